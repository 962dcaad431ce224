// Package dispatcher is the manager's side of the session with a node: it tells the node what to run, hands it the secrets
// that those tasks need, takes the states of its tasks, and renews its leaf.
//
// It decides nothing about placement, keeps no state that must survive, writes nothing to the store itself (reports go out
// through Config.Report, next keys through Config.Issue) and judges no connection: whoever calls Serve has.
//
// Invariants: a node is only ever called, it calls nothing (I5). A node is sent a secret version only while a task that is
// assigned to it in the current view needs it and the zones of the node, the task and the secret agree (I6); this is decided
// again for each message. Nothing but Evict is sent while Config.MayPush says no. A task report is taken for the node whose
// session it came over, and only for a task that is assigned to that node.
//
// It trusts the store's view and, for facts about tasks and itself, the node; a node can lie about its own tasks only, and
// what it sends is bounded in size, number and time. References: DESIGN.md §2 and §6, api/node.proto.
package dispatcher

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/internal/sensitive"
	"warden/store"
)

// Peer is what the handshake said of the node that dialled.
type Peer struct {
	NodeID              string
	Zone                string   // in the leaf of this connection
	KeyHash             [32]byte // SHA-256 of the SPKI of the leaf of this connection
	NotBefore, NotAfter time.Time
	IP                  string
	RenewOnly           bool           // the leaf has expired, but its key is the recorded one: its renewal is all that is done
	Tombstone           *api.Tombstone // set: the node was removed; it is sent one Evict and nothing else

	Up func() // called once, when the node has answered and this session has replaced its last; may be nil
}

// Config is what a Dispatcher needs of the rest. All fields are required; the functions may be called at once from many
// goroutines.
type Config struct {
	NodeID string // this manager's
	Store  interface {
		View() *store.View
		Watch(kinds ...api.Kind) *store.Watcher
	}
	Open     func(secretID string, version uint64) (sensitive.Bytes, error)                                                     // opens a sealed version; the dispatcher wipes the bytes
	Issue    func(ctx context.Context, nodeID string, keyHash [32]byte, csr []byte, reason string) (*api.InstallRequest, error) // commits the hash of the CSR's key as next and issues; keyHash is the session's current key
	Report   func(ctx context.Context, reports []*api.NodeTaskReport) error                                                     // hands states of tasks to the leader
	MayPush  func() bool                                                                                                        // the lease: while false, nothing is sent to nodes
	Managers func() *api.ManagerList                                                                                            // what nodes are told of managers
	Refused  func(nodeID string, err error)                                                                                     // told of what a node says that is not its to say; it goes on
	Logger   *slog.Logger
}

// Dispatcher holds the sessions of one manager. Safe for concurrent use.
type Dispatcher struct {
	cfg     Config
	reports *reports
	counts  counts
	vault   *vault

	managers atomic.Pointer[api.ManagerList] // as of the last change that could concern it; nil before the first look
	placed   map[string]placed               // by task ID; used by follow alone

	mu       sync.Mutex          // guards the fields below; held for their access only
	sessions map[string]*session // by node ID
	turn     string              // the node whose description Claims named last
	links    *links              // nil while nobody uses them
	users    int                 // of links
}

// New returns a Dispatcher without sessions. Run must run while Serve is called.
func New(cfg Config) *Dispatcher {
	return &Dispatcher{cfg: cfg, reports: newReports(), vault: newVault(cfg.Open), sessions: map[string]*session{}}
}

// Run delivers the reports of all sessions and tells sessions of changes in the store. It returns when ctx ends (its cause)
// or the store's watch fails; it ends no session.
func (d *Dispatcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() { d.deliver(ctx) }) // ends with ctx
	err := d.follow(ctx)
	cancel(err)
	wg.Wait()
	return err
}

// follow kicks the sessions that a change concerns.
func (d *Dispatcher) follow(ctx context.Context) error {
	w := d.cfg.Store.Watch(api.Kind_KIND_CLUSTER, api.Kind_KIND_NODE, api.Kind_KIND_TASK, api.Kind_KIND_SECRET)
	defer w.Close()
	d.spread(store.Changes{Resync: true})
	for {
		changes, err := w.Next(ctx)
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return err
		}
		d.spread(changes)
	}
}

// spread kicks the sessions of the nodes that the changes concern: all, where the list of managers, the cluster or a secret has
// changed.
func (d *Dispatcher) spread(changes store.Changes) {
	v := d.cfg.Store.View()
	nodes := map[string]bool{} // with the node's own record changed, or without
	all, records, managers := changes.Resync, changes.Resync, changes.Resync
	if changes.Resync {
		d.placed = map[string]placed{}
		for _, t := range v.Tasks() {
			d.placed[t.GetId()] = placedOf(t)
		}
	}
	for _, key := range changes.Keys {
		switch key.Kind {
		case api.Kind_KIND_TASK:
			task, old := v.Task(key.ID), d.placed[key.ID]
			now := placedOf(task)
			if now == old {
				continue // it came nearer to running, which its node knows
			}
			if d.placed[key.ID] = now; task == nil {
				delete(d.placed, key.ID)
			}
			for _, id := range []string{old.nodeID, now.nodeID} {
				if _, named := nodes[id]; !named && id != "" {
					nodes[id] = false
				}
			}
		case api.Kind_KIND_NODE:
			nodes[key.ID] = true
			node := v.Node(key.ID)
			managers = managers || node == nil || node.GetRole() == api.Role_ROLE_MANAGER || node.GetDesiredRole() == api.Role_ROLE_MANAGER
		case api.Kind_KIND_CLUSTER:
			all, records, managers = true, true, true
		default:
			all = true
		}
	}
	if managers {
		list := d.cfg.Managers()
		if old := d.managers.Load(); !sameManagers(old, list) {
			d.managers.Store(list)
			all = true
		}
	}
	for _, s := range d.of(nodes, all) {
		s.kick(records || nodes[s.peer.NodeID])
	}
}

// placed is what of a task decides whether and how its node has it.
type placed struct {
	nodeID          string
	stops           bool // it is to end
	ended, orphaned bool
}

func placedOf(t *api.Task) placed {
	if t.GetNodeId() == "" {
		return placed{}
	}
	state := t.GetStatus().GetState()
	return placed{t.GetNodeId(), t.GetDesiredState() != api.TaskState_TASK_RUNNING, state.Ended(), state == api.TaskState_TASK_ORPHANED}
}

// of returns the sessions of these nodes, or all.
func (d *Dispatcher) of(nodes map[string]bool, all bool) (found []*session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if all {
		return slices.Collect(maps.Values(d.sessions))
	}
	for id := range nodes {
		if s := d.sessions[id]; s != nil {
			found = append(found, s)
		}
	}
	return found
}

// managerList returns what nodes are told of managers. It is the same list until it changes.
func (d *Dispatcher) managerList() *api.ManagerList {
	if list := d.managers.Load(); list != nil {
		return list
	}
	d.managers.CompareAndSwap(nil, d.cfg.Managers())
	return d.managers.Load()
}

// describedBytesMax is how many bytes of descriptions the claims of one report carry: with a claim of every node that a cluster may have
// they stay below warden.MessageMax.
const describedBytesMax = 1 << 20

// Claims returns what this manager's sessions are, sorted by node ID. The leader may leave descriptions for later: where those that
// the records do not show yet are more than one report carries, they take turns.
func (d *Dispatcher) Claims() []*api.SessionClaim {
	d.mu.Lock()
	all := make([]*session, 0, len(d.sessions))
	for _, s := range d.sessions {
		all = append(all, s)
	}
	d.mu.Unlock()
	claims := make([]*api.SessionClaim, 0, len(all))
	for _, s := range all {
		if c := s.claim(); c != nil {
			claims = append(claims, c)
		}
	}
	slices.SortFunc(claims, func(a, b *api.SessionClaim) int { return strings.Compare(a.GetNodeId(), b.GetNodeId()) })
	d.mu.Lock()
	defer d.mu.Unlock()
	d.turn = takeTurns(claims, d.turn, describedBytesMax)
	return claims
}

// takeTurns drops the descriptions of sorted claims that do not fit into bytesMax, counted from the first node behind turn, and returns
// the last node whose description stays.
func takeTurns(claims []*api.SessionClaim, turn string, bytesMax int) string {
	first, _ := slices.BinarySearchFunc(claims, turn+"\x00", func(c *api.SessionClaim, id string) int { return strings.Compare(c.GetNodeId(), id) })
	for _, c := range append(claims[first:len(claims):len(claims)], claims[:first]...) {
		if c.Description == nil {
			continue
		}
		if bytesMax -= proto.Size(c.Description); bytesMax < 0 {
			c.Description = nil
		} else {
			turn = c.NodeId
		}
	}
	return turn
}

// Close ends the session of this ID, if it is still here, because it lost its claim or for another reason.
func (d *Dispatcher) Close(sessionID, reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sessions {
		if s.id == sessionID {
			s.end(warden.Errorf(warden.CodeConflict, "serving node "+s.peer.NodeID, "%s", reason))
		}
	}
}

// logsPerNode is how many logs of a node are read at once: fewer than the node takes calls, since assignments, renewals and the
// order to wipe must not wait for a log to end.
const logsPerNode = 512

// Logs streams the log of req's task from the node to send, until the log or ctx ends or send fails. The caller has checked
// that the task is the node's. Errors: CodeUnavailable where the node has no session here, CodeLimited where logsPerNode are
// read, or the node's own.
func (d *Dispatcher) Logs(ctx context.Context, nodeID string, req *api.LogsRequest, send func(*api.LogChunk) error) error {
	op := "reading the log of task " + req.GetTaskId()
	d.mu.Lock()
	s := d.sessions[nodeID]
	d.mu.Unlock()
	if s == nil || s.peer.RenewOnly {
		return warden.Errorf(warden.CodeUnavailable, op, "node %s has no session with this manager", nodeID)
	}
	if s.logs.Add(1) > logsPerNode {
		s.logs.Add(-1)
		return warden.Hint(warden.Errorf(warden.CodeLimited, op, "%d logs of node %s are read already", logsPerNode, nodeID), "end some of the commands that follow logs")
	}
	defer s.logs.Add(-1)
	ctx, cancel := context.WithCancel(s.link.with(ctx))
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)() // or a call over a connection that is gone already would wait for as long as the caller does
	over := func(err error) error {
		if err != nil && s.ctx.Err() != nil {
			err = warden.Errorf(warden.CodeUnavailable, "", "the session with node %s has ended", nodeID)
		}
		return warden.Wrap(op, err)
	}
	stream, err := s.client.Logs(ctx, req, recvMax(lineMessageMax))
	if err != nil {
		return over(api.FromError(err))
	}
	for {
		chunk, err := stream.Recv()
		if done, err := ended(err); done {
			return over(err)
		}
		chunk.NodeId, chunk.TaskId = nodeID, req.GetTaskId() // not for the node to say
		if err := send(chunk); err != nil {
			return err
		}
	}
}

// useLinks returns the gRPC client of all sessions; release ends the use.
func (d *Dispatcher) useLinks() (l *links, release func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.links == nil {
		if d.links, err = newLinks(); err != nil {
			return nil, nil, err
		}
	}
	d.users++
	return d.links, func() {
		d.mu.Lock()
		last := d.links
		if d.users--; d.users > 0 {
			last = nil
		} else {
			d.links = nil
		}
		d.mu.Unlock()
		if last != nil {
			last.close()
		}
	}, nil
}

// register makes s the node's session and ends the one it replaces.
func (d *Dispatcher) register(s *session) {
	d.mu.Lock()
	old := d.sessions[s.peer.NodeID]
	d.sessions[s.peer.NodeID] = s
	d.mu.Unlock()
	if old != nil {
		old.end(warden.Errorf(warden.CodeConflict, "serving node "+s.peer.NodeID, "the node opened a newer session"))
	}
}

func (d *Dispatcher) unregister(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sessions[s.peer.NodeID] == s {
		delete(d.sessions, s.peer.NodeID)
	}
}

// sameManagers reports whether two lists say the same, whatever index they were made at.
func sameManagers(a, b *api.ManagerList) bool {
	if a == nil || b == nil {
		return a == b
	}
	a, b = api.Clone(a), api.Clone(b)
	a.Index, b.Index = 0, 0
	return proto.Equal(a, b)
}
