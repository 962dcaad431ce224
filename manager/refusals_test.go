package manager

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"warden"
	"warden/api"
	"warden/door"
)

// TestWhatComesThroughADoorIsCounted: who passed a door and then does not speak as it should counts as refused there, too.
func TestWhatComesThroughADoorIsCounted(t *testing.T) {
	c := newCluster(t)
	peer, worker, gone := c.join(api.Role_ROLE_MANAGER, "peer"), c.join(api.Role_ROLE_WORKER, "worker"), c.join(api.Role_ROLE_WORKER, "gone")
	c.evict(gone)
	m := c.first.m
	counted := func(door string, code warden.Code) func() bool {
		return func() bool {
			for _, p := range m.counts.refusals.Read() {
				if p.A == door && p.B == string(code) {
					return true
				}
			}
			return false
		}
	}
	say := func(h *host, name, what string) {
		t.Helper()
		conn, err := door.Dial(t.Context(), c.first.address, name, h.cert, door.Expect{Root: c.root, NodeID: c.first.id, Loose: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, what); err != nil {
			t.Fatal(err)
		}
	}
	say(worker, warden.DoorNode, strings.Repeat("220 smtp ready\r\n", 20))
	await(t, "a session that never came to be is counted", counted("node", warden.CodeUnavailable))
	say(gone, warden.DoorNode, "\x00\x00\x00\x04\x00\x00\x00\x00\x00") // speaks HTTP/2, as an agent that does not wipe
	await(t, "a removed node is counted", counted("node", warden.CodeEvicted))
	say(peer, warden.DoorRaft, "GET / HTTP/1.1\r\n\r\n")
	await(t, "what is no raft call is counted", counted("raft", warden.CodeInvalid))

	cc, err := grpc.NewClient("passthrough:///first", grpc.WithTransportCredentials(door.Credentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return door.Dial(ctx, c.first.address, warden.DoorPeer, peer.cert, door.Expect{Root: c.root, NodeID: c.first.id, Loose: true})
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	client := api.NewPeerClient(cc)
	if _, err := client.Forward(t.Context(), &api.ForwardRequest{Request: make([]byte, warden.MessageMax+1)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a call of more than %d bytes = %v", warden.MessageMax, err)
	}
	await(t, "a call that is too large is counted", counted("peer", warden.CodeTooLarge))
	if counted("peer", warden.CodeInvalid)() {
		t.Error("a call that reads is counted")
	}
}
