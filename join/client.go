package join

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/tokens"
)

// Request is what a joiner says of itself. Key stays here (I3): a CSR for it is sent.
type Request struct {
	Key          crypto.Signer
	Hostname     string
	Advertise    string // managers: host:port, or :port for the address that the manager sees
	Availability api.Availability
	Version      string
}

// Join asks the manager at addr once for an identity, within JoinTimeout. The grant that it returns is authentic: it came
// from a manager under the root that t pins, which holds t, and its leaf is for our key and for the ID, role, zone and
// cluster that the grant names. dial opens the TCP connection; nil: net.Dialer.
//
// Errors: CodeWrongRoot, CodeWrongRole where a node that is no manager answers, CodeUnauthentic, CodeWrongCluster, CodeExpired
// and CodeClock of the manager's leaf or of clocks that differ, CodeUnavailable and CodeTimeout where nobody answers, and
// whatever the manager refuses with. CodeTimeout leaves open whether the node was made: to repeat with the same key is safe.
func Join(ctx context.Context, addr string, t tokens.Token, req Request, dial func(ctx context.Context, addr string) (net.Conn, error)) (*api.JoinGrant, error) {
	op := "joining by way of " + addr
	ctx, cancel := context.WithTimeout(ctx, warden.JoinTimeout)
	defer cancel()
	csr, err := ca.NewCSR(req.Key)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if dial == nil {
		dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	raw, err := dial(ctx, addr)
	if err != nil {
		return nil, warden.Hint(warden.Wrap(op, network("dialling", err)), "check the address, and that a manager listens there")
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })()

	conn, root, err := shake(ctx, raw, t.RootHash)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	defer conn.Close()
	grant, err := exchange(conn, t, req, csr)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := checkGrant(grant, root, req.Key.Public()); err != nil {
		return nil, warden.Wrap(op, err)
	}
	return grant, nil
}

// shake makes the TLS handshake, in which the manager is judged, and returns the pinned root.
func shake(ctx context.Context, raw net.Conn, pin [32]byte) (*tls.Conn, *x509.Certificate, error) {
	const op = "verifying the manager"
	var root *x509.Certificate
	var verdict error
	conn := tls.Client(raw, &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{warden.DoorJoin},
		SessionTicketsDisabled: true,
		InsecureSkipVerify:     true, // no name and no system root is of use here: VerifyConnection judges
		VerifyConnection: func(cs tls.ConnectionState) error {
			root, verdict = verifyManager(cs.PeerCertificates, pin)
			return verdict
		},
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		if verdict != nil {
			return nil, nil, warden.Wrap(op, verdict)
		}
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, nil, warden.Hint(network("shaking hands", err), "check the address and that it is a manager's")
	}
	cs := conn.ConnectionState()
	if err := checkDoor(&cs); err != nil {
		return nil, nil, err
	}
	return conn, root, nil
}

// verifyManager finds the pinned root among the presented certificates and verifies the leaf under it (I2).
func verifyManager(chain []*x509.Certificate, pin [32]byte) (*x509.Certificate, error) {
	root, err := ca.FindPinned(chain, pin)
	if err != nil {
		return nil, err
	}
	id, err := ca.Verify(chain, root, ca.VerifyOptions{Now: time.Now()})
	if err != nil {
		return nil, err
	}
	if id.Role != ca.RoleManager {
		return nil, warden.Hint(warden.Errorf(warden.CodeWrongRole, "", "node %s answers, which is a %s", id.NodeID, id.Role),
			"give the address of a manager; if this one should be a manager's, a worker may be posing as one")
	}
	return root, nil
}

// exchange sends the request and returns the grant, whose MAC it has checked before parsing it.
func exchange(conn *tls.Conn, t tokens.Token, req Request, csr []byte) (*api.JoinGrant, error) {
	cs := conn.ConnectionState()
	export, err := exporter(&cs)
	if err != nil {
		return nil, err
	}
	key := t.Key()
	err = writeFrame(conn, &api.JoinRequest{
		TokenId: t.ID, Csr: csr, Proof: tokens.Prove(key, export, csr), Hostname: req.Hostname, Advertise: req.Advertise,
		Availability: req.Availability, TimeNs: time.Now().UnixNano(), Version: req.Version,
	}, warden.JoinFrameMax)
	if err != nil {
		return nil, err
	}
	n, err := readLength(conn, warden.JoinReplyMax)
	if err != nil {
		return nil, err
	}
	body, err := readBody(conn, n)
	if err != nil {
		return nil, err
	}
	reply := new(api.JoinReply)
	if err := proto.Unmarshal(body, reply); err != nil {
		return nil, warden.Errorf(warden.CodeInvalid, "parsing join reply", "it is not a JoinReply")
	}
	if reply.Error != nil {
		return nil, refusal(reply.Error)
	}
	if !tokens.CheckGrant(key, export, reply.Grant, reply.Mac) {
		return nil, warden.Hint(warden.Errorf(warden.CodeUnauthentic, "checking the grant", "the manager has not proven that it holds the token"),
			"do not use this token again: revoke it, and find out who answers at this address")
	}
	grant := new(api.JoinGrant)
	if err := proto.Unmarshal(reply.Grant, grant); err != nil {
		return nil, warden.Errorf(warden.CodeInvalid, "parsing the grant", "it is not a JoinGrant")
	}
	return grant, nil
}

// refusal returns what the manager said, without what could confuse a terminal.
func refusal(d *api.ErrorDetail) error {
	return (&api.ErrorDetail{Code: printable(d.GetCode()), Text: printable(d.GetText()), Hint: printable(d.GetHint())}).Err()
}

func printable(s string) string {
	if len(s) > textMax {
		s = s[:textMax]
	}
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s)
}

// checkGrant wants a leaf for our key, under the pinned root, that says what the grant says.
func checkGrant(g *api.JoinGrant, root *x509.Certificate, pub crypto.PublicKey) error {
	const op = "checking the grant"
	chain, err := ca.ParseChain(g.GetChain())
	if err != nil {
		return warden.Wrap(op, err)
	}
	id, err := ca.Verify(chain, root, ca.VerifyOptions{Now: time.Now()})
	if err != nil {
		return warden.Wrap(op, err)
	}
	hash, err := ca.KeyHash(pub)
	if err != nil {
		return warden.Wrap(op, err)
	}
	if id.KeyHash != hash {
		return warden.Errorf(warden.CodeWrongKey, op, "the leaf is for another key")
	}
	if id.NodeID != g.NodeId || id.Role != g.Role.Word() || id.Zone != g.Zone || id.ClusterID != g.ClusterId {
		return warden.Errorf(warden.CodeUnauthentic, op, "the leaf and the grant name different nodes, roles, zones or clusters")
	}
	if last := chain[len(chain)-1]; !last.Equal(root) {
		return warden.Errorf(warden.CodeWrongRoot, op, "the chain does not end with the pinned root")
	}
	lock := g.GetLock()
	if id.Role == ca.RoleManager && lock == nil {
		return warden.Errorf(warden.CodeInvalid, op, "it does not say whether the cluster is locked")
	}
	if lock.GetAutolock() && len(lock.GetRecipient()) != 32 {
		return warden.Errorf(warden.CodeInvalid, op, "the cluster is locked, but the recipient is malformed")
	}
	return nil
}
