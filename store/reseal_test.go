package store_test

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"warden"
	"warden/store"
	"warden/store/storetest"
)

// TestResealingManagersUnderLoad: keys rotate on all managers while commands are committed and snapshots taken; nothing is lost, and
// afterwards the old keys open nothing and are nowhere on disk.
func TestResealingManagersUnderLoad(t *testing.T) {
	p := newPeers(t, 3)
	leader := p.bootstrap(func(c *store.Config) { c.SnapshotThreshold, c.TrailingLogs = 50, 60 })
	at := storetest.Propose(t, leader.store, describe(leader.id, "first")).GetIndex()
	for _, m := range p.all {
		p.must(m.store.WaitApplied(t.Context(), at))
	}
	lead := leader.store
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := lead.Propose(context.Background(), storetest.Command(describe(leader.id, warden.NewID()))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 3 {
		for _, m := range p.all {
			if err := m.store.Snapshot(); err != nil {
				t.Error(err)
			}
			old := m.sealer.rotate(t)
			if n, err := m.store.Stale(); err != nil || n == 0 {
				t.Errorf("Stale() after a rotation = %d, %v", n, err)
			}
			if err := m.store.Reseal(t.Context()); err != nil {
				t.Error(err)
			}
			if n, err := m.store.Stale(); err != nil || n != 0 {
				t.Errorf("Stale() after Reseal = %d, %v", n, err)
			}
			sealed, err := old.Seal(nil, nil)
			if err != nil {
				t.Error(err)
			}
			_ = filepath.WalkDir(m.dir, func(path string, _ fs.DirEntry, _ error) error { // raft removes snapshots meanwhile
				if b, rerr := os.ReadFile(path); rerr == nil && bytes.Contains(b, sealed[:5]) {
					t.Errorf("%s holds what the old key sealed", path)
				}
				return nil
			})
			m.sealer.drop(t)
		}
	}
	close(stop)
	wg.Wait()
	index := storetest.Propose(t, lead, describe(leader.id, "last")).GetIndex()
	var want bytes.Buffer
	p.must(leader.store.View().Write(&want))
	for _, m := range p.all {
		p.must(m.store.WaitApplied(t.Context(), index))
	}
	for _, m := range p.all {
		s := m.store
		p.must(m.stop())
		if err := s.Reseal(t.Context()); warden.CodeOf(err) != warden.CodeUnavailable {
			t.Errorf("Reseal() of a closed store = %v", err)
		}
	}
	for _, m := range p.all {
		p.start(m)
	}
	p.leader()
	for _, m := range p.all {
		p.must(m.store.WaitApplied(t.Context(), index))
		var got bytes.Buffer
		p.must(m.store.View().Write(&got))
		if !bytes.Equal(got.Bytes(), want.Bytes()) {
			t.Errorf("the state of %s differs after its restart", m.id)
		}
	}
}
