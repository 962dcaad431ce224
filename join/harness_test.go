package join_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/join"
	"warden/tokens"
)

// cluster is a certificate authority, what the state holds of tokens, and a join server.
type cluster struct {
	id        string
	rootDER   []byte
	rootKey   crypto.Signer
	authority *ca.Authority
	server    *join.Server
	log       bytes.Buffer

	mu       sync.Mutex // guards all below and log
	keys     map[string][32]byte
	rules    map[string]tokens.Rule
	admitted []join.Admission
	alter    func(*api.JoinGrant) // what a lying manager does to its grant
}

func (c *cluster) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.Write(b)
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

func newCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{id: warden.NewID(), keys: map[string][32]byte{}, rules: map[string]tokens.Rule{}}
	began := time.Now().Add(-1000 * time.Hour)
	var err error
	if c.rootDER, c.rootKey, err = ca.NewRoot(c.id, began); err != nil {
		t.Fatal(err)
	}
	issuingDER, issuingKey, err := ca.NewIssuing(c.rootDER, c.rootKey, c.id, 1, began)
	if err != nil {
		t.Fatal(err)
	}
	c.authority = must[*ca.Authority](t)(ca.New(c.id, c.rootDER, issuingDER, issuingKey))
	c.server = &join.Server{Admit: c.admit, Token: c.token, Logger: slog.New(slog.NewTextHandler(c, nil))}
	return c
}

// mint makes a token and keeps what the state would.
func (c *cluster) mint(t testing.TB, rule tokens.Rule) tokens.Token {
	t.Helper()
	tok := must[tokens.Token](t)(tokens.Mint(c.authority.RootHash()))
	if rule.ExpiresAt.IsZero() {
		rule.ExpiresAt = time.Now().Add(time.Hour)
	}
	if rule.Role == "" {
		rule.Role, rule.Zone = ca.RoleWorker, "default"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keys[tok.ID], c.rules[tok.ID] = tok.Key(), rule
	return tok
}

func (c *cluster) token(id string) ([32]byte, tokens.Rule, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rule, ok := c.rules[id]
	return c.keys[id], rule, ok
}

// admit does what the store's command and the CA do: counts the use, issues by the token's role and zone.
func (c *cluster) admit(_ context.Context, a join.Admission) (*api.JoinGrant, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rule := c.rules[a.TokenID]
	repeat := false
	for _, b := range c.admitted {
		repeat = repeat || b.TokenID == a.TokenID && b.KeyHash == a.KeyHash
	}
	if !repeat {
		if rule.UsesMax != 0 && rule.Uses >= rule.UsesMax {
			return nil, warden.Errorf(warden.CodeUsedUp, "", "no uses left")
		}
		rule.Uses++
		c.rules[a.TokenID] = rule
	}
	v, err := c.authority.Vet(ca.Request{Parsed: a.Parsed, NodeID: warden.NewID(), Role: rule.Role, Zone: rule.Zone, TTL: warden.LeafTTLDefault}, time.Now())
	if err != nil {
		return nil, err
	}
	leaf, err := c.authority.Issue(v)
	if err != nil {
		return nil, err
	}
	chain, err := ca.ParseChain([][]byte{leaf})
	if err != nil {
		return nil, err
	}
	role := api.Role_ROLE_WORKER
	if rule.Role == ca.RoleManager {
		role = api.Role_ROLE_MANAGER
	}
	c.admitted = append(c.admitted, a)
	g := &api.JoinGrant{ClusterId: c.id, NodeId: chain[0].Subject.CommonName, Chain: c.authority.Chain(leaf), Role: role, Zone: rule.Zone,
		Lock: &api.LockState{}, Managers: &api.ManagerList{Index: 7}}
	if c.alter != nil {
		c.alter(g)
	}
	return g, nil
}

// certificate makes a node's certificate with its chain, issued at the given time.
func (c *cluster) certificate(t testing.TB, role string, at time.Time, ttl time.Duration) *tls.Certificate {
	t.Helper()
	key := must[crypto.Signer](t)(ca.NewKey())
	csr := must[[]byte](t)(ca.NewCSR(key))
	v := must[*ca.Vetted](t)(c.authority.Vet(ca.Request{CSR: csr, NodeID: warden.NewID(), Role: role, Zone: "default", TTL: ttl}, at))
	return &tls.Certificate{Certificate: c.authority.Chain(must[[]byte](t)(c.authority.Issue(v))), PrivateKey: key}
}

func (c *cluster) manager(t testing.TB) *tls.Certificate {
	return c.certificate(t, ca.RoleManager, time.Now(), warden.LeafTTLDefault)
}

func serverConfig(cert *tls.Certificate) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{warden.DoorJoin}, Certificates: []tls.Certificate{*cert}, SessionTicketsDisabled: true}
}

// listen gives each connection to serve, until the test ends.
func listen(t testing.TB, serve func(net.Conn)) (addr string) {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// serve runs the cluster's join server behind the certificate.
func (c *cluster) serve(t testing.TB, cert *tls.Certificate) (addr string) {
	return listen(t, func(conn net.Conn) { c.server.Serve(t.Context(), tls.Server(conn, serverConfig(cert))) })
}

func newRequest(t testing.TB) join.Request {
	t.Helper()
	return join.Request{Key: must[crypto.Signer](t)(ca.NewKey()), Hostname: "node-1", Advertise: ":2377", Version: "0.1.0"}
}

// raw is a joiner that does what the test says.
type raw struct {
	*tls.Conn
	export []byte
}

func dialRaw(t testing.TB, addr string) *raw {
	t.Helper()
	conn := must[*tls.Conn](t)(tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{warden.DoorJoin}}))
	t.Cleanup(func() { conn.Close() })
	return &raw{conn, exporterOf(t, conn)}
}

func exporterOf(t testing.TB, conn *tls.Conn) []byte {
	cs := conn.ConnectionState()
	return must[[]byte](t)(cs.ExportKeyingMaterial("EXPORTER-warden-join", nil, 32))
}

// valid returns a request that the server grants on this connection.
func (r *raw) valid(t testing.TB, tok tokens.Token) *api.JoinRequest {
	csr := must[[]byte](t)(ca.NewCSR(must[crypto.Signer](t)(ca.NewKey())))
	return &api.JoinRequest{TokenId: tok.ID, Csr: csr, Proof: tokens.Prove(tok.Key(), r.export, csr), Hostname: "node-1", TimeNs: time.Now().UnixNano()}
}

func frame(body []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

func frameOf(t testing.TB, m proto.Message) []byte {
	return frame(must[[]byte](t)(proto.Marshal(m)))
}

func readReply(t testing.TB, r io.Reader) *api.JoinReply {
	t.Helper()
	b := must[[]byte](t)(io.ReadAll(r))
	reply := new(api.JoinReply)
	if len(b) < 4 || int(binary.BigEndian.Uint32(b)) != len(b)-4 || proto.Unmarshal(b[4:], reply) != nil {
		t.Fatalf("the reply is not one frame: %d bytes", len(b))
	}
	if reply.Error != nil && (len(reply.Grant) != 0 || len(reply.Mac) != 0 || reply.Error.TimeNs == 0) {
		t.Fatal("an error carries a grant, or no time")
	}
	return reply
}

func wantCode(t testing.TB, what string, err error, code warden.Code) {
	t.Helper()
	if got := warden.CodeOf(err); got != code {
		t.Errorf("%s: error %v [%s], want [%s]", what, err, got, code)
	}
}

func parse(t testing.TB, ders [][]byte) []*x509.Certificate {
	return must[[]*x509.Certificate](t)(ca.ParseChain(ders))
}
