package join_test

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/join"
	"warden/tokens"
)

// One exchange over loopback, both ends, without what Admit does: handshake, CSR made and checked, proofs, the grant judged.
func BenchmarkExchange(b *testing.B) {
	c := newCluster(b)
	req := newRequest(b)
	tok := c.mint(b, tokens.Rule{})
	chain := c.authority.Chain(c.leafFor(b, req))
	grant := &api.JoinGrant{ClusterId: c.id, NodeId: parse(b, chain)[0].Subject.CommonName, Chain: chain, Role: api.Role_ROLE_WORKER, Zone: "default",
		Lock: &api.LockState{}, Managers: &api.ManagerList{Index: 7}}
	c.server.Admit = func(context.Context, join.Admission) (*api.JoinGrant, error) { return grant, nil }
	c.server.Limiter, c.server.Logger = join.NewLimiter(), slog.New(slog.DiscardHandler)
	addr := c.serve(b, c.manager(b))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := join.Join(b.Context(), addr, tok, req, func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}); err != nil {
			b.Fatal(err)
		}
	}
}

// leafFor issues a worker's leaf for the request's key.
func (c *cluster) leafFor(b *testing.B, req join.Request) []byte {
	csr := must[[]byte](b)(ca.NewCSR(req.Key))
	v := must[*ca.Vetted](b)(c.authority.Vet(ca.Request{CSR: csr, NodeID: warden.NewID(), Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLDefault}, time.Now()))
	return must[[]byte](b)(c.authority.Issue(v))
}
