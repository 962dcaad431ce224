// Package keyset is a set of AEAD keys, one of which is primary: it seals, all of them open. It is what the DEK of a manager
// (package autolock) and the cluster keyset (package secrets) have in common.
//
// The cryptography is Tink's: XChaCha20-Poly1305 with random 192-bit nonces, so that no count of messages needs to be kept.
// This package decides which keys are acceptable, what an error says, and that no key prints; it does not decide what the
// associated data binds, and it does not store keysets.
//
// Invariants: every key in a Set is XChaCha20-Poly1305, enabled, and marks what it seals with its own key ID; a Set never
// changes, so that it is safe for concurrent use.
//
// It trusts crypto/rand and Tink (https://developers.google.com/tink, draft-irtf-cfrg-xchacha-03).
package keyset

import (
	"bytes"
	"encoding/binary"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/aead/xchacha20poly1305"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	tinkkeyset "github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"

	"warden"
)

const (
	keysMax  = 64      // keys in one set
	bytesMax = 8 << 10 // a serialised set: a key takes about 110 bytes
)

// Set is a set of keys. The zero value has none and must not be used.
type Set struct {
	held func() keys // a closure: fmt walks fields by reflection, and stops here
}

type keys struct {
	handle *tinkkeyset.Handle
	aead   tink.AEAD
}

// New returns a set of one fresh key. Errors: CodeInternal.
func New() (Set, error) {
	handle, err := tinkkeyset.NewHandle(aead.XChaCha20Poly1305KeyTemplate())
	if err != nil {
		return Set{}, warden.Recode(warden.CodeInternal, "making a keyset", err)
	}
	return fromHandle(handle)
}

// Parse is the inverse of Bytes. It does not keep data. Errors: CodeCorrupt.
func Parse(data []byte) (Set, error) {
	const op = "parsing a keyset"
	if len(data) > bytesMax {
		return Set{}, warden.Errorf(warden.CodeCorrupt, op, "%d bytes, at most %d", len(data), bytesMax)
	}
	// Tink's errors are dropped: what they quote of the input may be key material.
	handle, err := insecurecleartextkeyset.Read(tinkkeyset.NewBinaryReader(bytes.NewReader(data)))
	if err != nil {
		return Set{}, warden.Errorf(warden.CodeCorrupt, op, "not a keyset")
	}
	if handle.Len() > keysMax {
		return Set{}, warden.Errorf(warden.CodeCorrupt, op, "%d keys, at most %d", handle.Len(), keysMax)
	}
	for i := range handle.Len() {
		entry, err := handle.Entry(i)
		if err != nil {
			return Set{}, warden.Errorf(warden.CodeCorrupt, op, "not a keyset")
		}
		key, ok := entry.Key().(*xchacha20poly1305.Key)
		if !ok || entry.KeyStatus() != tinkkeyset.Enabled {
			return Set{}, warden.Errorf(warden.CodeCorrupt, op, "key %d is not an enabled XChaCha20-Poly1305 key", entry.KeyID())
		}
		if p, ok := key.Parameters().(*xchacha20poly1305.Parameters); !ok || p.Variant() != xchacha20poly1305.VariantTink {
			return Set{}, warden.Errorf(warden.CodeCorrupt, op, "key %d does not mark what it seals", entry.KeyID())
		}
	}
	set, err := fromHandle(handle)
	if err != nil {
		return Set{}, warden.Errorf(warden.CodeCorrupt, op, "unusable keys")
	}
	return set, nil
}

func fromHandle(handle *tinkkeyset.Handle) (Set, error) {
	primitive, err := aead.New(handle)
	if err != nil {
		return Set{}, warden.Recode(warden.CodeInternal, "using a keyset", err)
	}
	return Set{held: func() keys { return keys{handle, primitive} }}, nil
}

// Bytes returns the set in clear, in Tink's binary form. The caller seals or wipes it. Errors: CodeInternal.
func (s Set) Bytes() ([]byte, error) {
	var out bytes.Buffer
	if err := insecurecleartextkeyset.Write(s.held().handle, tinkkeyset.NewBinaryWriter(&out)); err != nil {
		return nil, warden.Errorf(warden.CodeInternal, "serialising a keyset", "writing it failed")
	}
	return out.Bytes(), nil
}

// Len returns how many keys there are.
func (s Set) Len() int { return s.held().handle.Len() }

// Rotate returns a set with a fresh primary; the keys of s stay for opening. Errors: CodeTooLarge when the set is full.
func (s Set) Rotate() (Set, error) {
	const op = "rotating a keyset"
	if n := s.Len(); n >= keysMax {
		return Set{}, warden.Errorf(warden.CodeTooLarge, op, "%d keys already: drop those that nothing is sealed under", n)
	}
	manager := tinkkeyset.NewManagerFromHandle(s.held().handle)
	id, err := manager.Add(aead.XChaCha20Poly1305KeyTemplate())
	if err != nil {
		return Set{}, warden.Recode(warden.CodeInternal, op, err)
	}
	if err := manager.SetPrimary(id); err != nil {
		return Set{}, warden.Recode(warden.CodeInternal, op, err)
	}
	return fromManager(op, manager)
}

// OnlyPrimary returns a set with the primary of s alone. What older keys sealed can't be opened with it. Errors: CodeInternal.
func (s Set) OnlyPrimary() (Set, error) {
	const op = "dropping old keys of a keyset"
	handle := s.held().handle
	manager := tinkkeyset.NewManagerFromHandle(handle)
	for i := range handle.Len() {
		entry, err := handle.Entry(i)
		if err == nil && !entry.IsPrimary() {
			err = manager.Delete(entry.KeyID())
		}
		if err != nil {
			return Set{}, warden.Recode(warden.CodeInternal, op, err)
		}
	}
	return fromManager(op, manager)
}

func fromManager(op string, manager *tinkkeyset.Manager) (Set, error) {
	handle, err := manager.Handle()
	if err != nil {
		return Set{}, warden.Recode(warden.CodeInternal, op, err)
	}
	return fromHandle(handle)
}

// Seal encrypts and authenticates plaintext, and authenticates aad, under the primary. Open is its inverse.
func (s Set) Seal(plaintext, aad []byte) ([]byte, error) {
	sealed, err := s.held().aead.Encrypt(plaintext, aad)
	return sealed, warden.Recode(warden.CodeInternal, "sealing", err)
}

// Open returns the plaintext of sealed. Errors: CodeCorrupt if it was not sealed under a key of s with this aad.
func (s Set) Open(sealed, aad []byte) ([]byte, error) {
	plaintext, err := s.held().aead.Decrypt(sealed, aad)
	if err != nil {
		return nil, warden.Errorf(warden.CodeCorrupt, "opening", "authentication failed")
	}
	return plaintext, nil
}

// UnderPrimary reports whether sealed claims, by its clear prefix (1, key ID; Tink's wire format), to be sealed under the
// primary. It authenticates nothing.
func (s Set) UnderPrimary(sealed []byte) bool {
	primary, err := s.held().handle.Primary()
	return err == nil && len(sealed) >= 5 && sealed[0] == 1 && binary.BigEndian.Uint32(sealed[1:]) == primary.KeyID()
}
