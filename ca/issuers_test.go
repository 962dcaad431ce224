package ca_test

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"net/url"
	"testing"
	"time"

	"warden"
	"warden/ca"
)

// caUnder makes a CA certificate; a nil parent makes it its own.
func caUnder(t *testing.T, template, parent *x509.Certificate, parentKey crypto.Signer) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := ca.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// TestVerdictsAreNotRemembered: that an issuing CA is known changes no verdict, whatever is wrong with the rest.
func TestVerdictsAreNotRemembered(t *testing.T) {
	id, other := warden.NewID(), newCluster(t, now)
	root := func(change func(*x509.Certificate)) *x509.Certificate {
		c := &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: "root", Organization: []string{id}}, NotBefore: now.Add(-time.Hour),
			NotAfter: now.Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLen: 1}
		change(c)
		return c
	}
	issuing := func(change func(*x509.Certificate)) *x509.Certificate {
		c := &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: "issuing", Organization: []string{id}}, NotBefore: now.Add(-time.Hour),
			NotAfter: now.Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLenZero: true}
		change(c)
		return c
	}
	same := func(*x509.Certificate) {}
	model := other.issue(t, ca.RoleWorker, "default", warden.LeafTTLDefault, now)[0]
	for _, tt := range []struct {
		name          string
		root, issuing func(*x509.Certificate)
		at            time.Time
		opts          func(o *ca.VerifyOptions, root, issuing *x509.Certificate)
		want          warden.Code
		known         bool // and the issuing CA is known after the first
	}{
		{"good", same, same, now, nil, "", true},
		{"distrusted later", same, same, now, func(o *ca.VerifyOptions, _, i *x509.Certificate) {
			o.DistrustedIssuers = [][32]byte{sha256.Sum256(i.Raw)}
		}, warden.CodeRevoked, false},
		{"the issuing CA has ended", same, func(c *x509.Certificate) { c.NotAfter = now.Add(2 * time.Hour) }, now.Add(3 * time.Hour), nil, warden.CodeExpired, true},
		{"the root has ended", func(c *x509.Certificate) { c.NotAfter = now.Add(2 * time.Hour) }, same, now.Add(3 * time.Hour), nil, warden.CodeExpired, true},
		{"the root is not valid yet", func(c *x509.Certificate) { c.NotBefore = now.Add(10 * time.Minute) }, same, now.Add(5 * time.Minute), nil, warden.CodeClock, true},
		{"no CA may be below the root", func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }, same, now, nil, warden.CodeUnauthentic, false},
		{"the issuing CA is none", same, func(c *x509.Certificate) {
			c.IsCA, c.MaxPathLenZero, c.KeyUsage = false, false, x509.KeyUsageDigitalSignature
		}, now, nil, warden.CodeUnauthentic, false},
		{"the issuing CA is for servers", same, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, now, nil, warden.CodeUnauthentic, false},
		{"the root is for servers", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, same, now, nil, warden.CodeUnauthentic, false},
		{"the issuing CA is for other names", same, func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
		}, now, nil, warden.CodeUnauthentic, false},
	} {
		ca.ForgetIssuers()
		r, rKey := caUnder(t, root(tt.root), nil, nil)
		i, iKey := caUnder(t, issuing(tt.issuing), r, rKey)
		leafTemplate := *model
		leafTemplate.Subject = pkix.Name{CommonName: warden.NewID(), Organization: []string{id}, OrganizationalUnit: []string{ca.RoleWorker}}
		leafTemplate.URIs = parseURI(t, ca.SPIFFEID(id, leafTemplate.Subject.CommonName))
		leafTemplate.ExtraExtensions = []pkix.Extension{{Id: ca.ZoneOID, Value: append([]byte{12, 7}, "default"...)}}
		leafTemplate.RawSubject, leafTemplate.AuthorityKeyId = nil, nil
		key, _ := ca.NewKey()
		der, err := x509.CreateCertificate(rand.Reader, &leafTemplate, i, key.Public(), iKey)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		chain := []*x509.Certificate{leaf, i, r}
		o := ca.VerifyOptions{Now: tt.at}
		if tt.opts != nil {
			tt.opts(&o, r, i)
		}
		_, err = ca.Verify(chain, r, o)
		wantCode(t, tt.name+", at first", err, tt.want)

		_, err = ca.Verify(chain, r, ca.VerifyOptions{Now: now.Add(20 * time.Minute)}) // what can be learnt is, by a chain that holds
		if known := ca.KnownIssuers() == 1; known != (err == nil) || tt.known && !known {
			t.Errorf("%s: known = %v after %v", tt.name, known, err)
		}
		_, err = ca.Verify(chain, r, o)
		wantCode(t, tt.name+", once known", err, tt.want)
		// Nor does it vouch for others' signatures, or under another root.
		broken := append([]byte(nil), leaf.Raw...)
		broken[len(broken)-1] ^= 1
		if bad, err := x509.ParseCertificate(broken); err == nil {
			_, err = ca.Verify([]*x509.Certificate{bad, i, r}, r, o)
			if err == nil {
				t.Errorf("%s: a broken signature passes", tt.name)
			}
		}
		twin, _ := caUnder(t, root(same), nil, nil)
		_, err = ca.Verify(chain, twin, ca.VerifyOptions{Now: now.Add(20 * time.Minute)})
		wantCode(t, tt.name+", under a root of the same name", err, warden.CodeUnauthentic)
	}
}

// TestKnownIssuersAreBounded: a process that sees many clusters forgets, and judges as before.
func TestKnownIssuersAreBounded(t *testing.T) {
	ca.ForgetIssuers()
	c := newCluster(t, now)
	for g := range uint64(70) {
		der, key, err := ca.NewIssuing(c.rootDER, c.rootKey, c.id, g, now)
		if err != nil {
			t.Fatal(err)
		}
		if c.authority, err = ca.New(c.id, c.rootDER, der, key); err != nil {
			t.Fatal(err)
		}
		chain := c.issue(t, ca.RoleWorker, "default", warden.LeafTTLDefault, now)
		for range 2 {
			if _, err := ca.Verify(chain, c.root, ca.VerifyOptions{Now: now}); err != nil {
				t.Fatal(err)
			}
		}
		if n := ca.KnownIssuers(); n < 1 || n > 64 {
			t.Fatalf("%d issuing CAs are known", n)
		}
	}
}

// liar signs with one key and says another, or signs badly.
type liar struct {
	crypto.Signer
	public crypto.PublicKey // once asked is over
	asked  *int
	spoil  bool
}

func (l liar) Public() crypto.PublicKey {
	if *l.asked--; *l.asked >= 0 {
		return l.Signer.Public()
	}
	return l.public
}

func (l liar) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	sig, err := l.Signer.Sign(r, digest, o)
	if l.spoil && err == nil {
		sig[len(sig)-1] ^= 1
	}
	return sig, err
}

// TestIssueChecksItsSignature: a token that signs badly, or by another key than it said at first, issues nothing.
func TestIssueChecksItsSignature(t *testing.T) {
	c := newCluster(t, now)
	another, _ := ca.NewKey()
	for _, tt := range []struct {
		name string
		key  liar
	}{
		{"bad signature", liar{Signer: c.issuingKey, public: c.issuingKey.Public(), asked: new(int), spoil: true}},
		{"another key", liar{Signer: swapped{c.issuingKey, another}, public: another.Public(), asked: new(1)}},
	} {
		a, err := ca.New(c.id, c.rootDER, c.issuingDER, tt.key)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		csr, _ := newCSR(t)
		v, err := a.Vet(ca.Request{CSR: csr, NodeID: warden.NewID(), Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLDefault}, now)
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.Issue(v)
		wantCode(t, tt.name, err, warden.CodeInternal)
	}
}

// swapped says one key and signs with another.
type swapped struct{ says, signs crypto.Signer }

func (s swapped) Public() crypto.PublicKey { return s.says.Public() }
func (s swapped) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return s.signs.Sign(r, digest, o)
}

// TestVetTakesParsedCSRs: one that ParseCSR made is as good as its bytes; one that somebody else made is not.
func TestVetTakesParsedCSRs(t *testing.T) {
	c := newCluster(t, now)
	der, key := newCSR(t)
	csr, err := ca.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	r := ca.Request{Parsed: csr, NodeID: warden.NewID(), Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLDefault}
	v, err := c.authority.Vet(r, now)
	if err != nil {
		t.Fatal(err)
	}
	if hash, _ := ca.KeyHash(key.Public()); v.KeyHash() != hash {
		t.Error("the leaf is for another key")
	}
	r.Parsed = &ca.CSR{Public: csr.Public, KeyHash: csr.KeyHash}
	_, err = c.authority.Vet(r, now)
	wantCode(t, "a CSR whose signature nobody checked", err, warden.CodeInternal)
}

func parseURI(t *testing.T, s string) []*url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return []*url.URL{u}
}
