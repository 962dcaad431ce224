package rafttransport

import (
	"context"
	"io"
	"math"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"warden"
)

// addr is a node's ID as a net.Addr.
type addr string

func (addr) Network() string  { return "warden-raft" }
func (a addr) String() string { return string(a) }

// dialer is the raft.StreamLayer for calls out: it dials by node ID and accepts nothing.
type dialer struct {
	localID string
	dial    func(ctx context.Context, nodeID string) (net.Conn, error)
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc

	mu    sync.Mutex // guards conns; held for moments only
	conns map[*outConn]bool
}

func newDialer(localID string, dial func(ctx context.Context, nodeID string) (net.Conn, error)) *dialer {
	d := &dialer{localID: localID, dial: dial, conns: map[*outConn]bool{}}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d
}

// Dial implements raft.StreamLayer.
func (d *dialer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(d.ctx, timeout)
	defer cancel()
	return d.connect(ctx, d.dial, string(address))
}

// connect dials the node. Close ends the connection, but not the dial.
func (d *dialer) connect(ctx context.Context, dial func(ctx context.Context, nodeID string) (net.Conn, error), nodeID string) (net.Conn, error) {
	conn, err := dial(ctx, nodeID)
	if err != nil {
		return nil, warden.Wrap("dialling manager "+nodeID, err)
	}
	c := &outConn{Conn: conn, d: d, to: nodeID}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ctx.Err() != nil {
		conn.Close()
		return nil, raft.ErrTransportShutdown
	}
	d.conns[c] = true
	return c, nil
}

// Accept implements net.Listener: nothing ever comes in here.
func (d *dialer) Accept() (net.Conn, error) {
	<-d.ctx.Done()
	return nil, net.ErrClosed
}

// Close implements net.Listener.
func (d *dialer) Close() error { d.cancel(); return nil }

// Addr implements net.Listener.
func (d *dialer) Addr() net.Addr { return addr(d.localID) }

// closeAll closes every connection that was dialled, also those in use: a call that waits for an answer ends. After Close.
func (d *dialer) closeAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		c.Conn.Close()
	}
}

// hangUp closes every connection, also those in use, to the nodes that are gone.
func (d *dialer) hangUp(gone func(nodeID string) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		if gone(c.to) {
			delete(d.conns, c)
			go c.Conn.Close() // it may wait a few seconds for a peer that does not read
		}
	}
}

// outConn is a dialled connection; its dialer forgets it when it is closed.
type outConn struct {
	net.Conn
	d  *dialer
	to string // node ID
}

func (c *outConn) Close() error {
	c.d.mu.Lock()
	delete(c.d.conns, c)
	c.d.mu.Unlock()
	return c.Conn.Close()
}

// inConn is one accepted connection and, for raft's transport, the listener that accepts it and nothing else.
type inConn struct {
	net.Conn
	accept chan net.Conn // holds the connection until it is accepted
	stop   chan struct{} // closed by the listener's Close
	done   chan struct{} // closed when raft's transport is through with the connection

	stopOnce, doneOnce sync.Once

	callMax int64            // bytes of a call
	now     func() time.Time // this node's, to tell
	begun   bool             // the first byte was read; Read's alone

	mu      sync.Mutex // guards all below; held for moments only
	refused bool
	left    int64 // that may be read until the next call is admitted
	broken  bool  // the connection itself failed, or ended
}

func newInConn(conn net.Conn, callMax int64, now func() time.Time) *inConn {
	c := &inConn{Conn: conn, accept: make(chan net.Conn, 1), stop: make(chan struct{}), done: make(chan struct{}), callMax: callMax, left: callMax, now: now}
	c.accept <- c
	return c
}

// refuse makes the connection end: what raft's transport answers now is still written, then it reads the end.
func (c *inConn) refuse() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused = true
}

func (c *inConn) isRefused() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused
}

// allow lets the next call be read, and before it the snapshot that follows a call to install one.
func (c *inConn) allow(command any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = c.callMax
	if s, ok := command.(*raft.InstallSnapshotRequest); ok {
		c.left += min(s.Size, math.MaxInt64-c.left)
	}
}

// ended says what was wrong with what came, where that is why raft's transport is through with the connection; nil where the connection failed,
// or a call was refused.
func (c *inConn) ended() error {
	const op = "reading raft call"
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.stop:
		return nil
	default:
	}
	switch {
	case c.refused || c.broken:
		return nil
	case c.left <= 0:
		return warden.Errorf(warden.CodeTooLarge, op, "it is longer than %d bytes", c.callMax)
	}
	return warden.Errorf(warden.CodeInvalid, op, "it does not decode")
}

// Read implements net.Conn. A connection on which the other asks for the time is served in here, and seems to raft's transport to have
// nothing on it.
func (c *inConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	refused, left := c.refused, c.left
	c.mu.Unlock()
	if refused || left <= 0 {
		return 0, io.EOF
	}
	if !c.begun {
		left = 1
	}
	n, err := c.Conn.Read(b[:min(int64(len(b)), left)])
	if !c.begun && n == 1 && b[0] == clockCall {
		if n, err = 0, c.tellTime(); err == nil {
			return 0, io.EOF // something else came
		}
	}
	c.begun = c.begun || n > 0
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left -= int64(n)
	c.broken = c.broken || err != nil
	return n, err
}

// Write implements net.Conn.
func (c *inConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.broken = true
	}
	return n, err
}

// Close implements net.Conn. raft's transport calls it last of all.
func (c *inConn) Close() error {
	err := c.Conn.Close()
	c.doneOnce.Do(func() { close(c.done) })
	return err
}

// inListener is an inConn as the raft.StreamLayer of its own transport.
type inListener struct{ c *inConn }

// Dial implements raft.StreamLayer: nobody calls out here.
func (l inListener) Dial(raft.ServerAddress, time.Duration) (net.Conn, error) {
	return nil, raft.ErrTransportShutdown
}

// Accept returns the connection once.
func (l inListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.c.accept:
		return conn, nil
	case <-l.c.stop:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l inListener) Close() error {
	l.c.stopOnce.Do(func() { close(l.c.stop) })
	return nil
}

// Addr implements net.Listener.
func (l inListener) Addr() net.Addr { return l.c.LocalAddr() }
