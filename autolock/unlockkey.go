package autolock

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"warden"
	"warden/internal/sensitive"
)

// An unlock key's text is "WDNKEY-1-" keyWidth characters "-" checksumWidth characters, the latter two base36.
const (
	textPrefix    = "WDNKEY-1-"
	keySize       = 32 // bytes of an X25519 private key
	keyWidth      = 50 // the least that holds 256 bits
	checksumSize  = 4
	checksumWidth = 7
	keyIDSize     = 6
	keyIDWidth    = 10
)

// UnlockKey is the private half of the cluster's unlock key pair (X25519). The cluster keeps it nowhere: whoever holds one
// wipes it as soon as it is used. It prints as its key ID. The zero value opens nothing.
type UnlockKey struct {
	private   sensitive.Bytes
	recipient Recipient
}

// Recipient is the public half of an unlock key: managers seal their own keys to it.
type Recipient [keySize]byte

// NewUnlockKey returns a fresh key from crypto/rand. Errors: CodeInternal.
func NewUnlockKey() (UnlockKey, error) {
	private := make([]byte, keySize)
	rand.Read(private)
	clamp(private)
	return newUnlockKey(private)
}

// clamp sets the bits that X25519 ignores (RFC 7748 §5), so that one key has one text.
func clamp(private []byte) {
	private[0] &= 0b1111_1000
	private[31] = private[31]&0b0111_1111 | 0b0100_0000
}

// newUnlockKey takes ownership of private.
func newUnlockKey(private []byte) (UnlockKey, error) {
	key, err := ecdh.X25519().NewPrivateKey(private)
	if err != nil {
		return UnlockKey{}, warden.Errorf(warden.CodeInternal, "making an unlock key", "X25519 refuses it")
	}
	return UnlockKey{private: sensitive.New(private), recipient: Recipient(key.PublicKey().Bytes())}, nil
}

// ParseUnlockKey is the inverse of Text: one spelling, but for spaces and line ends around it. The checksum decides typos
// offline. It does not keep text, which the caller wipes. Errors: CodeInvalid, which never quote the text.
func ParseUnlockKey(text []byte) (UnlockKey, error) {
	const op = "parsing the unlock key"
	refuse := func(why, hint string) (UnlockKey, error) {
		return UnlockKey{}, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "%s", why), hint)
	}
	const retype = "copy the whole key again, as it was shown when it was made"
	if len(text) > warden.UnlockKeyTextMax {
		return refuse(fmt.Sprintf("%d bytes, at most %d", len(text), warden.UnlockKeyTextMax), retype)
	}
	text = bytes.Trim(text, " \t\r\n")
	switch {
	case bytes.HasPrefix(text, []byte("SWMKEY-")):
		return refuse("it is the unlock key of a Docker swarm", "the key of this cluster begins with "+textPrefix)
	case bytes.HasPrefix(text, []byte("WDNTKN-")):
		return refuse("it is a join token", "the unlock key begins with "+textPrefix)
	case !bytes.HasPrefix(text, []byte(textPrefix)):
		return refuse("it does not begin with "+textPrefix, retype)
	case len(text) != len(textPrefix)+keyWidth+1+checksumWidth:
		return refuse(fmt.Sprintf("%d characters, want %d", len(text), len(textPrefix)+keyWidth+1+checksumWidth), retype)
	}
	body, sum, ok := strings.Cut(string(text[len(textPrefix):]), "-")
	if !ok || len(body) != keyWidth {
		return refuse("its parts have wrong lengths", retype)
	}
	private, err := warden.ParseBase36(body, keySize, keyWidth)
	if err != nil {
		return refuse("characters that a key does not have", retype)
	}
	clamped := bytes.Clone(private)
	clamp(clamped)
	if sum != checksum(private) || !bytes.Equal(clamped, private) {
		clear(private)
		clear(clamped)
		return refuse("the checksum does not fit: a character is wrong or missing", retype)
	}
	clear(clamped)
	return newUnlockKey(private)
}

// checksum returns the characters after the last "-": a check against typos, no secret's protection.
func checksum(private []byte) string {
	sum := sha256.Sum256(append([]byte("warden unlock key checksum 1\x00"), private...))
	return warden.Base36(sum[:checksumSize], checksumWidth)
}

// Text returns the key's text, to be shown once. ParseUnlockKey is its inverse. Of a wiped key it can't be used.
func (k UnlockKey) Text() sensitive.Bytes {
	var text sensitive.Bytes
	_ = k.private.Use(func(private []byte) error { // a wiped key leaves text unset, and its Use refuses
		text = sensitive.New([]byte(textPrefix + warden.Base36(private, keyWidth) + "-" + checksum(private)))
		return nil
	})
	return text
}

// Recipient returns the public half. It stays after Wipe.
func (k UnlockKey) Recipient() Recipient { return k.recipient }

// Wipe overwrites the private half. The key and its copies open nothing afterwards.
func (k UnlockKey) Wipe() { k.private.Wipe() }

// Format writes the key ID for every verb.
func (k UnlockKey) Format(s fmt.State, _ rune) { io.WriteString(s, k.String()) }

// String returns "unlock key " and the key ID, which is public.
func (k UnlockKey) String() string { return "unlock key " + k.recipient.KeyID() }

// LogValue returns the key ID.
func (k UnlockKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// MarshalText returns the key ID: the private half leaves only by Text.
func (k UnlockKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// ParseRecipient takes a recipient that came from elsewhere. Errors: CodeInvalid if it is no X25519 public key, or one of low order:
// what is sealed to such a one can be opened by anybody.
func ParseRecipient(public []byte) (Recipient, error) {
	var r Recipient
	if len(public) != len(r) {
		return Recipient{}, warden.Errorf(warden.CodeInvalid, "reading the unlock recipient", "%d bytes, want %d", len(public), len(r))
	}
	copy(r[:], public)
	if err := r.check(); err != nil {
		return Recipient{}, err
	}
	return r, nil
}

// KeyID returns a short public name of the key pair: 48 bits of the SHA-256 of the public half, in base36. It is for people;
// decisions compare the whole Recipient.
func (r Recipient) KeyID() string {
	sum := sha256.Sum256(r[:])
	return warden.Base36(sum[:keyIDSize], keyIDWidth)
}

// String returns the key ID.
func (r Recipient) String() string { return r.KeyID() }

// check refuses points of low order: what is sealed to one can be opened by anybody (RFC 7748 §6.1). Errors: CodeInvalid.
func (r Recipient) check() error {
	const op = "using the unlock recipient"
	public, err := ecdh.X25519().NewPublicKey(r[:])
	if err != nil {
		return warden.Errorf(warden.CodeInvalid, op, "not an X25519 public key")
	}
	probe, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	if _, err := probe.ECDH(public); err != nil {
		return warden.Errorf(warden.CodeInvalid, op, "a point of low order protects nothing")
	}
	return nil
}
