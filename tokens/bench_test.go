package tokens_test

import (
	"testing"

	"warden/tokens"
)

// Both proofs of a join, made and checked.
func BenchmarkProof(b *testing.B) {
	key, exporter, csr, grant := [32]byte{1}, make([]byte, 32), make([]byte, 300), make([]byte, 2000)
	b.ReportAllocs()
	for b.Loop() {
		if !tokens.CheckProof(key, exporter, csr, tokens.Prove(key, exporter, csr)) || !tokens.CheckGrant(key, exporter, grant, tokens.ProveGrant(key, exporter, grant)) {
			b.Fatal("a proof does not hold")
		}
	}
}
