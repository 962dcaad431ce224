// Package store holds the replicated state: commands go in through raft, are applied by deterministic rules, and come out as
// immutable views and bounded watches.
//
// It decides nothing about who may ask for a change (policy, control) and nothing about what should run (orchestrator,
// scheduler): it refuses commands that break the rules of the records, whoever proposed them, since the leader that proposes is
// trusted no more than it must be. The secret values and keys in its records are sealed by others before they get here, and all of
// its disk is sealed by store/sealedlog.
//
// Invariants: applying depends on the command and the state alone (no clock, no randomness, no order of a map); a command
// applies as a whole or not at all; any committed bytes give a result and never a panic; a request ID is applied once.
// It trusts the transport to know its peers and the sealer to know its place. Reference: Ongaro, "Consensus: Bridging Theory and
// Practice" (2014); hashicorp/raft v1.8.
package store

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store/sealedlog"
)

// Sealer seals what is on disk; *autolock.Keyring is one. Reseal wants a Rotating.
type Sealer = sealedlog.Sealer

// Rotating is a Sealer whose keys rotate. The holder of a keyring is one: to rotate, put the new keyring, which still opens what
// the old one sealed, in the holder, then call Store.Reseal, and drop the old key when Store.Stale has returned 0. Seal, Open and
// UnderPrimary each read the present keyring once and may be called at any time.
type Rotating = sealedlog.Rotating

// Stores is where raft keeps its log, its vote and its snapshots.
type Stores struct {
	Logs      raft.LogStore
	Stable    raft.StableStore
	Snapshots raft.SnapshotStore
	Close     func() error                // nil: nothing to close
	Reseal    func(context.Context) error // nil: nothing is sealed
	Stale     func() (int, error)         // nil as Reseal
}

// Config is what a store needs.
type Config struct {
	ClusterID, NodeID string
	Dir               string    // holds the sealed log and snapshots
	Sealer            Sealer    // of the node
	Transport         Transport // closed by Close; its address is the node ID
	Logger            *slog.Logger
	SnapshotThreshold uint64           // entries after which a snapshot is taken; 0: warden.SnapshotThreshold
	TrailingLogs      uint64           // entries kept behind a snapshot; 0: warden.SnapshotTrailing
	Heartbeat         time.Duration    // heartbeat and election timeout, and the leader's lease; 0: 500 ms
	Now               func() time.Time // nil: time.Now
	// CommandTime returns the time of the next command, instead of Now, or refuses it. It may wait for ctx. nil: Now
	CommandTime func(ctx context.Context) (time.Time, error)
	Stores      *Stores // nil: sealed files in Dir. Tests keep them in memory.
}

// Store is one manager's replica. Safe for concurrent use.
type Store struct {
	cfg     Config
	logger  *slog.Logger
	raft    *raft.Raft
	machine *machine
	stores  *Stores
	witness *witness      // carries raft's calls
	beats   chan struct{} // asks for heartbeats
	done    chan struct{} // closed by Close; ends the goroutines
	stopped chan struct{} // closed by Close once raft has stopped: it answers nothing any more
	wg      sync.WaitGroup
	closing sync.Once

	resealing sync.Mutex // held across Reseal; Close waits for it

	ledTerm  atomic.Uint64 // in which this manager, leading, has applied all that was committed before
	lastTime atomic.Int64  // newest command time proposed here
	inFlight atomic.Int64  // proposals that wait for their commit
	asked    atomic.Int64  // what raft was asked and has not answered, also where nobody waits for it any more
	nudge    chan struct{} // holds one token while followers wait to learn of a commit

	appliedMu sync.Mutex // guards applied; held across reads of the log cache
	applied   uint64     // all up to here is in the view

	leaderMu   sync.Mutex // guards leaderSubs
	leaderSubs []chan struct{}

	counts counts
}

// applyQueueTimeout bounds how long a proposal waits to get into raft's queue.
const applyQueueTimeout = 5 * time.Second

// View returns the newest state applied here. It takes no lock. On a follower it may be behind the leader's.
func (s *Store) View() *View { return s.machine.view.Load() }

// Watch collects changes of the kinds (none: all) from now on: what View shows after Watch returned, and what the watcher tells
// later, together miss nothing. Close it.
func (s *Store) Watch(kinds ...api.Kind) *Watcher { return s.machine.hub.watch(kinds) }

// Propose commits the command and returns what applying it gave. Its time is set here; the command is not changed. Calls are
// pipelined: no lock is held meanwhile. Where the rules refuse it, the result comes with the error that it says, and nothing was
// changed. Errors beside those: CodeNotLeader, CodeClock, CodeTooLarge, CodeInvalid, CodeUnavailable (nothing was proposed),
// CodeTimeout (the outcome is unknown, and the same request ID makes trying again safe); those of Config.CommandTime.
func (s *Store) Propose(ctx context.Context, cmd *api.Command) (*api.Result, error) {
	const op = "proposing a command"
	if s.closed() {
		return nil, warden.Errorf(warden.CodeUnavailable, op, "the store is closed")
	}
	if !s.IsLeader() {
		return nil, s.notLeader(op)
	}
	if err := checkCommand(cmd); err != nil {
		return nil, err
	}
	t, err := s.stamp(ctx)
	if err != nil {
		return nil, err
	}
	data, err := proto.Marshal(&api.Command{Actor: cmd.GetActor(), RequestId: cmd.GetRequestId(), TimeNs: t, Operations: cmd.GetOperations()})
	if err != nil {
		return nil, warden.Recode(warden.CodeInvalid, op, err)
	}
	if len(data) > warden.CommandBytes {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d", len(data), warden.CommandBytes)
	}
	s.inFlight.Add(1)
	start := time.Now()
	var f raft.ApplyFuture
	err = s.ask(ctx, func() raft.Future { f = s.raft.Apply(data, applyQueueTimeout); return f })
	if s.inFlight.Add(-1) == 0 && err == nil {
		select {
		case s.nudge <- struct{}{}:
		default:
		}
	}
	if err != nil {
		return nil, s.raftError(op, err)
	}
	s.counts.commits.Observe(time.Since(start))
	result, ok := f.Response().(*api.Result)
	if !ok {
		return nil, warden.Errorf(warden.CodeInternal, op, "the apply gave no result")
	}
	return result, resultError(result)
}

// stamp returns the time of the next command: now, but never before one that was proposed or applied here.
func (s *Store) stamp(ctx context.Context) (int64, error) {
	at, err := s.now(), error(nil)
	if s.cfg.CommandTime != nil {
		if at, err = s.cfg.CommandTime(ctx); err != nil {
			return 0, warden.Wrap("refusing to propose", err)
		}
	}
	now := at.UnixNano()
	for {
		proposed := s.lastTime.Load()
		last := max(proposed, s.View().Time())
		if last-now > int64(warden.SkewMax) {
			return 0, warden.Hint(warden.Errorf(warden.CodeClock, "refusing to propose", "this manager's clock says %s, the last command was made at %s",
				time.Unix(0, now).UTC().Format(time.RFC3339), time.Unix(0, last).UTC().Format(time.RFC3339)), "set this manager's clock right; if it is, that command was made by a leader whose clock was ahead, and changes are refused until that time")
		}
		if t := max(now, last); s.lastTime.CompareAndSwap(proposed, t) {
			return t, nil
		}
	}
}

func (s *Store) now() time.Time {
	if s.cfg.Now != nil {
		return s.cfg.Now()
	}
	return time.Now()
}

// nudgeLoop tells followers of commits at once instead of at raft's next idle append: it commits a barrier after a burst.
// Started by Open, ended by Close.
func (s *Store) nudgeLoop() {
	for {
		select {
		case <-s.done:
			return
		case <-s.nudge:
		}
		if s.IsLeader() && len(s.raft.GetConfiguration().Configuration().Servers) > 1 {
			_ = s.ask(context.Background(), func() raft.Future { return s.raft.Barrier(0) }) // whoever waits for the followers sees for himself
		}
	}
}

// AppliedIndex returns the index up to which the log is applied and visible in View. raft's own figure counts what it has
// handed over and may run ahead of the state; entries that are no commands don't reach the state at all.
func (s *Store) AppliedIndex() uint64 {
	handed := s.raft.AppliedIndex()
	seen := s.View().Index()
	s.appliedMu.Lock()
	defer s.appliedMu.Unlock()
	s.applied = max(s.applied, seen)
	for s.applied < handed {
		var l raft.Log
		err := s.stores.Logs.GetLog(s.applied+1, &l)
		if err == nil && l.Type == raft.LogCommand {
			break // on its way
		}
		if err != nil && !errors.Is(err, raft.ErrLogNotFound) { // not found: compacted, so a snapshot has it, so the state has it
			break
		}
		s.applied++
	}
	return s.applied
}

// CommitIndex returns the index up to which the log is known here to be committed.
func (s *Store) CommitIndex() uint64 { return s.raft.CommitIndex() }

// WaitApplied returns once AppliedIndex has reached index. Errors: those of ctx; CodeUnavailable after Close.
func (s *Store) WaitApplied(ctx context.Context, index uint64) error {
	const op = "waiting for the state to follow"
	tick := time.NewTicker(10 * time.Millisecond) // entries that are no commands are not published
	defer tick.Stop()
	for {
		next := s.machine.hub.next()
		if s.AppliedIndex() >= index {
			return nil
		}
		select {
		case <-next:
		case <-tick.C:
		case <-s.done:
			return warden.Errorf(warden.CodeUnavailable, op, "the store is closed")
		case <-ctx.Done():
			return warden.Wrap(op, ctx.Err())
		}
	}
}

// LoggedNode returns the newest record of a node that the log has, applied or not, nil for none. A replica that has just started has
// applied nothing behind its snapshot, and must reach the others first: this is where they may be, and no record to judge by, since it
// may never have been committed. Cost: reads the log from its end to there. Errors: those of the log.
func (s *Store) LoggedNode(id string) (*api.Node, error) {
	first, err1 := s.stores.Logs.FirstIndex()
	last, err2 := s.stores.Logs.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	for i := last; i >= max(first, 1); i-- {
		var l raft.Log
		switch err := s.stores.Logs.GetLog(i, &l); {
		case errors.Is(err, raft.ErrLogNotFound): // compacted meanwhile
			return nil, nil
		case err != nil:
			return nil, err
		}
		var cmd api.Command
		if l.Type != raft.LogCommand || proto.Unmarshal(l.Data, &cmd) != nil {
			continue
		}
		for _, op := range slices.Backward(cmd.Operations) {
			if n := op.GetPut().GetObject().GetNode(); n.GetId() == id {
				return n, nil
			}
		}
	}
	return nil, nil
}

// Snapshot takes a snapshot now. With nothing new it does nothing.
func (s *Store) Snapshot() error {
	if err := s.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return s.raftError("taking a snapshot", err)
	}
	return nil
}

// Reseal puts all that is on disk, log, stable values and the newest snapshot, under the present primary of Config.Sealer, and
// removes what was under older keys; beside everything else that the store does. Killed at any point, the next Open finds the old state
// or the new one, under a keyring that has both keys. It returns nil when a scan has found nothing stale; the older key opens no byte
// on disk then. With nothing stale it does nothing. Errors: CodeUnsupported if the Sealer is no Rotating; CodeConflict if the
// primary changed meanwhile (call it again); CodeUnavailable after Close; those of ctx and of the disk: what was done then stays, and
// calling it again goes on.
func (s *Store) Reseal(ctx context.Context) error {
	const op = "re-sealing what is on disk"
	s.resealing.Lock()
	defer s.resealing.Unlock()
	if s.closed() {
		return warden.Errorf(warden.CodeUnavailable, op, "the store is closed")
	}
	if s.stores.Reseal == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-s.done:
			cancel()
		case <-stop:
		}
	}()
	if err := s.stores.Reseal(ctx); err != nil {
		if s.closed() {
			return warden.Errorf(warden.CodeUnavailable, op, "the store is closed")
		}
		return warden.Wrap(op, err)
	}
	n, err := s.stores.Stale()
	if err == nil && n > 0 {
		err = warden.Hint(warden.Errorf(warden.CodeConflict, op, "%d records are under an older key, which was rotated meanwhile", n), "re-seal again")
	}
	return warden.Wrap(op, err)
}

// Stale counts what is on disk under another key than the present primary of Config.Sealer: log entries, stable values and snapshots.
// 0 means that older keys open no byte on disk. Cost: one pass over the log file. Errors: CodeUnsupported as Reseal; those of reading.
func (s *Store) Stale() (int, error) {
	if s.stores.Stale == nil {
		return 0, nil
	}
	return s.stores.Stale()
}

func (s *Store) closed() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// ask asks raft something and waits for its answer, for ctx, or until raft has stopped: what is committed then and not applied, raft forgets
// to answer. The goroutine ends with the answer.
func (s *Store) ask(ctx context.Context, question func() raft.Future) error {
	s.asked.Add(1) // before the look at done, so that Close sees it, or it sees Close
	if s.closed() {
		s.asked.Add(-1)
		return raft.ErrRaftShutdown
	}
	if ctx.Err() != nil {
		s.asked.Add(-1)
		return warden.Errorf(warden.CodeTimeout, "waiting for the managers", "%w; nothing was asked of them", ctx.Err())
	}
	answer := make(chan error, 1)
	go func() { // raft takes some questions only between two writes to the disk
		answer <- question().Error()
		s.asked.Add(-1)
	}()
	select {
	case err := <-answer:
		if !errors.Is(err, raft.ErrRaftShutdown) { // which raft says of what is committed, too
			return err
		}
	case <-s.stopped:
	case <-ctx.Done():
		return warden.Errorf(warden.CodeTimeout, "waiting for the managers", "%w; the outcome is unknown", ctx.Err())
	}
	return warden.Errorf(warden.CodeTimeout, "waiting for the managers", "the store was closed meanwhile; the outcome is unknown")
}

// raftError gives raft's errors their codes.
func (s *Store) raftError(op string, err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader):
		return s.notLeader(op)
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrAbortedByRestore):
		return warden.Errorf(warden.CodeTimeout, op, "%w; the outcome is unknown, and trying again with the same request ID is safe", err)
	case errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, raft.ErrRaftShutdown), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return warden.Recode(warden.CodeUnavailable, op, err)
	}
	return warden.Wrap(op, err)
}

func (s *Store) notLeader(op string) error {
	if id := s.Leader(); id != "" && id != s.cfg.NodeID {
		return warden.Errorf(warden.CodeNotLeader, op, "the leader is %s", id)
	}
	return warden.Errorf(warden.CodeNotLeader, op, "this manager does not lead, and knows no leader")
}
