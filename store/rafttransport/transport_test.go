package rafttransport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store/rafttransport"
)

const (
	alice = "alice00000000000000000000"
	bob   = "bob0000000000000000000000"
	carol = "carol00000000000000000000"
)

// served is bob's transport with one connection from alice, or whoever a test makes it, on the other end of a pipe.
type served struct {
	t     *rafttransport.Transport
	conn  net.Conn      // the caller's end
	ended chan struct{} // closed when Serve returned
}

func serve(t *testing.T, peerID string) served {
	t.Helper()
	tr := rafttransport.New(bob, nobody, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { tr.Close() })
	conn, theirs := pair(t)
	ended := make(chan struct{})
	go func() { defer close(ended); tr.Serve(theirs, peerID) }()
	return served{tr, conn, ended}
}

func nobody(context.Context, string) (net.Conn, error) { return nil, errors.New("nobody to dial") }

// pair returns both ends of a TCP connection over loopback.
func pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// caller is a transport that calls over conn whatever ID it is asked for.
func caller(t *testing.T, conn net.Conn) *rafttransport.Transport {
	tr := rafttransport.New(carol, func(context.Context, string) (net.Conn, error) { return conn, nil }, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { tr.Close() })
	return tr
}

func header(id string) raft.RPCHeader {
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(id)}
}

// heartbeat is what raft sends as one: only term and leader are set.
func heartbeat(h raft.RPCHeader) *raft.AppendEntriesRequest {
	//lint:ignore SA1019 the old field has to be checked as well
	return &raft.AppendEntriesRequest{RPCHeader: h, Term: 7, Leader: h.Addr}
}

func configuration() []byte {
	return raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: alice, Address: alice}}})
}

// calls lists a call of each kind with the given header.
func calls(h raft.RPCHeader) map[string]func(*rafttransport.Transport) error {
	return map[string]func(*rafttransport.Transport) error{
		"append": func(tr *rafttransport.Transport) error {
			return tr.AppendEntries(bob, bob, &raft.AppendEntriesRequest{RPCHeader: h, Term: 7, PrevLogEntry: 3,
				Entries: []*raft.Log{{Index: 4, Term: 7, Data: []byte("x")}}}, &raft.AppendEntriesResponse{})
		},
		"heartbeat": func(tr *rafttransport.Transport) error {
			return tr.AppendEntries(bob, bob, heartbeat(h), &raft.AppendEntriesResponse{})
		},
		"pipeline": func(tr *rafttransport.Transport) error {
			p, err := tr.AppendEntriesPipeline(bob, bob)
			if err != nil {
				return err
			}
			defer p.Close()
			f, err := p.AppendEntries(&raft.AppendEntriesRequest{RPCHeader: h, Term: 7, LeaderCommitIndex: 1}, &raft.AppendEntriesResponse{})
			if err != nil {
				return err
			}
			return f.Error()
		},
		"vote": func(tr *rafttransport.Transport) error {
			return tr.RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: h, Term: 7}, &raft.RequestVoteResponse{})
		},
		"pre-vote": func(tr *rafttransport.Transport) error {
			return tr.RequestPreVote(bob, bob, &raft.RequestPreVoteRequest{RPCHeader: h, Term: 7}, &raft.RequestPreVoteResponse{})
		},
		"timeout now": func(tr *rafttransport.Transport) error {
			return tr.TimeoutNow(bob, bob, &raft.TimeoutNowRequest{RPCHeader: h}, &raft.TimeoutNowResponse{})
		},
		"snapshot": func(tr *rafttransport.Transport) error {
			return tr.InstallSnapshot(bob, bob, &raft.InstallSnapshotRequest{RPCHeader: h, SnapshotVersion: 1, Term: 7, Size: 4,
				Configuration: configuration()}, &raft.InstallSnapshotResponse{}, bytes.NewReader([]byte("data")))
		},
	}
}

// answer plays raft: it answers every call and counts those on each path.
type answer struct {
	mu                    sync.Mutex // guards the counts
	consumed, heartbeats_ int
	body                  []byte
}

func (a *answer) start(t *testing.T, tr *rafttransport.Transport) {
	tr.SetHeartbeatHandler(func(rpc raft.RPC) {
		a.mu.Lock()
		a.heartbeats_++
		a.mu.Unlock()
		rpc.Respond(&raft.AppendEntriesResponse{Success: true}, nil)
	})
	go func() {
		for { // the channel is never closed
			var rpc raft.RPC
			select {
			case rpc = <-tr.Consumer():
			case <-t.Context().Done():
				return
			}
			a.mu.Lock()
			a.consumed++
			a.mu.Unlock()
			var resp any
			switch rpc.Command.(type) {
			case *raft.AppendEntriesRequest:
				resp = &raft.AppendEntriesResponse{Success: true}
			case *raft.RequestVoteRequest:
				resp = &raft.RequestVoteResponse{}
			case *raft.RequestPreVoteRequest:
				resp = &raft.RequestPreVoteResponse{}
			case *raft.TimeoutNowRequest:
				resp = &raft.TimeoutNowResponse{}
			case *raft.InstallSnapshotRequest:
				b, _ := io.ReadAll(rpc.Reader)
				a.mu.Lock()
				a.body = b
				a.mu.Unlock()
				resp = &raft.InstallSnapshotResponse{Success: true}
			}
			rpc.Respond(resp, nil)
		}
	}()
}

func (a *answer) counts() (consumed, heartbeats int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.consumed, a.heartbeats_
}

func wait(t *testing.T, ended <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal(what, "did not happen")
	}
}

func TestEveryKindOfCallFromItsOwnSenderPasses(t *testing.T) {
	for name, call := range calls(header(alice)) {
		t.Run(name, func(t *testing.T) {
			s := serve(t, alice)
			var a answer
			a.start(t, s.t)
			if err := call(caller(t, s.conn)); err != nil {
				t.Fatalf("%s from its own sender: %v", name, err)
			}
			consumed, beats := a.counts()
			if want := name == "heartbeat"; (beats == 1) != want || (consumed == 1) == want {
				t.Errorf("%s: consumed %d, on the fast path %d", name, consumed, beats)
			}
			if name == "snapshot" && string(a.body) != "data" {
				t.Errorf("snapshot body = %q", a.body)
			}
		})
	}
}

// TestAnotherNodesNameIsRefused covers the consumer, the heartbeat fast path, and the connection, which must end.
func TestAnotherNodesNameIsRefused(t *testing.T) {
	headers := map[string]raft.RPCHeader{
		"other":         header(carol),
		"other id":      {ProtocolVersion: 3, ID: []byte(carol), Addr: []byte(alice)},
		"other address": {ProtocolVersion: 3, ID: []byte(alice), Addr: []byte(carol)},
		"no id":         {ProtocolVersion: 3, Addr: []byte(alice)},
		"no address":    {ProtocolVersion: 3, ID: []byte(alice)},
		"none":          {},
		"prefix":        header(alice[:10]),
		"self":          header(bob),
	}
	for hname, h := range headers {
		for name, call := range calls(h) {
			t.Run(hname+"/"+name, func(t *testing.T) {
				s := serve(t, alice)
				var a answer
				a.start(t, s.t)
				err := call(caller(t, s.conn))
				if err == nil {
					t.Errorf("%s with header %q passed", name, hname)
				}
				wait(t, s.ended, "the end of the connection")
				if consumed, beats := a.counts(); consumed+beats != 0 {
					t.Errorf("%s with header %q reached raft: consumed %d, on the fast path %d", name, hname, consumed, beats)
				}
			})
		}
	}
}

func TestHeartbeatWithAnOlderFieldOfAnotherIsRefused(t *testing.T) {
	for _, req := range []*raft.AppendEntriesRequest{
		{RPCHeader: header(alice), Term: 7, Leader: []byte(carol)},                   // fast path
		{RPCHeader: header(alice), Term: 7, Leader: []byte(carol), PrevLogEntry: 1},  // consumer
		{Term: 7, Leader: []byte(carol)},                                             // fast path, nothing but the older field
		{RPCHeader: raft.RPCHeader{Addr: []byte(carol)}, Term: 7, PrevLogEntry: 100}, // consumer
	} {
		s := serve(t, alice)
		var a answer
		a.start(t, s.t)
		if err := caller(t, s.conn).AppendEntries(bob, bob, req, &raft.AppendEntriesResponse{}); err == nil {
			t.Errorf("AppendEntries(%+v) passed", req)
		}
		wait(t, s.ended, "the end of the connection")
		if consumed, beats := a.counts(); consumed+beats != 0 {
			t.Errorf("AppendEntries(%+v) reached raft", req)
		}
	}
}

func TestRefusalIsAnswered(t *testing.T) {
	s := serve(t, alice)
	err := caller(t, s.conn).RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: header(carol), Term: 9}, &raft.RequestVoteResponse{})
	want := fmt.Sprintf("checking raft call: node %s speaks as %q", alice, carol)
	if err == nil || err.Error() != want {
		t.Errorf("RequestVote as another = %v, want %s", err, want)
	}
}

// TestWhatRaftWouldEndTheProcessOver: raft v1.8 panics on each of these.
func TestWhatRaftWouldEndTheProcessOver(t *testing.T) {
	entry := func(e *raft.Log) *raft.AppendEntriesRequest {
		return &raft.AppendEntriesRequest{RPCHeader: header(alice), Term: 7, PrevLogEntry: 1, Entries: []*raft.Log{e}}
	}
	for name, req := range map[string]any{
		"empty entry":             entry(nil),
		"broken configuration":    entry(&raft.Log{Index: 2, Type: raft.LogConfiguration, Data: []byte{0xc1, 0xff}}),
		"kind of old versions":    entry(&raft.Log{Index: 2, Type: raft.LogAddPeerDeprecated, Data: []byte{0xc1}}),
		"unknown kind":            entry(&raft.Log{Index: 2, Type: 77}),
		"snapshot, configuration": &raft.InstallSnapshotRequest{RPCHeader: header(alice), SnapshotVersion: 1, Configuration: []byte{0xc1}},
		"snapshot, version":       &raft.InstallSnapshotRequest{RPCHeader: header(alice), Configuration: configuration()},
		"snapshot, size":          &raft.InstallSnapshotRequest{RPCHeader: header(alice), SnapshotVersion: 1, Configuration: configuration(), Size: -1},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, alice)
			var a answer
			a.start(t, s.t)
			var err error
			switch r := req.(type) {
			case *raft.AppendEntriesRequest:
				err = caller(t, s.conn).AppendEntries(bob, bob, r, &raft.AppendEntriesResponse{})
			case *raft.InstallSnapshotRequest:
				err = caller(t, s.conn).InstallSnapshot(bob, bob, r, &raft.InstallSnapshotResponse{}, bytes.NewReader(nil))
			}
			if err == nil {
				t.Error("passed")
			}
			wait(t, s.ended, "the end of the connection")
			if consumed, beats := a.counts(); consumed+beats != 0 {
				t.Error("reached raft")
			}
		})
	}
}

// TestBytesThatAreNoCall: garbage, frames cut at every byte, and lengths that promise gigabytes end the connection and nothing else.
func TestBytesThatAreNoCall(t *testing.T) {
	rec := &recorder{}
	caller(t, rec).RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: header(alice), Term: 7}, &raft.RequestVoteResponse{})
	frame := rec.sent.Bytes()
	if len(frame) < 50 {
		t.Fatalf("recorded a frame of %d bytes", len(frame))
	}
	inputs := map[string][]byte{
		"unknown call": {0xff},
		"text":         []byte("GET / HTTP/1.1\r\n\r\n"),
		"bin32":        binary.BigEndian.AppendUint32([]byte{0, 0x81, 0xa4, 'T', 'e', 'r', 'm', 0xc6}, 0xffffffff),
		"array32":      binary.BigEndian.AppendUint32([]byte{0, 0x81, 0xa7, 'E', 'n', 't', 'r', 'i', 'e', 's', 0xdd}, 0xffffffff),
		"map32":        binary.BigEndian.AppendUint32([]byte{1, 0xdf}, 0xffffffff),
		"deep":         append([]byte{0}, bytes.Repeat([]byte{0x81}, 100_000)...),
		"nested":       append([]byte{0, 0x81, 0xa1, 'x'}, bytes.Repeat([]byte{0x91}, 1_000_000)...),
	}
	for i := range frame {
		inputs[fmt.Sprintf("cut at %d", i)] = frame[:i]
	}
	for i := 0; i < len(frame); i += 7 {
		b := bytes.Clone(frame)
		b[i] ^= 0x55
		inputs[fmt.Sprintf("changed at %d", i)] = b
	}
	s := serve(t, alice)
	var a answer
	a.start(t, s.t)
	for name, in := range inputs {
		mine, theirs := pair(t)
		ended := make(chan struct{})
		go func() { defer close(ended); s.t.Serve(theirs, alice) }()
		mine.Write(in) // fails where the other side has closed already
		mine.(*net.TCPConn).CloseWrite()
		wait(t, ended, "the end of the connection after "+name)
		mine.Close()
	}
}

// recorder is a connection that keeps what is written and answers nothing.
type recorder struct {
	net.Conn
	sent bytes.Buffer
}

func (r *recorder) Write(b []byte) (int, error)      { return r.sent.Write(b) }
func (r *recorder) Read([]byte) (int, error)         { return 0, io.EOF }
func (r *recorder) Close() error                     { return nil }
func (r *recorder) SetDeadline(time.Time) error      { return nil }
func (r *recorder) SetReadDeadline(time.Time) error  { return nil }
func (r *recorder) SetWriteDeadline(time.Time) error { return nil }

// TestCloseEndsEverything: a Serve that waits for bytes, one that waits for raft, and a call that waits for an answer.
func TestCloseEndsEverything(t *testing.T) {
	s := serve(t, alice) // nobody consumes
	result := make(chan error, 1)
	out := caller(t, s.conn)
	go func() {
		result <- out.RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: header(alice)}, &raft.RequestVoteResponse{})
	}()
	idle, theirs := pair(t)
	defer idle.Close()
	ended := make(chan struct{})
	go func() { defer close(ended); s.t.Serve(theirs, alice) }()
	if err := s.t.Close(); err != nil {
		t.Error(err)
	}
	wait(t, s.ended, "the end of the busy connection")
	wait(t, ended, "the end of the idle connection")
	if err := <-result; err == nil {
		t.Error("the call had an answer")
	}
	_, late := pair(t)
	s.t.Serve(late, alice) // returns at once
	if _, err := late.Write([]byte{1}); err == nil {
		t.Error("Serve after Close left the connection open")
	}
	if err := s.t.Close(); err != nil {
		t.Errorf("second Close = %v", err)
	}
}

func TestCloseEndsACallThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		out := caller(t, conn)
		result := make(chan error, 1)
		go func() {
			result <- out.RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: header(carol)}, &raft.RequestVoteResponse{})
		}()
		synctest.Wait() // the call is under way
		if len(result) != 0 {
			t.Fatalf("the call did not wait: %v", <-result)
		}
		start := time.Now()
		out.Close()
		if err := <-result; err == nil || time.Since(start) != 0 {
			t.Errorf("the call ended with %v after %s", err, time.Since(start))
		}
	})
}

func TestAddressMustBeTheID(t *testing.T) {
	tr := rafttransport.New(alice, nobody, slog.New(slog.DiscardHandler))
	defer tr.Close()
	_, err := tr.AppendEntriesPipeline(bob, carol)
	if warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("AppendEntriesPipeline to bob at carol = %v", err)
	}
	if err := tr.RequestVote(bob, carol, &raft.RequestVoteRequest{}, &raft.RequestVoteResponse{}); warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("RequestVote to bob at carol = %v", err)
	}
	if got := tr.LocalAddr(); got != alice {
		t.Errorf("LocalAddr() = %s", got)
	}
	if got := tr.DecodePeer(tr.EncodePeer(bob, bob)); got != bob {
		t.Errorf("DecodePeer(EncodePeer(bob)) = %s", got)
	}
}

func TestServeRefusesItself(t *testing.T) {
	for _, peer := range []string{bob, ""} {
		s := serve(t, peer)
		wait(t, s.ended, "the end of the connection")
	}
}

// TestPipelineThatNobodyReads: calls fail where raft does not take their answers any more, as after one with a newer term.
func TestPipelineThatNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		tr := rafttransport.New(carol, func(context.Context, string) (net.Conn, error) { return mine, nil }, slog.New(slog.DiscardHandler))
		defer tr.Close()
		p, err := tr.AppendEntriesPipeline(bob, bob)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		for err == nil && time.Since(start) < time.Minute {
			_, err = p.AppendEntries(heartbeat(header(carol)), new(raft.AppendEntriesResponse))
		}
		if d := time.Since(start); !errors.Is(err, raft.ErrPipelineShutdown) || d > 3*rafttransport.Timeout {
			t.Errorf("after %s: %v", d, err)
		}
	})
}

// TestCallAfterARestart: a vote, and the call that hands leadership over, reach a manager that was restarted since the last one.
func TestCallAfterARestart(t *testing.T) {
	for _, kind := range []string{"vote", "pre-vote", "timeout now"} {
		call := calls(header(alice))[kind]
		if call == nil {
			t.Fatalf("no call %q", kind)
		}
		conns := make(chan net.Conn, 2)
		var running [2]*rafttransport.Transport
		var a answer
		for i := range running {
			mine, theirs := pair(t)
			conns <- mine
			running[i] = rafttransport.New(bob, nobody, slog.New(slog.DiscardHandler))
			a.start(t, running[i])
			go running[i].Serve(theirs, alice)
		}
		tr := rafttransport.New(alice, func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-conns:
				return c, nil
			default:
				return nil, errors.New("dialled too often")
			}
		}, slog.New(slog.DiscardHandler))
		if err := call(tr); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		running[0].Close() // as its process ends
		if err := call(tr); err != nil {
			t.Errorf("%s to a manager that was restarted: %v", kind, err)
		}
		tr.Close()
		running[1].Close()
	}
}

// TestHeartbeatsThatTakeTheirTurn: one that may change the term does not reach raft beside its loop.
func TestHeartbeatsThatTakeTheirTurn(t *testing.T) {
	s := serve(t, alice)
	s.t.Beside = func(term uint64) bool { return term == 6 } // the calls are of term 7
	var a answer
	a.start(t, s.t)
	call := caller(t, s.conn)
	if err := calls(header(alice))["heartbeat"](call); err != nil {
		t.Fatal(err)
	}
	older := heartbeat(header(alice))
	older.Term = 6
	if err := call.AppendEntries(bob, bob, older, &raft.AppendEntriesResponse{}); err != nil {
		t.Fatal(err)
	}
	if consumed, beats := a.counts(); consumed != 1 || beats != 1 {
		t.Errorf("consumed %d, on the fast path %d, want 1 of each", consumed, beats)
	}
}
