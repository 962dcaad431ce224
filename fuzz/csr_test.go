package fuzz_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"testing"
	"time"

	"warden"
	"warden/ca"
)

// FuzzCSR: whatever parses as a CSR gives a leaf that says what the request said, never what the CSR did (I1).
func FuzzCSR(f *testing.F) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	cluster, node := warden.NewID(), warden.NewID()
	rootDER, rootKey, err := ca.NewRoot(cluster, now)
	if err != nil {
		f.Fatal(err)
	}
	issuingDER, issuingKey, err := ca.NewIssuing(rootDER, rootKey, cluster, 1, now)
	if err != nil {
		f.Fatal(err)
	}
	authority, err := ca.New(cluster, rootDER, issuingDER, issuingKey)
	if err != nil {
		f.Fatal(err)
	}
	cas, err := ca.ParseChain([][]byte{rootDER, issuingDER})
	if err != nil {
		f.Fatal(err)
	}

	p256, _ := ca.NewKey()
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	hostile := &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "evil", OrganizationalUnit: []string{ca.RoleManager}},
		DNSNames: []string{"evil.example"},
		URIs:     []*url.URL{{Scheme: "spiffe", Host: cluster, Path: "/node/evil"}},
	}
	for _, key := range []any{p256, p384, ed} {
		for _, template := range []*x509.CertificateRequest{{}, hostile} {
			der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
			if err != nil {
				f.Fatal(err)
			}
			if _, err := ca.ParseCSR(der); err != nil {
				f.Fatalf("the seed does not parse: %v", err)
			}
			f.Add(der)
			f.Add(append(der[:len(der):len(der)], 0))
		}
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := ca.ParseCSR(der)
		if err != nil {
			switch code := warden.CodeOf(err); code {
			case warden.CodeInvalid, warden.CodeTooLarge, warden.CodeUnauthentic:
			default:
				t.Fatalf("ParseCSR = %v [%s]", err, code)
			}
			return
		}
		v, err := authority.Vet(ca.Request{CSR: der, NodeID: node, Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLDefault}, now)
		if err != nil {
			t.Fatalf("Vet of a CSR that parses = %v", err)
		}
		leafDER, err := authority.Issue(v)
		if err != nil {
			t.Fatalf("Issue = %v", err)
		}
		leaf, err := x509.ParseCertificate(leafDER)
		if err != nil {
			t.Fatal(err)
		}
		id, err := ca.Verify([]*x509.Certificate{leaf, cas[1]}, cas[0], ca.VerifyOptions{Now: now})
		if err != nil || id.NodeID != node || id.Role != ca.RoleWorker || id.Zone != "default" || id.KeyHash != csr.KeyHash {
			t.Fatalf("Verify = %+v, %v", id, err)
		}
	})
}
