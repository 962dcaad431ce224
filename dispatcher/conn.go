package dispatcher

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"warden"
	"warden/api"
)

// Bounds of what a node may answer, in bytes of one message.
const (
	describeMessageMax = 128 << 10 // labels at their bounds need 40 KiB
	ackMessageMax      = 1 << 10
	reportMessageMax   = 64 << 10
	renewMessageMax    = warden.CSRBytesMax + 1<<10
	lineMessageMax     = warden.LogLineMax + 1<<10
	emptyMessageMax    = 1 << 10
)

func recvMax(bytes int) grpc.CallOption { return grpc.MaxCallRecvMsgSize(bytes) }

// watched is a connection that says when it was closed: by either side of it here, gRPC closes it at its first error.
type watched struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func watch(conn net.Conn) *watched { return &watched{Conn: conn, closed: make(chan struct{})} }

// Close closes the connection, and the channel with it.
func (w *watched) Close() error {
	w.once.Do(func() { close(w.closed) })
	return w.Conn.Close()
}

// clientOver returns a gRPC client that lives on conn alone: it is given out once, and when it ends the client can't dial
// again. TLS is the connection's own matter. Closing the client closes conn.
func clientOver(conn net.Conn) (*grpc.ClientConn, error) {
	once := make(chan net.Conn, 1)
	once <- conn
	return grpc.NewClient("passthrough:///node",
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the session's connection has ended")
			}
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(emptyMessageMax), grpc.MaxCallSendMsgSize(warden.MessageMax)),
		grpc.WithMaxHeaderListSize(8<<10),
		grpc.WithReadBufferSize(4<<10),
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableHealthCheck(),
		grpc.WithNoProxy(),
		grpc.WithIdleTimeout(0),
	)
}

// ended tells whether a stream's error ends it, and as what: an orderly end is no error.
func ended(err error) (bool, error) {
	switch {
	case err == nil:
		return false, nil
	case errors.Is(err, io.EOF):
		return true, nil
	}
	return true, api.FromError(err)
}
