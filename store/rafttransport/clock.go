package rafttransport

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"time"

	"warden"
)

// clockCall is all that comes on a connection of Clock: each such byte is answered by the time, in ns since 1970, 8 bytes, big-endian.
// No kind of raft call has this number (raft v1.8, net_transport.go).
const clockCall = 0xc1

// Clock asks one other manager for its time. Not safe for concurrent use, but for Close.
type Clock struct{ conn net.Conn }

// Clock connects to the node, by DialClock. Close it; the transport's Close does, too. Errors: those of the dial.
func (t *Transport) Clock(ctx context.Context, nodeID string) (*Clock, error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	stop := context.AfterFunc(t.stream.ctx, cancel)
	defer stop()
	conn, err := t.stream.connect(ctx, t.DialClock, nodeID)
	if err != nil {
		return nil, err
	}
	return &Clock{conn}, nil
}

// Wall returns what the manager's clock says, in ns since 1970, at some moment during the call. After an error, or when ctx has ended, the
// connection is of no more use. Errors: CodeUnavailable.
func (c *Clock) Wall(ctx context.Context) (int64, error) {
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	var answer [8]byte
	err := c.conn.SetDeadline(time.Now().Add(Timeout))
	if err == nil {
		_, err = c.conn.Write([]byte{clockCall})
	}
	if err == nil {
		_, err = io.ReadFull(c.conn, answer[:])
	}
	if err != nil {
		return 0, warden.Recode(warden.CodeUnavailable, "asking a manager for its time", err)
	}
	return int64(binary.BigEndian.Uint64(answer[:])), nil
}

// Close ends the connection.
func (c *Clock) Close() error { return c.conn.Close() }

// tellTime answers on a connection whose first byte was a clockCall, until it ends or something else comes.
func (c *inConn) tellTime() error {
	b := []byte{clockCall}
	for b[0] == clockCall {
		if _, err := c.Conn.Write(binary.BigEndian.AppendUint64(nil, uint64(c.now().UnixNano()))); err != nil {
			return err
		}
		if _, err := io.ReadFull(c.Conn, b); err != nil {
			return err
		}
	}
	return nil
}
