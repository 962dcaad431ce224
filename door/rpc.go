package door

import (
	"context"
	"errors"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"warden"
	"warden/ca"
)

// Listener hands connections that a handler accepted to a gRPC server. Handle blocks until the connection ends, as a
// handler must.
type Listener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

// NewListener returns a listener for one gRPC server.
func NewListener() *Listener {
	return &Listener{conns: make(chan net.Conn), done: make(chan struct{})}
}

// Handle is a door's handler.
func (l *Listener) Handle(ctx context.Context, c *Conn) {
	select {
	case l.conns <- c:
		<-ctx.Done()
	case <-ctx.Done():
	case <-l.done:
	}
}

// Accept, Close and Addr make it a net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept. Connections go on.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr names the listener for logs.
func (l *Listener) Addr() net.Addr { return addr("door") }

type addr string

func (a addr) Network() string { return "warden" }
func (a addr) String() string  { return string(a) }

// Credentials are gRPC transport credentials for connections that a door has authenticated already: they do no handshake
// and pass the identity on.
func Credentials() credentials.TransportCredentials { return passed{} }

type passed struct{}

// Caller is the authenticated subject of a call.
type Caller struct {
	credentials.CommonAuthInfo
	ID ca.Identity
}

// AuthType names it for gRPC.
func (Caller) AuthType() string { return "warden-door" }

func (passed) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	dc, ok := c.(*Conn)
	if !ok {
		return nil, nil, errors.New("connection came through no door")
	}
	return c, Caller{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, ID: dc.ID}, nil
}

func (passed) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, Caller{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}

func (passed) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "warden-door"}
}
func (passed) Clone() credentials.TransportCredentials { return passed{} }
func (passed) OverrideServerName(string) error         { return nil }

// CallerOf returns who calls, as the door authenticated it. Errors: CodeDenied where the call came through no door.
func CallerOf(ctx context.Context) (ca.Identity, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(Caller); ok {
			return c.ID, nil
		}
	}
	return ca.Identity{}, warden.Errorf(warden.CodeDenied, "authenticating caller", "the call came through no door")
}
