package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"time"

	"warden"
)

// NewRoot makes a self-signed root for the cluster, valid for CATTL, and its key.
func NewRoot(clusterID string, now time.Time) (certDER []byte, key crypto.Signer, err error) {
	const op = "making root CA"
	if !warden.ValidID(clusterID) {
		return nil, nil, warden.Errorf(warden.CodeInvalid, op, "the cluster ID is malformed")
	}
	key, err = NewKey()
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	t, err := caTemplate("Warden root CA", clusterID, key.Public(), now, warden.CATTL)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	t.MaxPathLen = 1
	certDER, err = x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, nil, warden.Errorf(warden.CodeInternal, op, "%w", err)
	}
	return certDER, key, nil
}

// NewIssuing makes an issuing CA under the root and its key: valid for IssuingTTL but never longer than the root, path
// length 0. Each generation has a subject and a key identifier of its own, so that path building never has to choose by
// trying. Errors: CodeInvalid; CodeWrongCluster where the root is another cluster's; CodeExpired past the root's end.
func NewIssuing(rootDER []byte, rootKey crypto.Signer, clusterID string, generation uint64, now time.Time) (certDER []byte, key crypto.Signer, err error) {
	op := fmt.Sprintf("making issuing CA of generation %d", generation)
	root, err := parseCert(rootDER)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	if cluster, err := clusterOf(root); err != nil || cluster != clusterID {
		return nil, nil, warden.Errorf(warden.CodeWrongCluster, op, "the root belongs to another cluster")
	}
	if !samePublic(root.PublicKey, rootKey.Public()) {
		return nil, nil, warden.Errorf(warden.CodeInvalid, op, "the root key is not the root certificate's")
	}
	if now.After(root.NotAfter) {
		return nil, nil, warden.Errorf(warden.CodeExpired, op, "the root ended at %s, now is %s", stamp(root.NotAfter), stamp(now))
	}
	key, err = NewKey()
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	t, err := caTemplate(fmt.Sprintf("Warden issuing CA %d", generation), clusterID, key.Public(), now, warden.IssuingTTL)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	t.MaxPathLenZero = true
	if t.NotAfter.After(root.NotAfter) {
		t.NotAfter = root.NotAfter
	}
	certDER, err = x509.CreateCertificate(rand.Reader, t, root, key.Public(), rootKey)
	if err != nil {
		return nil, nil, warden.Errorf(warden.CodeInternal, op, "%w", err)
	}
	return certDER, key, nil
}

func caTemplate(name, clusterID string, pub crypto.PublicKey, now time.Time, ttl time.Duration) (*x509.Certificate, error) {
	hash, err := KeyHash(pub)
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	return &x509.Certificate{
		SerialNumber: newSerial(),
		Subject: pkix.Name{
			CommonName:   name,
			Organization: []string{clusterID},
			SerialNumber: hex.EncodeToString(hash[:8]), // a subject of its own for each key
		},
		NotBefore:             now.Add(-warden.LeafBackdate),
		NotAfter:              now.Add(ttl),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId:          hash[:20],
	}, nil
}

// newSerial returns 128 random bits, not zero.
func newSerial() *big.Int {
	var b [SerialBytes]byte
	for {
		rand.Read(b[:]) // never fails (crypto/rand since Go 1.24)
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n
		}
	}
}

func samePublic(a, b crypto.PublicKey) bool {
	ha, erra := KeyHash(a)
	hb, errb := KeyHash(b)
	return erra == nil && errb == nil && ha == hb
}

// Authority issues leaves under one issuing CA. Safe for concurrent use.
type Authority struct {
	clusterID     string
	root, issuing *x509.Certificate
	key           crypto.Signer
}

// signer signs with the issuing CA's key. It says that its public half is the one in the issuing CA's certificate, whatever a
// token says: crypto/x509 checks each signature that it makes by that.
type signer struct {
	crypto.Signer
	public crypto.PublicKey
}

func (s signer) Public() crypto.PublicKey { return s.public }

// New returns the authority of the cluster. The key may live in a token: only Sign and Public are called. Errors:
// CodeWrongCluster where a certificate is another cluster's; CodeCorrupt where root, issuing CA and key do not belong
// together.
func New(clusterID string, rootDER, issuingDER []byte, issuingKey crypto.Signer) (*Authority, error) {
	const op = "opening the certificate authority"
	root, err := parseCert(rootDER)
	if err != nil {
		return nil, warden.Recode(warden.CodeCorrupt, op, err)
	}
	issuing, err := parseCert(issuingDER)
	if err != nil {
		return nil, warden.Recode(warden.CodeCorrupt, op, err)
	}
	for _, c := range []*x509.Certificate{root, issuing} {
		if cluster, err := clusterOf(c); err != nil || cluster != clusterID {
			return nil, warden.Errorf(warden.CodeWrongCluster, op, "the certificate %q is not of cluster %s", c.Subject.CommonName, clusterID)
		}
	}
	if !root.IsCA || !issuing.IsCA || issuing.KeyUsage&x509.KeyUsageCertSign == 0 || issuing.CheckSignatureFrom(root) != nil {
		return nil, warden.Errorf(warden.CodeCorrupt, op, "the issuing CA is not signed by the root")
	}
	if !samePublic(issuing.PublicKey, issuingKey.Public()) {
		return nil, warden.Errorf(warden.CodeCorrupt, op, "the key is not the issuing CA's")
	}
	return &Authority{clusterID: clusterID, root: root, issuing: issuing, key: signer{issuingKey, issuing.PublicKey}}, nil
}

// Request asks for one leaf. All but the CSR comes from the store's record or the token, never from the node (I1).
type Request struct {
	CSR                []byte
	Parsed             *CSR // what ParseCSR made of CSR, where it was called already: else Vet does
	NodeID, Role, Zone string
	TTL                time.Duration
}

// Vetted proves that one request met the profile of its role at one authority. Only Vet makes one; Issue spends it.
type Vetted struct {
	by       *Authority
	template *x509.Certificate
	csr      *CSR
	want     Identity
	once     sync.Once
}

// KeyHash returns the SHA-256 of the SubjectPublicKeyInfo that the leaf will have.
func (v *Vetted) KeyHash() [32]byte { return v.csr.KeyHash }

// Validity returns the two ends of the life that the leaf will have.
func (v *Vetted) Validity() (notBefore, notAfter time.Time) { return v.want.NotBefore, v.want.NotAfter }

// Vet judges the request and fixes everything that the leaf will say. Validity: from LeafBackdate before now to TTL after
// it, whole seconds, never outside the issuing CA's own. A TTL out of LeafTTLMin to LeafTTLMax is refused, not replaced.
// Cost: one signature check where the CSR is not parsed yet. Errors: those of ParseCSR; CodeInvalid; CodeExpired or CodeClock where now is outside the
// issuing CA's validity.
func (a *Authority) Vet(r Request, now time.Time) (*Vetted, error) {
	op := "vetting CSR for node " + clip(r.NodeID)
	if !warden.ValidID(r.NodeID) {
		return nil, warden.Errorf(warden.CodeInvalid, op, "the node ID is malformed")
	}
	usage, err := usages(r.Role)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := warden.CheckName("zone", r.Zone); err != nil {
		return nil, warden.Wrap(op, err)
	}
	if r.TTL < warden.LeafTTLMin || r.TTL > warden.LeafTTLMax {
		return nil, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "a life of %s is out of range", r.TTL),
			fmt.Sprintf("choose between %s and %s", warden.LeafTTLMin, warden.LeafTTLMax))
	}
	if err := checkTime(op, a.issuing, now, 0); err != nil {
		return nil, err
	}
	csr := r.Parsed
	if csr == nil {
		if csr, err = ParseCSR(r.CSR); err != nil {
			return nil, warden.Wrap(op, err)
		}
	} else if !csr.proven {
		return nil, warden.Errorf(warden.CodeInternal, op, "the CSR was not parsed here")
	}
	zone, err := zoneExtension(r.Zone)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	now = now.UTC().Truncate(time.Second)
	t := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{CommonName: r.NodeID, OrganizationalUnit: []string{r.Role}, Organization: []string{a.clusterID}},
		NotBefore:             now.Add(-warden.LeafBackdate),
		NotAfter:              now.Add(r.TTL.Truncate(time.Second)),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           usage,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: a.clusterID, Path: "/node/" + r.NodeID}},
		ExtraExtensions:       []pkix.Extension{zone},
		SubjectKeyId:          csr.KeyHash[:20],
	}
	if t.NotBefore.Before(a.issuing.NotBefore) {
		t.NotBefore = a.issuing.NotBefore
	}
	if t.NotAfter.After(a.issuing.NotAfter) {
		t.NotAfter = a.issuing.NotAfter
	}
	return &Vetted{by: a, template: t, csr: csr, want: Identity{
		ClusterID: a.clusterID, NodeID: r.NodeID, Role: r.Role, Zone: r.Zone, KeyHash: csr.KeyHash,
		Serial: serialText(t.SerialNumber), NotBefore: t.NotBefore, NotAfter: t.NotAfter,
	}}, nil
}

// Issue signs the leaf that v stands for and returns its DER, after having compared what it says with what was vetted. That
// its signature holds under the issuing CA's certificate crypto/x509 has checked in making it, and that the issuing CA is the
// root's New has: a second check of each would find the same. A Vetted of another authority, or one that was spent, gives
// CodeInternal. Cost: one signature, one check.
func (a *Authority) Issue(v *Vetted) (leafDER []byte, err error) {
	const op = "issuing leaf"
	if v == nil || v.by != a {
		return nil, warden.Errorf(warden.CodeInternal, op, "the request was vetted by another authority")
	}
	spent := true
	v.once.Do(func() { spent = false })
	if spent {
		return nil, warden.Errorf(warden.CodeInternal, op, "the vetted request was spent before")
	}
	op2 := op + " for node " + v.want.NodeID
	der, err := x509.CreateCertificate(rand.Reader, v.template, a.issuing, v.csr.Public, a.key)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInternal, op2, "%w", err)
	}
	leaf, err := parseCert(der)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op2, err)
	}
	got, err := profile(leaf)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op2, err)
	}
	if got != v.want || !bytes.Equal(leaf.RawIssuer, a.issuing.RawSubject) || !bytes.Equal(leaf.AuthorityKeyId, a.issuing.SubjectKeyId) ||
		len(leaf.UnhandledCriticalExtensions) != 0 || leaf.NotAfter.After(a.root.NotAfter) {
		return nil, warden.Errorf(warden.CodeInternal, op2, "the leaf differs from what was vetted")
	}
	return der, nil
}

// Chain returns leaf, issuing CA and root, as managers and nodes present it: the root is part of it, so that a joiner finds
// its pin in the handshake (I2).
func (a *Authority) Chain(leafDER []byte) [][]byte {
	return [][]byte{bytes.Clone(leafDER), bytes.Clone(a.issuing.Raw), bytes.Clone(a.root.Raw)}
}

// RootHash returns the SHA-256 of the root's DER: what join tokens pin.
func (a *Authority) RootHash() [32]byte { return sha256.Sum256(a.root.Raw) }

// usages returns the profile of the role.
func usages(role string) ([]x509.ExtKeyUsage, error) {
	switch role {
	case RoleManager:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, nil
	case RoleWorker:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, nil
	}
	return nil, warden.Errorf(warden.CodeInvalid, "choosing the profile", "role %q has none", clip(role))
}

func zoneExtension(zone string) (pkix.Extension, error) {
	value, err := asn1.MarshalWithParams(zone, "utf8")
	if err != nil {
		return pkix.Extension{}, warden.Errorf(warden.CodeInvalid, "encoding zone", "%w", err)
	}
	return pkix.Extension{Id: ZoneOID, Value: value}, nil
}

func serialText(n *big.Int) string { return fmt.Sprintf("%0*x", 2*SerialBytes, n) }

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func clip(s string) string { return warden.Clip(s, 64) }
