package store_test

import (
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/store"
	"warden/store/storetest"
)

// What is counted is what happened: commits and appends, changes of leader, the log, its files and its snapshot.
func TestFacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		change := onDisk(t)
		c := newCluster(t, 3, func(cfg *store.Config) { change(cfg); cfg.TrailingLogs = 1 })
		leader := c.leader()
		before := leader.Facts()
		for range 20 {
			storetest.Propose(t, leader, store.Put(storetest.Zone(warden.NewID()), 0))
		}
		f := leader.Facts()
		if !f.Leading || !f.LeaderKnown || f.Term == 0 || f.Voters != 3 || f.Nonvoters != 0 {
			t.Errorf("Facts of the leader = %v", f)
		}
		if n := f.Commit.Count - before.Commit.Count; n != 20 {
			t.Errorf("%d commits counted, want 20", n)
		}
		if f.Append.Count <= before.Append.Count || f.LogEntries < 20 || f.DiskBytes < 20*64 || f.CommitIndex < 20 || f.LastIndex < f.CommitIndex {
			t.Errorf("Facts = %v, was %v", f, before)
		}
		if f.SnapshotIndex != 0 || f.SnapshotNs != 0 {
			t.Errorf("a snapshot at %d of %d, want none", f.SnapshotIndex, f.SnapshotNs)
		}
		c.must(leader.Snapshot())
		f = leader.Facts()
		if f.SnapshotIndex < 20 || f.LogEntries > 10 || time.Since(time.Unix(0, f.SnapshotNs)).Abs() > time.Minute {
			t.Errorf("after a snapshot: index %d, %s ago, %d entries", f.SnapshotIndex, time.Since(time.Unix(0, f.SnapshotNs)), f.LogEntries)
		}
		follower := ""
		for _, id := range c.ids {
			if c.up[id] != leader {
				follower = id
			}
		}
		changes := c.up[follower].Facts().LeaderChanges
		c.must(leader.TransferLeadership(t.Context()))
		c.leader()
		synctest.Wait()
		if f := c.up[follower].Facts(); f.LeaderChanges != changes+1 || !f.LeaderKnown {
			t.Errorf("%d leader changes after one more than %d; Facts = %v", f.LeaderChanges, changes, f)
		}
	})
}
