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

// VerifyLeader returns once a majority has answered this manager as its leader, on calls that it made after VerifyLeader began (Raft,
// section 8): nobody can have led in a newer term before. Calls that overlap share round trips, and none waits for a disk. Errors:
// CodeNotLeader; CodeTimeout where ctx ends.
func (s *Store) VerifyLeader(ctx context.Context) error {
	const op = "verifying leadership"
	for since := s.witness.now(); ; {
		woken := s.witness.woken()
		if !s.IsLeader() {
			return s.notLeader(op)
		}
		if ok, err := s.followedSince(since); ok || err != nil {
			return warden.Wrap(op, err)
		}
		select {
		case s.beats <- struct{}{}:
		default: // there will be one
		}
		select {
		case <-woken:
		case <-time.After(beatMax): // whose vote was missing may be no voter any more
		case <-s.done:
			return warden.Errorf(warden.CodeUnavailable, op, "the store is closed")
		case <-ctx.Done():
			return warden.Errorf(warden.CodeTimeout, op, "waiting for a majority: %w", ctx.Err())
		}
	}
}

// beatLoop has raft make heartbeats at once, whenever VerifyLeader asks. Without it, it would be the next regular ones that prove it.
func (s *Store) beatLoop() {
	for {
		select {
		case <-s.done:
			return
		case <-s.beats:
		}
		before := s.witness.now()
		ctx, cancel := context.WithTimeout(context.Background(), beatMax) // raft forgets those that wait for a manager which is removed
		_ = s.ask(ctx, func() raft.Future { return s.raft.VerifyLeader() })
		cancel()
		s.witness.wake() // it may have found that it does not lead
		s.awaitFollowed(before, time.Millisecond)
	}
}

// awaitFollowed waits for a proof that raft did not wait for: it takes other answers for one, and would at once be asked again.
func (s *Store) awaitFollowed(since uint64, limit time.Duration) {
	end := time.After(limit)
	for {
		woken := s.witness.woken()
		if ok, err := s.followedSince(since); ok || err != nil {
			return
		}
		select {
		case <-woken:
		case <-end:
			return
		case <-s.done:
			return
		}
	}
}

// Fresh returns once this leader's View has all that was acknowledged before the call, by whichever leader (Ongaro, Consensus: Bridging
// Theory and Practice, section 6.4). Errors: CodeNotLeader; those of Barrier and VerifyLeader.
func (s *Store) Fresh(ctx context.Context) error {
	term := s.Term()
	if s.ledTerm.Load() != term { // a new leader may not have what its predecessor committed
		if err := s.Barrier(ctx); err != nil {
			return err
		}
	}
	if err := s.VerifyLeader(ctx); err != nil {
		return err
	}
	if s.Term() != term {
		return warden.Errorf(warden.CodeNotLeader, "reading the state", "the leader changed meanwhile")
	}
	return nil
}

// followedSince reports whether a majority has followed this manager in the present term since then, a moment of witness.now. Errors:
// CodeNotLeader where a voter has named a newer term.
func (s *Store) followedSince(since uint64) (bool, error) {
	term := s.Term()
	members, err := s.Configuration()
	if err != nil {
		return false, err
	}
	n := 0
	for _, m := range members {
		switch {
		case !m.Voter:
		case m.ID == s.cfg.NodeID || s.witness.followed(m.ID, term, since):
			n++
		case s.witness.term(m.ID) > term:
			return false, warden.Errorf(warden.CodeNotLeader, "asking the managers", "manager %s has a newer term", m.ID)
		}
	}
	return n > voters(members)/2, nil
}

// Barrier returns once all that was committed before is applied here. Leader only: a new one needs it before it trusts its view.
func (s *Store) Barrier(ctx context.Context) error {
	term := s.Term()
	err := s.do(ctx, "applying all that is committed", func() raft.Future { return s.raft.Barrier(left(ctx)) })
	if err == nil && s.Term() == term {
		s.ledTerm.Store(term)
	}
	return err
}

// Follows reports whether this manager is a follower in that term, and neither leads nor stands for election.
func (s *Store) Follows(term uint64) bool {
	return s.raft.State() == raft.Follower && s.raft.CurrentTerm() == term
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
		return s.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(id), 0, left(ctx))
	})
}

// AddVoter gives the node a vote. Leader only. Add it as a non-voter first and wait until it follows.
func (s *Store) AddVoter(ctx context.Context, id string) error {
	return s.do(ctx, "giving manager "+id+" a vote", func() raft.Future {
		return s.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(id), 0, left(ctx))
	})
}

// RemoveServer takes the node out of raft's configuration. Leader only; the leader may remove itself, and steps down then.
func (s *Store) RemoveServer(ctx context.Context, id string) error {
	return s.do(ctx, "removing manager "+id+" from raft", func() raft.Future { return s.raft.RemoveServer(raft.ServerID(id), 0, left(ctx)) })
}

// TransferLeadership hands leadership to the most caught-up other voter, and returns when this manager does not lead any
// more. Errors: CodeNotLeader; CodeUnavailable where no voter takes over, and this manager leads on.
func (s *Store) TransferLeadership(ctx context.Context) error {
	return s.transfer(ctx, func() raft.Future { return s.raft.LeadershipTransfer() })
}

// TransferLeadershipTo hands leadership to that voter, as TransferLeadership.
func (s *Store) TransferLeadershipTo(ctx context.Context, id string) error {
	return s.transfer(ctx, func() raft.Future {
		return s.raft.LeadershipTransferToServer(raft.ServerID(id), raft.ServerAddress(id))
	})
}

func (s *Store) transfer(ctx context.Context, f func() raft.Future) error {
	err := s.do(ctx, "handing leadership over", f)
	if warden.CodeOf(err) == warden.CodeInternal { // raft has no names for its reasons here
		return warden.Recode(warden.CodeUnavailable, "", err)
	}
	return err
}

// left returns how long raft may keep a question that it has not taken up, 0 for as long as it likes: what ctx gave up is not asked later.
func left(ctx context.Context) time.Duration {
	end, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	return max(time.Until(end), time.Nanosecond)
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
