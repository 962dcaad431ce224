// Package thief is an attacker who has what a node has: its key and certificate, which it takes to any door, and an agent of its own. It
// serves tests alone.
package thief

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/join"
	"warden/tokens"
)

// Member is what the attacker has of a node; the zero one is nobody, who has no certificate.
type Member struct {
	NodeID, ClusterID string
	Key               crypto.Signer
	Cert              *tls.Certificate
	Root              *x509.Certificate
}

// Steal reads the unsealed key file in a daemon's state directory, as root there can.
func Steal(t testing.TB, state string) Member {
	t.Helper()
	kf, err := autolock.ReadKeyFile(filepath.Join(state, "identity", "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := kf.Identity()
	if err != nil {
		t.Fatal(err)
	}
	m, err := Of(id)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// Of returns what an attacker has of the node whose key file holds id.
func Of(id autolock.Identity) (Member, error) {
	m := Member{NodeID: id.NodeID, ClusterID: id.ClusterID}
	if err := id.Key.Use(func(der []byte) (err error) { m.Key, err = ca.ParseKey(der); return err }); err != nil {
		return Member{}, err
	}
	var err error
	if m.Root, err = x509.ParseCertificate(id.Chain[len(id.Chain)-1]); err != nil {
		return Member{}, err
	}
	m.Cert = &tls.Certificate{Certificate: id.Chain, PrivateKey: m.Key}
	return m, nil
}

// Join joins a node with a key of its own and no daemon, from an IP address of its own if from names one. It tries again where a flood took
// the place of its handshake, as a joiner does.
func Join(from, address string, token tokens.Token, req join.Request) (Member, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		g, err := join.Join(ctx, address, token, req, DialFrom(from))
		if err == nil {
			root, err := x509.ParseCertificate(g.Chain[len(g.Chain)-1])
			return Member{NodeID: g.NodeId, ClusterID: g.ClusterId, Key: req.Key, Cert: &tls.Certificate{Certificate: g.Chain, PrivateKey: req.Key}, Root: root}, err
		}
		if !api.Transient(err) || ctx.Err() != nil {
			return Member{}, err
		}
	}
}

// Config is a TLS client's that trusts anybody.
func (m Member) Config(protocols ...string) *tls.Config {
	cfg := &tls.Config{NextProtos: protocols, InsecureSkipVerify: true}
	if m.Cert != nil {
		cfg.Certificates = []tls.Certificate{*m.Cert}
	}
	return cfg
}

// Dial shakes hands at a door, from an IP address of its own if from names one. A refusal may show with the first read only.
func (m Member) Dial(ctx context.Context, from, address string, protocols ...string) (*tls.Conn, error) {
	raw, err := DialFrom(from)(ctx, address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, m.Config(protocols...))
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// DialFrom dials TCP from an IP address, "" for any.
func DialFrom(from string) func(ctx context.Context, address string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		d := net.Dialer{Timeout: 10 * time.Second}
		if from != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		return d.DialContext(ctx, "tcp", address)
	}
}

// Refused returns why a door does not keep the connection: nil where it does for 3 s.
func (m Member) Refused(address string, protocols ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := m.Dial(ctx, "", address, protocols...)
	if err != nil {
		return err
	}
	defer conn.Close()
	return Ended(conn, 3*time.Second)
}

// Ended returns what a connection ended with, nil where it did not within limit. What comes on it is dropped.
func Ended(conn net.Conn, limit time.Duration) error {
	conn.SetReadDeadline(time.Now().Add(limit))
	for buf := make([]byte, 4096); ; {
		if _, err := conn.Read(buf); err != nil {
			if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
				return nil
			}
			return err
		}
	}
}
