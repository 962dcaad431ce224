// Package door is a manager's one TCP port: TLS 1.3 only, and the ALPN protocol that a client offers picks the door, with a
// client-certificate policy and authorisation of its own, all before an application byte is read.
//
// A connection that has proven the key of its certificate enters the table of live connections before its record is judged,
// so that a commit in between can't slip past the cut. It stays there until it closes, is judged again on every change of its record
// (Rejudge), and is closed at its leaf's NotAfter. Session resumption is off: a resumed session would skip the checks.
//
// The package decides nothing about records itself: Config.Judge does. It trusts package ca for chains and nothing of what
// a client says but its certificate.
package door

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"warden"
	"warden/ca"
)

// Bounds of the port.
const (
	connsMax      = 4*warden.NodesMax + 1024 // live and authenticated
	connsPerNode  = 64                       // of one node; an honest one has a handful
	cutGrace      = 1500 * time.Millisecond  // a cut session may still say its one last message
	renewOnlyTime = time.Minute              // how long a session with an expired leaf may last: long enough to renew

	// handshakeBytesMax is what a client may send until its handshake is through: a hello and the longest chain. An honest one
	// sends some 5 KiB; crypto/tls alone would wait for, and keep, 256 KiB of a certificate message.
	handshakeBytesMax = 8<<10 + warden.ChainMax*warden.CertBytesMax
)

// Policy of a door.
type policy struct {
	certificate bool          // a client certificate is required and judged
	expired     time.Duration // how long past its end a leaf with the recorded key is still let in
	grace       time.Duration // between the cut and the close
}

var policies = map[string]policy{
	warden.DoorJoin:    {},
	warden.DoorNode:    {certificate: true, expired: warden.ExpiredKept, grace: cutGrace},
	warden.DoorPeer:    {certificate: true},
	warden.DoorRaft:    {certificate: true, expired: warden.ExpiredKept},
	warden.DoorControl: {certificate: true},
}

// Config wires a Server.
type Config struct {
	// Certificate returns this manager's present leaf with its whole chain, root included, and key.
	Certificate func() *tls.Certificate
	// Root returns the trust anchor.
	Root func() *x509.Certificate
	// Distrusted returns the SHA-256 sums of issuing certificates that must not be accepted any more.
	Distrusted func() [][32]byte
	// Judge decides by the current state whether the subject may pass the door. live: the connection exists already and the
	// record has changed. It is called for each new connection, too: in the handshake, and again after its entry in the table.
	Judge func(door string, id ca.Identity, live bool) error
	// Pinned reports whether the record of the subject holds the key of its leaf. Only then a leaf may be past its end, or come
	// from an issuing CA that is distrusted by now: the record vouches for the key, not the certificate.
	Pinned func(id ca.Identity) bool
	// Admit decides whether an address may try at a door at all, before the handshake goes on. nil: always.
	Admit func(door string, remote netip.Addr) error
	// Refused is told of each refusal, for logs and alarms. Before a hello the door is empty; a client that said nothing and went
	// away is none.
	Refused func(door string, id ca.Identity, remote netip.Addr, err error)
	// Handlers serve a door. They own the connection until they return; then it is closed. A door without one is shut.
	Handlers map[string]func(ctx context.Context, c *Conn)
	Logger   *slog.Logger
}

// Conn is one accepted connection: authenticated at every door but the join door.
type Conn struct {
	*tls.Conn
	Door    string
	ID      ca.Identity // zero at the join door
	Expired bool        // the leaf was past its end at the handshake
	Remote  netip.Addr

	raw    net.Conn
	turn   *turn               // while its handshake is under way
	chain  []*x509.Certificate // as presented
	ctx    context.Context
	cancel context.CancelCauseFunc
	once   sync.Once
}

// Context ends when the connection is cut or closed; context.Cause says why, with a code.
func (c *Conn) Context() context.Context { return c.ctx }

// Close closes the connection at once.
func (c *Conn) Close() error {
	c.cancel(warden.Errorf(warden.CodeUnavailable, "", "connection closed"))
	var err error
	c.once.Do(func() { err = c.raw.Close() })
	return err
}

// cut tells the handler why, and closes the connection after the door's grace.
func (c *Conn) cut(why error) {
	c.cancel(why)
	if g := policies[c.Door].grace; g > 0 {
		time.AfterFunc(g, func() { c.Close() })
		return
	}
	c.Close()
}

// Server accepts at the port. Safe for concurrent use.
type Server struct {
	cfg     Config
	shaking handshakes
	slots   chan struct{} // of handshakes whose turn it is

	mu   sync.Mutex // guards live; never held across I/O or Judge
	live map[string]map[*Conn]struct{}
	n    int
	wg   sync.WaitGroup
}

// New returns a server that serves nothing yet.
func New(cfg Config) *Server {
	return &Server{cfg: cfg, live: map[string]map[*Conn]struct{}{}, slots: make(chan struct{}, runtime.GOMAXPROCS(0))}
}

// Serve accepts from l until ctx ends, then closes l and every connection and waits for the handlers.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer s.wg.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		raw, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() || errors.Is(err, net.ErrClosed) {
				return warden.Recode(warden.CodeUnavailable, "accepting", err)
			}
			s.cfg.Logger.Warn("failed to accept", "error", err) // out of descriptors: wait for some to close
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		c := &Conn{raw: raw, Remote: addrOf(raw.RemoteAddr())}
		c.ctx, c.cancel = context.WithCancelCause(ctx)
		s.shaking.begin(c)
		s.wg.Go(func() { s.serve(ctx, c) })
	}
}

// serve is the whole life of one connection. ctx is Serve's.
func (s *Server) serve(ctx context.Context, c *Conn) {
	defer c.Close()
	defer s.shaking.end(c)

	var refusal error
	hctx, cancel := context.WithTimeout(c.ctx, warden.HandshakeTimeout)
	first := &bounded{Conn: c.raw, left: handshakeBytesMax, turn: turn{ctx: hctx, slots: s.slots}}
	c.Conn = tls.Server(first, &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			cfg, err := s.configFor(c, hello)
			if err != nil {
				refusal = err
			}
			return cfg, err
		},
	})
	c.raw.SetDeadline(time.Now().Add(warden.HandshakeTimeout))
	c.turn = &first.turn
	err := c.Conn.HandshakeContext(hctx)
	cancel()
	first.turn.end()
	c.turn, first.turn = nil, turn{}
	defer s.remove(c)
	if err != nil {
		if refusal == nil {
			refusal = broken(err, c.Door)
		}
		if refusal != nil && s.cfg.Refused != nil {
			s.cfg.Refused(c.Door, c.ID, c.Remote, refusal)
		}
		return
	}
	if policies[c.Door].certificate {
		if err := s.enter(c); err != nil {
			if s.cfg.Refused != nil {
				s.cfg.Refused(c.Door, c.ID, c.Remote, err)
			}
			return
		}
	}
	s.shaking.end(c)
	first.left = -1
	c.raw.SetDeadline(time.Time{})
	// Handlers need not look at a context, and a join's connection is in no table: the end of Serve cuts each one.
	defer context.AfterFunc(ctx, func() { c.cut(warden.Errorf(warden.CodeUnavailable, "", "the manager stops")) })()
	if policies[c.Door].certificate {
		end := c.ID.NotAfter
		if c.Expired {
			end = time.Now().Add(renewOnlyTime)
		}
		t := time.AfterFunc(time.Until(end), func() {
			c.cut(warden.Errorf(warden.CodeExpired, "serving "+c.Door, "the leaf's validity ended"))
		})
		defer t.Stop()
	}
	s.cfg.Handlers[c.Door](c.ctx, c)
}

// broken says what a handshake broke off as. A client that went away before its hello is nil: many look whether a port is open. One that
// has a certificate to show and breaks off by itself has failed no proof: a node that is killed does, and one that does not expect this
// manager's leaf, as where its list of managers is older than that. At the join door it is an attempt that failed.
func broken(err error, door string) error {
	const op = "shaking hands"
	switch code := warden.CodeOf(err); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return warden.Errorf(warden.CodeTimeout, op, "the client did not do its part within %s", warden.HandshakeTimeout)
	case code != warden.CodeInternal:
		return err
	case door == "" && gone(err):
		return nil
	case door == "":
		return warden.Recode(warden.CodeInvalid, op, err)
	case policies[door].certificate && (gone(err) || errors.Is(err, io.ErrUnexpectedEOF) || alerted(err)):
		return warden.Recode(warden.CodeUnavailable, op, fmt.Errorf("the client broke off: %w", err))
	}
	return warden.Recode(warden.CodeUnauthentic, op, err)
}

// gone reports whether a connection was closed.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed)
}

// alerted reports whether the other side has sent an alert.
func alerted(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error" // crypto/tls has no other name for it
}

// bounded is a connection of which no more than left bytes can be read; below 0: any. Until then it is its turn from the end of each read
// to the next read or write.
type bounded struct {
	net.Conn
	left int // set between reads only
	turn turn
}

// Read reads as far as the bound goes. Errors: CodeTooLarge beyond it.
func (b *bounded) Read(p []byte) (int, error) {
	if b.left < 0 {
		return b.Conn.Read(p)
	}
	if b.left == 0 {
		return 0, warden.Errorf(warden.CodeTooLarge, "shaking hands", "the client sends more than %d bytes", handshakeBytesMax)
	}
	b.turn.end()
	n, err := b.Conn.Read(p[:min(len(p), b.left)])
	b.left -= n
	if terr := b.turn.begin(); err == nil {
		err = terr
	}
	return n, err
}

// Write is the end of the turn: what the client says next is waited for.
func (b *bounded) Write(p []byte) (int, error) {
	b.turn.end()
	return b.Conn.Write(p)
}

// configFor picks the door by the one ALPN protocol that the client offers. Go would let a client without ALPN in, and would
// choose among several: neither passes here.
func (s *Server) configFor(c *Conn, hello *tls.ClientHelloInfo) (*tls.Config, error) {
	const op = "choosing a door"
	if len(hello.SupportedProtos) != 1 {
		return nil, warden.Errorf(warden.CodeInvalid, op, "the client offers %d ALPN protocols, want exactly one", len(hello.SupportedProtos))
	}
	name := hello.SupportedProtos[0]
	p, known := policies[name]
	if _, open := s.cfg.Handlers[name]; !known || !open {
		return nil, warden.Errorf(warden.CodeInvalid, op, "no door has the ALPN protocol that the client offers")
	}
	c.Door = name
	if s.cfg.Admit != nil {
		if err := s.cfg.Admit(name, c.Remote); err != nil {
			return nil, err
		}
	}
	cert := s.cfg.Certificate()
	if cert == nil {
		return nil, warden.Errorf(warden.CodeUnavailable, op, "this manager has no certificate yet")
	}
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{name},
		Certificates:           []tls.Certificate{*cert},
		SessionTicketsDisabled: true,
		ClientAuth:             tls.NoClientCert,
	}
	if p.certificate {
		cfg.ClientAuth = tls.RequireAnyClientCert
		cfg.VerifyConnection = func(cs tls.ConnectionState) error { return s.verify(c, p, cs) }
	}
	return cfg, nil
}

// verify runs in the handshake, before the client has proven that it has the leaf's key: chain and record are judged, so
// that most refusals reach the client as an alert, but nothing is done that a stranger who shows another's chain could spoil.
// So a wrong key, which raises an alarm, waits for its proof.
func (s *Server) verify(c *Conn, p policy, cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) > warden.ChainMax {
		return warden.Errorf(warden.CodeTooLarge, "verifying client", "%d certificates in the chain", len(cs.PeerCertificates))
	}
	now := time.Now()
	id, err := ca.Verify(cs.PeerCertificates, s.cfg.Root(), ca.VerifyOptions{Now: now, AllowExpiredFor: p.expired})
	if err != nil {
		return err
	}
	c.ID, c.chain, c.Expired = id, cs.PeerCertificates, now.After(id.NotAfter)
	c.turn.end() // Judge may wait
	if err := s.judge(c); warden.CodeOf(err) != warden.CodeWrongKey {
		return err
	}
	return c.turn.begin()
}

// enter runs when the handshake has proven the key, before a byte is read or written: table, then record, so that a commit
// between the two finds the connection.
func (s *Server) enter(c *Conn) error {
	if err := s.add(c); err != nil {
		return err
	}
	if err := s.judge(c); err != nil {
		return err
	}
	return context.Cause(c.ctx) // cut meanwhile
}

func (s *Server) judge(c *Conn) error {
	if err := s.trusted(c); err != nil {
		return err
	}
	return s.cfg.Judge(c.Door, c.ID, false)
}

// trusted refuses a leaf that is past its end, or of an issuing CA that is distrusted by now, unless the record holds its key.
func (s *Server) trusted(c *Conn) error {
	if s.cfg.Pinned(c.ID) {
		return nil
	}
	_, err := ca.Verify(c.chain, s.cfg.Root(), ca.VerifyOptions{Now: time.Now(), DistrustedIssuers: s.cfg.Distrusted()})
	return err
}

func (s *Server) add(c *Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.live[c.ID.NodeID]
	if s.n >= connsMax || len(m) >= connsPerNode {
		return warden.Errorf(warden.CodeLimited, "accepting", "%d connections are open, %d of them the node's", s.n, len(m))
	}
	if m == nil {
		m = map[*Conn]struct{}{}
		s.live[c.ID.NodeID] = m
	}
	m[c] = struct{}{}
	s.n++
	return nil
}

func (s *Server) remove(c *Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.live[c.ID.NodeID]
	if _, ok := m[c]; !ok {
		return
	}
	delete(m, c)
	s.n--
	if len(m) == 0 {
		delete(s.live, c.ID.NodeID)
	}
}

// of returns the live connections of a node; "" means all.
func (s *Server) of(nodeID string) []*Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*Conn
	for id, m := range s.live {
		if nodeID != "" && id != nodeID {
			continue
		}
		for c := range m {
			out = append(out, c)
		}
	}
	return out
}

// Rejudge judges the live connections of a node again and cuts those that may not pass any more; "" means all nodes, as
// after a restore or a change of the issuers that count. Call it after each change of the node's record is visible to Judge.
func (s *Server) Rejudge(nodeID string) {
	for _, c := range s.of(nodeID) {
		err := s.cfg.Judge(c.Door, c.ID, true)
		if err == nil {
			err = s.trusted(c)
		}
		if err != nil && c.ctx.Err() == nil {
			s.cfg.Logger.Warn("cut a live connection", "node_id", c.ID.NodeID, "door", c.Door, "reason", err, "code", warden.CodeOf(err))
			c.cut(err)
		}
	}
}

// Cut closes the live connections of a node for the reason given; "" means all.
func (s *Server) Cut(nodeID string, why error) {
	for _, c := range s.of(nodeID) {
		c.cut(why)
	}
}

// CutDoor closes the live connections at one door.
func (s *Server) CutDoor(door string, why error) {
	for _, c := range s.of("") {
		if c.Door == door {
			c.cut(why)
		}
	}
}

// Live returns the number of live authenticated connections.
func (s *Server) Live() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func addrOf(a net.Addr) netip.Addr {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}
