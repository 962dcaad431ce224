// Package secrets seals what the cluster keeps for its users: the values of secret versions, and other records of the
// replicated state that need more than the seal of the disk (the keys of the CA, of tokens).
//
// All is sealed under the cluster keyset. A secret version has a data key of its own that seals the value and is itself
// wrapped under the keyset, so that rotating the keyset re-wraps keys and touches no value.
//
// The package decides nothing about who may read a secret (policy, dispatcher), keeps nothing and does no I/O but drawing
// randomness. It cannot tell an old record from the current one with the same purpose: versions are in the purpose.
//
// Invariants: what was sealed for one purpose, cluster, secret or version opens for no other (I8); each version has a fresh
// data key; no key and no value prints (I10).
//
// It trusts crypto/rand and Tink, through internal/keyset. Reference: NIST SP 800-57 part 1, §6.2.2 (key wrapping).
package secrets

import (
	"golang.org/x/crypto/cryptobyte"

	"warden"
	"warden/internal/keyset"
)

// Keyset is the cluster keyset: one primary key that seals, and older keys that still open. It never changes, is safe for
// concurrent use, and does not print.
type Keyset struct{ set keyset.Set }

// NewKeyset returns a keyset of one fresh key. Errors: CodeInternal.
func NewKeyset() (*Keyset, error) { return made(keyset.New()) }

// ParseKeyset is the inverse of Bytes. It does not keep data, which the caller wipes. Errors: CodeCorrupt.
func ParseKeyset(data []byte) (*Keyset, error) { return made(keyset.Parse(data)) }

func made(set keyset.Set, err error) (*Keyset, error) {
	if err != nil {
		return nil, err
	}
	return &Keyset{set}, nil
}

// Bytes returns the keyset in clear. The caller seals or wipes it. Errors: CodeInternal.
func (k *Keyset) Bytes() ([]byte, error) { return k.set.Bytes() }

// Rotate returns a keyset with a fresh primary; the keys of k stay for opening. It protects what is sealed from then on, and
// nothing that was sealed before until that is sealed again. Errors: CodeTooLarge when old keys were never dropped.
func (k *Keyset) Rotate() (*Keyset, error) { return made(k.set.Rotate()) }

// OnlyPrimary returns a keyset with the primary of k alone. What is still sealed under older keys is lost with them: see
// UnderPrimary. Errors: CodeInternal.
func (k *Keyset) OnlyPrimary() (*Keyset, error) { return made(k.set.OnlyPrimary()) }

// UnderPrimary reports whether sealed, or a wrapped key, is marked as sealed under the primary of k, so that it needs no
// sealing again. The mark is not authenticated.
func (k *Keyset) UnderPrimary(sealed []byte) bool { return k.set.UnderPrimary(sealed) }

// Seal encrypts plaintext under the primary and binds it to the purpose: what the record is and every ID it belongs to. Open
// is its inverse, with the same words in the same order. Errors: CodeInternal.
func (k *Keyset) Seal(plaintext []byte, purpose ...string) ([]byte, error) {
	return k.set.Seal(plaintext, binding(purpose))
}

// Open returns what Seal sealed; the caller wipes it. Errors: CodeCorrupt if it was not sealed by this keyset for this
// purpose.
func (k *Keyset) Open(sealed []byte, purpose ...string) ([]byte, error) {
	plaintext, err := k.set.Open(sealed, binding(purpose))
	return plaintext, warden.Wrap("opening a sealed record", err)
}

// binding returns the words, each behind its length: no two lists have the same bytes.
func binding(words []string) []byte {
	var b cryptobyte.Builder
	for _, w := range words {
		b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(w)) })
	}
	return b.BytesOrPanic() // words are constants and IDs, far below 16 MiB
}
