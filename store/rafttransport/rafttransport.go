// Package rafttransport carries raft's calls between managers over connections that others have authenticated.
//
// It neither listens nor knows of TLS: it is given a function that dials a node by ID, and accepted connections with the ID that
// TLS proved. It does not judge whether a node may take part; the door does, and closes connections.
//
// Invariants:
//   - A server's raft address is its node ID. An outbound call goes to the node whose ID it names.
//   - A call that came in is handed to raft only if its header's ID and address, and the older field that names its
//     sender, are the peer of the connection that it came on: on the consumer channel and on the heartbeat fast path, for every kind
//     of call. Otherwise it gets an error, and the connection is closed.
//   - What raft would end the process over (a configuration that does not decode, an empty entry, a kind of entry of old
//     versions) is refused likewise, and so is a call that is longer than any of ours.
//
// Beside raft's calls it carries one of our own, on connections that carry nothing else: what time it is (clock.go). Only here may it be
// asked, since managers whose leaves are all past their end enter by this door alone, and must agree on a time before they can be renewed.
//
// Trust: an authenticated manager may say what it likes in raft's own terms, as raft trusts its members; it cannot say so in another's
// name. Lengths within a call are bounded by what raft's decoder reads from the connection, and that by callBytesMax.
//
// References: hashicorp/raft v1.8, net_transport.go (wire format, pooling, pipelining, of which all is reused here).
package rafttransport

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"

	"warden"
)

const (
	// Timeout bounds dialling and each call; raft stretches it for a snapshot by its size.
	Timeout = 5 * time.Second
	// connsPerPeer is how many idle connections to one peer are kept: replication, heartbeats and votes.
	connsPerPeer = 3
	// callBytesMax bounds a call, a snapshot's content aside: above the longest append, which is 128 entries (package store) of
	// warden.CommandBytes. raft's decoder has no bound of its own.
	callBytesMax = 160 * warden.CommandBytes
)

// Transport is a raft.Transport, raft.WithPreVote and raft.WithClose. All methods are safe for concurrent use.
type Transport struct {
	// Refused is told once of each connection that is ended for what came on it; nil: nobody is. Set it before the first Serve.
	Refused func(nodeID string, err error)
	// Beside reports whether a heartbeat of that term may be handled beside raft's loop, as raft v1.8 would have it of each. There it may
	// change the term under the loop's feet: a leader that is about to append an entry would give it the term of its successor. So it
	// should be a follower's of that term; others take their turn. nil: all may. Set it before the first Serve.
	Beside func(term uint64) bool
	// Now is what others are told who ask for the time, time.Now unless set. Set it before the first question.
	Now func() time.Time
	// DialClock dials for Clock, as New's dial unless set. Set it before the first Clock.
	DialClock func(ctx context.Context, nodeID string) (net.Conn, error)

	localID  string
	callMax  int64 // callBytesMax, but in tests
	logger   *slog.Logger
	out      *raft.NetworkTransport // calls out; accepts nothing
	fresh    *raft.NetworkTransport // as out, but keeps no connection for a later call
	stream   *dialer                // of out
	again    *dialer                // of fresh
	consumer chan raft.RPC
	closed   chan struct{}

	mu        sync.Mutex     // guards what follows; held for moments only
	heartbeat func(raft.RPC) // nil until raft sets it
	isClosed  bool
	serving   sync.WaitGroup // calls of Serve; added to under mu while not closed
}

var (
	_ raft.Transport   = (*Transport)(nil)
	_ raft.WithPreVote = (*Transport)(nil)
	_ raft.WithClose   = (*Transport)(nil)
)

// New returns a transport of the node localID. dial returns a connection that is authenticated as the node that it names, and heeds its
// context. The goroutine that New starts ends with Close.
func New(localID string, dial func(ctx context.Context, nodeID string) (net.Conn, error), logger *slog.Logger) *Transport {
	t := &Transport{
		Now: time.Now, DialClock: dial,
		localID:  localID,
		callMax:  callBytesMax,
		logger:   logger,
		stream:   newDialer(localID, dial),
		again:    newDialer(localID, dial),
		consumer: make(chan raft.RPC),
		closed:   make(chan struct{}),
	}
	t.out, t.fresh = network(t.stream, connsPerPeer, logger), network(t.again, 0, logger)
	return t
}

// network returns raft's transport over s, which keeps some idle connections to each peer.
func network(s raft.StreamLayer, idle int, logger *slog.Logger) *raft.NetworkTransport {
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: s, MaxPool: idle, Timeout: Timeout, Logger: HCLog(logger), MsgpackUseNewTimeFormat: true,
	})
}

// Close ends all calls and connections, in and out, and returns when every Serve has. raft calls it when it is shut down.
func (t *Transport) Close() error {
	t.mu.Lock()
	if !t.isClosed {
		t.isClosed = true
		close(t.closed)
	}
	t.mu.Unlock()
	err := errors.Join(t.out.Close(), t.fresh.Close())
	t.out.CloseStreams()
	t.stream.closeAll()
	t.again.closeAll()
	t.serving.Wait()
	return err
}

// HangUp ends the connections that were dialled to nodes which gone names, with the calls on them: raft keeps some, idle, also to a server
// that was removed. gone is called under a lock and must not call the transport.
func (t *Transport) HangUp(gone func(nodeID string) bool) {
	t.stream.hangUp(gone)
	t.again.hangUp(gone)
}

// Consumer returns the channel of calls that came in and passed the check.
func (t *Transport) Consumer() <-chan raft.RPC { return t.consumer }

// LocalAddr returns the node's ID.
func (t *Transport) LocalAddr() raft.ServerAddress { return raft.ServerAddress(t.localID) }

// EncodePeer returns the address, which is the node ID. DecodePeer is its inverse.
func (t *Transport) EncodePeer(_ raft.ServerID, addr raft.ServerAddress) []byte { return []byte(addr) }

// DecodePeer is the inverse of EncodePeer.
func (t *Transport) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

// SetHeartbeatHandler sets what heartbeats that pass the check are handed to, past the consumer. raft calls it once, at its start.
func (t *Transport) SetHeartbeatHandler(f func(raft.RPC)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.heartbeat = f
}

// target refuses a server whose address is not its ID: the call would be answered by somebody else.
func target(id raft.ServerID, addr raft.ServerAddress) error {
	if string(id) != string(addr) {
		return warden.Errorf(warden.CodeInvalid, "calling manager "+string(id), "its raft address %.64q is not its ID", addr)
	}
	return nil
}

// AppendEntriesPipeline opens a connection on which calls need not wait for each other.
func (t *Transport) AppendEntriesPipeline(id raft.ServerID, addr raft.ServerAddress) (raft.AppendPipeline, error) {
	if err := target(id, addr); err != nil {
		return nil, err
	}
	p, err := t.out.AppendEntriesPipeline(id, addr)
	if err != nil {
		return nil, err
	}
	return pipeline{p}, nil
}

// pipeline ends itself where a call waits for longer than Timeout to be let in: raft v1.8 takes no answers any more once one had a newer
// term, and would wait for ever, also as it shuts down.
type pipeline struct{ raft.AppendPipeline }

func (p pipeline) AppendEntries(req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	t := time.AfterFunc(Timeout, func() { p.Close() })
	defer t.Stop()
	return p.AppendPipeline.AppendEntries(req, resp)
}

// AppendEntries calls the server.
func (t *Transport) AppendEntries(id raft.ServerID, addr raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := target(id, addr); err != nil {
		return err
	}
	return t.out.AppendEntries(id, addr, req, resp)
}

// twice makes a call, and makes it again on a new connection where its own broke: a server that was restarted has closed those that are
// kept idle here, and raft gives up a vote, or a hand-over, whose call fails. The server may get it twice.
func (t *Transport) twice(call func(*raft.NetworkTransport) error) error {
	err := call(t.out)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return call(t.fresh)
	}
	return err
}

// RequestVote calls the server.
func (t *Transport) RequestVote(id raft.ServerID, addr raft.ServerAddress, req *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if err := target(id, addr); err != nil {
		return err
	}
	return t.twice(func(n *raft.NetworkTransport) error { return n.RequestVote(id, addr, req, resp) })
}

// RequestPreVote calls the server. That there is such a method is what turns pre-votes on in raft.
func (t *Transport) RequestPreVote(id raft.ServerID, addr raft.ServerAddress, req *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if err := target(id, addr); err != nil {
		return err
	}
	return t.twice(func(n *raft.NetworkTransport) error { return n.RequestPreVote(id, addr, req, resp) })
}

// TimeoutNow calls the server.
func (t *Transport) TimeoutNow(id raft.ServerID, addr raft.ServerAddress, req *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	if err := target(id, addr); err != nil {
		return err
	}
	return t.twice(func(n *raft.NetworkTransport) error { return n.TimeoutNow(id, addr, req, resp) })
}

// InstallSnapshot calls the server and streams data after the request.
func (t *Transport) InstallSnapshot(id raft.ServerID, addr raft.ServerAddress, req *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if err := target(id, addr); err != nil {
		return err
	}
	return t.out.InstallSnapshot(id, addr, req, resp, data)
}
