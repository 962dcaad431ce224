package secrets

import (
	"strconv"

	"warden"
	"warden/internal/keyset"
	"warden/internal/sensitive"
)

// First words of the purposes of a version's two layers.
const (
	purposeValue = "warden secret value 1"
	purposeKey   = "warden secret data key 1"
)

// SealVersion seals a secret version's value under a fresh data key, and wraps that under the primary of ks. Both layers are
// bound to cluster, secret and version. It does not keep value. OpenVersion is its inverse. Errors: CodeTooLarge above
// SecretBytesMax; CodeInternal.
func SealVersion(ks *Keyset, clusterID, secretID string, version uint64, value []byte) (ciphertext, wrappedKey []byte, err error) {
	op := opOf("sealing", secretID, version)
	if len(value) > warden.SecretBytesMax {
		return nil, nil, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d", len(value), warden.SecretBytesMax)
	}
	dataKey, err := keyset.New()
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	clearKey, err := dataKey.Bytes()
	if err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	defer clear(clearKey)
	if wrappedKey, err = ks.Seal(clearKey, words(purposeKey, clusterID, secretID, version)...); err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	if ciphertext, err = dataKey.Seal(value, binding(words(purposeValue, clusterID, secretID, version))); err != nil {
		return nil, nil, warden.Wrap(op, err)
	}
	return ciphertext, wrappedKey, nil
}

// OpenVersion returns the value of a secret version; the caller wipes it. Errors: CodeCorrupt if either part was not made by
// SealVersion for this cluster, secret and version under a key of ks, or they do not belong together.
func OpenVersion(ks *Keyset, clusterID, secretID string, version uint64, ciphertext, wrappedKey []byte) (sensitive.Bytes, error) {
	op := opOf("opening", secretID, version)
	clearKey, err := ks.Open(wrappedKey, words(purposeKey, clusterID, secretID, version)...)
	if err != nil {
		return sensitive.Bytes{}, warden.Wrap(op, err)
	}
	defer clear(clearKey)
	dataKey, err := keyset.Parse(clearKey)
	if err != nil {
		return sensitive.Bytes{}, warden.Wrap(op, err)
	}
	value, err := dataKey.Open(ciphertext, binding(words(purposeValue, clusterID, secretID, version)))
	if err != nil {
		return sensitive.Bytes{}, warden.Wrap(op, err)
	}
	return sensitive.New(value), nil
}

// Rewrap returns the wrapped key sealed again under the primary of ks; the ciphertext stays as it is. Who had the data key
// still has it: only a new version of the secret changes that. Errors: CodeCorrupt as for OpenVersion; CodeInternal.
func Rewrap(ks *Keyset, clusterID, secretID string, version uint64, wrappedKey []byte) ([]byte, error) {
	op := opOf("wrapping the data key again of", secretID, version)
	purpose := words(purposeKey, clusterID, secretID, version)
	clearKey, err := ks.Open(wrappedKey, purpose...)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	defer clear(clearKey)
	wrapped, err := ks.Seal(clearKey, purpose...)
	return wrapped, warden.Wrap(op, err)
}

func words(purpose, clusterID, secretID string, version uint64) []string {
	return []string{purpose, clusterID, secretID, strconv.FormatUint(version, 10)}
}

func opOf(verb, secretID string, version uint64) string {
	return verb + " version " + strconv.FormatUint(version, 10) + " of secret " + secretID
}
