package store_test

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store"
	"warden/store/storetest"
)

// stopped is the transport of a manager that SIGSTOP hits, and then SIGCONT: what it had asked is answered, and the answers lie there.
type stopped struct {
	*raft.InmemTransport

	mu             sync.Mutex
	calls, answers chan struct{} // where not nil, calls wait to be made, and answers to be read, until it is closed
}

func (s *stopped) AppendEntries(id raft.ServerID, addr raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	s.await(&s.calls)
	err := s.InmemTransport.AppendEntries(id, addr, req, resp)
	s.await(&s.answers)
	return err
}

func (s *stopped) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

func (s *stopped) await(what *chan struct{}) {
	s.mu.Lock()
	ch := *what
	s.mu.Unlock()
	if ch != nil {
		<-ch
	}
}

func (s *stopped) hold(what *chan struct{}) (release func()) {
	ch := make(chan struct{})
	set := func(to chan struct{}) {
		s.mu.Lock()
		defer s.mu.Unlock()
		*what = to
	}
	set(ch)
	return sync.OnceFunc(func() { set(nil); close(ch) })
}

// TestAnswersFromBeforeProveNothing: a leader that was stopped, while the others elected another who committed something, finds answers
// of theirs that are older than all that. They don't make it the leader that its state may be read from.
func TestAnswersFromBeforeProveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tr *stopped
		heartbeat := 6 * time.Second // of the first, whose lease does not end: time stands still in a process that is stopped
		c := newClusterOver(t, 3, func(cfg *store.Config) {
			cfg.Heartbeat, heartbeat = heartbeat, 500*time.Millisecond
		}, func(_ string, network *raft.InmemTransport) store.Transport {
			if tr != nil {
				return network
			}
			tr = &stopped{InmemTransport: network}
			return tr
		})
		old := c.up[c.ids[0]]
		c.must(old.VerifyLeader(t.Context()))

		hear := tr.hold(&tr.answers)
		time.Sleep(400 * time.Millisecond) // it asks both once more
		call := tr.hold(&tr.calls)
		defer func() { hear(); call() }()
		for _, id := range c.ids[1:] { // nor does it hear anybody
			c.networks[id].Disconnect(raft.ServerAddress(c.ids[0]))
		}
		var next *store.Store
		for next == nil {
			time.Sleep(10 * time.Millisecond)
			for _, id := range c.ids[1:] {
				if s := c.up[id]; s.IsLeader() && s.VerifyLeader(t.Context()) == nil && s.Barrier(t.Context()) == nil {
					next = s
				}
			}
		}
		storetest.Propose(t, next, store.Put(storetest.Zone("new"), 0))
		if !old.IsLeader() {
			t.Fatal("the old leader is none by itself")
		}
		if old.View().Zone("new") != nil {
			t.Fatal("the old leader has what the new one committed")
		}

		proved := make(chan error, 1)
		go func() { proved <- old.VerifyLeader(t.Context()) }()
		synctest.Wait()
		hear()
		synctest.Wait()
		select {
		case err := <-proved:
			t.Fatalf("VerifyLeader took old answers for a proof: %v", err)
		default:
		}
		call()
		if err := <-proved; warden.CodeOf(err) != warden.CodeNotLeader {
			t.Errorf("VerifyLeader = %v, want [not-leader]", err)
		}
	})
}
