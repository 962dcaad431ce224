package door_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"warden"
	"warden/ca"
	"warden/door"
)

// A client that does not offer exactly one known protocol gets no door, and no handler runs.
func TestOffersOfALPN(t *testing.T) {
	w := onLoopback(t, map[string]func(context.Context, *door.Conn){
		warden.DoorJoin: func(context.Context, *door.Conn) { t.Error("a handler ran") },
		warden.DoorNode: func(context.Context, *door.Conn) { t.Error("a handler ran") },
	})
	for name, offer := range map[string][]string{
		"none":             nil,
		"two known":        {warden.DoorJoin, warden.DoorNode},
		"known, unknown":   {warden.DoorJoin, "http/1.1"},
		"unknown":          {"http/1.1"},
		"another version":  {"warden-join/2"},
		"no handler":       {warden.DoorPeer},
		"the same twice":   {warden.DoorJoin, warden.DoorJoin},
		"case differs":     {"WARDEN-JOIN/1"},
		"operators' door":  {warden.DoorControl},
		"known in trimmed": {" " + warden.DoorJoin},
	} {
		conn, err := w.dial(t, nil, offer...)
		if err == nil {
			err = ended(t, conn)
		}
		if err == nil {
			t.Errorf("%s: let in", name)
		}
		if r := <-w.refused; warden.CodeOf(r.err) != warden.CodeInvalid || r.door != "" {
			t.Errorf("%s: refused at %q with %v", name, r.door, r.err)
		}
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	w := onLoopback(t, nil)
	_, err := tls.Dial("tcp", w.addr(), &tls.Config{NextProtos: []string{warden.DoorJoin}, InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
	if err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Fatalf("TLS 1.2 = %v", err)
	}
}

// Each door with each kind of certificate: "" is let in.
func TestDoorsAndCertificates(t *testing.T) {
	w := onLoopback(t, nil)
	now := time.Now()
	kinds := map[string]*tls.Certificate{"none": nil}
	make1 := func(kind, role string, ttl time.Duration, at time.Time, recorded bool) {
		cert, id := w.leaf(t, role, warden.NewID(), ttl, at)
		if recorded {
			w.record(id)
		}
		kinds[kind] = cert
	}
	make1("distrusted, pinned", ca.RoleManager, warden.LeafTTLDefault, now, true)
	make1("distrusted", ca.RoleManager, warden.LeafTTLDefault, now, false)
	make1("distrusted and expired, pinned", ca.RoleManager, warden.LeafTTLMin, now.Add(-500*time.Hour), true)
	w.distrust(w.issuingDER)
	w.generation(t, 2, now.Add(-900*time.Hour))
	make1("worker", ca.RoleWorker, warden.LeafTTLDefault, now, true)
	make1("manager", ca.RoleManager, warden.LeafTTLDefault, now, true)
	make1("manager, not recorded", ca.RoleManager, warden.LeafTTLDefault, now, false)
	make1("expired, pinned", ca.RoleManager, warden.LeafTTLMin, now.Add(-500*time.Hour), true)
	make1("expired", ca.RoleManager, warden.LeafTTLMin, now.Add(-500*time.Hour), false)
	make1("expired longer than kept, pinned", ca.RoleManager, warden.LeafTTLMin, now.Add(-850*time.Hour), true)
	make1("not yet valid", ca.RoleManager, warden.LeafTTLDefault, now.Add(100*time.Hour), true)
	other := newPKI(t, w.id, now.Add(-time.Hour)) // says the same cluster ID
	otherCert, otherID := other.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, now)
	w.record(otherID)
	kinds["other root"] = otherCert
	long := *kinds["manager"]
	for len(long.Certificate) <= warden.ChainMax {
		long.Certificate = append(long.Certificate, w.root.Raw)
	}
	kinds["long chain"] = &long
	bare := *kinds["manager"]
	bare.Certificate = bare.Certificate[:1]
	kinds["leaf alone"] = &bare
	thief := *kinds["manager"]
	thief.PrivateKey = kinds["worker"].PrivateKey
	kinds["another's key"] = &thief

	const in = warden.Code("")
	for kind, want := range map[string]map[string]warden.Code{
		"none":                             {warden.DoorNode: warden.CodeUnauthentic, warden.DoorPeer: warden.CodeUnauthentic, warden.DoorRaft: warden.CodeUnauthentic},
		"worker":                           {warden.DoorNode: in, warden.DoorPeer: warden.CodeWrongRole, warden.DoorRaft: warden.CodeWrongRole},
		"manager":                          {warden.DoorNode: in, warden.DoorPeer: in, warden.DoorRaft: in},
		"manager, not recorded":            {warden.DoorNode: in, warden.DoorPeer: in, warden.DoorRaft: in}, // Judge's matter
		"expired, pinned":                  {warden.DoorNode: in, warden.DoorPeer: warden.CodeExpired, warden.DoorRaft: in},
		"expired":                          {warden.DoorNode: warden.CodeExpired, warden.DoorPeer: warden.CodeExpired, warden.DoorRaft: warden.CodeExpired},
		"expired longer than kept, pinned": {warden.DoorNode: in}, // 850 h are under 90 days
		"not yet valid":                    {warden.DoorNode: warden.CodeClock, warden.DoorPeer: warden.CodeClock, warden.DoorRaft: warden.CodeClock},
		"distrusted, pinned":               {warden.DoorNode: in, warden.DoorPeer: in, warden.DoorRaft: in},
		"distrusted":                       {warden.DoorNode: warden.CodeRevoked, warden.DoorPeer: warden.CodeRevoked, warden.DoorRaft: warden.CodeRevoked},
		"distrusted and expired, pinned":   {warden.DoorNode: in, warden.DoorPeer: warden.CodeExpired, warden.DoorRaft: in},
		"other root":                       {warden.DoorNode: warden.CodeUnauthentic, warden.DoorPeer: warden.CodeUnauthentic, warden.DoorRaft: warden.CodeUnauthentic},
		"long chain":                       {warden.DoorNode: warden.CodeTooLarge, warden.DoorPeer: warden.CodeTooLarge, warden.DoorRaft: warden.CodeTooLarge},
		"leaf alone":                       {warden.DoorNode: warden.CodeUnauthentic, warden.DoorPeer: warden.CodeUnauthentic, warden.DoorRaft: warden.CodeUnauthentic},
		"another's key":                    {warden.DoorNode: warden.CodeUnauthentic},
	} {
		cert, ok := kinds[kind]
		if !ok {
			t.Fatalf("no kind %q", kind)
		}
		for name, code := range want {
			client, err := w.dial(t, cert, name)
			if err != nil {
				t.Fatalf("%s at %s: %v", kind, name, err) // TLS 1.3: a refusal of the client shows after its handshake
			}
			select {
			case c := <-w.entered:
				if code != in {
					t.Errorf("%s at %s: let in, want [%s]", kind, name, code)
				}
				if c.Door != name || c.ID.KeyHash == [32]byte{} || c.Expired != strings.Contains(kind, "expired") {
					t.Errorf("%s at %s: entered as %+v at %s, expired %t", kind, name, c.ID, c.Door, c.Expired)
				}
			case r := <-w.refused:
				if got := warden.CodeOf(r.err); got != code || r.door != name {
					t.Errorf("%s at %s: refused at %q with %v [%s], want [%s]", kind, name, r.door, r.err, got, code)
				}
				if err := ended(t, client); !strings.Contains(err.Error(), "tls: ") { // the alert, at the first read
					t.Errorf("%s at %s: the client read %v, want the alert", kind, name, err)
				}
			}
			client.Close()
		}
	}
	// The join door asks for no certificate, and takes none to heart.
	if _, c := w.in(t, kinds["other root"], warden.DoorJoin); c.ID != (ca.Identity{}) {
		t.Errorf("at the join door as %+v", c.ID)
	}
}

// A commit that takes a node's right away while its handshake is judged by the state before can't leave the connection alive.
func TestI4CommitDuringTheHandshakeCutsTheConnection(t *testing.T) {
	w := onLoopback(t, nil)
	cert, id := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.record(id)
	judging, committed := make(chan struct{}), make(chan struct{})
	w.judge = func(_ string, _ ca.Identity, live bool) error {
		if live {
			return warden.Errorf(warden.CodeEvicted, "", "gone")
		}
		if w.server.Live() == 0 {
			return nil // its key is not proven yet; it is judged again when it is, and in the table
		}
		close(judging)
		<-committed
		return nil // what the state said before the commit
	}
	go func() {
		<-judging
		w.server.Rejudge(id.NodeID)
		close(committed)
	}()
	client, err := w.dial(t, cert, warden.DoorPeer)
	if err == nil {
		ended(t, client)
	}
	select {
	case <-w.entered:
		t.Error("a handler ran")
	case <-w.refused:
	}
}

// The same without a script: dials and commits race.
func TestI4NoConnectionOutlivesItsRight(t *testing.T) {
	w := onLoopback(t, map[string]func(context.Context, *door.Conn){warden.DoorRaft: func(_ context.Context, c *door.Conn) { io.Copy(io.Discard, c) }})
	for range 40 {
		cert, id := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
		var evicted atomic.Bool
		w.set(func() {
			w.judge = func(string, ca.Identity, bool) error {
				if evicted.Load() {
					return warden.Errorf(warden.CodeEvicted, "", "gone")
				}
				return nil
			}
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			evicted.Store(true)
			w.server.Rejudge(id.NodeID)
		})
		client, err := w.dial(t, cert, warden.DoorRaft)
		wg.Wait()
		if err == nil {
			ended(t, client)
		}
	}
}

func TestRejudgeCutsTheNodeAloneAndSaysWhy(t *testing.T) {
	w := onLoopback(t, nil)
	a, aid := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	b, _ := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	client, conn := w.in(t, a, warden.DoorPeer)
	_, other := w.in(t, b, warden.DoorPeer)
	w.server.Rejudge("")
	if conn.Context().Err() != nil || other.Context().Err() != nil {
		t.Fatal("cut though nothing has changed")
	}
	w.set(func() { w.shut[aid.NodeID] = warden.Errorf(warden.CodeWrongRole, "", "demoted") })
	w.server.Rejudge("nobody")
	w.server.Rejudge(aid.NodeID)
	ended(t, client)
	if cause := context.Cause(conn.Context()); warden.CodeOf(cause) != warden.CodeWrongRole {
		t.Errorf("cause = %v", cause)
	}
	if other.Context().Err() != nil {
		t.Error("another node was cut")
	}
}

// A live connection whose key no record vouches for ends when its issuing CA is distrusted: what an evicted manager may have
// issued for itself does not outlast the rotation.
func TestDistrustCutsLiveConnections(t *testing.T) {
	w := onLoopback(t, nil)
	minted, _ := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	honest, id := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.record(id)
	client, conn := w.in(t, minted, warden.DoorRaft)
	_, stays := w.in(t, honest, warden.DoorRaft)
	w.distrust(w.issuingDER)
	w.server.Rejudge("")
	ended(t, client)
	if cause := context.Cause(conn.Context()); warden.CodeOf(cause) != warden.CodeRevoked {
		t.Errorf("cause = %v", cause)
	}
	if stays.Context().Err() != nil {
		t.Error("a pinned key was cut")
	}
}

func TestCutDoor(t *testing.T) {
	w := onLoopback(t, nil)
	cert, id := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.record(id)
	_, node := w.in(t, cert, warden.DoorNode)
	_, peer := w.in(t, cert, warden.DoorPeer)
	w.server.CutDoor(warden.DoorNode, warden.Errorf(warden.CodeUnavailable, "", "no lease"))
	<-node.Context().Done()
	if peer.Context().Err() != nil {
		t.Error("another door was cut")
	}
	w.server.Cut(id.NodeID, errors.New("all"))
	<-peer.Context().Done()
}

func TestOneNodeHasFewConnections(t *testing.T) {
	w := onLoopback(t, nil)
	cert, _ := w.leaf(t, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
	other, _ := w.leaf(t, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
	n := 0
	for ; n < 1000; n++ {
		client, err := w.dial(t, cert, warden.DoorNode)
		if err != nil {
			t.Fatal(err)
		}
		var r refusal
		select {
		case <-w.entered:
			continue
		case r = <-w.refused:
		}
		if warden.CodeOf(r.err) != warden.CodeLimited {
			t.Fatal(r.err)
		}
		ended(t, client)
		break
	}
	if n != 64 || w.server.Live() > 65 {
		t.Errorf("%d connections of one node, %d live", n, w.server.Live())
	}
	w.in(t, other, warden.DoorNode)
}

// Handshakes that are held open, from one address or from many, keep nobody out.
func TestFloodOfHandshakesIsBounded(t *testing.T) {
	w := onLoopback(t, nil)
	cert, _ := w.leaf(t, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
	hold := func(from string, n int) (held []net.Conn) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		for range n {
			c, err := d.Dial("tcp", w.addr())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			held = append(held, c)
		}
		return held
	}
	begun := time.Now()
	open := func(c net.Conn) bool { // without waiting: whoever goes for a newcomer goes before that one's handshake
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var said error
		if err := raw.Control(func(fd uintptr) {
			_, _, said = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		}); err != nil {
			t.Fatal(err)
		}
		return errors.Is(said, syscall.EAGAIN) || time.Since(begun) > warden.HandshakeTimeout // of a loaded machine: all have gone
	}
	const most = 1024
	one := hold("127.0.0.9", most+50)
	w.in(t, cert, warden.DoorNode) // accepted after all of them
	for _, c := range one[:51] {
		ended(t, c)
	}
	one = one[51:]
	if !open(one[0]) || !open(one[len(one)-1]) {
		t.Fatal("one went that was not the oldest")
	}
	// Others have their share, which is the greatest holder's to lose, oldest first, ...
	var many []net.Conn
	for _, from := range []string{"127.0.0.10", "127.0.0.11", "127.0.0.12"} {
		many = append(many, hold(from, 240)...)
	}
	w.in(t, cert, warden.DoorNode)
	gone := len(one) + len(many) + 1 - most
	for _, c := range one[:gone] {
		ended(t, c)
	}
	for _, c := range append(one[gone:], many...) {
		if !open(c) {
			t.Fatal("one went that was not the greatest holder's oldest")
		}
	}
	// ... and beyond that their own.
	hold("127.0.0.10", 100)
	w.in(t, cert, warden.DoorNode)
	ended(t, many[0])
	if c := many[240]; !open(c) {
		t.Error("one went for a newcomer from elsewhere that has its share")
	}
}

// Whoever shows the chain of another, which is no secret, and does not prove its key, takes no place of the other's, and
// raises no alarm.
func TestAChainWithoutItsKeyIsNobody(t *testing.T) {
	w := onLoopback(t, nil)
	cert, id := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.record(id)
	old, oldID := w.leaf(t, ca.RoleManager, id.NodeID, warden.LeafTTLDefault, time.Now())
	earlier := func(_ string, got ca.Identity, _ bool) error {
		if got.KeyHash == oldID.KeyHash {
			return warden.Errorf(warden.CodeWrongKey, "", "an earlier key")
		}
		return nil
	}
	w.judge = earlier
	another, err := ca.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, chain := range [][][]byte{cert.Certificate, old.Certificate} {
		for range 70 { // more than a node may have open
			conn, err := w.dial(t, &tls.Certificate{Certificate: chain, PrivateKey: another}, warden.DoorPeer)
			if err == nil {
				err = ended(t, conn)
			}
			if err == nil {
				t.Fatal("let in")
			}
			if r := <-w.refused; warden.CodeOf(r.err) != warden.CodeUnauthentic {
				t.Fatalf("refused for %v, want the missing key", r.err)
			}
		}
	}
	judged := make(chan struct{}, 70)
	w.set(func() { w.judge = func(string, ca.Identity, bool) error { judged <- struct{}{}; return nil } })
	for range 70 { // and with the handshake held open where the key would be proven
		raw, err := net.Dial("tcp", w.addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { raw.Close() })
		conn := tls.Client(&unproven{Conn: raw}, &tls.Config{NextProtos: []string{warden.DoorPeer}, InsecureSkipVerify: true,
			Certificates: []tls.Certificate{{Certificate: cert.Certificate, PrivateKey: another}}})
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
	}
	for range 70 {
		<-judged
	}
	w.set(func() { w.judge = earlier })
	w.in(t, cert, warden.DoorPeer)
	if n := w.server.Live(); n != 1 {
		t.Errorf("%d connections in the table, want the one that proved its key", n)
	}
	conn, err := w.dial(t, old, warden.DoorPeer)
	if err == nil {
		ended(t, conn)
	}
	r := <-w.refused
	for warden.CodeOf(r.err) == warden.CodeTimeout { // those that are held open, on a loaded machine
		r = <-w.refused
	}
	if warden.CodeOf(r.err) != warden.CodeWrongKey || r.id.NodeID != id.NodeID {
		t.Errorf("with the earlier key: %v of %s, want [wrong-key] of the node", r.err, r.id.NodeID)
	}
}

// unproven is a client's connection that leaves out the last two records of its second flight: CertificateVerify, Finished.
type unproven struct {
	net.Conn
	hello bool // is sent
}

func (u *unproven) Write(b []byte) (int, error) {
	if !u.hello {
		u.hello = true
		return u.Conn.Write(b)
	}
	starts := []int{}
	for at := 0; at < len(b); at += 5 + int(b[at+3])<<8 + int(b[at+4]) {
		starts = append(starts, at)
	}
	if _, err := u.Conn.Write(b[:starts[max(0, len(starts)-2)]]); err != nil {
		return 0, err
	}
	return len(b), nil
}

// A client that keeps sessions gets none to resume.
func TestNoSessionIsResumed(t *testing.T) {
	w := onLoopback(t, nil)
	cert, _ := w.leaf(t, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
	cfg := &tls.Config{NextProtos: []string{warden.DoorNode}, InsecureSkipVerify: true, Certificates: []tls.Certificate{*cert},
		ServerName: "manager", ClientSessionCache: tls.NewLRUClientSessionCache(4)}
	for range 2 {
		client, err := tls.Dial("tcp", w.addr(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		c := <-w.entered
		if client.ConnectionState().DidResume || c.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		c.Write([]byte("x")) // a ticket would come before
		io.ReadFull(client, make([]byte, 1))
		client.Close()
	}
	if _, ok := cfg.ClientSessionCache.Get("manager"); ok {
		t.Error("the client holds a session ticket")
	}
}

func TestHandlersEndClosesTheConnection(t *testing.T) {
	w := onLoopback(t, map[string]func(context.Context, *door.Conn){warden.DoorJoin: func(context.Context, *door.Conn) {}})
	client, err := w.dial(t, nil, warden.DoorJoin)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, client)
}

// Serve's end waits for handlers, and closes the connection under those that look at no context, at every door.
func TestServeWaitsForHandlers(t *testing.T) {
	var running atomic.Int32
	began := make(chan struct{}, 8)
	deaf := func(_ context.Context, c *door.Conn) {
		running.Add(1)
		defer running.Add(-1)
		began <- struct{}{}
		io.Copy(io.Discard, c)
	}
	w := onLoopback(t, map[string]func(context.Context, *door.Conn){warden.DoorJoin: deaf, warden.DoorRaft: deaf, warden.DoorPeer: deaf})
	cert, _ := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	for _, name := range []string{warden.DoorJoin, warden.DoorRaft, warden.DoorPeer} {
		if _, err := w.dial(t, cert, name); err != nil {
			t.Fatal(err)
		}
		<-began
	}
	w.stop()
	if n := running.Load(); n != 0 {
		t.Errorf("%d handlers run after Serve", n)
	}
}

// A listener that fails ends Serve, with its connections.
func TestServeEndsWithItsListener(t *testing.T) {
	l := newPipes()
	s := door.New(door.Config{Handlers: map[string]func(context.Context, *door.Conn){}})
	served := make(chan error, 1)
	go func() { served <- s.Serve(t.Context(), l) }()
	client := l.dial()
	l.Close()
	if err := <-served; warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("Serve = %v", err)
	}
	ended(t, client)
}

// A handshake that breaks off is told of: it counts against the address.
func TestBrokenHandshakeIsReported(t *testing.T) {
	w := onLoopback(t, nil)
	if _, err := tls.Dial("tcp", w.addr(), &tls.Config{NextProtos: []string{warden.DoorJoin}}); err == nil { // the system's roots: fails
		t.Fatal("verified by the system's roots")
	}
	if r := <-w.refused; r.door != warden.DoorJoin || warden.CodeOf(r.err) != warden.CodeUnauthentic {
		t.Errorf("told of %q, %v", r.door, r.err)
	}
}

// Who has a certificate to show and goes away instead has failed no proof.
func TestWhoGoesAwayHasNotFailed(t *testing.T) {
	w := onLoopback(t, nil)
	cert, id := w.leaf(t, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.record(id)
	raw, err := net.Dial("tcp", w.addr())
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, &tls.Config{NextProtos: []string{warden.DoorNode}, InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { raw.Close(); return cert, nil }})
	if conn.Handshake() == nil {
		t.Fatal("shook hands over a closed connection")
	}
	if r := <-w.refused; r.door != warden.DoorNode || warden.CodeOf(r.err) != warden.CodeUnavailable {
		t.Errorf("told of %q, %v", r.door, r.err)
	}
}

// What is no hello is told of, too, at no door; who only looks whether the port is open is not.
func TestNoHelloIsReported(t *testing.T) {
	w := onLoopback(t, nil)
	looks, err := net.Dial("tcp", w.addr())
	if err != nil {
		t.Fatal(err)
	}
	looks.Close()
	for _, said := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff", "\x17\x03\x03\x00\x05hello", "\x16\x03\x01\x00\x04\x02\x00\x00\x00"} {
		c, err := net.Dial("tcp", w.addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, said); err != nil {
			t.Fatal(err)
		}
		if r := <-w.refused; r.door != "" || warden.CodeOf(r.err) != warden.CodeInvalid {
			t.Errorf("%q: told of %q, %v", said, r.door, r.err)
		}
	}
}

// A client may send as much in a handshake as the longest chain needs, and no more: it is all kept until the handshake is through.
func TestHandshakesAreBoundedInBytes(t *testing.T) {
	w := onLoopback(t, nil)
	key, err := ca.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for bytes, want := range map[int]warden.Code{warden.ChainMax * warden.CertBytesMax: warden.CodeUnauthentic, 48 << 10: warden.CodeTooLarge, 250 << 10: warden.CodeTooLarge} {
		cert := &tls.Certificate{Certificate: [][]byte{make([]byte, bytes)}, PrivateKey: key}
		if conn, err := w.dial(t, cert, warden.DoorNode); err == nil {
			ended(t, conn)
		}
		if r := <-w.refused; r.door != warden.DoorNode || warden.CodeOf(r.err) != want {
			t.Errorf("%d bytes of certificates: told of %q, %v, want [%s]", bytes, r.door, r.err, want)
		}
	}
}

// Who lost its place to a newcomer has not failed: a fleet behind one address that comes at once is not counted as guessing.
func TestWhoGivesWayHasNotFailed(t *testing.T) {
	w := onLoopback(t, nil)
	a, b := net.Pipe()
	go tls.Client(a, &tls.Config{NextProtos: []string{warden.DoorJoin}, InsecureSkipVerify: true}).Handshake() // ends with the pipe
	hello := make([]byte, 16<<10)
	n, err := b.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	b.Close()
	const most, more = 1024, 150
	begun := time.Now()
	for range most + more {
		c, err := net.Dial("tcp", w.addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write(hello[:n]); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil { // the manager waits for the end of the handshake
			t.Fatal(err)
		}
	}
	slow, failed := time.Since(begun) > warden.HandshakeTimeout, 0
	for range more {
		if r := <-w.refused; warden.CodeOf(r.err) != warden.CodeUnavailable && !(slow && warden.CodeOf(r.err) == warden.CodeTimeout) { // of a loaded machine
			failed++
		}
	}
	if failed != 0 {
		t.Errorf("%d of %d were refused for more than want of room", failed, more)
	}
}
