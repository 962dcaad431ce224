package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"

	"warden"
)

// NewKey returns a new P-256 key. It stays on the host it was made on (I3).
func NewKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInternal, "making a key", "%w", err)
	}
	return key, nil
}

// MarshalKey returns the key as PKCS #8 DER, in clear: the caller seals it. ParseKey is its inverse. Errors: CodeInvalid
// for a key that is not in memory or not of an allowed kind.
func MarshalKey(key crypto.Signer) ([]byte, error) {
	const op = "marshalling key"
	if err := checkPublic(key.Public()); err != nil {
		return nil, warden.Wrap(op, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		// The cause names a Go type at most.
		return nil, warden.Errorf(warden.CodeInvalid, op, "the key cannot be exported")
	}
	return der, nil
}

// ParseKey is the inverse of MarshalKey. Errors: CodeInvalid; the text holds nothing of the key.
func ParseKey(der []byte) (crypto.Signer, error) {
	const op = "parsing key"
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInvalid, op, "not a PKCS #8 private key")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, warden.Errorf(warden.CodeInvalid, op, "the key does not sign")
	}
	if err := checkPublic(key.Public()); err != nil {
		return nil, warden.Wrap(op, err)
	}
	return key, nil
}

// KeyHash returns the SHA-256 of pub's SubjectPublicKeyInfo, DER. Errors: CodeInvalid for a key of a kind that is not
// allowed.
func KeyHash(pub crypto.PublicKey) ([32]byte, error) {
	spki, err := marshalPublic(pub)
	if err != nil {
		return [32]byte{}, err
	}
	return sha256.Sum256(spki), nil
}

func marshalPublic(pub crypto.PublicKey) ([]byte, error) {
	if err := checkPublic(pub); err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInvalid, "marshalling public key", "%w", err)
	}
	return spki, nil
}

// checkPublic allows P-256, P-384 and Ed25519.
func checkPublic(pub crypto.PublicKey) error {
	const hint = "use a P-256, P-384 or Ed25519 key"
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k != nil && (k.Curve == elliptic.P256() || k.Curve == elliptic.P384()) {
			return nil
		}
		return warden.Hint(warden.Errorf(warden.CodeInvalid, "checking public key", "this curve is not allowed"), hint)
	case ed25519.PublicKey:
		if len(k) == ed25519.PublicKeySize {
			return nil
		}
	}
	return warden.Hint(warden.Errorf(warden.CodeInvalid, "checking public key", "keys of type %T are not allowed", pub), hint)
}

// canonicalKey refuses a SubjectPublicKeyInfo that is not the one spelling of its key, so that a hash of the key and a hash
// of the bytes are the same. It returns the hash.
func canonicalKey(pub crypto.PublicKey, spki []byte) ([32]byte, error) {
	canonical, err := marshalPublic(pub)
	if err != nil {
		return [32]byte{}, err
	}
	if !bytes.Equal(canonical, spki) {
		return [32]byte{}, warden.Errorf(warden.CodeInvalid, "checking public key", "it is not in its canonical form")
	}
	return sha256.Sum256(canonical), nil
}
