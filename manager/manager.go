// Package manager runs what a manager runs: the replicated state, the doors, the sessions of nodes, and, while this manager
// leads, the orchestrator and the membership of raft.
//
// It wires sibling packages together and holds what only makes sense with all of them at hand: the rules of the doors
// (judge.go), admission and renewal (admit.go), reports and leases between managers (report.go), membership and quorum
// (membership.go), and what evicting a manager sets off (evict.go). It trusts the store's record of a node over whatever
// certificate the node shows (I4).
package manager

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/control"
	"warden/dispatcher"
	"warden/door"
	"warden/join"
	"warden/orchestrator"
	"warden/store"
	"warden/store/rafttransport"
	"warden/store/sealedlog"
)

// Config is what a manager needs of its node.
type Config struct {
	ClusterID, NodeID string
	Dir               string // of the replicated state
	Listen            string // host:port
	Root              *x509.Certificate
	Sealer            sealedlog.Sealer
	Certificate       func() *tls.Certificate
	// Known returns the managers that the node knows of from before, for as long as the replica is empty.
	Known  func() *api.ManagerList
	Lock   func() LockStatus // how this node's own keys are sealed
	Facts  func() *api.Facts // of the daemon, for Status; nil: none
	Logger *slog.Logger
}

// Manager is one running manager. Safe for concurrent use.
type Manager struct {
	cfg        Config
	logger     *slog.Logger
	store      *store.Store
	transport  *rafttransport.Transport
	doors      *door.Server
	dispatcher *dispatcher.Dispatcher
	control    *control.Server
	authority  authorityCache
	peers      *peers
	live       *liveness
	catching   flight
	alarms     alarms
	described  allowance // descriptions, while this manager leads
	unfinished allowance // renewals that were not finished
	clocks     *clocks
	lease      lease
	limiter    *join.Limiter
	counts     counts
	serving    atomic.Pointer[door.Server] // doors, for Facts; nil before they are made
	ready      atomic.Bool
	rotation   sync.Mutex    // held over a rotation of keys: two at once would drop keys that are in use
	report     chan struct{} // asks for a report to the leader now
	reconcile  chan struct{} // asks for a look at the membership now

	cancel context.CancelCauseFunc
	lost   chan struct{} // closed by Demoted
	done   chan struct{}
	mu     sync.Mutex // guards err
	err    error
}

// Bootstrap makes the state of a new cluster, with first as its first command, and stops again.
func Bootstrap(ctx context.Context, cfg Config, first *api.Command) error {
	t := rafttransport.New(cfg.NodeID, func(context.Context, string) (net.Conn, error) {
		return nil, warden.Errorf(warden.CodeUnavailable, "dialling peer", "a new cluster has one manager")
	}, cfg.Logger)
	s, err := store.Bootstrap(storeConfig(cfg, t), first)
	if err != nil {
		t.Close()
		return err
	}
	return s.Close(ctx)
}

func storeConfig(cfg Config, t *rafttransport.Transport) store.Config {
	return store.Config{
		ClusterID: cfg.ClusterID, NodeID: cfg.NodeID, Dir: cfg.Dir, Sealer: cfg.Sealer, Transport: t,
		Logger: cfg.Logger.With("part", "store"),
	}
}

// Start opens the state and the port. The manager runs until Stop.
func Start(cfg Config) (*Manager, error) {
	m := &Manager{
		cfg: cfg, logger: cfg.Logger, live: newLiveness(), clocks: newClocks(), limiter: join.NewLimiter(),
		described: allowance{burst: describeBurst, period: warden.DescribePeriod}, unfinished: allowance{burst: unfinishedBurst, period: unfinishedPeriod},
		report: make(chan struct{}, 1), reconcile: make(chan struct{}, 1), lost: make(chan struct{}), done: make(chan struct{}),
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, warden.Hint(warden.Recode(warden.CodeUnavailable, "opening the port "+cfg.Listen, err),
			"another program has it, or the address is not on this host: choose another with --listen")
	}
	m.transport = rafttransport.New(cfg.NodeID, m.dialRaft, cfg.Logger.With("part", "raft"))
	m.transport.Refused = func(_ string, err error) { m.counts.refusal(warden.DoorRaft, err) }
	scfg := storeConfig(cfg, m.transport)
	scfg.CommandTime = m.commandTime // asked of a leader only, which the store is not before it is open
	m.transport.Now, m.transport.DialClock = m.clocks.time, m.dialClock
	m.store, err = store.Open(scfg)
	if err != nil {
		listener.Close()
		m.transport.Close()
		return nil, warden.Wrap("opening the state in "+filepath.Clean(cfg.Dir), err)
	}
	m.transport.Beside = m.store.Follows
	m.peers = newPeers(m)
	m.dispatcher = dispatcher.New(dispatcher.Config{
		NodeID: cfg.NodeID, Store: m.store, Open: m.openSecret, Issue: m.issue, Report: m.reportTasks, MayPush: m.mayPush,
		Managers: m.Managers, Refused: func(_ string, err error) { m.counts.refusal(warden.DoorNode, err) }, Logger: cfg.Logger.With("part", "dispatcher"),
	})
	m.control = control.New(control.Config{
		NodeID: cfg.NodeID, ClusterID: cfg.ClusterID, Store: m.store, Forward: m.forward, Cluster: m, Address: Address, Facts: cfg.Facts, Logger: cfg.Logger.With("part", "control"),
	})
	ctx, cancel := context.WithCancelCause(context.Background())
	m.cancel = cancel
	go m.run(ctx, listener)
	return m, nil
}

// run is every goroutine of a manager; the first that fails ends all.
func (m *Manager) run(ctx context.Context, listener net.Listener) {
	defer close(m.done)
	peerListener := door.NewListener()
	peerServer := grpc.NewServer(grpc.Creds(door.Credentials()), grpc.MaxRecvMsgSize(warden.MessageMax), grpc.MaxSendMsgSize(warden.MessageMax),
		grpc.MaxConcurrentStreams(peerCallsMax), grpc.MaxHeaderListSize(8<<10), grpc.ConnectionTimeout(warden.HandshakeTimeout), grpc.StatsHandler(peerStats{m}))
	api.RegisterPeerServer(peerServer, &peerService{m: m})
	joins := &join.Server{Admit: m.admit, Token: m.token, Limiter: m.limiter, Logger: m.logger.With("part", "join")}
	m.doors = door.New(door.Config{
		Certificate: m.cfg.Certificate,
		Root:        func() *x509.Certificate { return m.cfg.Root },
		Distrusted:  m.distrusted,
		Pinned:      m.pinned,
		Judge:       m.judge,
		Admit:       m.admitAddress,
		Refused:     m.refused,
		Handlers: map[string]func(context.Context, *door.Conn){
			warden.DoorRaft:    func(_ context.Context, c *door.Conn) { m.transport.Serve(c, c.ID.NodeID) },
			warden.DoorPeer:    peerListener.Handle,
			warden.DoorNode:    m.serveNode,
			warden.DoorJoin:    func(ctx context.Context, c *door.Conn) { m.serveJoin(ctx, joins, c) },
			warden.DoorControl: func(context.Context, *door.Conn) {}, // Judge lets no subject in: operators over TCP have no leaf yet
		},
		Logger: m.logger.With("part", "door"),
	})
	m.serving.Store(m.doors)
	watch := m.store.Watch(api.Kind_KIND_NODE, api.Kind_KIND_TOMBSTONE, api.Kind_KIND_CLUSTER)
	parent := ctx
	g, ctx := errgroup.WithContext(parent)
	g.Go(func() error { return m.doors.Serve(ctx, listener) })
	g.Go(func() error { return serveUntil(ctx, peerServer, peerListener) })
	g.Go(func() error { return m.dispatcher.Run(ctx) })
	g.Go(func() error { return m.rejudge(ctx, watch) })
	g.Go(func() error { return m.reportLoop(ctx) })
	g.Go(func() error { return m.leaseLoop(ctx) })
	g.Go(func() error { return m.lead(ctx) })
	err := g.Wait()
	m.peers.close()
	sctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if cerr := m.store.Close(sctx); cerr != nil {
		m.logger.Error("failed to close the state", "error", cerr)
	}
	m.transport.Close()
	if parent.Err() != nil {
		return // told to stop
	}
	m.mu.Lock()
	m.err = err
	m.mu.Unlock()
}

func serveUntil(ctx context.Context, s *grpc.Server, l net.Listener) error {
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// Stop hands leadership over, closes everything and waits.
func (m *Manager) Stop(ctx context.Context) error {
	if m.store.IsLeader() {
		tctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		if err := m.store.TransferLeadership(tctx); err != nil {
			m.logger.Debug("kept leadership until the stop", "error", err)
		}
		cancel()
	}
	m.cancel(warden.Errorf(warden.CodeUnavailable, "", "the manager stops"))
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Demoted says that the node has a worker's leaf now. Call it once, before Stop.
func (m *Manager) Demoted() { close(m.lost) }

// RoleLost is closed by Demoted.
func (m *Manager) RoleLost() <-chan struct{} { return m.lost }

// Done is closed when the manager has ended; Err says why, nil after Stop.
func (m *Manager) Done() <-chan struct{} { return m.done }

// Err returns why the manager ended by itself.
func (m *Manager) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Control returns the service of the operator's API, for the local socket.
func (m *Manager) Control() *control.Server { return m.control }

// Store returns the replicated state.
func (m *Manager) Store() *store.Store { return m.store }

// Ready reports whether the replica has applied the leader's commit index since its start: before, all doors but the raft
// door are shut.
func (m *Manager) Ready() bool { return m.ready.Load() }

// lead runs what only the leader runs, for as long as this manager leads.
func (m *Manager) lead(ctx context.Context) error {
	changes := m.store.LeaderChanges()
	for ctx.Err() == nil {
		if !m.store.IsLeader() {
			select {
			case <-ctx.Done():
			case <-changes:
			}
			continue
		}
		m.asLeader(ctx, changes)
	}
	return nil
}

func (m *Manager) asLeader(ctx context.Context, changes <-chan struct{}) {
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() { m.askClocks(ctx) })
	term := m.store.Term() // one run leads for one term: what it remembers is of no other
	start := time.Now()
	bctx, bcancel := context.WithTimeout(ctx, 10*time.Second)
	err := m.store.Barrier(bctx)
	bcancel()
	if err != nil {
		select {
		case <-ctx.Done():
		case <-changes:
		case <-time.After(100 * time.Millisecond):
		}
		return
	}
	m.logger.Info("became leader", "term", term)
	m.live.begin(time.Now())
	m.lease.renew(start)
	m.ready.Store(true)
	m.askReport()
	o := orchestrator.New(orchestrator.Config{
		Store: m.store, Liveness: m.liveness, LivenessChanged: m.live.changed, NodeID: m.cfg.NodeID,
		Counts: &m.counts.rounds, Logger: m.logger.With("part", "orchestrator"),
	})
	var g errgroup.Group
	g.Go(func() error { return o.Run(ctx) })
	g.Go(func() error { return m.membership(ctx) })
	g.Go(func() error { return m.housekeeping(ctx) })
	g.Go(func() error { m.live.run(ctx); return nil })
	g.Go(func() error { m.resume(ctx); return nil })
	g.Go(func() error { m.yield(ctx); return nil })
	for m.store.IsLeader() && m.store.Term() == term && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-changes:
		}
	}
	cancel()
	if err := g.Wait(); err != nil {
		m.logger.Error("failed to lead", "error", err)
	}
	m.logger.Info("stopped leading", "term", term)
}

// rejudge lets each committed change of a record count at once for the live connections.
func (m *Manager) rejudge(ctx context.Context, w *store.Watcher) error {
	defer w.Close()
	for {
		ch, err := w.Next(ctx)
		if err != nil {
			return nil
		}
		m.cut(ch)
		if ch.Resync || m.concernsManagers(ch.Keys) { // after the cut: the report is this manager's word that it is done
			m.askReport()
			m.askReconcile()
		}
	}
}

// cut ends the connections that the changes leave no right to.
func (m *Manager) cut(ch store.Changes) {
	m.peers.rejudge()
	m.hangUp()
	if ch.Resync {
		m.doors.Rejudge("")
		return
	}
	for _, k := range ch.Keys {
		if k.Kind == api.Kind_KIND_CLUSTER { // an issuing CA may be distrusted now
			k.ID = ""
		}
		m.doors.Rejudge(k.ID)
	}
}

// concernsManagers reports whether a change is one that raft's membership follows, or that the leader waits for on each
// manager: not the coming, renewal or description of a worker.
func (m *Manager) concernsManagers(keys []store.Key) bool {
	v := m.store.View()
	return slices.ContainsFunc(keys, func(k store.Key) bool {
		n := v.Node(k.ID)
		return k.Kind != api.Kind_KIND_NODE || n == nil || n.WasManager
	})
}

func (m *Manager) askReport()    { signal(m.report) }
func (m *Manager) askReconcile() { signal(m.reconcile) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Managers returns the list of managers that nodes and joiners get, with the key hashes that are good for each.
func (m *Manager) Managers() *api.ManagerList {
	v := m.store.View()
	l := &api.ManagerList{Index: v.Index()}
	if c := v.Cluster(); c != nil {
		l.DistrustedIssuers = c.DistrustedIssuers
	}
	for _, n := range v.Managers() {
		if n.EffectiveRole() == api.Role_ROLE_MANAGER {
			l.Managers = append(l.Managers, managerInfo(n))
		}
	}
	return l
}

func managerInfo(n *api.Node) *api.ManagerInfo {
	i := &api.ManagerInfo{NodeId: n.Id, Address: n.Address}
	for _, h := range [][]byte{n.KeyHash, n.NextKeyHash} {
		if len(h) > 0 {
			i.KeyHashes = append(i.KeyHashes, h)
		}
	}
	return i
}

// Expect returns whom to expect behind an entry of a manager list.
func Expect(root *x509.Certificate, i *api.ManagerInfo, distrusted []byte, loose bool) door.Expect {
	e := door.Expect{Root: root, NodeID: i.NodeId, Loose: loose, Distrusted: Sums(distrusted)}
	for _, h := range i.KeyHashes {
		if len(h) == sha256.Size {
			e.KeyHashes = append(e.KeyHashes, [32]byte(h))
		}
	}
	return e
}

// Sums cuts concatenated SHA-256 sums.
func Sums(b []byte) [][32]byte {
	var out [][32]byte
	for ; len(b) >= sha256.Size; b = b[sha256.Size:] {
		out = append(out, [32]byte(b[:sha256.Size]))
	}
	return out
}

// manager returns how to reach a manager: by its record, by what the node knew before the replica had it, or by what the log says, of
// which nothing is applied before a leader is elected: a member that is being added or demoted may be on no list, and its vote is needed.
func (m *Manager) manager(id string) (*api.ManagerInfo, error) {
	v := m.store.View()
	if n := v.Node(id); n != nil && n.Address != "" {
		return managerInfo(n), nil
	}
	if v.Tombstone(id) == nil {
		for _, i := range m.cfg.Known().GetManagers() {
			if i.NodeId == id {
				return i, nil
			}
		}
		if n, err := m.store.LoggedNode(id); err != nil {
			return nil, warden.Wrap("looking up manager "+id, err)
		} else if n.GetAddress() != "" {
			return managerInfo(n), nil
		}
	}
	return nil, warden.Errorf(warden.CodeUnavailable, "looking up manager "+id, "no address known")
}

// dialRaft resolves a raft address, which is a node ID. A peer's key may have changed while this replica was down: it is
// pinned for a leaf past its end, and otherwise ID and role decide, as on the door itself.
func (m *Manager) dialRaft(ctx context.Context, id string) (net.Conn, error) {
	return m.dial(ctx, id, false)
}

// dialClock is dialRaft for a question for the time: where this manager's clock is out, other managers' leaves may not be valid by it.
func (m *Manager) dialClock(ctx context.Context, id string) (net.Conn, error) {
	return m.dial(ctx, id, true)
}

func (m *Manager) dial(ctx context.Context, id string, anyTime bool) (net.Conn, error) {
	i, err := m.manager(id)
	if err != nil {
		return nil, err
	}
	want := Expect(m.cfg.Root, i, m.distrustedBytes(), true)
	want.AnyTime = anyTime
	c, err := door.Dial(ctx, i.Address, warden.DoorRaft, m.cfg.Certificate(), want)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// hangUp ends the raft connections that this manager dialled to nodes which are managers no more. Not while raft counts one as a member: its
// vote may be needed for what removes it.
func (m *Manager) hangUp() {
	members, err := m.store.Configuration()
	if err != nil {
		return // the store is closing, and its connections with it
	}
	m.transport.HangUp(func(id string) bool {
		return m.peers.may(id) != nil && !slices.ContainsFunc(members, func(member store.Member) bool { return member.ID == id })
	})
}

func (m *Manager) serveJoin(ctx context.Context, s *join.Server, c *door.Conn) {
	m.counts.refusal(warden.DoorJoin, s.Serve(ctx, c.Conn)) // it logs what fails
}

// admitAddress runs before anything else of a connection.
func (m *Manager) admitAddress(name string, remote netip.Addr) error {
	if name != warden.DoorRaft && !m.ready.Load() {
		return warden.Errorf(warden.CodeUnavailable, "opening "+name, "this manager has not caught up with the leader yet")
	}
	if name == warden.DoorJoin {
		return m.limiter.Allow(remote, time.Now())
	}
	return m.holds(name)
}

// holds refuses sessions to a manager that has lost its lease for good.
func (m *Manager) holds(name string) error {
	if name == warden.DoorNode && m.lease.age(time.Now()) > warden.LeaseHold {
		return warden.Errorf(warden.CodeUnavailable, "opening "+name, "this manager has had no word from a leader for %s", warden.LeaseHold)
	}
	return nil
}

// refused counts against an address what did not get through the join door, and raises the alarm where a live node's ID
// comes with another key.
func (m *Manager) refused(name string, id ca.Identity, remote netip.Addr, err error) {
	m.counts.refusal(name, err)
	code := warden.CodeOf(err)
	level := slog.LevelInfo
	if id.NodeID == "" {
		level = slog.LevelDebug // anybody can cause it, as often as they like
	}
	if code == warden.CodeWrongKey || code == warden.CodeEvicted {
		level = slog.LevelWarn
	}
	if code == warden.CodeWrongKey {
		m.alarms.raise(id, remote, time.Now())
		m.askReport()
	}
	m.logger.Log(context.Background(), level, "refused a connection", "door", name, "node_id", id.NodeID, "role", id.Role,
		"remote", remote.String(), "code", string(code), "reason", err)
	if name == warden.DoorJoin && code != warden.CodeLimited && code != warden.CodeUnavailable {
		m.limiter.Failed(remote, time.Now()) // a handshake that broke; what a limit or this manager refused is nobody's failure
	}
}

// keyGrace is how long a new key waits for its session to be up before it is committed as the node's.
const keyGrace = time.Second

// commitKey commits the key of a node that dialled with its next one as its current one: when the session is up, since the commit cuts
// what the node has under the old key. The handshake has proved the key: a session that is slow to come up does not hold it up for long.
func (m *Manager) commitKey(ctx context.Context, c *door.Conn, up <-chan struct{}) {
	grace := time.NewTimer(keyGrace)
	defer grace.Stop()
	select {
	case <-up:
	case <-grace.C:
	case <-ctx.Done():
		return
	}
	if err := m.promoteKey(ctx, c.ID); err != nil {
		m.logger.Warn("failed to commit the new key of a node", "node_id", c.ID.NodeID, "error", err)
		c.Close() // it dials again
	}
}

// breaches are what a session ends with that does not just close: its node broke the protocol, or fell silent.
var breaches = map[warden.Code]bool{warden.CodeInvalid: true, warden.CodeTooLarge: true, warden.CodeLimited: true, warden.CodeTimeout: true}

// serveNode runs the session of a node that dialled in. One that never came to be counts as refused, as does what a removed node gets.
func (m *Manager) serveNode(ctx context.Context, c *door.Conn) {
	p := dispatcher.Peer{
		NodeID: c.ID.NodeID, Zone: c.ID.Zone, KeyHash: c.ID.KeyHash, NotBefore: c.ID.NotBefore, NotAfter: c.ID.NotAfter,
		IP: c.Remote.String(), RenewOnly: c.Expired,
	}
	p.Tombstone = m.store.View().Tombstone(p.NodeID)
	up := make(chan struct{})
	served := false
	p.Up = func() { served = true; close(up) }
	if p.Tombstone == nil {
		go m.commitKey(ctx, c, up) // ends with ctx at the latest
	}
	err := m.dispatcher.Serve(ctx, c, p)
	if cause := context.Cause(ctx); cause == nil || warden.CodeOf(cause) == warden.CodeUnavailable { // just closed, and not cut by the door
		if !served { // else the dispatcher has logged its end
			m.logger.Info("refused a session", "node_id", p.NodeID, "reason", err)
		}
		if !served || breaches[warden.CodeOf(err)] {
			m.counts.refusal(warden.DoorNode, err)
		}
	}
	m.askReport()
}
