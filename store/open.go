package store

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/api"
	"warden/store/sealedlog"
)

// Bounds of raft.
const (
	heartbeatDefault = 500 * time.Millisecond
	snapshotsKept    = 2
	appendEntriesMax = 128                  // entries of one append, and of one write to the log, each at most warden.CommandBytes
	beatMax          = heartbeatDefault / 5 // until a proof of leadership is looked for again; regular heartbeats are no rarer
	bootstrapTimeout = 15 * time.Second
	handOverTimeout  = 2 * time.Second
	lastSnapshotMin  = 1024 // entries since the last snapshot, for one to be taken before stopping
	lastSnapshotMax  = 2 * time.Second
	answersMax       = 2 * time.Second // for what raft was asked before it is stopped
)

// Open starts raft on what is on disk. With nothing there this is a joiner, which waits until a leader adds it. Errors: those
// of the stores; CodeInternal.
func Open(cfg Config) (*Store, error) {
	stores, err := openStores(cfg)
	if err != nil {
		return nil, err
	}
	return start(cfg, stores)
}

// Bootstrap makes a new cluster of this one manager, and commits first as its first command. Errors: CodeInitialized where
// there is a state already; those of Open and Propose. On an error the directory may hold a part of it: remove it.
func Bootstrap(cfg Config, first *api.Command) (*Store, error) {
	const op = "bootstrapping the replicated state"
	stores, err := openStores(cfg)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Store, error) {
		stores.close()
		return nil, warden.Wrap(op, err)
	}
	exists, err := raft.HasExistingState(stores.Logs, stores.Stable, stores.Snapshots)
	if err != nil {
		return fail(err)
	}
	if exists {
		return fail(warden.Errorf(warden.CodeInitialized, "looking for a state", "there is one already"))
	}
	servers := []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(cfg.NodeID), Address: raft.ServerAddress(cfg.NodeID)}}
	if err := raft.BootstrapCluster(raftConfig(cfg), stores.Logs, stores.Stable, stores.Snapshots, cfg.Transport,
		raft.Configuration{Servers: servers}); err != nil {
		return fail(err)
	}
	s, err := start(cfg, stores)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootstrapTimeout)
	defer cancel()
	if err := s.WaitLeader(ctx); err != nil {
		s.Close(ctx)
		return nil, warden.Wrap(op, err)
	}
	if _, err := s.Propose(ctx, first); err != nil {
		s.Close(ctx)
		return nil, warden.Wrap(op, err)
	}
	return s, nil
}

// start starts raft and the goroutines of the store; it owns the stores from here on.
func start(cfg Config, stores *Stores) (*Store, error) {
	cfg.Logger = orDiscard(cfg.Logger)
	s := &Store{cfg: cfg, logger: cfg.Logger, machine: newMachine(), done: make(chan struct{}), stopped: make(chan struct{}), nudge: make(chan struct{}, 1), witness: newWitness(cfg.Transport), beats: make(chan struct{}, 1)}
	behind := *stores
	stores = &behind
	stores.Logs = newLogCache(&timedLogs{stores.Logs, &s.counts.appends})
	s.stores = stores
	var err error
	s.raft, err = raft.NewRaft(raftConfig(cfg), s.machine, stores.Logs, stores.Stable, stores.Snapshots, s.witness)
	if err != nil {
		stores.close()
		return nil, warden.Wrap("starting raft", err)
	}
	s.witness.raft.Store(s.raft)
	s.wg.Go(s.observe())
	s.wg.Go(s.nudgeLoop)
	s.wg.Go(s.beatLoop)
	return s, nil
}

func raftConfig(cfg Config) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(cfg.NodeID)
	c.HeartbeatTimeout = heartbeatDefault
	if cfg.Heartbeat > 0 {
		c.HeartbeatTimeout = cfg.Heartbeat
	}
	c.ElectionTimeout = c.HeartbeatTimeout
	// The lease is raft's own hint to step down, not what makes reads safe (VerifyLeader does). At half of it, a leader on a machine that
	// was busy for 250 ms stepped down though its followers had not missed it yet.
	c.LeaderLeaseTimeout = c.HeartbeatTimeout
	c.CommitTimeout = min(c.CommitTimeout, c.HeartbeatTimeout/2)
	c.MaxAppendEntries = appendEntriesMax
	c.ShutdownOnRemove = false
	c.RestoreCommittedLogs = false // after a restart it would lose the configuration
	c.NoSnapshotRestoreOnStart = false
	c.PreVoteDisabled = false
	c.NoLegacyTelemetry = true
	c.SnapshotInterval = warden.SnapshotInterval
	c.SnapshotThreshold = warden.SnapshotThreshold
	if cfg.SnapshotThreshold > 0 {
		c.SnapshotThreshold = cfg.SnapshotThreshold
	}
	c.TrailingLogs = warden.SnapshotTrailing
	if cfg.TrailingLogs > 0 {
		c.TrailingLogs = cfg.TrailingLogs
	}
	c.Logger = newRaftLogger(orDiscard(cfg.Logger))
	return c
}

func orDiscard(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

// openStores opens the sealed files, or takes what the configuration gives.
func openStores(cfg Config) (*Stores, error) {
	if cfg.Stores != nil {
		return cfg.Stores, nil
	}
	logger := orDiscard(cfg.Logger)
	var snapshots *sealedlog.Snapshots
	var failed error
	var both sync.WaitGroup // each reads its files to their end
	both.Go(func() {
		snapshots, failed = sealedlog.OpenSnapshots(cfg.Dir, cfg.ClusterID, cfg.NodeID, cfg.Sealer, snapshotsKept, logger)
	})
	log, err := sealedlog.Open(cfg.Dir, cfg.ClusterID, cfg.NodeID, cfg.Sealer, logger)
	both.Wait()
	if failed != nil {
		if err == nil {
			log.Close()
		}
		return nil, failed
	}
	if err != nil {
		return nil, err
	}
	return &Stores{
		Logs: rewindable{log}, Stable: log, Snapshots: snapshots, Close: log.Close,
		Reseal: func(ctx context.Context) error {
			if err := log.Reseal(ctx); err != nil {
				return err
			}
			return snapshots.Reseal(ctx)
		},
		Stale: func() (int, error) {
			inLog, err := log.Stale()
			if err != nil {
				return 0, err
			}
			n, err := snapshots.Stale()
			return inLog + n, err
		},
	}, nil
}

func (s *Stores) close() error {
	if s.Close == nil {
		return nil
	}
	return s.Close()
}

// Close hands leadership over where this manager leads others, takes a snapshot where much came since the last, so that the next start
// has little to apply again, and waits for the answers to what is under way; then it stops raft and closes the stores. ctx bounds the first
// three only, each also 2 s. It may be called more than once.
func (s *Store) Close(ctx context.Context) error {
	var err error
	s.closing.Do(func() {
		if members, cerr := s.Configuration(); cerr == nil && s.IsLeader() && voters(members) > 1 {
			hctx, cancel := context.WithTimeout(ctx, handOverTimeout)
			if terr := s.TransferLeadership(hctx); terr != nil {
				s.logger.Warn("failed to hand leadership over before stopping", "error", terr)
			}
			cancel()
		}
		s.lastSnapshotBeforeStop(ctx)
		close(s.done)
		s.resealing.Lock() // a re-sealing ends at s.done, and none begins after it
		defer s.resealing.Unlock()
		s.lastAnswers(ctx)
		serr := s.raft.Shutdown().Error()
		close(s.stopped)
		s.wg.Wait()
		s.machine.hub.close()
		err = warden.Wrap("closing the replicated state", s.stores.close())
		if err == nil {
			err = warden.Wrap("stopping raft", serr)
		}
	})
	return err
}

// lastAnswers waits until raft was asked nothing more that it has not answered.
func (s *Store) lastAnswers(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, answersMax)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for s.asked.Load() > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// lastSnapshotBeforeStop takes a snapshot if it is worth it.
func (s *Store) lastSnapshotBeforeStop(ctx context.Context) {
	snapshot, _ := s.lastSnapshot()
	if ctx.Err() != nil || s.raft.AppliedIndex() < snapshot+lastSnapshotMin {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, lastSnapshotMax)
	defer cancel()
	if err := s.ask(ctx, func() raft.Future { return s.raft.Snapshot() }); err != nil {
		s.logger.Warn("failed to take a snapshot before stopping", "error", err)
	}
}
