package store_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// TestResealingManagersUnderLoad: keys rotate on all managers while commands are committed and snapshots taken; nothing is lost, and
// afterwards the old keys open nothing and are nowhere on disk.
func TestResealingManagersUnderLoad(t *testing.T) {
	p := newPeers(t, 3)
	p.bootstrap(func(c *store.Config) { c.SnapshotThreshold, c.TrailingLogs = 50, 60 })
	node := p.all[0].id // has a record
	at, err := p.propose(describe(node, "first"))
	p.must(err)
	for _, m := range p.all {
		p.must(m.store.WaitApplied(t.Context(), at.GetIndex()))
	}
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
				if _, err := p.propose(describe(node, warden.NewID())); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 3 {
		for _, m := range p.all {
			err := m.store.Snapshot()
			for ; api.Transient(err); err = m.store.Snapshot() { // it hands leadership over
				<-time.After(5 * time.Millisecond)
			}
			p.must(err)
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
	last, err := p.propose(describe(node, "last"))
	p.must(err)
	index := last.GetIndex()
	for _, m := range p.all {
		p.must(m.store.WaitApplied(t.Context(), index))
	}
	var want bytes.Buffer
	p.must(p.all[0].store.View().Write(&want))
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
