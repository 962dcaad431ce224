package tokens

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
)

// Labels keep the two MACs apart: a request's proof is never a grant's.
const (
	labelProof = "warden-join/1 proof"
	labelGrant = "warden-join/1 grant"
)

// Prove returns the joiner's proof that it holds the token with this key: HMAC-SHA256 over the exporter of the TLS
// connection (RFC 8446 §7.5) and its CSR. CheckProof is its inverse. Pure.
func Prove(key [32]byte, exporter, csr []byte) []byte { return mac(key, labelProof, exporter, csr) }

// CheckProof reports in constant time whether proof is Prove's for the same arguments. Pure.
func CheckProof(key [32]byte, exporter, csr, proof []byte) bool {
	return hmac.Equal(Prove(key, exporter, csr), proof)
}

// ProveGrant returns the manager's proof that it holds the token too: HMAC-SHA256 over the exporter and the exact bytes of
// the grant. CheckGrant is its inverse. Pure.
func ProveGrant(key [32]byte, exporter, grant []byte) []byte {
	return mac(key, labelGrant, exporter, grant)
}

// CheckGrant reports in constant time whether proof is ProveGrant's for the same arguments. Pure.
func CheckGrant(key [32]byte, exporter, grant, proof []byte) bool {
	return hmac.Equal(ProveGrant(key, exporter, grant), proof)
}

// mac is HMAC-SHA256 over the parts, each with its length before it, so that no two lists of parts have the same bytes.
func mac(key [32]byte, label string, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key[:])
	for _, p := range append([][]byte{[]byte(label)}, parts...) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	return h.Sum(nil)
}
