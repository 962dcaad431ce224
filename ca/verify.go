package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"slices"
	"time"

	"warden"
)

// VerifyOptions says what Verify judges by. The zero value of the other fields is the strict choice; Now must be set.
type VerifyOptions struct {
	Now               time.Time
	AllowExpiredFor   time.Duration // how long past its end the leaf is still taken; for doors that only renew
	DistrustedIssuers [][32]byte    // SHA-256 of the DER of issuing certificates that count no more
}

// Verify checks that chain[0] is a leaf of Warden's profile, signed under root by way of the other certificates in chain,
// of root's cluster, by no distrusted issuer, and valid at o.Now (both bounds count, RFC 5280 §4.1.2.5). The time is judged
// last, so that CodeExpired and CodeClock are said of authentic leaves only; both carry both times. A chain may be at most
// ChainMax long. Errors: CodeTooLarge, CodeUnauthentic, CodeWrongCluster, CodeRevoked for a distrusted issuer, CodeExpired,
// CodeClock for a leaf that is not yet valid. Cost: one signature check, and another the first time that an issuing CA is seen.
func Verify(chain []*x509.Certificate, root *x509.Certificate, o VerifyOptions) (Identity, error) {
	const op = "verifying certificate chain"
	if len(chain) == 0 || root == nil {
		return Identity{}, warden.Errorf(warden.CodeUnauthentic, op, "no certificate was presented")
	}
	if len(chain) > warden.ChainMax {
		return Identity{}, warden.Errorf(warden.CodeTooLarge, op, "%d certificates, at most %d are allowed", len(chain), warden.ChainMax)
	}
	cluster, err := clusterOf(root)
	if err != nil {
		return Identity{}, warden.Recode(warden.CodeUnauthentic, op, err)
	}
	leaf := chain[0]
	at := clamp(o.Now, leaf.NotBefore, leaf.NotAfter)
	if !knownIssuers.verify(leaf, chain[1:], root, at, o.DistrustedIssuers) {
		if err := verifyPath(op, leaf, chain[1:], root, cluster, at, o); err != nil {
			return Identity{}, err
		}
		knownIssuers.learn(chain[1:], root)
	}
	id, err := profile(leaf)
	if err != nil {
		return Identity{}, warden.Recode(warden.CodeUnauthentic, op, err)
	}
	if id.ClusterID != cluster {
		return Identity{}, warden.Errorf(warden.CodeWrongCluster, op, "the leaf is of cluster %s, the root of %s", id.ClusterID, cluster)
	}
	if err := checkTime(op, leaf, o.Now, o.AllowExpiredFor); err != nil {
		return Identity{}, err
	}
	return id, nil
}

// verifyPath builds and judges the whole path from leaf to root, by way of others that are not distrusted.
func verifyPath(op string, leaf *x509.Certificate, others []*x509.Certificate, root *x509.Certificate, cluster string, at time.Time, o VerifyOptions) error {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	var distrusted []*x509.Certificate
	for _, c := range others {
		if slices.Contains(o.DistrustedIssuers, sha256.Sum256(c.Raw)) {
			distrusted = append(distrusted, c)
			continue
		}
		intermediates.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, // in every role's profile; profile checks the rest
		CurrentTime:   at,
	})
	if err == nil {
		return nil
	}
	for _, c := range distrusted {
		if leaf.CheckSignatureFrom(c) == nil {
			return warden.Hint(warden.Errorf(warden.CodeRevoked, op, "the issuing CA %q is not trusted any more", clip(c.Subject.CommonName)),
				"the node has to join again with a new token, unless a manager renews it")
		}
	}
	return refusal(op, err, leaf, cluster, o.Now)
}

// FindPinned returns the CA certificate in chain whose DER has the SHA-256 rootHash. It alone proves nothing of the leaf:
// give the result to Verify. Errors: CodeWrongRoot.
func FindPinned(chain []*x509.Certificate, rootHash [32]byte) (*x509.Certificate, error) {
	for _, c := range chain {
		if sha256.Sum256(c.Raw) == rootHash && c.IsCA && c.BasicConstraintsValid {
			return c, nil
		}
	}
	return nil, warden.Hint(warden.Errorf(warden.CodeWrongRoot, "finding the pinned root", "the other side does not present the root CA that the token names"),
		"check the address; if it is right, ask a manager of the cluster for a new token (wardenctl swarm join-token)")
}

// Read returns what the leaf says, without verifying anything of it but its shape: for display, and for a leaf that the
// caller has from a place that it trusts. Errors: CodeInvalid.
func Read(leaf *x509.Certificate) (Identity, error) { return profile(leaf) }

// refusal turns an error of path building into a warden error.
func refusal(op string, err error, leaf *x509.Certificate, cluster string, now time.Time) error {
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired && invalid.Cert != nil {
		if terr := checkTime(op, invalid.Cert, now, 0); terr != nil {
			return terr
		}
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		if id, perr := profile(leaf); perr == nil && id.ClusterID != cluster {
			return warden.Hint(warden.Errorf(warden.CodeWrongCluster, op, "the leaf claims cluster %s, this is %s", id.ClusterID, cluster),
				"the address belongs to another cluster, or this node does")
		}
	}
	return warden.Errorf(warden.CodeUnauthentic, op, "%w", err)
}

// checkTime judges now by the certificate's validity. Both bounds count.
func checkTime(op string, c *x509.Certificate, now time.Time, grace time.Duration) error {
	if now.Before(c.NotBefore) {
		return warden.Hint(warden.Errorf(warden.CodeClock, op, "the certificate %q is valid from %s, the clock here says %s",
			clip(c.Subject.CommonName), stamp(c.NotBefore), stamp(now)), "set the clocks of both hosts (NTP), then try again")
	}
	// A certificate is valid through the whole second of its NotAfter.
	if now.Truncate(time.Second).After(c.NotAfter.Add(grace)) {
		return warden.Hint(warden.Errorf(warden.CodeExpired, op, "the certificate %q was valid until %s, the clock here says %s",
			clip(c.Subject.CommonName), stamp(c.NotAfter), stamp(now)), "check the clock of this host; if it is right, the other side has to renew its certificate")
	}
	return nil
}

// profile reads a leaf and refuses whatever Issue would not have made.
func profile(leaf *x509.Certificate) (Identity, error) {
	const op = "reading leaf"
	bad := func(format string, args ...any) (Identity, error) {
		return Identity{}, warden.Errorf(warden.CodeInvalid, op, format, args...)
	}
	if leaf.IsCA || !leaf.BasicConstraintsValid || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		return bad("it is not an end-entity certificate for signing")
	}
	s := leaf.Subject
	if len(s.Names) != 3 || len(s.Organization) != 1 || len(s.OrganizationalUnit) != 1 || !warden.ValidID(s.CommonName) || !warden.ValidID(s.Organization[0]) {
		return bad("the subject is not node, role and cluster")
	}
	id := Identity{ClusterID: s.Organization[0], NodeID: s.CommonName, Role: s.OrganizationalUnit[0],
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
	want, err := usages(id.Role)
	if err != nil {
		return Identity{}, warden.Wrap(op, err)
	}
	if !slices.Equal(leaf.ExtKeyUsage, want) || len(leaf.UnknownExtKeyUsage) != 0 {
		return bad("the key usages are not those of role %s", id.Role)
	}
	if len(leaf.DNSNames)+len(leaf.EmailAddresses)+len(leaf.IPAddresses) != 0 || len(leaf.URIs) != 1 ||
		leaf.URIs[0].String() != SPIFFEID(id.ClusterID, id.NodeID) {
		return bad("the alternative name is not the node's SPIFFE ID alone")
	}
	if id.Zone, err = zoneOf(leaf.Extensions); err != nil {
		return Identity{}, warden.Wrap(op, err)
	}
	if leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() > 8*SerialBytes {
		return bad("the serial is not 128 bits")
	}
	id.Serial = serialText(leaf.SerialNumber)
	if id.KeyHash, err = canonicalKey(leaf.PublicKey, leaf.RawSubjectPublicKeyInfo); err != nil {
		return Identity{}, warden.Wrap(op, err)
	}
	return id, nil
}

// zoneOf wants exactly one zone extension, in the one encoding that zoneExtension makes.
func zoneOf(extensions []pkix.Extension) (string, error) {
	const op = "reading zone"
	var value []byte
	for _, e := range extensions {
		if !e.Id.Equal(ZoneOID) {
			continue
		}
		if value != nil || e.Critical || len(e.Value) < 2 {
			return "", warden.Errorf(warden.CodeInvalid, op, "the zone extension is malformed")
		}
		value = e.Value
	}
	if value == nil {
		return "", warden.Errorf(warden.CodeInvalid, op, "there is no zone extension")
	}
	zone := string(value[2:]) // a UTF8String of at most 63 bytes has a header of two
	if err := warden.CheckName("zone", zone); err != nil {
		return "", warden.Wrap(op, err)
	}
	if canonical, err := zoneExtension(zone); err != nil || !bytes.Equal(canonical.Value, value) {
		return "", warden.Errorf(warden.CodeInvalid, op, "the zone extension is malformed")
	}
	return zone, nil
}

// clusterOf returns the cluster ID in a CA certificate's subject.
func clusterOf(c *x509.Certificate) (string, error) {
	if !c.IsCA || !c.BasicConstraintsValid || len(c.Subject.Organization) != 1 || !warden.ValidID(c.Subject.Organization[0]) {
		return "", warden.Errorf(warden.CodeInvalid, "reading CA certificate", "it is not a Warden CA")
	}
	return c.Subject.Organization[0], nil
}

func clamp(t, lo, hi time.Time) time.Time {
	switch {
	case t.Before(lo):
		return lo
	case t.After(hi):
		return hi
	}
	return t
}
