package store

import (
	"context"
	"time"

	"github.com/hashicorp/raft"

	"warden"
)

// Member is one manager in raft's configuration.
type Member struct {
	ID    string
	Voter bool
}

// IsLeader reports whether this manager leads, as far as it knows: see VerifyLeader.
func (s *Store) IsLeader() bool { return s.raft.State() == raft.Leader }

// Leader returns the node ID of the leader, or "" where none is known.
func (s *Store) Leader() string {
	_, id := s.raft.LeaderWithID()
	return string(id)
}

// Term returns raft's current term.
func (s *Store) Term() uint64 { return s.raft.CurrentTerm() }

// VerifyLeader asks a majority whether this manager still leads. Calls that overlap share the round trip. Errors: CodeNotLeader.
func (s *Store) VerifyLeader(ctx context.Context) error {
	return s.do(ctx, "verifying leadership", func() raft.Future { return s.raft.VerifyLeader() })
}

// Barrier returns once all that was committed before is applied here. Leader only: a new one needs it before it trusts its view.
func (s *Store) Barrier(ctx context.Context) error {
	return s.do(ctx, "applying all that is committed", func() raft.Future { return s.raft.Barrier(0) })
}

// Configuration returns the members of raft's newest configuration, in its order, also while it is not committed.
func (s *Store) Configuration() ([]Member, error) {
	f := s.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, s.raftError("reading raft's configuration", err)
	}
	var out []Member
	for _, srv := range f.Configuration().Servers {
		out = append(out, Member{ID: string(srv.ID), Voter: srv.Suffrage == raft.Voter})
	}
	return out, nil
}

func voters(members []Member) int {
	n := 0
	for _, m := range members {
		if m.Voter {
			n++
		}
	}
	return n
}

// AddNonvoter makes the node follow the log without a vote. Leader only; done already: nothing happens. A voter stays one.
func (s *Store) AddNonvoter(ctx context.Context, id string) error {
	return s.do(ctx, "adding manager "+id+" without a vote", func() raft.Future {
		return s.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(id), 0, 0)
	})
}

// AddVoter gives the node a vote. Leader only. Add it as a non-voter first and wait until it follows.
func (s *Store) AddVoter(ctx context.Context, id string) error {
	return s.do(ctx, "giving manager "+id+" a vote", func() raft.Future {
		return s.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(id), 0, 0)
	})
}

// RemoveServer takes the node out of raft's configuration. Leader only; the leader may remove itself, and steps down then.
func (s *Store) RemoveServer(ctx context.Context, id string) error {
	return s.do(ctx, "removing manager "+id+" from raft", func() raft.Future { return s.raft.RemoveServer(raft.ServerID(id), 0, 0) })
}

// TransferLeadership hands leadership to the most caught-up other voter, and returns when this manager does not lead any
// more. Errors: CodeNotLeader; CodeUnavailable where no voter takes over, and this manager leads on.
func (s *Store) TransferLeadership(ctx context.Context) error {
	err := s.do(ctx, "handing leadership over", func() raft.Future { return s.raft.LeadershipTransfer() })
	if warden.CodeOf(err) == warden.CodeInternal { // raft has no names for its reasons here
		return warden.Recode(warden.CodeUnavailable, "", err)
	}
	return err
}

func (s *Store) do(ctx context.Context, op string, f func() raft.Future) error {
	if !s.IsLeader() {
		return s.notLeader(op)
	}
	if err := s.ask(ctx, f); err != nil {
		return s.raftError(op, err)
	}
	return nil
}

// LeaderChanges returns a channel that gets a signal after this manager begins or ceases to lead, and after it learns of
// another leader. Signals coalesce; each call makes a channel of its own, which is never closed.
func (s *Store) LeaderChanges() <-chan struct{} {
	ch := make(chan struct{}, 1)
	s.leaderMu.Lock()
	defer s.leaderMu.Unlock()
	s.leaderSubs = append(s.leaderSubs, ch)
	return ch
}

// WaitLeader returns once this manager leads and has applied all that was committed before. Errors: those of ctx.
func (s *Store) WaitLeader(ctx context.Context) error {
	const op = "waiting to lead"
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if s.IsLeader() && s.Barrier(ctx) == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-s.done:
			return warden.Errorf(warden.CodeUnavailable, op, "the store is closed")
		case <-ctx.Done():
			return warden.Wrap(op, ctx.Err())
		}
	}
}

// observe registers with raft and returns the loop that passes changes of leadership on. Close ends it.
func (s *Store) observe() func() {
	seen := make(chan raft.Observation, 16)
	observer := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState:
			return true
		}
		return false
	})
	s.raft.RegisterObserver(observer)
	return func() {
		defer s.raft.DeregisterObserver(observer)
		for {
			select {
			case <-s.done:
				return
			case <-seen:
			}
			s.counts.sawLeader(s.Leader())
			s.leaderMu.Lock()
			for _, ch := range s.leaderSubs {
				select {
				case ch <- struct{}{}:
				default:
				}
			}
			s.leaderMu.Unlock()
		}
	}
}
