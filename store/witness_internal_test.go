package store

import (
	"testing"

	"github.com/hashicorp/raft"

	"warden"
)

// told answers each call with a term.
type told struct {
	Transport
	term uint64
}

func (t *told) AppendEntries(_ raft.ServerID, _ raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	resp.Term, resp.Success = t.term, t.term <= req.Term
	return nil
}

// TestWitness: who followed in which term since when, and who named a newer one, also while raft itself has not noticed.
func TestWitness(t *testing.T) {
	network := &told{term: 7}
	w := newWitness(network)
	call := func(term uint64) {
		w.AppendEntries("b", "b", &raft.AppendEntriesRequest{Term: term}, new(raft.AppendEntriesResponse))
	}
	call(7)
	since, woken := w.now(), w.woken()
	if !w.followed("b", 7, 0) || w.followed("b", 7, since) || w.followed("b", 8, 0) || w.followed("c", 7, 0) {
		t.Error("who followed in term 7, since the start, is not as it was")
	}
	call(7)
	if !w.followed("b", 7, since) {
		t.Error("an answer to a newer call counts for nothing")
	}
	select {
	case <-woken:
	default:
		t.Error("an answer of a follower wakes nobody")
	}
	network.term, since, woken = 9, w.now(), w.woken()
	call(7)
	if w.followed("b", 7, since) || w.term("b") != 9 || w.term("c") != 0 {
		t.Errorf("b is in term 9, the witness says %d", w.term("b"))
	}
	select {
	case <-woken:
	default:
		t.Error("an answer of a newer term wakes nobody")
	}
}

// TestNoSnapshotGoesToWhomTheConfigurationHasNot, and none where raft can't say yet whom it has.
func TestNoSnapshotGoesToWhomTheConfigurationHasNot(t *testing.T) {
	w := newWitness(&told{}) // which has no method for snapshots
	if err := w.InstallSnapshot("b", "b", &raft.InstallSnapshotRequest{}, new(raft.InstallSnapshotResponse), nil); warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("InstallSnapshot = %v, want [unavailable]", err)
	}
}
