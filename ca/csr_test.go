package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net"
	"net/url"
	"testing"

	"warden"
	"warden/ca"
)

// hostileTemplate asks for all that a joiner must not choose.
func hostileTemplate(clusterID string) *x509.CertificateRequest {
	zone, _ := asn1.MarshalWithParams("pci", "utf8")
	isCA, _ := asn1.Marshal(struct {
		CA bool
	}{true})
	return &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "evil-node", Organization: []string{clusterID}, OrganizationalUnit: []string{ca.RoleManager}},
		DNSNames:       []string{"evil.example"},
		EmailAddresses: []string{"root@evil.example"},
		IPAddresses:    []net.IP{net.IPv4(10, 9, 8, 7)},
		URIs:           []*url.URL{{Scheme: "spiffe", Host: clusterID, Path: "/node/evil"}},
		ExtraExtensions: []pkix.Extension{
			{Id: ca.ZoneOID, Value: zone},
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: isCA},
		},
	}
}

func request(t *testing.T, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestCSRAttacks pins what ParseCSR refuses, and with which code. The classes are those of the CSR advisories of other CAs
// (OpenBao GHSA-g892, SPIRE 1.14.6) and RFC 2986.
func TestCSRAttacks(t *testing.T) {
	p256, _ := ca.NewKey()
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	plain := &x509.CertificateRequest{}
	good := request(t, p256, plain)

	badSignature := bytes.Clone(good)
	badSignature[len(badSignature)-1] ^= 1
	otherKey, _ := ca.NewKey()
	spki, _ := x509.MarshalPKIXPublicKey(p256.Public())
	otherSPKI, _ := x509.MarshalPKIXPublicKey(otherKey.Public())
	swappedKey := bytes.Replace(good, spki, otherSPKI, 1)
	offCurve := bytes.Clone(good)
	offCurve[bytes.Index(good, spki)+len(spki)-1] ^= 1
	large := request(t, p256, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{
		{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: make([]byte, warden.CSRBytesMax)}}})

	for _, tt := range []struct {
		name string
		der  []byte
		want warden.Code
	}{
		{"P-256", good, ""},
		{"P-384", request(t, p384, plain), ""},
		{"Ed25519", request(t, ed, plain), ""},
		{"names and extensions are ignored", request(t, p256, hostileTemplate(warden.NewID())), ""},
		{"RSA", request(t, rsaKey, plain), warden.CodeInvalid},
		{"P-224", request(t, p224, plain), warden.CodeInvalid},
		{"P-521", request(t, p521, plain), warden.CodeInvalid},
		{"SHA-1 signature", withSHA1(t, good), warden.CodeInvalid},
		{"key with something behind it", withLongKey(t, p256), warden.CodeInvalid},
		{"bad signature", badSignature, warden.CodeUnauthentic},
		{"another's key", swappedKey, warden.CodeUnauthentic},
		{"point off the curve", offCurve, warden.CodeInvalid},
		{"trailing byte", append(bytes.Clone(good), 0), warden.CodeInvalid},
		{"two requests", append(bytes.Clone(good), good...), warden.CodeInvalid},
		{"truncated", good[:len(good)-1], warden.CodeInvalid},
		{"empty", nil, warden.CodeInvalid},
		{"more than 8 KiB", large, warden.CodeTooLarge},
		{"10 MB of zeros", make([]byte, 10<<20), warden.CodeTooLarge},
		{"a certificate", newCluster(t, now).rootDER, warden.CodeInvalid},
	} {
		csr, err := ca.ParseCSR(tt.der)
		wantCode(t, tt.name, err, tt.want)
		if (csr == nil) == (tt.want == "") {
			t.Errorf("%s: ParseCSR gives %v beside error %v", tt.name, csr, err)
		}
	}
}

// withSHA1 names ecdsa-with-SHA1 (1.2.840.10045.4.1) as the signature algorithm.
func withSHA1(t *testing.T, der []byte) []byte {
	t.Helper()
	var outer struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &outer); err != nil {
		t.Fatal(err)
	}
	outer.Algorithm.Algorithm = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}
	out, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// withLongKey makes a CSR whose signature holds and whose SubjectPublicKeyInfo has an element too many, which encoding/asn1
// skips: a second spelling of the same key, with another hash.
func withLongKey(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	marshal := func(v any) []byte {
		der, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	var sequence asn1.RawValue
	if _, err := asn1.Unmarshal(spki, &sequence); err != nil {
		t.Fatal(err)
	}
	long := marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: append(sequence.Bytes, 5, 0)})
	body := append([]byte{2, 1, 0, 0x30, 0}, long...) // version 0, empty subject
	body = append(body, 0xa0, 0)                      // no attributes
	tbs := marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: body})
	digest := sha256.Sum256(tbs)
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}})
}
