package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/ca"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// cluster is a root with one issuing CA.
type cluster struct {
	id            string
	rootDER       []byte
	root          *x509.Certificate
	rootKey       crypto.Signer
	issuingDER    []byte
	issuingKey    crypto.Signer
	authority     *ca.Authority
	intermediates []*x509.Certificate
}

func newCluster(t testing.TB, at time.Time) *cluster {
	t.Helper()
	c := &cluster{id: warden.NewID()}
	var err error
	if c.rootDER, c.rootKey, err = ca.NewRoot(c.id, at); err != nil {
		t.Fatal(err)
	}
	if c.issuingDER, c.issuingKey, err = ca.NewIssuing(c.rootDER, c.rootKey, c.id, 1, at); err != nil {
		t.Fatal(err)
	}
	if c.authority, err = ca.New(c.id, c.rootDER, c.issuingDER, c.issuingKey); err != nil {
		t.Fatal(err)
	}
	chain, err := ca.ParseChain([][]byte{c.rootDER, c.issuingDER})
	if err != nil {
		t.Fatal(err)
	}
	c.root, c.intermediates = chain[0], chain[1:]
	return c
}

func newCSR(t testing.TB) ([]byte, crypto.Signer) {
	t.Helper()
	key, err := ca.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	return csr, key
}

func (c *cluster) issue(t testing.TB, role, zone string, ttl time.Duration, at time.Time) []*x509.Certificate {
	t.Helper()
	csr, _ := newCSR(t)
	v, err := c.authority.Vet(ca.Request{CSR: csr, NodeID: warden.NewID(), Role: role, Zone: zone, TTL: ttl}, at)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := c.authority.Issue(v)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.ParseChain(c.authority.Chain(leaf))
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

func wantCode(t *testing.T, what string, err error, code warden.Code) {
	t.Helper()
	if got := warden.CodeOf(err); got != code {
		t.Errorf("%s: error %v [%s], want [%s]", what, err, got, code)
	}
}

func TestIssueAndVerify(t *testing.T) {
	c := newCluster(t, now)
	for _, role := range []string{ca.RoleManager, ca.RoleWorker} {
		csr, key := newCSR(t)
		req := ca.Request{CSR: csr, NodeID: warden.NewID(), Role: role, Zone: "pci", TTL: warden.LeafTTLDefault}
		v, err := c.authority.Vet(req, now.Add(300*time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := c.authority.Issue(v)
		if err != nil {
			t.Fatal(err)
		}
		chain, err := ca.ParseChain(c.authority.Chain(leaf))
		if err != nil {
			t.Fatal(err)
		}
		root, err := ca.FindPinned(chain, c.authority.RootHash())
		if err != nil {
			t.Fatal(err)
		}
		id, err := ca.Verify(chain, root, ca.VerifyOptions{Now: now})
		if err != nil {
			t.Fatal(err)
		}
		hash, _ := ca.KeyHash(key.Public())
		if id.ClusterID != c.id || id.NodeID != req.NodeID || id.Role != role || id.Zone != "pci" || id.KeyHash != hash || v.KeyHash() != hash {
			t.Errorf("Verify = %+v, want what the request said", id)
		}
		if !id.NotBefore.Equal(now.Add(-warden.LeafBackdate)) || !id.NotAfter.Equal(now.Add(warden.LeafTTLDefault)) {
			t.Errorf("validity = %s to %s", id.NotBefore, id.NotAfter)
		}
		if len(id.Serial) != 32 || chain[0].URIs[0].String() != ca.SPIFFEID(c.id, req.NodeID) {
			t.Errorf("serial %q, URI %s", id.Serial, chain[0].URIs[0])
		}
		if server := len(chain[0].ExtKeyUsage) == 2; server != (role == ca.RoleManager) {
			t.Errorf("role %s may serve = %v", role, server)
		}
	}
}

// TestI1CSRNames: whatever a CSR asks for, the leaf says what the request to the authority said.
func TestI1CSRNames(t *testing.T) {
	c := newCluster(t, now)
	key, _ := ca.NewKey()
	csr, err := x509.CreateCertificateRequest(rand.Reader, hostileTemplate(c.id), key)
	if err != nil {
		t.Fatal(err)
	}
	req := ca.Request{CSR: csr, NodeID: warden.NewID(), Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLDefault}
	v, err := c.authority.Vet(req, now)
	if err != nil {
		t.Fatal(err)
	}
	der, err := c.authority.Issue(v)
	if err != nil {
		t.Fatal(err)
	}
	for _, planted := range []string{"evil", "pci", ca.RoleManager, "10.9.8.7"} {
		if bytes.Contains(der, []byte(planted)) {
			t.Errorf("the leaf contains %q from the CSR", planted)
		}
	}
	chain, _ := ca.ParseChain(c.authority.Chain(der))
	id, err := ca.Verify(chain, c.root, ca.VerifyOptions{Now: now})
	if err != nil || id.NodeID != req.NodeID || id.Role != req.Role || id.Zone != req.Zone || chain[0].IsCA {
		t.Errorf("Verify = %+v, %v, want the request's names", id, err)
	}
}

func TestVetRefuses(t *testing.T) {
	c := newCluster(t, now)
	csr, _ := newCSR(t)
	good := ca.Request{CSR: csr, NodeID: warden.NewID(), Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLMin}
	for _, tt := range []struct {
		name   string
		at     time.Time
		change func(*ca.Request)
		want   warden.Code
	}{
		{"good", now, func(*ca.Request) {}, ""},
		{"no ID", now, func(r *ca.Request) { r.NodeID = "" }, warden.CodeInvalid},
		{"path in ID", now, func(r *ca.Request) { r.NodeID = "../" + r.NodeID[3:] }, warden.CodeInvalid},
		{"no role", now, func(r *ca.Request) { r.Role = "" }, warden.CodeInvalid},
		{"operator", now, func(r *ca.Request) { r.Role = ca.RoleOperator }, warden.CodeInvalid},
		{"role in capitals", now, func(r *ca.Request) { r.Role = "Manager" }, warden.CodeInvalid},
		{"no zone", now, func(r *ca.Request) { r.Zone = "" }, warden.CodeInvalid},
		{"long zone", now, func(r *ca.Request) { r.Zone = strings.Repeat("z", warden.NameMax+1) }, warden.CodeInvalid},
		{"short life", now, func(r *ca.Request) { r.TTL = warden.LeafTTLMin - 1 }, warden.CodeInvalid},
		{"long life", now, func(r *ca.Request) { r.TTL = warden.LeafTTLMax + 1 }, warden.CodeInvalid},
		{"no CSR", now, func(r *ca.Request) { r.CSR = nil }, warden.CodeInvalid},
		{"past the issuing CA", now.Add(warden.IssuingTTL + time.Second), func(*ca.Request) {}, warden.CodeExpired},
		{"before the issuing CA", now.Add(-time.Hour), func(*ca.Request) {}, warden.CodeClock},
	} {
		r := good
		tt.change(&r)
		_, err := c.authority.Vet(r, tt.at)
		wantCode(t, tt.name, err, tt.want)
	}
}

func TestVettedIsSpentOnceAndAtItsAuthority(t *testing.T) {
	c, other := newCluster(t, now), newCluster(t, now)
	csr, _ := newCSR(t)
	req := ca.Request{CSR: csr, NodeID: warden.NewID(), Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLDefault}
	v, err := c.authority.Vet(req, now)
	if err != nil {
		t.Fatal(err)
	}
	_, err = other.authority.Issue(v)
	wantCode(t, "Issue at another authority", err, warden.CodeInternal)
	if _, err := c.authority.Issue(v); err != nil {
		t.Errorf("Issue after a refusal elsewhere = %v, want a leaf", err)
	}
	_, err = c.authority.Issue(v)
	wantCode(t, "Issue of a spent request", err, warden.CodeInternal)
	_, err = c.authority.Issue(nil)
	wantCode(t, "Issue(nil)", err, warden.CodeInternal)
}

func TestLeafNeverOutlivesIssuing(t *testing.T) {
	c := newCluster(t, now)
	chain := c.issue(t, ca.RoleWorker, "default", warden.LeafTTLDefault, now.Add(warden.IssuingTTL-time.Hour))
	if got, want := chain[0].NotAfter, chain[1].NotAfter; !got.Equal(want) {
		t.Errorf("NotAfter = %s, want the issuing CA's %s", got, want)
	}
	late := now.Add(warden.CATTL - warden.IssuingTTL + 24*time.Hour)
	der, _, err := ca.NewIssuing(c.rootDER, c.rootKey, c.id, 2, late)
	if err != nil {
		t.Fatal(err)
	}
	issuing, _ := ca.ParseChain([][]byte{der})
	if got := issuing[0].NotAfter; !got.Equal(c.root.NotAfter) {
		t.Errorf("issuing NotAfter = %s, want the root's %s", got, c.root.NotAfter)
	}
}

func TestGenerationsHaveOwnSubjectsAndKeyIDs(t *testing.T) {
	c := newCluster(t, now)
	der, key, err := ca.NewIssuing(c.rootDER, c.rootKey, c.id, 2, now)
	if err != nil {
		t.Fatal(err)
	}
	second, _ := ca.ParseChain([][]byte{der})
	first := c.intermediates[0]
	if bytes.Equal(first.RawSubject, second[0].RawSubject) || bytes.Equal(first.SubjectKeyId, second[0].SubjectKeyId) {
		t.Error("two generations share a subject or a key ID")
	}
	if second[0].MaxPathLen != 0 || !second[0].MaxPathLenZero || c.root.MaxPathLen != 1 {
		t.Error("path lengths are not 1 and 0")
	}
	if _, err := ca.New(c.id, c.rootDER, der, key); err != nil {
		t.Error(err)
	}
}

func TestNewRefusesWhatDoesNotBelongTogether(t *testing.T) {
	c, other := newCluster(t, now), newCluster(t, now)
	_, err := ca.New(c.id, c.rootDER, c.issuingDER, other.issuingKey)
	wantCode(t, "another key", err, warden.CodeCorrupt)
	_, err = ca.New(c.id, c.rootDER, other.issuingDER, other.issuingKey)
	wantCode(t, "another cluster's issuing CA", err, warden.CodeWrongCluster)
	_, err = ca.New(other.id, c.rootDER, c.issuingDER, c.issuingKey)
	wantCode(t, "another cluster's ID", err, warden.CodeWrongCluster)
	_, err = ca.New(c.id, c.rootDER, c.rootDER[:20], c.issuingKey)
	wantCode(t, "a truncated certificate", err, warden.CodeCorrupt)
	twinDER, _, _ := ca.NewRoot(c.id, now)
	_, err = ca.New(c.id, twinDER, c.issuingDER, c.issuingKey)
	wantCode(t, "another root of the same cluster", err, warden.CodeCorrupt)
	_, _, err = ca.NewIssuing(c.rootDER, other.rootKey, c.id, 2, now)
	wantCode(t, "NewIssuing with another root's key", err, warden.CodeInvalid)
	_, _, err = ca.NewIssuing(c.rootDER, c.rootKey, other.id, 2, now)
	wantCode(t, "NewIssuing for another cluster", err, warden.CodeWrongCluster)
	_, _, err = ca.NewRoot("not an ID", now)
	wantCode(t, "NewRoot of a bad ID", err, warden.CodeInvalid)
}

func TestKeysRoundTrip(t *testing.T) {
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	p256, _ := ca.NewKey()
	for _, key := range []crypto.Signer{p256, p384, ed} {
		der, err := ca.MarshalKey(key)
		if err != nil {
			t.Fatal(err)
		}
		back, err := ca.ParseKey(der)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := ca.KeyHash(key.Public())
		b, _ := ca.KeyHash(back.Public())
		if a != b {
			t.Errorf("ParseKey(MarshalKey(%T)) is another key", key)
		}
		csr, err := ca.NewCSR(key)
		if err != nil {
			t.Fatal(err)
		}
		if parsed, err := ca.ParseCSR(csr); err != nil || parsed.KeyHash != a {
			t.Errorf("ParseCSR(NewCSR(%T)) = %v, %v", key, parsed, err)
		}
	}
	_, err := ca.ParseKey([]byte("CANARY-not-a-key"))
	wantCode(t, "ParseKey of garbage", err, warden.CodeInvalid)
	if strings.Contains(err.Error(), "CANARY") {
		t.Error("the error repeats the key bytes")
	}
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	_, err = ca.MarshalKey(p521)
	wantCode(t, "MarshalKey(P-521)", err, warden.CodeInvalid)
}

func TestParseChainBounds(t *testing.T) {
	c := newCluster(t, now)
	_, err := ca.ParseChain(nil)
	wantCode(t, "no certificates", err, warden.CodeInvalid)
	_, err = ca.ParseChain(bytes.SplitAfter(bytes.Repeat([]byte{0}, warden.ChainMax+1), []byte{0})[:warden.ChainMax+1])
	wantCode(t, "too many", err, warden.CodeTooLarge)
	_, err = ca.ParseChain([][]byte{make([]byte, warden.CertBytesMax+1)})
	wantCode(t, "too large", err, warden.CodeTooLarge)
	_, err = ca.ParseChain([][]byte{append(bytes.Clone(c.rootDER), 0)})
	wantCode(t, "trailing byte", err, warden.CodeInvalid)
	if got := sha256.Sum256(c.rootDER); got != c.authority.RootHash() {
		t.Error("RootHash is not the SHA-256 of the DER")
	}
}

func serial() *big.Int { return big.NewInt(time.Now().UnixNano()) }
