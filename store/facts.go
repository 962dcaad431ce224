package store

import (
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"warden/api"
	"warden/internal/tally"
)

// counts is what a store counts for its facts.
type counts struct {
	appends, commits tally.Histogram
	leaderChanges    atomic.Uint64

	mu         sync.Mutex // guards the rest; held across reading the list of snapshots
	leader     string     // last known
	snapshot   uint64     // index that snapshotNS is of
	snapshotNS int64
}

// sawLeader notes who leads; "" while nobody is known to.
func (c *counts) sawLeader(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id != "" && id != c.leader {
		c.leader = id
		c.leaderChanges.Add(1)
	}
}

// timedLogs counts how long writes of entries take.
type timedLogs struct {
	raft.LogStore
	took *tally.Histogram
}

// StoreLogs implements raft.LogStore.
func (l *timedLogs) StoreLogs(logs []*raft.Log) error {
	defer func(start time.Time) { l.took.Observe(time.Since(start)) }(time.Now())
	return l.LogStore.StoreLogs(logs)
}

// IsMonotonic implements raft.MonotonicLogStore for what is below.
func (l *timedLogs) IsMonotonic() bool {
	m, ok := l.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

// Facts returns how raft is here. It reads a few numbers, the sizes of the files, and after a snapshot once the list of them; no
// lock that applying or proposing needs is held.
func (s *Store) Facts() *api.RaftFacts {
	leader := s.Leader()
	f := &api.RaftFacts{
		Term: s.Term(), LeaderKnown: leader != "", Leading: s.IsLeader(), LeaderChanges: s.counts.leaderChanges.Load(),
		LastIndex: s.raft.LastIndex(), CommitIndex: s.CommitIndex(), AppliedIndex: s.AppliedIndex(),
		Append: s.counts.appends.Read(), Commit: s.counts.commits.Read(),
	}
	if members, err := s.Configuration(); err == nil {
		f.Voters = uint64(voters(members))
		f.Nonvoters = uint64(len(members)) - f.Voters
	}
	first, err := s.stores.Logs.FirstIndex()
	last, lerr := s.stores.Logs.LastIndex()
	if err == nil && lerr == nil && first > 0 && last >= first {
		f.LogEntries = last - first + 1
	}
	f.DiskBytes = diskBytes(s.cfg.Dir)
	f.SnapshotIndex, f.SnapshotNs = s.lastSnapshot()
	return f
}

// lastSnapshot returns the index and the time of the newest snapshot.
func (s *Store) lastSnapshot() (index uint64, ns int64) {
	index, _ = strconv.ParseUint(s.raft.Stats()["last_snapshot_index"], 10, 64)
	c := &s.counts
	c.mu.Lock()
	defer c.mu.Unlock()
	if index == 0 || index == c.snapshot {
		return index, c.snapshotNS
	}
	all, err := s.stores.Snapshots.List()
	if err != nil || len(all) == 0 {
		return index, 0
	}
	parts := strings.Split(all[0].ID, "-") // TERM-INDEX-MILLISECONDS
	ms, err := strconv.ParseInt(parts[len(parts)-1], 10, 64)
	if err != nil {
		return index, 0
	}
	c.snapshot, c.snapshotNS = index, ms*int64(time.Millisecond)
	return index, c.snapshotNS
}

// diskBytes adds up the sizes of the files below dir, "" being none; what goes away meanwhile is not counted.
func diskBytes(dir string) (sum uint64) {
	if dir == "" {
		return 0
	}
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if info, err := d.Info(); err == nil {
			sum += uint64(info.Size())
		}
		return nil
	})
	return sum
}
