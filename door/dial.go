package door

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"slices"
	"time"

	"warden"
	"warden/ca"
)

// Expect says whom a dialler wants to reach.
type Expect struct {
	Root       *x509.Certificate
	NodeID     string     // the manager's ID: no manager can pass for another
	KeyHashes  [][32]byte // of its current and next leaf: the pin
	Loose      bool       // a key outside the pin passes, while its leaf is valid and its issuer trusted
	AnyTime    bool       // a pinned key passes, whenever its leaf is valid: who asks for the time may be the one whose clock is out
	Distrusted [][32]byte // SHA-256 sums of issuing certificates
}

// Dial connects to a manager's door and verifies in the handshake that the answering side is the expected manager, under
// the root, with a pinned key. A leaf past its end, or of an issuer distrusted by now, passes only where its key is pinned (a
// cluster that was off for long must come back). Errors: CodeUnavailable, CodeTimeout, CodeUnauthentic, CodeWrongKey, CodeWrongRole, CodeExpired, CodeClock.
// A refusal by the other side shows at the first read.
func Dial(ctx context.Context, addr, door string, cert *tls.Certificate, want Expect) (*tls.Conn, error) {
	op := "dialling " + addr
	ctx, cancel := context.WithTimeout(ctx, warden.HandshakeTimeout)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		if ctx.Err() != nil {
			return nil, warden.Recode(warden.CodeTimeout, op, err)
		}
		return nil, warden.Recode(warden.CodeUnavailable, op, err)
	}
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{door},
		SessionTicketsDisabled: true,
		InsecureSkipVerify:     true, // VerifyConnection is the whole of it: node ID, role, key and chain instead of a host name
		VerifyConnection:       func(cs tls.ConnectionState) error { return want.verify(cs) },
	}
	if cert != nil {
		own := *cert
		if n := len(own.Certificate); n > 2 { // leaf, issuing CA, root: the manager has the root, and would keep a copy for each connection
			own.Certificate = own.Certificate[:n-1]
		}
		cfg.Certificates = []tls.Certificate{own}
	}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		if warden.CodeOf(err) == warden.CodeInternal {
			err = warden.Recode(warden.CodeUnavailable, "", err)
		}
		return nil, warden.Wrap(op, err)
	}
	return conn, nil
}

func (want Expect) verify(cs tls.ConnectionState) error {
	const op = "verifying manager"
	now := time.Now()
	id, err := ca.Verify(cs.PeerCertificates, want.Root, ca.VerifyOptions{Now: now, AllowExpiredFor: warden.ExpiredKept})
	if code := warden.CodeOf(err); want.AnyTime && (code == warden.CodeExpired || code == warden.CodeClock) { // said of authentic leaves only
		id, err = ca.Verify(cs.PeerCertificates, want.Root, ca.VerifyOptions{Now: cs.PeerCertificates[0].NotAfter})
	}
	if err != nil {
		return err
	}
	switch {
	case id.Role != ca.RoleManager:
		return warden.Errorf(warden.CodeWrongRole, op, "node %s has a %s's leaf", id.NodeID, id.Role)
	case want.NodeID != "" && id.NodeID != want.NodeID:
		return warden.Errorf(warden.CodeUnauthentic, op, "node %s answers where %s was expected", id.NodeID, want.NodeID)
	case slices.Contains(want.KeyHashes, id.KeyHash):
		return nil
	case !want.Loose:
		return warden.Errorf(warden.CodeWrongKey, op, "node %s presents a key that is not the recorded one", id.NodeID)
	}
	_, err = ca.Verify(cs.PeerCertificates, want.Root, ca.VerifyOptions{Now: now, DistrustedIssuers: want.Distrusted})
	return err
}
