package daemon

import (
	"context"
	"crypto"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/join"
	"warden/tokens"
)

// TestJoinOutlastsACrowd: a manager that has too many attempts at hand is asked again, with the same key, until it has room.
func TestJoinOutlastsACrowd(t *testing.T) {
	p := newPKI(t, warden.NewID())
	token := must[tokens.Token](t)(tokens.Mint(p.authority.RootHash()))
	limiter := join.NewLimiter()
	var asked [][32]byte
	server := &join.Server{
		Limiter: limiter, Logger: slog.New(slog.DiscardHandler),
		Token: func(id string) ([32]byte, tokens.Rule, bool) {
			return token.Key(), tokens.Rule{Role: ca.RoleWorker, Zone: warden.DefaultZone, ExpiresAt: time.Now().Add(time.Hour)}, id == token.ID
		},
		Admit: func(_ context.Context, a join.Admission) (*api.JoinGrant, error) {
			if asked = append(asked, a.KeyHash); len(asked) == 1 { // as a manager behind this one, or an older one, may say
				return nil, warden.Errorf(warden.CodeLimited, "admitting", "too many at once")
			}
			id := warden.NewID()
			return &api.JoinGrant{ClusterId: p.id, NodeId: id, Chain: p.chain(t, a.CSR, id, ca.RoleWorker), Role: api.Role_ROLE_WORKER, Zone: warden.DefaultZone}, nil
		},
	}
	own := must[crypto.Signer](t)(ca.NewKey())
	chain := p.chain(t, must[[]byte](t)(ca.NewCSR(own)), warden.NewID(), ca.RoleManager)
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.Close()
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			server.Serve(t.Context(), tls.Server(conn, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{warden.DoorJoin},
				Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: own}}, SessionTicketsDisabled: true}))
		}
	})
	for range 129 { // the address has had its failures, and gets two more a second
		limiter.Failed(netip.MustParseAddr("127.0.0.1"), time.Now())
	}
	key := must[crypto.Signer](t)(ca.NewKey())
	grant, err := (&Daemon{}).askToJoin(t.Context(), &api.LocalJoinRequest{Addresses: []string{l.Addr().String()}}, token, join.Request{Key: key, Hostname: "node"})
	if err != nil || grant.GetNodeId() == "" {
		t.Fatalf("askToJoin = %v, %v, want a grant", grant, err)
	}
	if len(asked) != 2 || asked[0] != asked[1] {
		t.Errorf("%d attempts got through, want two by the same key", len(asked))
	}
}
