// Package courier carries one secret over a call so that it is in no buffer of the transport: the receiver offers a one-time
// public key, the sender seals to it, and only the opened value, which can be wiped, is ever in clear on the receiving side.
//
// It authenticates nobody: both sides must know by other means (the local socket, SO_PEERCRED) whom they talk to. An Inbox is
// not written anywhere. References: nacl/box, anonymous sealed boxes (X25519, XSalsa20-Poly1305).
package courier

import (
	"crypto/rand"

	"golang.org/x/crypto/nacl/box"

	"warden"
	"warden/internal/sensitive"
)

// Inbox receives one secret. Safe for concurrent use.
type Inbox struct{ public, private *[32]byte }

// NewInbox returns an inbox with a key of its own.
func NewInbox() (*Inbox, error) {
	public, private, err := box.GenerateKey(rand.Reader)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "making a one-time key", err)
	}
	return &Inbox{public, private}, nil
}

// Public returns what the sender seals to. nil for no inbox.
func (i *Inbox) Public() []byte {
	if i == nil {
		return nil
	}
	return i.public[:]
}

// Open is the inverse of Seal. The caller wipes what it returns. Errors: CodeInvalid where the message is for another inbox.
func (i *Inbox) Open(sealed []byte) (sensitive.Bytes, error) {
	if i != nil {
		if b, ok := box.OpenAnonymous(nil, sealed, i.public, i.private); ok {
			return sensitive.New(b), nil
		}
	}
	return sensitive.Bytes{}, warden.Hint(warden.Errorf(warden.CodeInvalid, "opening a sealed message", "it was not sealed to this daemon's one-time key"),
		"the daemon may have restarted meanwhile: run the command again")
}

// Overhead is how many bytes Seal adds.
const Overhead = box.AnonymousOverhead

// Seal returns the secret for the inbox with the public key. Errors: CodeInvalid.
func Seal(to, secret []byte) ([]byte, error) {
	if len(to) != 32 {
		return nil, warden.Errorf(warden.CodeInvalid, "sealing a message", "the one-time key has %d bytes, want 32", len(to))
	}
	sealed, err := box.SealAnonymous(nil, secret, (*[32]byte)(to), rand.Reader)
	return sealed, warden.Recode(warden.CodeInternal, "sealing a message", err)
}
