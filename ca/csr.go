package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"

	"warden"
)

// CSR is a certificate signing request whose signature holds. Only ParseCSR makes one. It has no names: of a request only
// the public key is used (I1).
type CSR struct {
	Public  crypto.PublicKey
	KeyHash [32]byte // SHA-256 of the SubjectPublicKeyInfo, DER
	proven  bool     // ParseCSR made it: Vet takes no other
}

// NewCSR returns a certificate signing request for the key with an empty subject, DER. ParseCSR is its inverse.
func NewCSR(key crypto.Signer) ([]byte, error) {
	const op = "making CSR"
	if err := checkPublic(key.Public()); err != nil {
		return nil, warden.Wrap(op, err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInternal, op, "%w", err)
	}
	return der, nil
}

// ParseCSR accepts a DER request of at most CSRBytesMax bytes with nothing after it, with a P-256, P-384 or Ed25519 key in
// its canonical form and a signature by that key. Subject, SANs, extensions and attributes are ignored. Cost: one signature
// check, made only after the size and the kind of key have been judged. Errors: CodeTooLarge, CodeInvalid, CodeUnauthentic
// for a signature that does not hold.
func ParseCSR(der []byte) (*CSR, error) {
	const op = "parsing CSR"
	if len(der) > warden.CSRBytesMax {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d are allowed", len(der), warden.CSRBytesMax)
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInvalid, op, "%w", err)
	}
	if len(req.Raw) != len(der) {
		return nil, warden.Errorf(warden.CodeInvalid, op, "trailing bytes")
	}
	hash, err := canonicalKey(req.PublicKey, req.RawSubjectPublicKeyInfo)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	switch req.SignatureAlgorithm {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519:
	default:
		return nil, warden.Errorf(warden.CodeInvalid, op, "signature algorithm %v is not allowed", req.SignatureAlgorithm)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, warden.Errorf(warden.CodeUnauthentic, op, "the signature does not hold")
	}
	return &CSR{Public: req.PublicKey, KeyHash: hash, proven: true}, nil
}
