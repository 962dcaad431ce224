package door_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"warden"
	"warden/ca"
	"warden/door"
)

// pki is a root with one issuing CA, made at a given time.
type pki struct {
	id         string
	root       *x509.Certificate
	rootKey    crypto.Signer
	issuingDER []byte
	authority  *ca.Authority
}

func newPKI(t testing.TB, id string, at time.Time) *pki {
	t.Helper()
	der, rootKey, err := ca.NewRoot(id, at)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{id: id, rootKey: rootKey}
	if p.root, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	p.generation(t, 1, at)
	return p
}

// generation makes the issuing CA anew.
func (p *pki) generation(t testing.TB, n uint64, at time.Time) {
	t.Helper()
	der, key, err := ca.NewIssuing(p.root.Raw, p.rootKey, p.id, n, at)
	if err != nil {
		t.Fatal(err)
	}
	p.issuingDER = der
	if p.authority, err = ca.New(p.id, p.root.Raw, der, key); err != nil {
		t.Fatal(err)
	}
}

// leaf returns a certificate with its chain and its identity.
func (p *pki) leaf(t testing.TB, role, nodeID string, ttl time.Duration, at time.Time) (*tls.Certificate, ca.Identity) {
	t.Helper()
	key, err := ca.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	vetted, err := p.authority.Vet(ca.Request{CSR: csr, NodeID: nodeID, Role: role, Zone: warden.DefaultZone, TTL: ttl}, at)
	if err != nil {
		t.Fatal(err)
	}
	der, err := p.authority.Issue(vetted)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	id, err := ca.Read(parsed)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: p.authority.Chain(der), PrivateKey: key}, id
}

// refusal is what Config.Refused was told.
type refusal struct {
	door string
	id   ca.Identity
	err  error
}

// world is a port whose records are a map.
type world struct {
	*pki
	self     string
	cert     *tls.Certificate
	certID   ca.Identity
	server   *door.Server
	listener net.Listener
	stop     func() // ends Serve and waits for it
	served   chan error

	handlers map[string]func(context.Context, *door.Conn)
	entered  chan *door.Conn // what reached the default handler
	refused  chan refusal

	mu         sync.Mutex // guards all below
	records    map[string][32]byte
	shut       map[string]error // what Judge says of a node, before the record
	distrusted [][32]byte
	judge      func(door string, id ca.Identity, live bool) error // nil: by records
}

func (w *world) pinned(id ca.Identity) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	h, ok := w.records[id.NodeID]
	return ok && h == id.KeyHash
}

// judged is the records' word: the raft and peer doors want managers.
func (w *world) judged(name string, id ca.Identity, live bool) error {
	w.mu.Lock()
	own, err := w.judge, w.shut[id.NodeID]
	w.mu.Unlock()
	if own != nil {
		return own(name, id, live)
	}
	if err != nil {
		return err
	}
	if (name == warden.DoorRaft || name == warden.DoorPeer) && id.Role != ca.RoleManager {
		return warden.Errorf(warden.CodeWrongRole, "entering "+name, "a %s", id.Role)
	}
	return nil
}

func (w *world) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *world) record(id ca.Identity) { w.set(func() { w.records[id.NodeID] = id.KeyHash }) }
func (w *world) distrust(der []byte) {
	w.set(func() { w.distrusted = append(w.distrusted, sha256.Sum256(der)) })
}

// newWorld opens a port at l. Doors without a handler of their own keep the connection until it ends. began is when the
// cluster was made.
func newWorld(t testing.TB, l net.Listener, began time.Time, handlers map[string]func(context.Context, *door.Conn)) *world {
	t.Helper()
	w := &world{
		pki: newPKI(t, warden.NewID(), began), self: warden.NewID(), listener: l, handlers: handlers, records: map[string][32]byte{}, shut: map[string]error{},
		entered: make(chan *door.Conn, 1024), refused: make(chan refusal, 4096), served: make(chan error, 1),
	}
	w.cert, w.certID = w.leaf(t, ca.RoleManager, w.self, warden.LeafTTLDefault, time.Now())
	hold := func(ctx context.Context, c *door.Conn) { w.entered <- c; <-ctx.Done() }
	if w.handlers == nil {
		w.handlers = map[string]func(context.Context, *door.Conn){}
		for _, name := range []string{warden.DoorJoin, warden.DoorNode, warden.DoorPeer, warden.DoorRaft} {
			w.handlers[name] = hold
		}
	}
	w.server = door.New(door.Config{
		Certificate: func() *tls.Certificate { w.mu.Lock(); defer w.mu.Unlock(); return w.cert },
		Root:        func() *x509.Certificate { return w.root },
		Distrusted:  func() [][32]byte { w.mu.Lock(); defer w.mu.Unlock(); return slices.Clone(w.distrusted) },
		Judge:       w.judged,
		Pinned:      w.pinned,
		Refused:     func(d string, id ca.Identity, _ netip.Addr, err error) { w.refused <- refusal{d, id, err} },
		Handlers:    w.handlers,
		Logger:      slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(context.Background())
	go func() { w.served <- w.server.Serve(ctx, l) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-w.served; err != nil {
			t.Errorf("Serve = %v", err)
		}
		if n := w.server.Live(); n != 0 {
			t.Errorf("%d connections are in the table after Serve", n)
		}
	})
	t.Cleanup(w.stop)
	return w
}

// onLoopback is newWorld on a port of its own.
func onLoopback(t testing.TB, handlers map[string]func(context.Context, *door.Conn)) *world {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return newWorld(t, l, time.Now().Add(-1000*time.Hour), handlers)
}

func (w *world) addr() string { return w.listener.Addr().String() }

// dial shakes hands as a client that checks nothing.
func (w *world) dial(t testing.TB, cert *tls.Certificate, protocols ...string) (*tls.Conn, error) {
	t.Helper()
	cfg := &tls.Config{NextProtos: protocols, InsecureSkipVerify: true}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	conn, err := tls.Dial("tcp", w.addr(), cfg)
	if err == nil {
		t.Cleanup(func() { conn.Close() })
	}
	return conn, err
}

// in shakes hands and returns both ends of a connection that got in.
func (w *world) in(t testing.TB, cert *tls.Certificate, name string) (*tls.Conn, *door.Conn) {
	t.Helper()
	client, err := w.dial(t, cert, name)
	if err != nil {
		t.Fatal(err)
	}
	for {
		select {
		case c := <-w.entered:
			return client, c
		case r := <-w.refused:
			if r.door != "" { // else one that made room
				t.Fatalf("refused at %s: %v", r.door, r.err)
			}
		}
	}
}

// ended waits until the other side has closed the client's connection.
func ended(t testing.TB, client net.Conn) error {
	t.Helper()
	client.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := client.Read(make([]byte, 1))
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Fatal("the connection is still open")
	}
	if err == nil {
		t.Fatal("read a byte")
	}
	return err
}

// pipes is a listener of connections in memory: synctest's clock can't wait for sockets.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) dial() net.Conn {
	a, b := net.Pipe()
	p.conns <- b
	return a
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }
