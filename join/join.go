// Package join is the wire protocol of the door warden-join/1, both sides: how a node that holds nothing but a join token
// gets its identity from a manager that it has never seen.
//
// The joiner pins the cluster's root inside its first handshake (I2), sends a CSR and the proof that it holds the token, and
// takes no byte of the answer for true before the answer's MAC has shown that the manager holds the token too. The secret
// itself never crosses the wire; both proofs are bound to this TLS connection by its exporter, so that a relay in the middle
// or a replay on another connection proves nothing.
//
// It does not decide what a token allows (package tokens), make nodes or certificates (Server.Admit does, elsewhere), keep
// the granted identity, or try again. It has no listener: it is given established connections.
//
// Invariants: role, zone and ID come from the token and from Admit, never from the request (I1); an unknown token and a
// wrong secret are answered alike; an answer holds a grant or an error, never both; everything is bounded in size and time.
//
// The server trusts what Token and Admit tell it, and nothing in the request but the public key whose CSR the proof covers;
// host name, versions and addresses are the joiner's own word. The joiner trusts its token and its clock.
//
// # Frames
//
// One request and one reply, then the connection is closed. Each is a length of four bytes, big-endian, and that many bytes
// of protobuf: JoinRequest of at most JoinFrameMax, JoinReply of at most JoinReplyMax.
//
// References: RFC 8446 §7.5 (exporters), RFC 9266 (why an exporter binds the channel), DESIGN §2 and §3.
package join

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
)

// SkewMax is how far a joiner's clock may be from the manager's.
const SkewMax = 5 * time.Minute

const (
	exporterLabel = "EXPORTER-warden-join"
	exporterSize  = 32
	proofSize     = 32
	versionMax    = 64                        // bytes of a program's version
	advertiseMax  = 300                       // bytes of an address
	textMax       = 1024                      // bytes of an error's text that a joiner shows
	grantMax      = warden.JoinReplyMax - 128 // leaves room for the MAC
)

// exporter returns the secret that both ends of this very connection share, and nobody else.
func exporter(cs *tls.ConnectionState) ([]byte, error) {
	key, err := cs.ExportKeyingMaterial(exporterLabel, nil, exporterSize)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInternal, "exporting keying material", "%w", err)
	}
	return key, nil
}

// checkDoor refuses a connection that is not TLS 1.3 at the join door.
func checkDoor(cs *tls.ConnectionState) error {
	const op = "checking the connection"
	if !cs.HandshakeComplete || cs.Version != tls.VersionTLS13 {
		return warden.Errorf(warden.CodeUnsupported, op, "it is not TLS 1.3")
	}
	if cs.NegotiatedProtocol != warden.DoorJoin {
		return warden.Hint(warden.Errorf(warden.CodeUnsupported, op, "the other side does not speak %s", warden.DoorJoin),
			"check the address and that it is a manager's")
	}
	return nil
}

func writeFrame(w io.Writer, m proto.Message, limit int) error {
	const op = "sending frame"
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return warden.Errorf(warden.CodeInvalid, op, "%w", err)
	}
	if len(body) > limit {
		return warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d are allowed", len(body), limit)
	}
	if _, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)); err != nil {
		return network(op, err)
	}
	return nil
}

// readLength reads the head of a frame, readBody the rest. Nothing is allocated before the length has been judged.
func readLength(r io.Reader, limit int) (int, error) {
	const op = "receiving frame"
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, network(op, err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 {
		return 0, warden.Errorf(warden.CodeInvalid, op, "the frame is empty")
	}
	if int64(n) > int64(limit) {
		return 0, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d are allowed", n, limit)
	}
	return int(n), nil
}

func readBody(r io.Reader, n int) ([]byte, error) {
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, network("receiving frame", err)
	}
	return body, nil
}

// network gives an error of a connection its code: CodeTimeout, CodeInvalid for a frame that ends early, or CodeUnavailable.
func network(op string, err error) error {
	if _, ok := errors.AsType[*warden.Error](err); ok {
		return warden.Wrap(op, err)
	}
	nerr, isNet := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), isNet && nerr.Timeout(), warden.CodeOf(err) == warden.CodeTimeout:
		return warden.Errorf(warden.CodeTimeout, op, "the other side did not do its part in time")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return warden.Errorf(warden.CodeInvalid, op, "the connection ended in the middle of it")
	case errors.Is(err, io.EOF):
		return warden.Errorf(warden.CodeUnavailable, op, "the other side closed the connection")
	}
	return warden.Errorf(warden.CodeUnavailable, op, "%w", err)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
