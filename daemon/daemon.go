// Package daemon is the life of one node: uninitialised, told by init or join what it is, locked or running, promoted,
// demoted, evicted, gone. It owns the state directory and the local socket, and wires the agent and, on a manager, the
// manager together.
//
// It trusts whoever may open the local socket (mode 0660, root and group warden), the files of its state directory only as
// far as they authenticate, and of the network nothing that the doors and handshakes have not proved.
package daemon

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/agent"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/door"
	"warden/executor"
	"warden/internal/courier"
	"warden/internal/durable"
	"warden/manager"
)

// States of a daemon, as Info names them.
const (
	StateUninitialized = "uninitialized"
	StateLocked        = "locked"
	StateRunning       = "running"
	StateEvicted       = "evicted"
)

// Config is what `warden run` is told.
type Config struct {
	StateDir     string
	Listen       string // host:port of the manager's port
	Advertise    string // where others reach it; empty: found out
	Socket       string
	Hostname     string
	EngineLabels map[string]string
	Version      string
	Executor     executor.Executor
	Metrics      string // where metrics are shown, as metrics.Address takes it; empty: nowhere
	Logger       *slog.Logger
}

// Daemon is one node. Safe for concurrent use.
type Daemon struct {
	cfg    Config
	logger *slog.Logger
	ctx    context.Context // of Run
	failed chan error      // what ends the daemon
	counts counts

	op     sync.Mutex       // serialises init, join, leave, unlock, and changes of role; held across their I/O
	sealer *autolock.Sealer // what the running manager's state is sealed by; guarded by op

	mu       sync.Mutex // guards all below; never held across I/O
	state    string
	message  string
	locked   *autolock.KeyFile
	inbox    *courier.Inbox // where locked: for the unlock key
	identity *identity
	manager  *manager.Manager
	keeper   *lockKeeper // of manager
	agent    *agent.Agent
	stop     func() // ends the agent and waits
}

// Run is the daemon until ctx ends. Tasks go on when it returns. Errors: those of the state directory (CodeCorrupt,
// CodeForeign, CodePermissions: nothing was changed), of the socket and of the port.
func Run(ctx context.Context, cfg Config) error {
	d := &Daemon{cfg: cfg, logger: cfg.Logger, ctx: ctx, failed: make(chan error, 1), state: StateUninitialized}
	if err := durable.MkdirPrivate(cfg.StateDir); err != nil {
		return err
	}
	unlock, err := lockDir(filepath.Join(cfg.StateDir, lockFile))
	if err != nil {
		return err
	}
	defer unlock()
	socket, err := listenSocket(cfg.Socket)
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := d.load(); err != nil {
		return err
	}
	stopMetrics, err := d.showMetrics(ctx)
	if err != nil {
		d.halt()
		return err
	}
	defer stopMetrics()
	d.logger.Info("started", "state", d.state, "state_dir", cfg.StateDir, "socket", cfg.Socket, "version", cfg.Version)
	server := d.socketServer()
	served := make(chan error, 1)
	go func() { served <- server.Serve(socket) }()
	select {
	case <-ctx.Done():
		err = nil
	case err = <-d.failed:
	case err = <-served:
	}
	server.Stop()
	d.op.Lock()
	defer d.op.Unlock()
	d.halt()
	d.logger.Info("stopped")
	return err
}

// load finds out what this node is from its state directory.
func (d *Daemon) load() error {
	path := filepath.Join(d.cfg.StateDir, keyFile)
	kf, err := autolock.ReadKeyFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := d.orphaned(); err != nil {
			return err
		}
		return d.wipe() // what an init, a leave or an eviction left half done
	}
	if err != nil {
		return err
	}
	if kf.Locked {
		inbox, err := courier.NewInbox()
		if err != nil {
			return err
		}
		d.set(func() { d.state, d.locked, d.inbox = StateLocked, kf, inbox })
		d.logger.Warn("locked: needs the unlock key", "unlock_key_id", kf.KeyID)
		return nil
	}
	id, err := kf.Identity()
	if err != nil {
		return err
	}
	return d.start(id, nil)
}

func (d *Daemon) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

// start runs the node that the identity makes it, whose key file is sealed to the recipient. d.op is held, or the socket not served
// yet.
func (d *Daemon) start(id autolock.Identity, to *autolock.Recipient) error {
	i, err := openIdentity(d.cfg.StateDir, id, to)
	if err != nil {
		return err
	}
	d.set(func() { d.identity = i })
	if id.Role == ca.RoleManager {
		d.askLock(i)
		if err := d.startManager(); err != nil {
			d.set(func() { d.identity = nil })
			return err
		}
	} else if err := d.removeState(); err != nil { // of a demotion that a crash cut short
		d.set(func() { d.identity = nil })
		return err
	}
	d.startAgent()
	d.set(func() { d.state, d.message, d.locked, d.inbox = StateRunning, "", nil, nil })
	return nil
}

func (d *Daemon) managerConfig(i *identity) manager.Config {
	id, sealer := i.sealed()
	return manager.Config{
		ClusterID: id.ClusterID, NodeID: id.NodeID, Dir: filepath.Join(d.cfg.StateDir, raftDir), Listen: d.cfg.Listen,
		Root: i.trust(), Sealer: sealer, Certificate: i.certificate,
		Known:  func() *api.ManagerList { l, _ := i.known(); return l },
		Lock:   func() manager.LockStatus { return d.lockStatus(i) },
		Facts:  d.facts,
		Logger: d.logger,
	}
}

// startManager opens the state and the port, and watches that the manager lives.
func (d *Daemon) startManager() error {
	if err := durable.MkdirPrivate(filepath.Join(d.cfg.StateDir, raftDir)); err != nil {
		return err
	}
	i := d.identity
	_, d.sealer = i.sealed()
	m, err := manager.Start(d.managerConfig(i))
	if err != nil {
		return err
	}
	k := newLockKeeper(d, m, i, d.sealer)
	d.set(func() { d.manager, d.keeper = m, k })
	go k.run()
	go func() {
		<-m.Done()
		if err := m.Err(); err != nil {
			d.fail(warden.Wrap("running the manager", err))
		}
	}()
	return nil
}

func (d *Daemon) fail(err error) {
	select {
	case d.failed <- err:
	default:
	}
}

// stopManager hands over and closes.
func (d *Daemon) stopManager() {
	d.mu.Lock()
	m, k := d.manager, d.keeper
	d.manager, d.keeper = nil, nil
	d.mu.Unlock()
	if m == nil {
		return
	}
	defer k.end() // it may be writing the key file, which goes next
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	if err := m.Stop(ctx); err != nil {
		d.logger.Error("failed to stop the manager in time", "error", err)
	}
}

// halt ends agent and manager; tasks go on.
func (d *Daemon) halt() {
	d.mu.Lock()
	stop := d.stop
	d.stop, d.agent = nil, nil
	d.mu.Unlock()
	if stop != nil {
		stop()
	}
	d.stopManager()
}

func (d *Daemon) startAgent() {
	i := d.identity
	id, _ := i.now()
	a := agent.New(agent.Config{
		NodeID: id.NodeID, Zone: func() string { _, leaf := i.now(); return leaf.Zone }, Executor: d.cfg.Executor, Describe: d.describe, Dial: d.dial, Renew: i.renew, Install: d.install,
		SetManagers: func(l *api.ManagerList) {
			if err := i.setManagers(l); err != nil {
				d.logger.Error("failed to store the list of managers", "error", err)
			}
		},
		Evicted: d.evicted, Logger: d.logger.With("part", "agent"),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := a.Run(ctx); err != nil && ctx.Err() == nil && warden.CodeOf(err) != warden.CodeEvicted {
			d.fail(warden.Wrap("running the agent", err))
		}
	}()
	d.set(func() {
		d.agent = a
		d.stop = func() { cancel(); <-done }
	})
}

// dial reaches the next manager's node door. Other managers come first: this node's own may be cut off, or not be one any more.
func (d *Daemon) dial(ctx context.Context) (net.Conn, string, error) {
	d.mu.Lock()
	i, m := d.identity, d.manager
	d.mu.Unlock()
	if i == nil {
		return nil, "", warden.Errorf(warden.CodeUninitialized, "dialling a manager", "the node has left")
	}
	id, _ := i.now()
	l, stale := i.known()
	if m != nil && m.CaughtUpSince(time.Now().Add(-warden.PinStale)) { // one that is evicted while it is cut off never is again
		if fresh := m.Managers(); len(fresh.Managers) > 0 {
			l, stale = fresh, false
		}
	}
	order := slices.Clone(l.Managers)
	rand.Shuffle(len(order), func(a, b int) { order[a], order[b] = order[b], order[a] })
	if k := slices.IndexFunc(order, func(x *api.ManagerInfo) bool { return x.NodeId == id.NodeID }); k >= 0 {
		own := order[k]
		order = append(slices.Delete(order, k, k+1), own)
	}
	var errs []error
	for _, info := range order {
		conn, err := door.Dial(ctx, info.Address, warden.DoorNode, i.certificate(), manager.Expect(i.trust(), info, l.DistrustedIssuers, stale))
		if err == nil {
			if !stale { // a loose check proves no contact: the session does, by its list of managers
				i.heard()
			}
			return conn, info.NodeId, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) == 0 {
		return nil, "", warden.Errorf(warden.CodeUnavailable, "dialling a manager", "no manager is known")
	}
	return nil, "", warden.Recode(warden.CodeOf(errs[0]), "dialling a manager", errors.Join(errs...))
}

// install stores a renewed leaf. A change of role is followed once the answer is out.
func (d *Daemon) install(r *api.InstallRequest) error {
	d.mu.Lock()
	i := d.identity
	d.mu.Unlock()
	if i == nil {
		return warden.Errorf(warden.CodeUninitialized, "installing a leaf", "the node has left")
	}
	promoted, demoted, err := i.install(r)
	d.counts.installed(err)
	if err != nil {
		return err
	}
	d.mu.Lock()
	if d.keeper != nil {
		d.keeper.kick() // the leaf may have come with a newer lock state
	}
	d.mu.Unlock()
	if err := i.setManagers(r.Managers); err != nil {
		return err
	}
	if promoted || demoted {
		go d.follow(i)
	}
	return nil
}

// follow starts or ends the manager after a change of role. It goes by the role of now, since a later change may come first.
func (d *Daemon) follow(i *identity) {
	d.op.Lock()
	defer d.op.Unlock()
	d.mu.Lock()
	same, m := d.identity == i, d.manager
	d.mu.Unlock()
	if !same || d.ctx.Err() != nil {
		return
	}
	id, sealer := i.sealed()
	if m != nil && sealer == d.sealer {
		return // it was, and is, a manager
	}
	if m != nil {
		m.Demoted()
		d.stopManager()
	}
	if err := d.removeState(); err != nil { // under a key that is gone
		d.fail(warden.Wrap("removing the replicated state after a change of role", err))
		return
	}
	d.logger.Info("followed a change of role", "role", id.Role)
	if id.Role != ca.RoleManager {
		return
	}
	if err := d.startManager(); err != nil {
		d.fail(warden.Wrap("starting the manager after the promotion", err))
	}
}

// removeState removes the replicated state.
func (d *Daemon) removeState() error {
	return durable.RemoveAll(filepath.Join(d.cfg.StateDir, raftDir))
}

// evicted is the agent's word that the order to wipe came, after it stopped and wiped every task.
func (d *Daemon) evicted(r *api.EvictRequest) { go d.evict(r) }

func (d *Daemon) evict(r *api.EvictRequest) {
	d.op.Lock()
	defer d.op.Unlock()
	d.mu.Lock()
	i := d.identity
	d.mu.Unlock()
	if i == nil {
		return // it left meanwhile
	}
	if id, _ := i.now(); id.NodeID != r.NodeId {
		return // it left and joined again: the order is for who it was
	}
	d.halt()
	d.set(func() {
		d.state, d.identity = StateEvicted, nil
		d.message = "node " + r.NodeId + ", all that it held is wiped"
	})
	if err := d.wipe(); err != nil {
		d.fail(err)
		return
	}
	d.logger.Warn("evicted: wiped identity, state, tasks and secrets", "node_id", r.NodeId)
}

// wipe removes everything that belongs to a cluster: the key file first and for good, without which the rest is nobody's. The other
// way round a crash could leave a node that knows its key and no manager, and never hears that it was evicted.
func (d *Daemon) wipe() error {
	if err := d.mark(); err != nil {
		return err
	}
	for _, name := range []string{keyFile, identityDir, raftDir} {
		if err := durable.RemoveAll(filepath.Join(d.cfg.StateDir, name)); err != nil {
			return warden.Wrap("wiping the state directory", err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tasks, err := d.cfg.Executor.Adopt(ctx)
	if err != nil {
		return warden.Wrap("wiping tasks", err)
	}
	for _, t := range tasks {
		if err := t.Stop(ctx, 2*time.Second); err != nil {
			d.logger.Warn("failed to stop a task while wiping", "task_id", t.ID(), "error", err)
		}
		if err := t.Remove(ctx); err != nil {
			return warden.Wrap("wiping task "+t.ID(), err)
		}
	}
	return d.unmark()
}

// mark says on disk that what there is without a key file may go: an init, a leave or an eviction is under way.
func (d *Daemon) mark() error {
	return durable.WriteFile(filepath.Join(d.cfg.StateDir, unfinishedFile), nil, 0o600)
}

func (d *Daemon) unmark() error {
	return durable.RemoveAll(filepath.Join(d.cfg.StateDir, unfinishedFile))
}

// orphaned refuses a state or tasks whose key file is missing, where nothing says that they were to go: the file may be on a
// disk that is not mounted, and wiping loses what it belongs to. Errors: CodeCorrupt.
func (d *Daemon) orphaned() error {
	if _, err := os.Lstat(filepath.Join(d.cfg.StateDir, unfinishedFile)); err == nil {
		return nil
	}
	found := ""
	if _, err := os.Lstat(filepath.Join(d.cfg.StateDir, raftDir, "log.db")); err == nil {
		found = filepath.Join(d.cfg.StateDir, raftDir)
	}
	tasks := filepath.Join(d.cfg.StateDir, tasksDir)
	held, err := holdsTasks(tasks)
	if err != nil {
		return warden.Recode(warden.CodeInternal, "looking for tasks", err)
	}
	if held {
		found = tasks
	}
	if found == "" {
		return nil
	}
	return warden.Hint(warden.Errorf(warden.CodeCorrupt, "reading "+filepath.Join(d.cfg.StateDir, keyFile), "the file is missing, but %s holds something", found),
		"restore the file, or, to have this node begin anew, make the file "+filepath.Join(d.cfg.StateDir, unfinishedFile)+" and start again: everything is wiped then")
}

// holdsTasks reports whether there is a task in dir, or in a folder below it that an executor has for itself.
func holdsTasks(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if warden.ValidID(e.Name()) {
			return true, nil
		}
		if !e.IsDir() {
			continue
		}
		below, berr := os.ReadDir(filepath.Join(dir, e.Name()))
		if berr != nil {
			return false, berr
		}
		if slices.ContainsFunc(below, func(e fs.DirEntry) bool { return warden.ValidID(e.Name()) }) {
			return true, nil
		}
	}
	return false, nil
}

// describe is what the node says of itself.
func (d *Daemon) describe() *api.NodeDescription {
	var si unix.Sysinfo_t
	memory := int64(0)
	if err := unix.Sysinfo(&si); err == nil {
		memory = int64(si.Totalram) * int64(si.Unit)
	}
	return &api.NodeDescription{
		Hostname: d.cfg.Hostname, Os: runtime.GOOS, Arch: runtime.GOARCH, NanoCpus: int64(runtime.NumCPU()) * 1e9, MemoryBytes: memory,
		EngineLabels: d.cfg.EngineLabels, Version: d.cfg.Version, Executor: d.cfg.Executor.Name(), SecretMounts: d.cfg.Executor.SecretMounts(),
		Advertise: d.advertise(""),
	}
}

// advertise returns what others are told to dial: the call's own wish, the flag, or where it listens, which may leave the
// host open for whoever sees this node's address.
func (d *Daemon) advertise(asked string) string {
	_, port, err := net.SplitHostPort(d.cfg.Listen)
	if err != nil {
		port = "2377"
	}
	for _, a := range []string{asked, d.cfg.Advertise} {
		if a == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(a); err != nil {
			return net.JoinHostPort(a, port)
		}
		return a
	}
	host, _, _ := net.SplitHostPort(d.cfg.Listen)
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = ""
	}
	return net.JoinHostPort(host, port)
}

// lockDir keeps a second daemon from the same state directory.
func lockDir(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "locking the state directory", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, warden.Hint(warden.Recode(warden.CodeInUse, "locking "+path, err), "another daemon runs on this state directory: stop it, or choose another with --state-dir")
	}
	return func() { f.Close() }, nil
}
