package ca_test

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/ca"
)

func TestVerifyTimes(t *testing.T) {
	c := newCluster(t, now.Add(-1000*time.Hour))
	chain := c.issue(t, ca.RoleManager, "default", 2*time.Hour, now)
	end := now.Add(2 * time.Hour)
	begin := now.Add(-warden.LeafBackdate)
	for _, tt := range []struct {
		name  string
		at    time.Time
		grace time.Duration
		want  warden.Code
	}{
		{"now", now, 0, ""},
		{"first second", begin, 0, ""},
		{"last second", end, 0, ""},
		{"within the last second", end.Add(999 * time.Millisecond), 0, ""},
		{"too early", begin.Add(-time.Second), 0, warden.CodeClock},
		{"years too early", begin.Add(-9 * 365 * 24 * time.Hour), 0, warden.CodeClock},
		{"too late", end.Add(time.Second), 0, warden.CodeExpired},
		{"late with grace", end.Add(time.Hour), time.Hour, ""},
		{"later than the grace", end.Add(time.Hour + time.Second), time.Hour, warden.CodeExpired},
		{"early with grace", begin.Add(-time.Second), time.Hour, warden.CodeClock},
	} {
		_, err := ca.Verify(chain, c.root, ca.VerifyOptions{Now: tt.at, AllowExpiredFor: tt.grace})
		wantCode(t, tt.name, err, tt.want)
		if err == nil {
			continue
		}
		bound := end
		if tt.want == warden.CodeClock {
			bound = begin
		}
		for _, want := range []time.Time{tt.at, bound} {
			if s := want.UTC().Format(time.RFC3339); !strings.Contains(err.Error(), s) {
				t.Errorf("%s: error %q does not name %s", tt.name, err, s)
			}
		}
		if warden.HintOf(err) == "" {
			t.Errorf("%s: no hint", tt.name)
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	c, other := newCluster(t, now), newCluster(t, now)
	chain := c.issue(t, ca.RoleManager, "default", warden.LeafTTLDefault, now)
	worker := c.issue(t, ca.RoleWorker, "default", warden.LeafTTLDefault, now)
	foreign := other.issue(t, ca.RoleManager, "default", warden.LeafTTLDefault, now)
	tampered := slices.Clone(chain[0].Raw)
	tampered[len(tampered)-1] ^= 1
	badLeaf, err := x509.ParseCertificate(tampered)
	if err != nil {
		t.Fatal(err)
	}
	opts := ca.VerifyOptions{Now: now}
	distrust := ca.VerifyOptions{Now: now, DistrustedIssuers: [][32]byte{{1}, sha256.Sum256(c.issuingDER)}}
	unrelated := ca.VerifyOptions{Now: now, DistrustedIssuers: [][32]byte{sha256.Sum256(other.issuingDER)}}
	cat := slices.Concat[[]*x509.Certificate]
	for _, tt := range []struct {
		name  string
		chain []*x509.Certificate
		opts  ca.VerifyOptions
		want  warden.Code
	}{
		{"good", chain, opts, ""},
		{"root left out", chain[:2], opts, ""},
		{"unrelated certificate beside", cat(chain, foreign[2:]), opts, ""},
		{"another issuer distrusted", chain, unrelated, ""},
		{"nothing", nil, opts, warden.CodeUnauthentic},
		{"too many", cat(chain, chain), opts, warden.CodeTooLarge},
		{"no issuing CA", chain[:1], opts, warden.CodeUnauthentic},
		{"another cluster", foreign, opts, warden.CodeWrongCluster},
		{"bad signature", cat([]*x509.Certificate{badLeaf}, chain[1:]), opts, warden.CodeUnauthentic},
		{"issuing CA as leaf", chain[1:], opts, warden.CodeUnauthentic},
		{"root as leaf", chain[2:], opts, warden.CodeUnauthentic},
		{"another's leaf first", cat(foreign[:1], chain[1:]), opts, warden.CodeWrongCluster},
		{"issuer distrusted", chain, distrust, warden.CodeRevoked},
		{"issuer distrusted, worker", worker, distrust, warden.CodeRevoked},
	} {
		_, err := ca.Verify(tt.chain, c.root, tt.opts)
		wantCode(t, tt.name, err, tt.want)
	}
	_, err = ca.Verify(chain, nil, opts)
	wantCode(t, "no root", err, warden.CodeUnauthentic)
	_, err = ca.Verify(chain, chain[0], opts)
	wantCode(t, "a leaf as root", err, warden.CodeUnauthentic)
}

// TestVerifyTrustsNoNodeAsIssuer: a node's key signs no certificates, however the forged one looks.
func TestVerifyTrustsNoNodeAsIssuer(t *testing.T) {
	c := newCluster(t, now)
	csr, key := newCSR(t)
	v, err := c.authority.Vet(ca.Request{CSR: csr, NodeID: warden.NewID(), Role: ca.RoleManager, Zone: "default", TTL: warden.LeafTTLDefault}, now)
	if err != nil {
		t.Fatal(err)
	}
	der, err := c.authority.Issue(v)
	if err != nil {
		t.Fatal(err)
	}
	chain, _ := ca.ParseChain(c.authority.Chain(der))
	template := *chain[0]
	template.SerialNumber = serial()
	forgedKey, _ := ca.NewKey()
	forged, err := x509.CreateCertificate(rand.Reader, &template, chain[0], forgedKey.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(forged)
	_, err = ca.Verify(append([]*x509.Certificate{leaf}, chain...), c.root, ca.VerifyOptions{Now: now})
	wantCode(t, "leaf signed by a leaf", err, warden.CodeUnauthentic)
}

// TestVerifyWantsTheProfile: a leaf that the issuing CA did sign, but that Issue would not have made, is refused.
func TestVerifyWantsTheProfile(t *testing.T) {
	c := newCluster(t, now)
	model := c.issue(t, ca.RoleManager, "default", warden.LeafTTLDefault, now)[0]
	zone := func(value ...byte) []pkix.Extension { return []pkix.Extension{{Id: ca.ZoneOID, Value: value}} }
	good := zone(append([]byte{12, 7}, "default"...)...)
	for _, tt := range []struct {
		name   string
		change func(*x509.Certificate)
		want   warden.Code
	}{
		{"good", func(*x509.Certificate) {}, ""},
		{"operator", func(l *x509.Certificate) { l.Subject.OrganizationalUnit = []string{ca.RoleOperator} }, warden.CodeUnauthentic},
		{"two roles", func(l *x509.Certificate) { l.Subject.OrganizationalUnit = []string{ca.RoleWorker, ca.RoleManager} }, warden.CodeUnauthentic},
		{"worker that serves", func(l *x509.Certificate) { l.Subject.OrganizationalUnit = []string{ca.RoleWorker} }, warden.CodeUnauthentic},
		{"another cluster", func(l *x509.Certificate) {
			l.Subject.Organization = []string{warden.NewID()}
			l.URIs = []*url.URL{{Scheme: "spiffe", Host: l.Subject.Organization[0], Path: "/node/" + l.Subject.CommonName}}
		}, warden.CodeWrongCluster},
		{"other node's URI", func(l *x509.Certificate) {
			l.URIs = []*url.URL{{Scheme: "spiffe", Host: c.id, Path: "/node/" + warden.NewID()}}
		}, warden.CodeUnauthentic},
		{"path tricks in the URI", func(l *x509.Certificate) {
			l.URIs = []*url.URL{{Scheme: "spiffe", Host: c.id, Path: "/node/../node/" + l.Subject.CommonName}}
		}, warden.CodeUnauthentic},
		{"two URIs", func(l *x509.Certificate) { l.URIs = append(l.URIs, l.URIs[0]) }, warden.CodeUnauthentic},
		{"DNS name", func(l *x509.Certificate) { l.DNSNames = []string{"localhost"} }, warden.CodeUnauthentic},
		{"country in the subject", func(l *x509.Certificate) { l.Subject.Country = []string{"DE"} }, warden.CodeUnauthentic},
		{"any usage", func(l *x509.Certificate) { l.ExtKeyUsage = append(l.ExtKeyUsage, x509.ExtKeyUsageAny) }, warden.CodeUnauthentic},
		{"CA bit", func(l *x509.Certificate) { l.IsCA = true; l.KeyUsage |= x509.KeyUsageCertSign }, warden.CodeUnauthentic},
		{"long serial", func(l *x509.Certificate) { l.SerialNumber = l.SerialNumber.Lsh(serial(), 100) }, warden.CodeUnauthentic},
		{"no zone", func(l *x509.Certificate) { l.ExtraExtensions = nil }, warden.CodeUnauthentic},
		{"two zones", func(l *x509.Certificate) { l.ExtraExtensions = append(good, good...) }, warden.CodeUnauthentic},
		{"empty zone", func(l *x509.Certificate) { l.ExtraExtensions = zone(12, 0) }, warden.CodeUnauthentic},
		{"no bytes for the zone", func(l *x509.Certificate) { l.ExtraExtensions = zone() }, warden.CodeUnauthentic},
		{"zone as printable string", func(l *x509.Certificate) { l.ExtraExtensions = zone(19, 1, 'a') }, warden.CodeUnauthentic},
		{"zone in a long form", func(l *x509.Certificate) { l.ExtraExtensions = zone(12, 0x81, 1, 'a') }, warden.CodeUnauthentic},
		{"zone and more", func(l *x509.Certificate) { l.ExtraExtensions = zone(12, 1, 'a', 'b') }, warden.CodeUnauthentic},
		{"zone in capitals", func(l *x509.Certificate) { l.ExtraExtensions = zone(12, 1, 'A') }, warden.CodeUnauthentic},
		{"zone critical", func(l *x509.Certificate) {
			l.ExtraExtensions = []pkix.Extension{{Id: ca.ZoneOID, Value: good[0].Value, Critical: true}}
		}, warden.CodeUnauthentic},
	} {
		key, _ := ca.NewKey()
		template := &x509.Certificate{
			SerialNumber: serial(), NotBefore: model.NotBefore, NotAfter: model.NotAfter, BasicConstraintsValid: true,
			Subject:  pkix.Name{CommonName: model.Subject.CommonName, Organization: []string{c.id}, OrganizationalUnit: []string{ca.RoleManager}},
			KeyUsage: model.KeyUsage, ExtKeyUsage: slices.Clone(model.ExtKeyUsage), URIs: slices.Clone(model.URIs), ExtraExtensions: slices.Clone(good),
		}
		tt.change(template)
		der, err := x509.CreateCertificate(rand.Reader, template, c.intermediates[0], key.Public(), c.issuingKey)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil && tt.want != "" {
			continue // crypto/x509 refuses to parse it
		} else if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		_, err = ca.Verify([]*x509.Certificate{leaf, c.intermediates[0]}, c.root, ca.VerifyOptions{Now: now})
		wantCode(t, tt.name, err, tt.want)
		want := warden.CodeInvalid
		if tt.want != warden.CodeUnauthentic {
			want = "" // the shape is right
		}
		_, err = ca.Read(leaf)
		wantCode(t, "Read: "+tt.name, err, want)
	}
}

// TestI2FindPinned: the pin is found wherever it stands in the chain, and only a CA with exactly these bytes is it.
func TestI2FindPinned(t *testing.T) {
	c, other := newCluster(t, now), newCluster(t, now)
	chain := c.issue(t, ca.RoleManager, "default", warden.LeafTTLDefault, now)
	if root, err := ca.FindPinned(chain, c.authority.RootHash()); err != nil || !root.Equal(c.root) {
		t.Errorf("FindPinned = %v, %v, want the root", root, err)
	}
	_, err := ca.FindPinned(chain, other.authority.RootHash())
	wantCode(t, "another root", err, warden.CodeWrongRoot)
	_, err = ca.FindPinned(nil, c.authority.RootHash())
	wantCode(t, "no chain", err, warden.CodeWrongRoot)
	_, err = ca.FindPinned(chain, sha256.Sum256(chain[0].Raw))
	wantCode(t, "a pinned leaf", err, warden.CodeWrongRoot)
	// The pinned root beside another cluster's leaf is found, and the leaf then refused.
	foreign := other.issue(t, ca.RoleManager, "default", warden.LeafTTLDefault, now)
	root, err := ca.FindPinned(append(foreign, c.root), c.authority.RootHash())
	if err != nil {
		t.Fatal(err)
	}
	_, err = ca.Verify(append(foreign, c.root), root, ca.VerifyOptions{Now: now})
	wantCode(t, "another's leaf beside the pinned root", err, warden.CodeWrongCluster)
}
