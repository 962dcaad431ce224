package fuzz_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"warden/store/rafttransport"
)

const (
	caller = "alice00000000000000000000"
	callee = "bob0000000000000000000000"
)

// FuzzRaftCalls: whatever a manager sends at the raft door ends with its connection, and what of it reaches raft is in that manager's own name
// and can be decoded by raft, which panics where it can't.
func FuzzRaftCalls(f *testing.F) {
	for _, id := range []string{caller, callee} {
		h := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(id)}
		configuration := raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: caller, Address: caller}}})
		var calls bytes.Buffer
		for _, call := range []func(*raft.NetworkTransport){
			func(tr *raft.NetworkTransport) {
				_ = tr.AppendEntries(callee, callee, &raft.AppendEntriesRequest{RPCHeader: h, Term: 7, PrevLogEntry: 3, Entries: []*raft.Log{{Index: 4, Term: 7, Data: []byte("x")},
					{Index: 5, Term: 7, Type: raft.LogConfiguration, Data: configuration}}}, &raft.AppendEntriesResponse{})
			},
			func(tr *raft.NetworkTransport) {
				//lint:ignore SA1019 the old field has to be checked as well
				_ = tr.AppendEntries(callee, callee, &raft.AppendEntriesRequest{RPCHeader: h, Term: 7, Leader: h.Addr}, &raft.AppendEntriesResponse{})
			},
			func(tr *raft.NetworkTransport) {
				_ = tr.RequestVote(callee, callee, &raft.RequestVoteRequest{RPCHeader: h, Term: 7}, &raft.RequestVoteResponse{})
			},
			func(tr *raft.NetworkTransport) {
				_ = tr.RequestPreVote(callee, callee, &raft.RequestPreVoteRequest{RPCHeader: h, Term: 7}, &raft.RequestPreVoteResponse{})
			},
			func(tr *raft.NetworkTransport) {
				_ = tr.TimeoutNow(callee, callee, &raft.TimeoutNowRequest{RPCHeader: h}, &raft.TimeoutNowResponse{})
			},
			func(tr *raft.NetworkTransport) {
				_ = tr.InstallSnapshot(callee, callee, &raft.InstallSnapshotRequest{RPCHeader: h, SnapshotVersion: 1, Term: 7, Size: 4, Configuration: configuration},
					&raft.InstallSnapshotResponse{}, bytes.NewReader([]byte("data")))
			},
		} {
			sent := said(call)
			if len(sent) == 0 {
				f.Fatal("a seed is empty")
			}
			f.Add(sent)
			calls.Write(sent)
		}
		f.Add(calls.Bytes())
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		tr := rafttransport.New(callee, func(context.Context, string) (net.Conn, error) { return nil, errors.New("nobody to dial") }, slog.New(slog.DiscardHandler))
		defer tr.Close()
		reached := func(rpc raft.RPC) {
			h, ok := rpc.Command.(raft.WithRPCHeader)
			if !ok || string(h.GetRPCHeader().ID) != caller || string(h.GetRPCHeader().Addr) != caller {
				t.Errorf("reached raft: %+v", rpc.Command)
			}
			switch c := rpc.Command.(type) {
			case *raft.AppendEntriesRequest:
				for _, e := range c.Entries {
					if e.Type == raft.LogConfiguration {
						raft.DecodeConfiguration(e.Data)
					}
				}
				rpc.Respond(&raft.AppendEntriesResponse{Success: true}, nil)
			case *raft.InstallSnapshotRequest:
				raft.DecodeConfiguration(c.Configuration)
				_, _ = io.Copy(io.Discard, rpc.Reader)
				rpc.Respond(&raft.InstallSnapshotResponse{Success: true}, nil)
			case *raft.RequestVoteRequest:
				rpc.Respond(&raft.RequestVoteResponse{}, nil)
			case *raft.RequestPreVoteRequest:
				rpc.Respond(&raft.RequestPreVoteResponse{}, nil)
			case *raft.TimeoutNowRequest:
				rpc.Respond(&raft.TimeoutNowResponse{}, nil)
			}
		}
		tr.SetHeartbeatHandler(reached)
		ended := make(chan struct{})
		go func() { defer close(ended); tr.Serve(&once{in: bytes.NewReader(sent)}, caller) }()
		for {
			select {
			case rpc := <-tr.Consumer():
				reached(rpc)
			case <-ended:
				return
			case <-time.After(time.Minute):
				t.Fatal("Serve does not end with its connection")
			}
		}
	})
}

// said returns what a call sends.
func said(call func(*raft.NetworkTransport)) []byte {
	c := &once{in: bytes.NewReader(nil)}
	tr := raft.NewNetworkTransport(dialed{c}, 1, time.Second, io.Discard)
	defer tr.Close()
	call(tr)
	return c.out.Bytes()
}

// dialed is a raft.StreamLayer whose only connection is there already.
type dialed struct{ conn net.Conn }

func (d dialed) Dial(raft.ServerAddress, time.Duration) (net.Conn, error) { return d.conn, nil }
func (dialed) Accept() (net.Conn, error)                                  { return nil, net.ErrClosed }
func (dialed) Close() error                                               { return nil }
func (dialed) Addr() net.Addr                                             { return &net.TCPAddr{} }

// once is a connection over which in comes, then its end.
type once struct {
	in  *bytes.Reader
	out bytes.Buffer
}

func (c *once) Read(b []byte) (int, error)     { return c.in.Read(b) }
func (c *once) Write(b []byte) (int, error)    { return c.out.Write(b) }
func (*once) Close() error                     { return nil }
func (*once) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (*once) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (*once) SetDeadline(time.Time) error      { return nil }
func (*once) SetReadDeadline(time.Time) error  { return nil }
func (*once) SetWriteDeadline(time.Time) error { return nil }
