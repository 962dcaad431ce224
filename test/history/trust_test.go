package history

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"warden"
	"warden/ca"
	"warden/join"
	"warden/tokens"
)

// impostor is who poses as a manager to joiners: a TLS server with a certificate that it has.
type impostor struct {
	what string
	cert tls.Certificate
}

// impostors returns all that there are: a cluster of their own, its manager with our root beside its chain, and a worker of ours.
func (c *client) impostors(t *joinToken) ([]impostor, error) {
	cluster, now := warden.NewID(), time.Now()
	root, rootKey, err1 := ca.NewRoot(cluster, now)
	issuing, issuingKey, err2 := ca.NewIssuing(root, rootKey, cluster, 1, now)
	key, err3 := ca.NewKey()
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	authority, err := ca.New(cluster, root, issuing, issuingKey)
	if err != nil {
		return nil, err
	}
	leaf, err := issue(authority, key, now)
	if err != nil {
		return nil, err
	}
	all := []impostor{{"a manager of another cluster", tls.Certificate{Certificate: authority.Chain(leaf), PrivateKey: key}}}
	t.mu.Lock()
	guests := slices.Clone(t.guests)
	t.mu.Unlock()
	for _, g := range guests {
		g.mu.Lock()
		if g.grant != nil {
			chain := g.grant.Chain
			all = append(all,
				impostor{"a manager of another cluster with our root beside", tls.Certificate{Certificate: append(authority.Chain(leaf), chain[len(chain)-1]), PrivateKey: key}},
				impostor{"a worker", tls.Certificate{Certificate: chain, PrivateKey: g.key}})
		}
		g.mu.Unlock()
		if len(all) > 1 {
			break
		}
	}
	return all, nil
}

func issue(authority *ca.Authority, key crypto.Signer, now time.Time) ([]byte, error) {
	csr, err := ca.NewCSR(key)
	if err != nil {
		return nil, err
	}
	parsed, err := ca.ParseCSR(csr)
	if err != nil {
		return nil, err
	}
	vetted, err := authority.Vet(ca.Request{Parsed: parsed, NodeID: warden.NewID(), Role: ca.RoleManager, Zone: warden.DefaultZone, TTL: time.Hour}, now)
	if err != nil {
		return nil, err
	}
	return authority.Issue(vetted)
}

// misled joins by way of each impostor: the joiner finds that out in the handshake, and has said nothing (I2).
func (c *client) misled(t *joinToken) {
	all, err := c.impostors(t)
	if err != nil {
		c.violated("I2", "making impostors: %v", err)
	}
	for _, who := range all {
		c.misledBy(who, t)
	}
}

func (c *client) misledBy(who impostor, t *joinToken) {
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{who.cert}, NextProtos: []string{warden.DoorJoin}})
	if err != nil {
		c.violated("I2", "listening: %v", err)
		return
	}
	var server sync.WaitGroup
	heard := 0
	server.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		heard, _ = conn.Read(make([]byte, 1))
	})
	_, code := c.stray(l.Addr().String(), t.token)
	l.Close()
	server.Wait()
	refusals := []warden.Code{warden.CodeWrongRoot, warden.CodeUnauthentic, warden.CodeWrongRole, warden.CodeWrongCluster, warden.CodeExpired, warden.CodeTimeout}
	if heard > 0 || !slices.Contains(refusals, code) {
		c.violated("I2", "%s answered a join: it ended with %q, and was told something: %v", who.what, code, heard > 0)
	}
}

// strayed joins by way of a manager with a token that pins another root. That it has the right secret must not matter: the history of
// the token shows no use.
func (c *client) strayed(at *member, t *joinToken) bool {
	other := t.token
	other.RootHash[c.rand.IntN(len(other.RootHash))] ^= 1
	dialled, code := c.stray(at.Address(), other)
	if dialled && code != warden.CodeWrongRoot && code != warden.CodeTimeout && code != warden.CodeUnavailable {
		c.violated("I2", "a join by %s, whose root is not the one that the token pins, ended with %q", at.Name, code)
	}
	return dialled
}

// stray makes a join that has to come to nothing.
func (c *client) stray(addr string, token tokens.Token) (dialled bool, code warden.Code) {
	key, err := ca.NewKey()
	if err != nil {
		return false, warden.CodeOf(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	dial := func(ctx context.Context, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}
	if from := c.members[c.rand.IntN(len(c.members))]; !isLoopback(addr) {
		dial = dialFrom(from)
	}
	_, err = join.Join(ctx, addr, token, join.Request{Key: key, Hostname: "stray"}, func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := dial(ctx, addr)
		dialled = err == nil
		return conn, err
	})
	if err == nil {
		return dialled, warden.Code("joined")
	}
	return dialled, warden.CodeOf(err)
}

func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	return err == nil && net.ParseIP(host).IsLoopback()
}

// wantOneWay: a join is one connection to the manager that it was told (I2).
func (r *run) wantOneWay(at *member, dials []string) {
	if len(dials) > 1 || len(dials) == 1 && dials[0] != at.Address() {
		r.violated("I2", "a join by %s dialled %s", at.Name, fmt.Sprint(dials))
	}
}
