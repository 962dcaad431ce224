package manager

import (
	"crypto/sha256"
	"crypto/x509"
	"sync"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/internal/sensitive"
	"warden/secrets"
)

// Purposes that CA keys are sealed under the cluster keyset for.
const (
	purposeRoot    = "root-ca-key"
	purposeIssuing = "issuing-ca-key"
)

// authorityCache keeps the opened keyset and issuing CA of the cluster record's latest version.
type authorityCache struct {
	mu        sync.Mutex // guards the rest; held while keys are opened, never across I/O
	version   uint64
	keyset    *secrets.Keyset
	authority *ca.Authority
}

func (a *authorityCache) of(c *api.Cluster) (*secrets.Keyset, *ca.Authority, error) {
	const op = "opening the issuing CA"
	if c == nil {
		return nil, nil, warden.Errorf(warden.CodeUnavailable, op, "the replica has no cluster record yet")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.authority != nil && a.version == c.Meta.GetVersion() {
		return a.keyset, a.authority, nil
	}
	ks, err := secrets.ParseKeyset(c.Keyset)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	der, err := ks.Open(c.SealedIssuingKey, c.Id, purposeIssuing)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	key, err := ca.ParseKey(der)
	clear(der)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	au, err := ca.New(c.Id, c.RootCert, c.IssuingCert, key)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	a.keyset, a.authority, a.version = ks, au, c.Meta.GetVersion()
	return ks, au, nil
}

// openSecret opens one version with the cluster keyset, for the dispatcher at the moment of sending.
func (m *Manager) openSecret(secretID string, version uint64) (sensitive.Bytes, error) {
	v := m.store.View()
	ks, _, err := m.authority.of(v.Cluster())
	if err != nil {
		return sensitive.Bytes{}, err
	}
	sv := v.SecretVersion(secretID, version)
	if sv == nil {
		return sensitive.Bytes{}, warden.Errorf(warden.CodeNotFound, "opening secret "+secretID, "no version %d", version)
	}
	return secrets.OpenVersion(ks, m.cfg.ClusterID, secretID, version, sv.Ciphertext, sv.WrappedKey)
}

// NewClusterRecord makes the keys of a new cluster: root, issuing CA and keyset.
func NewClusterRecord(clusterID string, mk Maker) (*api.Cluster, *ca.Authority, error) {
	const op = "making the keys of the cluster"
	root, rootKey, err := ca.NewRoot(clusterID, mk.Now)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	issuing, issuingKey, err := ca.NewIssuing(root, rootKey, clusterID, 1, mk.Now)
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	ks, err := secrets.NewKeyset()
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	c := &api.Cluster{
		Id: clusterID, RootCert: root, IssuingCert: issuing, IssuingGeneration: 1, LeafTtlNs: int64(mk.LeafTTL), KeysetGeneration: 1, ApplyVersion: 1,
		LockGeneration: 1, DekGeneration: 1,
		Autolock: mk.Recipient != nil, UnlockRecipient: mk.Recipient, UnlockKeyId: mk.KeyID,
	}
	for _, k := range []struct {
		key     any
		purpose string
		to      *[]byte
	}{{rootKey, purposeRoot, &c.SealedRootKey}, {issuingKey, purposeIssuing, &c.SealedIssuingKey}} {
		if *k.to, err = sealKey(ks, clusterID, k.key, k.purpose); err != nil {
			return nil, nil, warden.Wrap(op, err)
		}
	}
	if c.Keyset, err = ks.Bytes(); err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	au, err := ca.New(clusterID, root, issuing, issuingKey)
	return c, au, warden.Wrap(op, err)
}

func sealKey(ks *secrets.Keyset, clusterID string, key any, purpose string) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	return ks.Seal(der, clusterID, purpose)
}

func issuerSum(der []byte) []byte {
	s := sha256.Sum256(der)
	return s[:]
}
