package door_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/ca"
	"warden/door"
)

// inBubble runs f on a port in memory, under a clock of its own. The bubble fails where a goroutine is left behind.
func inBubble(t *testing.T, handlers map[string]func(context.Context, *door.Conn), f func(t *testing.T, w *world, l *pipes)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := newPipes()
		w := newWorld(t, l, time.Now(), handlers)
		f(t, w, l)
		w.stop()
	})
}

// shake shakes hands over a connection in memory.
func shake(t *testing.T, l *pipes, cert *tls.Certificate, name string) *tls.Conn {
	t.Helper()
	cfg := &tls.Config{NextProtos: []string{name}, InsecureSkipVerify: true}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	client := tls.Client(l.dial(), cfg)
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	return client
}

func TestSlowClientEndsAtTheHandshakeTimeout(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, w *world, l *pipes) {
		start := time.Now()
		silent, slow := l.dial(), l.dial()
		if _, err := slow.Write([]byte{22, 3, 1, 0, 200}); err != nil { // the head of a hello
			t.Fatal(err)
		}
		for _, c := range []net.Conn{silent, slow} {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("read a byte")
			}
			if d := time.Since(start); d != warden.HandshakeTimeout {
				t.Errorf("closed after %s", d)
			}
			if r := <-w.refused; r.door != "" || warden.CodeOf(r.err) != warden.CodeTimeout {
				t.Errorf("told of %q, %v", r.door, r.err)
			}
		}
	})
}

func TestConnectionEndsAtNotAfter(t *testing.T) {
	const life = 2 * warden.LeafTTLMin
	inBubble(t, nil, func(t *testing.T, w *world, l *pipes) {
		cert, id := w.leaf(t, ca.RoleManager, warden.NewID(), life, time.Now())
		w.record(id)
		start := time.Now()
		client := shake(t, l, cert, warden.DoorPeer)
		conn := <-w.entered
		if _, err := client.Read(make([]byte, 1)); err == nil {
			t.Error("read a byte")
		}
		if d := time.Since(start); d != life {
			t.Errorf("closed after %s, the leaf lived %s", d, life)
		}
		if cause := context.Cause(conn.Context()); warden.CodeOf(cause) != warden.CodeExpired {
			t.Errorf("cause = %v", cause)
		}
		// From now on the key must be recorded, and the session is for the renewal alone.
		time.Sleep(time.Hour)
		start = time.Now()
		client = shake(t, l, cert, warden.DoorNode)
		if conn = <-w.entered; !conn.Expired {
			t.Error("not marked as expired")
		}
		<-conn.Context().Done()
		if d := time.Since(start); d != time.Minute {
			t.Errorf("a session with an expired leaf was told to end after %s", d)
		}
		io.Copy(io.Discard, client)
	})
}

// A cut session may say its one last message: its context ends at once, the connection after the grace. Other doors have none.
func TestGraceOfACut(t *testing.T) {
	// Each handler stays until its connection is closed, as one that writes its last words.
	handlers := map[string]func(context.Context, *door.Conn){}
	entered := make(chan *door.Conn)
	for _, name := range []string{warden.DoorNode, warden.DoorRaft} {
		handlers[name] = func(_ context.Context, c *door.Conn) { entered <- c; io.Copy(io.Discard, c) }
	}
	inBubble(t, handlers, func(t *testing.T, w *world, l *pipes) {
		cert, id := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
		for name, grace := range map[string]time.Duration{warden.DoorNode: 1500 * time.Millisecond, warden.DoorRaft: 0} {
			client := shake(t, l, cert, name)
			conn := <-entered
			start := time.Now()
			w.server.Cut(id.NodeID, warden.Errorf(warden.CodeEvicted, "", "gone"))
			<-conn.Context().Done()
			if d := time.Since(start); d != 0 {
				t.Errorf("%s: told after %s", name, d)
			}
			client.Read(make([]byte, 1))
			if d := time.Since(start); d != grace {
				t.Errorf("%s: closed after %s, want %s", name, d, grace)
			}
		}
	})
}

// Connections of every kind leave no goroutine: the bubble would not end.
func TestNothingIsLeftBehind(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, w *world, l *pipes) {
		cert, _ := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
		shake(t, l, cert, warden.DoorRaft)
		shake(t, l, nil, warden.DoorJoin)
		l.dial().Close()
		l.dial()
		gone := shake(t, l, cert, warden.DoorPeer)
		gone.NetConn().Close()
	})
}

// deaf is a connection whose client reads nothing.
type deaf struct {
	net.Conn
	until <-chan struct{}
}

func (d deaf) Read([]byte) (int, error) { <-d.until; return 0, io.EOF }

// TestHandshakesTakeTurns: no more handshakes use the processors at once than there are, and none keeps its turn while it waits: for its
// client, which may take nothing, or for Judge.
func TestHandshakesTakeTurns(t *testing.T) {
	n := int32(4 * runtime.GOMAXPROCS(0))
	for _, c := range []struct {
		name, door         string
		certificate, judge bool // where the handshakes are held up
		deaf               bool
		want               int32 // how many are there at once
	}{
		{name: "at work", door: warden.DoorJoin, certificate: true, want: n / 4},
		{name: "in Judge", door: warden.DoorNode, judge: true, want: n},
		{name: "client takes nothing", door: warden.DoorJoin, deaf: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, l := newPKI(t, warden.NewID(), time.Now()), newPipes()
				own, _ := p.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
				node, _ := p.leaf(t, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
				goOn, through := make(chan struct{}), make(chan struct{}, 2*n)
				var there atomic.Int32
				hold := func(is bool) {
					if is {
						there.Add(1)
						<-goOn
					}
				}
				handler := func(context.Context, *door.Conn) { through <- struct{}{} }
				s := door.New(door.Config{
					Certificate: func() *tls.Certificate { hold(c.certificate); return own },
					Judge:       func(string, ca.Identity, bool) error { hold(c.judge); return nil },
					Root:        func() *x509.Certificate { return p.root }, Pinned: func(ca.Identity) bool { return true },
					Handlers: map[string]func(context.Context, *door.Conn){warden.DoorJoin: handler, warden.DoorNode: handler},
				})
				ctx, cancel := context.WithCancel(t.Context())
				served := make(chan error, 1)
				go func() { served <- s.Serve(ctx, l) }()
				var wg sync.WaitGroup
				for range n {
					var conn net.Conn = l.dial()
					if c.deaf {
						conn = deaf{conn, goOn}
					}
					client := tls.Client(conn, &tls.Config{NextProtos: []string{c.door}, InsecureSkipVerify: true, Certificates: []tls.Certificate{*node}})
					wg.Go(func() {
						client.Handshake()
						io.Copy(io.Discard, conn)
						conn.Close()
					})
				}
				synctest.Wait()
				if got := there.Load(); got != c.want {
					t.Errorf("%d of %d handshakes are there at once, want %d", got, n, c.want)
				}
				if !c.certificate { // another is not kept waiting
					shake(t, l, nil, warden.DoorJoin)
					<-through
				}
				close(goOn)
				for range n {
					if !c.deaf {
						<-through
					}
				}
				cancel()
				<-served
				wg.Wait()
			})
		})
	}
}
