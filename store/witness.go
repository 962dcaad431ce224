package store

import (
	"sync"

	"github.com/hashicorp/raft"
)

// Transport is how a store calls others. It also votes beforehand, and can be closed.
type Transport interface {
	raft.Transport
	raft.WithPreVote
	raft.WithClose
}

// witness remembers which of its calls the others answered as followers of this manager. raft v1.8 takes every answer that it reads
// after a question for one to it (replication.go, notifyAll): of a leader that was paused also those that had lain there since before
// the pause, while another led. It also counts those of managers without a vote. Pipelined calls don't count here: a heartbeat is
// never among them.
type witness struct {
	Transport

	mu    sync.Mutex // guards what follows; held for moments only
	begun uint64     // calls so far
	heard map[raft.ServerID]heard
	terms map[raft.ServerID]uint64 // the newest that each named
	next  chan struct{}            // closed by wake
}

// heard is the newest call that a follower answered: the term in which it was made, and its number.
type heard struct{ term, call uint64 }

func newWitness(t Transport) *witness {
	return &witness{Transport: t, heard: map[raft.ServerID]heard{}, terms: map[raft.ServerID]uint64{}, next: make(chan struct{})}
}

// AppendEntries implements raft.Transport.
func (w *witness) AppendEntries(id raft.ServerID, addr raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	w.mu.Lock()
	w.begun++
	call := heard{req.Term, w.begun}
	w.mu.Unlock()
	err := w.Transport.AppendEntries(id, addr, req, resp)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.terms[id] = max(w.terms[id], resp.Term)
	if h := w.heard[id]; resp.Success && (call.term > h.term || call.term == h.term && call.call > h.call) {
		w.heard[id] = call
	}
	w.wakeLocked()
	return nil
}

// term returns the newest term that the server named: raft's loop, which takes note of it, may be waiting for the disk.
func (w *witness) term(id string) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.terms[raft.ServerID(id)]
}

// woken returns a channel that is closed by the next answer, or by wake.
func (w *witness) woken() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next
}

func (w *witness) wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wakeLocked()
}

func (w *witness) wakeLocked() {
	close(w.next)
	w.next = make(chan struct{})
}

// now returns the number of the last call that was begun.
func (w *witness) now() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.begun
}

// followed reports whether the server has answered, as a follower in that term, a call that was begun after now returned since.
func (w *witness) followed(id string, term, since uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.heard[raft.ServerID(id)]
	return h.term == term && h.call > since
}
