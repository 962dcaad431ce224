package autolock

import (
	"warden/internal/keyset"
)

// Keyring is a manager's DEK: what seals its log and snapshots. It never changes and is safe for concurrent use. It does not
// print.
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
