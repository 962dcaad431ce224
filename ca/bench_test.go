package ca_test

import (
	"crypto/sha256"
	"testing"
	"time"

	"warden"
	"warden/ca"
)

func leafRequest(b *testing.B) ca.Request {
	csr, _ := newCSR(b)
	return ca.Request{CSR: csr, NodeID: warden.NewID(), Role: ca.RoleWorker, Zone: "default", TTL: warden.LeafTTLDefault}
}

// Must pay: one P-256 verification.
func BenchmarkParseCSR(b *testing.B) {
	csr, _ := newCSR(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ca.ParseCSR(csr); err != nil {
			b.Fatal(err)
		}
	}
}

// Must pay: one P-256 verification.
func BenchmarkVet(b *testing.B) {
	c := newCluster(b, now)
	r := leafRequest(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.authority.Vet(r, now); err != nil {
			b.Fatal(err)
		}
	}
}

// Must pay: one P-256 signature.
func BenchmarkIssue(b *testing.B) {
	c := newCluster(b, now)
	r := leafRequest(b)
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		v, err := c.authority.Vet(r, now)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if _, err := c.authority.Issue(v); err != nil {
			b.Fatal(err)
		}
	}
}

// Must pay: one P-256 verification, of the leaf; that the issuing CA is the root's is known after the first.
func BenchmarkVerifyChain(b *testing.B) {
	c := newCluster(b, now)
	chain := c.issue(b, ca.RoleWorker, "default", warden.LeafTTLDefault, now)
	at := now.Add(time.Hour)
	distrusted := [][32]byte{sha256.Sum256([]byte("another"))}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ca.Verify(chain, c.root, ca.VerifyOptions{Now: at, DistrustedIssuers: distrusted}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseChain(b *testing.B) {
	c := newCluster(b, now)
	var ders [][]byte
	for _, cert := range c.issue(b, ca.RoleWorker, "default", warden.LeafTTLDefault, now) {
		ders = append(ders, cert.Raw)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ca.ParseChain(ders); err != nil {
			b.Fatal(err)
		}
	}
}

// Must pay: one P-256 signature.
func BenchmarkNewCSR(b *testing.B) {
	_, key := newCSR(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ca.NewCSR(key); err != nil {
			b.Fatal(err)
		}
	}
}
