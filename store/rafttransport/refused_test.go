package rafttransport_test

import (
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store/rafttransport"
)

const callMax = 4 << 20 // bytes of a call here

// tell serves a connection of alice's and returns what Refused is told of it until it has ended.
func tell(t *testing.T, say func(w io.WriteCloser, call *rafttransport.Transport)) (told []warden.Code) {
	t.Helper()
	tr := rafttransport.New(bob, nobody, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { tr.Close() })
	tr.BoundCalls(callMax)
	tr.Refused = func(_ string, err error) { told = append(told, warden.CodeOf(err)) } // on Serve's goroutine, or while it waits
	go func() {                                                                        // plays raft
		for {
			select {
			case rpc := <-tr.Consumer():
				if rpc.Reader != nil {
					io.Copy(io.Discard, rpc.Reader)
				}
				rpc.Respond(&raft.AppendEntriesResponse{Success: true}, nil)
			case <-t.Context().Done():
				return
			}
		}
	}()
	mine, theirs := pair(t)
	ended := make(chan struct{})
	go func() { defer close(ended); tr.Serve(theirs, alice) }()
	say(mine, caller(t, mine))
	wait(t, ended, "the end of the connection")
	return told
}

// TestRefusedIsTold of what ends a connection, once; not of a peer that goes away.
func TestRefusedIsTold(t *testing.T) {
	const giant = "\x00\x81\xa7Entries\xdd\x00\x00\x04\x00" // an append of 1,024 entries of 1 MiB, of which the first begins below
	entry := "\x81\xa4Data\xc6\x00\x10\x00\x00" + strings.Repeat("x", 1<<20)
	for name, c := range map[string]struct {
		say  func(w io.WriteCloser, call *rafttransport.Transport)
		want warden.Code
	}{
		"no call": {func(w io.WriteCloser, _ *rafttransport.Transport) { io.WriteString(w, "GET / HTTP/1.1\r\n\r\n") }, warden.CodeInvalid},
		"another's name": {func(_ io.WriteCloser, call *rafttransport.Transport) {
			call.RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: header(carol), Term: 7}, &raft.RequestVoteResponse{})
			call.RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: header(carol), Term: 7}, &raft.RequestVoteResponse{})
		}, warden.CodeDenied},
		"too long": {func(w io.WriteCloser, _ *rafttransport.Transport) {
			err := error(nil)
			for io.WriteString(w, giant); err == nil; _, err = io.WriteString(w, entry) {
			}
		}, warden.CodeTooLarge},
		"goes away":             {func(w io.WriteCloser, _ *rafttransport.Transport) { w.Close() }, ""},
		"goes away in its call": {func(w io.WriteCloser, _ *rafttransport.Transport) { io.WriteString(w, giant+entry); w.Close() }, ""},
		"goes away after one": {func(w io.WriteCloser, call *rafttransport.Transport) {
			call.RequestVote(bob, bob, &raft.RequestVoteRequest{RPCHeader: header(alice), Term: 7}, &raft.RequestVoteResponse{})
			w.Close()
		}, ""},
	} {
		told := tell(t, c.say)
		if len(told) > 1 || len(told) == 0 && c.want != "" || len(told) == 1 && told[0] != c.want {
			t.Errorf("%s: told of %q, want %q", name, told, c.want)
		}
	}
}

// TestLongCallsPass: calls that are together longer than one may be, and a snapshot that is.
func TestLongCallsPass(t *testing.T) {
	told := tell(t, func(w io.WriteCloser, call *rafttransport.Transport) {
		entry := &raft.Log{Index: 4, Term: 7, Data: make([]byte, callMax/2)}
		for range 4 {
			if err := call.AppendEntries(bob, bob, &raft.AppendEntriesRequest{RPCHeader: header(alice), Term: 7, Entries: []*raft.Log{entry}}, &raft.AppendEntriesResponse{}); err != nil {
				t.Errorf("an append: %v", err)
			}
		}
		const size = 2 * callMax
		if err := call.InstallSnapshot(bob, bob, &raft.InstallSnapshotRequest{RPCHeader: header(alice), SnapshotVersion: 1, Term: 7, Size: size,
			Configuration: configuration()}, &raft.InstallSnapshotResponse{}, io.LimitReader(zeros{}, size)); err != nil {
			t.Errorf("a snapshot: %v", err)
		}
		w.Close()
	})
	if len(told) != 0 {
		t.Errorf("told of %q", told)
	}
}

// zeros is an endless reader.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
