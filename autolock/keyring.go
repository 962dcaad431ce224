package autolock

import (
	"sync/atomic"

	"warden/internal/keyset"
)

// Keyring is a manager's DEK: what seals its log and snapshots. While its keys are being rotated it holds the older ones too, for
// opening. It never changes and is safe for concurrent use. It does not print.
type Keyring struct{ set keyset.Set }

// NewKeyring returns a keyring with one fresh key. Errors: CodeInternal.
func NewKeyring() (*Keyring, error) {
	set, err := keyset.New()
	if err != nil {
		return nil, err
	}
	return &Keyring{set}, nil
}

// Seal encrypts plaintext and binds it to aad, which says where the bytes belong. Errors: CodeInternal.
func (k *Keyring) Seal(plaintext, aad []byte) ([]byte, error) { return k.set.Seal(plaintext, aad) }

// Open is the inverse of Seal. Errors: CodeCorrupt if sealed was not sealed by this keyring with this aad.
func (k *Keyring) Open(sealed, aad []byte) ([]byte, error) { return k.set.Open(sealed, aad) }

// UnderPrimary reports whether sealed is, by its clear prefix, under the key that Seal uses. It authenticates nothing.
func (k *Keyring) UnderPrimary(sealed []byte) bool { return k.set.UnderPrimary(sealed) }

// Keys returns how many keys there are. More than one: a rotation is not finished.
func (k *Keyring) Keys() int { return k.set.Len() }

// Rotate returns a keyring that seals with a fresh key and opens with those of k too. Errors: CodeTooLarge when it is full.
func (k *Keyring) Rotate() (*Keyring, error) {
	set, err := k.set.Rotate()
	if err != nil {
		return nil, err
	}
	return &Keyring{set}, nil
}

// OnlyPrimary returns a keyring with the key that k seals with, and no other: for when nothing is left under the others. Errors:
// CodeInternal.
func (k *Keyring) OnlyPrimary() (*Keyring, error) {
	set, err := k.set.OnlyPrimary()
	if err != nil {
		return nil, err
	}
	return &Keyring{set}, nil
}

// Sealer seals and opens with the keyring of the moment: what a running manager's state is sealed by while its keys rotate. Safe for
// concurrent use.
type Sealer struct{ now atomic.Pointer[Keyring] }

// NewSealer returns a Sealer that uses k.
func NewSealer(k *Keyring) *Sealer {
	s := &Sealer{}
	s.now.Store(k)
	return s
}

// Swap has every call from now on use k. One that runs meanwhile may still use what was before.
func (s *Sealer) Swap(k *Keyring) { s.now.Store(k) }

// Seal is Keyring.Seal.
func (s *Sealer) Seal(plaintext, aad []byte) ([]byte, error) {
	return s.now.Load().Seal(plaintext, aad)
}

// Open is Keyring.Open.
func (s *Sealer) Open(sealed, aad []byte) ([]byte, error) { return s.now.Load().Open(sealed, aad) }

// UnderPrimary is Keyring.UnderPrimary.
func (s *Sealer) UnderPrimary(sealed []byte) bool { return s.now.Load().UnderPrimary(sealed) }
