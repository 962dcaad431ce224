package manager

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/door"
	"warden/join"
	"warden/store"
	"warden/tokens"
)

var addresses atomic.Int32

// host is a node of a test: a manager where m is set.
type host struct {
	id, address string
	key         crypto.Signer
	cert        *tls.Certificate
	identity    ca.Identity
	m           *Manager
	stop        func()
}

// cluster is managers on loopback, with real stores.
type cluster struct {
	t         testing.TB
	id        string
	root      *x509.Certificate
	authority *ca.Authority // of the first generation
	issuing   []byte
	first     *host
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newAddress() string {
	n := addresses.Add(1)
	l, err := net.Listen("tcp", fmt.Sprintf("127.67.%d.%d:0", n/250+1, n%250+1))
	if err != nil {
		panic(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// issue makes a leaf under an authority.
func issueLeaf(t testing.TB, a *ca.Authority, nodeID, role string) (crypto.Signer, *tls.Certificate, ca.Identity) {
	t.Helper()
	key := must[crypto.Signer](t)(ca.NewKey())
	csr := must[[]byte](t)(ca.NewCSR(key))
	vetted := must[*ca.Vetted](t)(a.Vet(ca.Request{CSR: csr, NodeID: nodeID, Role: role, Zone: warden.DefaultZone, TTL: warden.LeafTTLDefault}, time.Now()))
	der := must[[]byte](t)(a.Issue(vetted))
	id := must[ca.Identity](t)(ca.Read(must[*x509.Certificate](t)(x509.ParseCertificate(der))))
	return key, &tls.Certificate{Certificate: a.Chain(der), PrivateKey: key}, id
}

// newCluster makes a cluster of one manager that serves.
func newCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{t: t, id: warden.NewID()}
	record, authority, err := NewClusterRecord(c.id, Maker{Now: time.Now(), LeafTTL: warden.LeafTTLDefault})
	if err != nil {
		t.Fatal(err)
	}
	c.authority, c.issuing = authority, record.IssuingCert
	c.root = must[*x509.Certificate](t)(x509.ParseCertificate(record.RootCert))
	h := &host{id: warden.NewID(), address: newAddress()}
	h.key, h.cert, h.identity = issueLeaf(t, authority, h.id, ca.RoleManager)
	node := &api.Node{
		Id: h.id, Hostname: "first", Role: api.Role_ROLE_MANAGER, DesiredRole: api.Role_ROLE_MANAGER, Zone: warden.DefaultZone,
		Availability: api.Availability_AVAILABILITY_DRAIN, Address: h.address, KeyHash: h.identity.KeyHash[:], JoinKeyHash: h.identity.KeyHash[:],
		LeafRole: api.Role_ROLE_MANAGER, LeafZone: warden.DefaultZone, LeafGeneration: 1,
	}
	cfg := c.config(h, nil)
	if err := Bootstrap(t.Context(), cfg, &api.Command{Actor: &api.Actor{Kind: "system", Name: "test"}, RequestId: warden.NewID(), Operations: []*api.Operation{
		store.Put(record, 0), store.Put(&api.Zone{Id: warden.NewID(), Name: warden.DefaultZone}, 0), store.Put(node, 0),
	}}); err != nil {
		t.Fatal(err)
	}
	c.start(h, cfg)
	c.first = h
	await(t, "the first manager is ready", h.m.Ready)
	return c
}

func (c *cluster) config(h *host, known *api.ManagerList) Config {
	return Config{
		ClusterID: c.id, NodeID: h.id, Dir: c.t.TempDir(), Listen: h.address, Root: c.root, Sealer: must[*autolock.Keyring](c.t)(autolock.NewKeyring()),
		Certificate: func() *tls.Certificate { return h.cert }, Known: func() *api.ManagerList { return known },
		Lock: func() LockStatus { return LockStatus{State: LockUnlocked} }, Logger: slog.New(slog.DiscardHandler),
	}
}

func (c *cluster) start(h *host, cfg Config) {
	c.t.Helper()
	h.m = must[*Manager](c.t)(Start(cfg))
	stopped := false
	h.stop = func() {
		if stopped {
			return
		}
		stopped = true
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := h.m.Stop(ctx); err != nil {
			c.t.Errorf("stopping %s: %v", h.id, err)
		}
	}
	c.t.Cleanup(h.stop)
}

// leader returns who leads among the hosts.
func (c *cluster) leader(hosts ...*host) *host {
	c.t.Helper()
	var found *host
	await(c.t, "one leads", func() bool {
		for _, h := range hosts {
			if h.m.store.IsLeader() && h.m.Ready() {
				found = h
				return true
			}
		}
		return false
	})
	return found
}

// leads sees to it that h leads. A loaded machine makes elections necessary, and another may win one at any moment: what h has to lead for
// is tried again with it, see attempt.
func (c *cluster) leads(h *host, others ...*host) {
	c.t.Helper()
	await(c.t, "it leads", func() bool {
		for _, o := range others {
			if o.m.store.IsLeader() {
				ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Second)
				o.m.StepDown(ctx) // fails where it leads no more
				cancel()
			}
		}
		return h.m.store.IsLeader() && h.m.Ready()
	})
}

// attempt makes a call until no election comes between, and returns what it came to.
func attempt(t testing.TB, what string, call func() error) (err error) {
	t.Helper()
	await(t, what, func() bool {
		err = call()
		return !api.Transient(err)
	})
	return err
}

// roles returns who leads of two hosts, and the other.
func (c *cluster) roles(a, b *host) (leader, other *host) {
	c.t.Helper()
	if c.leader(a, b) == b {
		return b, a
	}
	return a, b
}

// mint commits a token.
func (c *cluster) mint(role api.Role, change func(*api.Token)) tokens.Token {
	c.t.Helper()
	token := must[tokens.Token](c.t)(tokens.Mint(sha256.Sum256(c.root.Raw)))
	key := token.Key()
	r := &api.Token{Id: token.ID, Role: role, ExpiresNs: time.Now().Add(time.Hour).UnixNano(), Key: key[:], RootHash: token.RootHash[:]}
	if change != nil {
		change(r)
	}
	c.propose(store.Put(r, 0))
	return token
}

func (c *cluster) propose(ops ...*api.Operation) *api.Result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	cmd := &api.Command{Actor: &api.Actor{Kind: "uid", Name: "0"}, RequestId: warden.NewID(), Operations: ops}
	res, err := c.first.m.propose(ctx, cmd)
	for warden.CodeOf(err) == warden.CodeTimeout && ctx.Err() == nil { // an election came between: nobody knows, and the request ID makes it safe
		res, err = c.first.m.propose(ctx, cmd)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.first.m.store.WaitApplied(ctx, res.Index); err != nil {
		c.t.Fatal(err)
	}
	return res
}

// join admits a node through the join door; a manager is started, and has its vote.
func (c *cluster) join(role api.Role, name string) *host {
	c.t.Helper()
	h := c.admit(role, name)
	if role == api.Role_ROLE_MANAGER {
		await(c.t, name+" is a voter and ready", func() bool {
			members, _ := c.first.m.store.Configuration()
			for _, member := range members {
				if member.ID == h.id {
					return member.Voter && h.m.Ready()
				}
			}
			return false
		})
	}
	return h
}

// admit is join without the wait for the vote.
func (c *cluster) admit(role api.Role, name string) *host {
	c.t.Helper()
	h := &host{address: newAddress(), key: must[crypto.Signer](c.t)(ca.NewKey())}
	token := c.mint(role, nil)
	var grant *api.JoinGrant
	if err := attempt(c.t, name+" joins", func() (err error) {
		grant, err = join.Join(c.t.Context(), c.first.address, token, join.Request{Key: h.key, Hostname: name, Advertise: h.address}, nil)
		return err
	}); err != nil {
		c.t.Fatal(err)
	}
	h.id = grant.NodeId
	h.cert = &tls.Certificate{Certificate: grant.Chain, PrivateKey: h.key}
	h.identity = must[ca.Identity](c.t)(ca.Read(must[*x509.Certificate](c.t)(x509.ParseCertificate(grant.Chain[0]))))
	if role == api.Role_ROLE_MANAGER {
		c.start(h, c.config(h, grant.Managers))
	}
	return h
}

// record returns the node's record as the first manager has it.
func (c *cluster) record(h *host) *api.Node { return api.Clone(c.first.m.store.View().Node(h.id)) }

// evict commits the tombstone and the removal, as the control service does.
func (c *cluster) evict(h *host) {
	c.t.Helper()
	n := c.record(h)
	c.propose(store.Put(&api.Tombstone{Id: n.Id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone}, 0), store.Delete(n))
}

// dial shakes hands with a manager as the holder of a certificate, who is to be let in; the error is what the first read says, nil where
// the connection stays open.
func (c *cluster) dial(to *host, cert *tls.Certificate, name string) (*tls.Conn, error) {
	c.t.Helper()
	return c.knock(to, cert, name, 150*time.Millisecond)
}

// refused reports whether a manager refuses the holder of a certificate. A refusal takes its time: the client is done with the handshake
// before it is judged, and that may ask the leader. Who is let in and says nothing would be closed after warden.HandshakeTimeout.
func (c *cluster) refused(to *host, cert *tls.Certificate, name string) bool {
	c.t.Helper()
	_, err := c.knock(to, cert, name, warden.HandshakeTimeout/2)
	return err != nil
}

// knock is dial that listens for as long as it is told.
func (c *cluster) knock(to *host, cert *tls.Certificate, name string, patience time.Duration) (*tls.Conn, error) {
	c.t.Helper()
	conn, err := door.Dial(c.t.Context(), to.address, name, cert, door.Expect{Root: c.root, NodeID: to.id, Loose: true})
	if err != nil {
		return nil, err
	}
	c.t.Cleanup(func() { conn.Close() })
	conn.SetReadDeadline(time.Now().Add(patience))
	_, err = conn.Read(make([]byte, 1))
	if ne, ok := err.(net.Error); err == nil || ok && ne.Timeout() {
		return conn, nil
	}
	return nil, err
}

// cut waits for the end of a connection.
func cut(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 1024)
	for {
		_, err := conn.Read(b)
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Fatal("the connection is still open")
		}
		if err != nil {
			return
		}
	}
}

func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for stop := time.Now().Add(time.Minute); !ok(); <-tick.C {
		if time.Now().After(stop) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
