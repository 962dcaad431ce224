package dispatcher

import (
	"errors"
	"io"
	"net"
	"sync"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

// Bounds of what a node may answer, in bytes of one message.
const (
	describeMessageMax = 128 << 10 // labels at their bounds need 40 KiB
	ackMessageMax      = 1 << 10
	reportMessageMax   = 256 << 10 // an agent sends 128 KiB of reports and one more, or its description
	renewMessageMax    = warden.CSRBytesMax + 1<<10
	lineMessageMax     = warden.LogLineMax + 1<<10
	emptyMessageMax    = 1 << 10
)

func recvMax(bytes int) grpc.CallOption { return grpc.MaxCallRecvMsgSize(bytes) }

// watched is a connection that says once when it was closed: by either side of it here, gRPC closes it at its first error.
type watched struct {
	net.Conn
	once   sync.Once
	closed func()
}

func watch(conn net.Conn, closed func()) *watched { return &watched{Conn: conn, closed: closed} }

// Close closes the connection.
func (w *watched) Close() error {
	w.once.Do(w.closed)
	return w.Conn.Close()
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
