// Package ca is Warden's certificate authority: it makes the root, issuing CAs and node leaves, vets certificate signing
// requests, and verifies chains.
//
// It does not decide who becomes a node (package tokens), who may do what (package policy), or whether a certificate's
// node is still a member: that is the store's record, which every door asks after the chain has verified (I4). It keeps no
// state but which issuing CAs a root was seen to have signed, does no I/O but drawing random bytes, and takes the time as an
// argument.
//
// Invariants: of a CSR only the public key is used (I1); a leaf is issued only from a Vetted, which only Vet makes and only
// once; an issued leaf is known to verify under the root before it leaves Issue; whatever Verify accepts has exactly the shape of the
// one profile that Issue makes.
//
// It trusts crypto/x509 for parsing, signatures and path building, and the caller for the time and for the root.
//
// # Names
//
// A leaf has the subject CN = node ID, OU = role, O = cluster ID, one URI SAN spiffe://<cluster>/node/<id>, and its zone in
// a non-critical extension:
//
//	id-warden-zone OBJECT IDENTIFIER ::= { joint-iso-itu-t(2) uuid(25) 1463898692 zone(1) }
//	Zone           ::= UTF8String (SIZE (1..63))
//
// The arc under 2.25 is a UUID's (ITU-T X.667) and needs no registration. Workers' leaves are for client authentication,
// managers' also for server authentication.
//
// References: RFC 5280, RFC 2986 (CSR), RFC 7093 method 1 (key identifiers), the SPIFFE X.509-SVID specification.
package ca

import (
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"net/url"
	"time"

	"warden"
)

// Roles, as they stand in a leaf's OU. No operator leaf can be issued or verified yet.
const (
	RoleManager  = "manager"
	RoleWorker   = "worker"
	RoleOperator = "operator"
)

// SerialBytes is the size of a leaf's random serial.
const SerialBytes = 16

// ZoneOID is id-warden-zone. Treat it as a constant.
var ZoneOID = asn1.ObjectIdentifier{2, 25, 1463898692, 1}

// Identity is what a verified leaf says of its holder. It proves the holder's key, not that the node is still a member.
type Identity struct {
	ClusterID, NodeID, Role, Zone string
	KeyHash                       [32]byte // SHA-256 of the leaf's SubjectPublicKeyInfo, DER
	Serial                        string   // lower-case hexadecimal, 32 digits
	NotBefore, NotAfter           time.Time
}

// SPIFFEID returns the URI that stands in the node's leaf.
func SPIFFEID(clusterID, nodeID string) string {
	return (&url.URL{Scheme: "spiffe", Host: clusterID, Path: "/node/" + nodeID}).String()
}

// ParseChain parses DER certificates in the order given: at least one, at most ChainMax, each at most CertBytesMax and
// without trailing bytes. It verifies nothing. Errors: CodeInvalid, CodeTooLarge.
func ParseChain(ders [][]byte) ([]*x509.Certificate, error) {
	const op = "parsing certificate chain"
	if len(ders) == 0 {
		return nil, warden.Errorf(warden.CodeInvalid, op, "no certificates")
	}
	if len(ders) > warden.ChainMax {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "%d certificates, at most %d are allowed", len(ders), warden.ChainMax)
	}
	chain := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		cert, err := parseCert(der)
		if err != nil {
			return nil, warden.Wrap(fmt.Sprintf("%s: certificate %d", op, i), err)
		}
		chain[i] = cert
	}
	return chain, nil
}

func parseCert(der []byte) (*x509.Certificate, error) {
	const op = "parsing certificate"
	if len(der) > warden.CertBytesMax {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d are allowed", len(der), warden.CertBytesMax)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInvalid, op, "%w", err)
	}
	return cert, nil
}
