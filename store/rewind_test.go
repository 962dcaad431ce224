package store_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"warden/store"
	"warden/store/storetest"
)

// full is the sealer of a manager whose disk has no room for entries at times; smaller writes find some.
type full struct {
	*holder
	is      atomic.Bool
	refused atomic.Int32
}

func (f *full) Seal(plaintext, aad []byte) ([]byte, error) {
	if f.is.Load() && bytes.Contains(aad, []byte("\x00\x00\x00\x03log\x00\x00\x00\x08")) {
		f.refused.Add(1)
		return nil, errors.New("no space left on device")
	}
	return f.holder.Seal(plaintext, aad)
}

// TestDiskFullWhereTheLogIsRewound: a leader that was cut off comes back with an entry that nobody else has, and has no room for those
// that replace it. With room it follows again.
func TestDiskFullWhereTheLogIsRewound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disks := map[string]*full{}
		c := newCluster(t, 3, func(cfg *store.Config) {
			disks[cfg.NodeID] = &full{holder: newHolder(t)}
			cfg.Dir, cfg.Sealer = t.TempDir(), disks[cfg.NodeID]
		})
		old := c.leader()
		var id string
		for i, s := range c.up {
			if s == old {
				id = i
			}
		}
		c.disconnect(id)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := old.Propose(ctx, storetest.Command(store.Put(storetest.Zone("lost"), 0))); err == nil {
			t.Fatal("a leader that nobody follows commits")
		}
		for old.IsLeader() {
			time.Sleep(10 * time.Millisecond)
		}
		delete(c.up, id)
		defer func() { c.up[id] = old }()
		next := c.leader()
		storetest.Propose(t, next, store.Put(storetest.Zone("kept"), 0))

		disk := disks[id]
		disk.is.Store(true)
		c.connect(id)
		for disk.refused.Load() == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Second)
		disk.is.Store(false)
		for end := time.Now().Add(5 * time.Minute); old.View().Zone("kept") == nil; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("a manager whose disk was full follows nobody, 5 minutes after it had room again")
			}
		}
		if old.View().Zone("lost") != nil {
			t.Error("it has what was never committed")
		}
	})
}
