package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"slices"
	"sync"
	"time"
)

// issuersMax bounds how many issuing CAs are remembered. A cluster has one in use, and one per rotation in the last leaf life.
const issuersMax = 64

// knownIssuers is shared by all of the process: what it holds are facts about bytes.
var knownIssuers issuers

// issuers remembers issuing CAs that were found to be signed by a root, both by the hash of their DER, so that the one
// signature that is the same in every chain is checked once. It remembers nothing that depends on the time, on a list of
// distrusted issuers, or on a leaf, and only pairs whose certificates have none of the extensions that narrow what may stand
// below (usages, names, policies): for these, a path that ends at the issuing CA is judged as the path that ends at the root
// is, but for the root's own validity. Nobody can fill it but who has a root's key. Safe for concurrent use.
type issuers struct {
	mu    sync.RWMutex // guards known; held across no signature check
	known map[issuerKey]*issuer
}

type issuerKey struct{ root, issuing [sha256.Size]byte }

type issuer struct{ pool *x509.CertPool } // of it alone

// verify reports whether leaf is valid at a time under an issuing CA among others that is known under root and not
// distrusted. false says nothing: verifyPath has to judge.
func (k *issuers) verify(leaf *x509.Certificate, others []*x509.Certificate, root *x509.Certificate, at time.Time, distrusted [][32]byte) bool {
	if at.Before(root.NotBefore) || at.After(root.NotAfter) {
		return false
	}
	rootSum := sha256.Sum256(root.Raw)
	for _, c := range others {
		if !bytes.Equal(c.RawSubject, leaf.RawIssuer) {
			continue
		}
		sum := sha256.Sum256(c.Raw)
		k.mu.RLock()
		i := k.known[issuerKey{rootSum, sum}]
		k.mu.RUnlock()
		if i == nil || slices.Contains(distrusted, sum) {
			continue
		}
		_, err := leaf.Verify(x509.VerifyOptions{
			Roots: i.pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: at,
		})
		return err == nil
	}
	return false
}

// learn remembers those of the certificates that are plain issuing CAs under root.
func (k *issuers) learn(certs []*x509.Certificate, root *x509.Certificate) {
	for _, c := range certs {
		if !bytes.Equal(c.RawIssuer, root.RawSubject) || bytes.Equal(c.Raw, root.Raw) || !plainCA(c, 0) || !plainCA(root, 1) || c.CheckSignatureFrom(root) != nil {
			continue
		}
		i := &issuer{x509.NewCertPool()}
		i.pool.AddCert(c)
		k.mu.Lock()
		if k.known == nil || len(k.known) >= issuersMax {
			k.known = map[issuerKey]*issuer{}
		}
		k.known[issuerKey{sha256.Sum256(root.Raw), sha256.Sum256(c.Raw)}] = i
		k.mu.Unlock()
	}
}

// What a CA certificate of ours has, and nothing else does where it matters here.
var plainExtensions = []asn1.ObjectIdentifier{
	{2, 5, 29, 14}, // subject key identifier
	{2, 5, 29, 15}, // key usage
	{2, 5, 29, 19}, // basic constraints
	{2, 5, 29, 35}, // authority key identifier
}

// plainCA reports whether c may sign certificates with so many CAs below it, and says nothing else of what is below.
func plainCA(c *x509.Certificate, below int) bool {
	for _, e := range c.Extensions {
		if !slices.ContainsFunc(plainExtensions, e.Id.Equal) {
			return false
		}
	}
	return c.IsCA && c.BasicConstraintsValid && c.KeyUsage&x509.KeyUsageCertSign != 0 && (c.MaxPathLen < 0 || below <= c.MaxPathLen)
}
