package store_test

import (
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store"
	"warden/store/storetest"
)

// slow is the transport of a leader whose calls with entries take until released, as with servers that do not answer, and end then
// with their connection, or well where they are pipelined.
type slow struct {
	*raft.InmemTransport
	pipelines bool

	mu   sync.Mutex
	held chan struct{}            // where not nil, calls with entries wait for its end
	sent map[raft.ServerID]uint64 // the newest entry that each was sent
}

func (s *slow) pass(id raft.ServerID, req *raft.AppendEntriesRequest, call func() error) error {
	s.mu.Lock()
	held := s.held
	for _, e := range req.Entries {
		s.sent[id] = max(s.sent[id], e.Index)
	}
	s.mu.Unlock()
	if held != nil && len(req.Entries) > 0 {
		<-held
		if !s.pipelines {
			return io.ErrUnexpectedEOF // else raft sees at once that it is to stop
		}
	}
	return call()
}

func (s *slow) AppendEntries(id raft.ServerID, addr raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	return s.pass(id, req, func() error { return s.InmemTransport.AppendEntries(id, addr, req, resp) })
}

func (s *slow) AppendEntriesPipeline(id raft.ServerID, addr raft.ServerAddress) (raft.AppendPipeline, error) {
	if !s.pipelines {
		return nil, raft.ErrPipelineReplicationNotSupported
	}
	p, err := s.InmemTransport.AppendEntriesPipeline(id, addr)
	return slowPipeline{p, s, id}, err
}

type slowPipeline struct {
	raft.AppendPipeline
	s  *slow
	id raft.ServerID
}

func (p slowPipeline) AppendEntries(req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (f raft.AppendFuture, err error) {
	err = p.s.pass(p.id, req, func() error { f, err = p.AppendPipeline.AppendEntries(req, resp); return err })
	return f, err
}

// TestRemovedGetsNoEntry: a manager that is in a call while it is removed, for as long as it likes, is sent nothing that was committed
// after its removal. raft alone would send it in every second case.
func TestRemovedGetsNoEntry(t *testing.T) {
	for name, pipelines := range map[string]bool{"calls": false, "pipelines": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tr := &slow{pipelines: pipelines, sent: map[raft.ServerID]uint64{}}
				c := newClusterOver(t, 1, nil, func(_ string, network *raft.InmemTransport) store.Transport {
					if tr.InmemTransport != nil {
						return network
					}
					tr.InmemTransport = network
					return tr
				})
				s := c.up[c.ids[0]]
				var removed []string
				for range 10 {
					id, logs := warden.NewID(), raft.NewInmemStore()
					c.configs[id] = c.configs[c.ids[0]]
					cfg := c.configs[id]
					cfg.NodeID, cfg.Stores = id, &store.Stores{Logs: logs, Stable: logs, Snapshots: raft.NewInmemSnapshotStore()}
					c.configs[id] = cfg
					c.start(id)
					c.must(s.AddNonvoter(t.Context(), id))
					c.must(c.up[id].WaitApplied(t.Context(), s.CommitIndex()))
					removed = append(removed, id)
				}
				time.Sleep(time.Second) // all follow

				held := make(chan struct{})
				tr.mu.Lock()
				tr.held = held
				tr.mu.Unlock()
				storetest.Propose(t, s, store.Put(storetest.Zone("before"), 0))
				synctest.Wait() // all are in a call
				for _, id := range removed {
					c.must(s.RemoveServer(t.Context(), id))
				}
				last := s.CommitIndex()
				storetest.Propose(t, s, store.Put(storetest.Zone("after"), 0))
				tr.mu.Lock()
				tr.held = nil
				tr.mu.Unlock()
				close(held)
				time.Sleep(time.Minute)
				tr.mu.Lock()
				defer tr.mu.Unlock()
				for _, id := range removed {
					if got := tr.sent[raft.ServerID(id)]; got == 0 || got > last {
						t.Errorf("%s was sent entries to %d, the last removal is %d", id, got, last)
					}
				}
			})
		})
	}
}
