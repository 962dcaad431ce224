package agent

import (
	"net"
	"sync"
)

// once is a listener of one connection that exists already. Its second Accept waits for Close.
type once struct {
	conn   *watched
	given  chan net.Conn // holds the connection until it is accepted
	closed chan struct{}
	close  sync.Once
}

func newOnce(conn net.Conn) *once {
	w := &watched{Conn: conn, closed: make(chan struct{})}
	l := &once{conn: w, given: make(chan net.Conn, 1), closed: make(chan struct{})}
	l.given <- w
	return l
}

// Accept returns the connection, and then net.ErrClosed once Close was called.
func (l *once) Accept() (net.Conn, error) {
	select {
	case c := <-l.given:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept; the connection stays.
func (l *once) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

// Addr returns the connection's own end.
func (l *once) Addr() net.Addr { return l.conn.LocalAddr() }

// watched is a connection that says when it was closed here: gRPC closes it at its first error.
type watched struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

// Close closes the connection, and the channel with it.
func (w *watched) Close() error {
	w.once.Do(func() { close(w.closed) })
	return w.Conn.Close()
}
