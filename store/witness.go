package store

import (
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"warden"
)

// Transport is how a store calls others. It also votes beforehand, and can be closed.
type Transport interface {
	raft.Transport
	raft.WithPreVote
	raft.WithClose
}

// witness stands between raft and its transport, and does two things that raft v1.8 does not.
//
// It remembers which of its calls the others answered as followers of this manager. raft v1.8 takes every answer that it reads
// after a question for one to it (replication.go, notifyAll): of a leader that was paused also those that had lain there since before
// the pause, while another led. It also counts those of managers without a vote. Pipelined calls don't count here: a heartbeat is
// never among them.
//
// And it sends no entry to a server that the configuration has not (withhold).
type witness struct {
	Transport
	raft atomic.Pointer[raft.Raft] // nil while that is being started

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
	w.withhold(id, req)
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

// AppendEntriesPipeline implements raft.Transport.
func (w *witness) AppendEntriesPipeline(id raft.ServerID, addr raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := w.Transport.AppendEntriesPipeline(id, addr)
	if err != nil {
		return nil, err
	}
	return pipeline{p, w, id}, nil
}

// pipeline is one to a server.
type pipeline struct {
	raft.AppendPipeline
	w  *witness
	id raft.ServerID
}

// AppendEntries implements raft.AppendPipeline.
func (p pipeline) AppendEntries(req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	p.w.withhold(p.id, req)
	return p.AppendPipeline.AppendEntries(req, resp)
}

// InstallSnapshot implements raft.Transport.
func (w *witness) InstallSnapshot(id raft.ServerID, addr raft.ServerAddress, req *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if !w.isMember(id) {
		return warden.Errorf(warden.CodeUnavailable, "sending a snapshot to manager "+string(id), "it was removed")
	}
	return w.Transport.InstallSnapshot(id, addr, req, resp, data)
}

// withhold takes the entries out of a call to a server that the configuration has not. raft v1.8 tells the goroutine that replicates to
// a server to stop when that server is removed, but one that is still in a call, for as long as the server takes to answer, may
// afterwards take up news of an entry before that (replication.go, replicate), and sends all that the log has by then: for an evicted
// manager that would be the new keys. What was appended after the removal is read from the log after the configuration changed, so that
// this sees the change. Without entries the call asks for nothing, and the goroutine comes to its end.
func (w *witness) withhold(id raft.ServerID, req *raft.AppendEntriesRequest) {
	if len(req.Entries) > 0 && !w.isMember(id) {
		req.Entries, req.LeaderCommitIndex = nil, 0 // raft keeps to the same request: it takes nothing for sent
	}
}

// isMember reports whether the newest configuration, committed or not, has the server.
func (w *witness) isMember(id raft.ServerID) bool {
	r := w.raft.Load()
	return r != nil && slices.ContainsFunc(r.GetConfiguration().Configuration().Servers, func(s raft.Server) bool { return s.ID == id })
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
