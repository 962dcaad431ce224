// Package tokens is the *admit* decision: it mints and parses join tokens, proves and checks that one is held, and says what
// a token allows.
//
// It issues nothing, stores nothing and counts nothing: a use is consumed in the committed command that makes the node, and
// the certificate is package ca's. It is pure but for the randomness of Mint.
//
// Invariants: the secret never crosses the wire, only HMACs over the TLS exporter of this very connection (so a proof that
// is relayed or replayed on another connection does not hold); a token's text has exactly one spelling; the checksum tells a
// typo offline; a Token never prints its secret; a rule that cannot be read admits nobody (I11).
//
// It trusts the caller for the time, for the address of the joiner and for the exporter. The key K = SHA-256(secret), which
// the state holds, is join power: whoever has K can prove the token.
//
// # Format
//
//	WDNTKN-1-<SHA-256 of the root's DER, base36, 50>-<id, base36, 12>-<secret, 16 bytes, base36, 25>-<checksum, base36, 7>
//
// The checksum is the first four bytes of SHA-256 over all that stands before it, without the last hyphen.
package tokens

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"strings"

	"warden"
	"warden/internal/sensitive"
)

// Prefix begins every join token: one string for secret scanners to look for.
const Prefix = "WDNTKN-1-"

// IDLength is the length of a token's ID in characters.
const IDLength = 12

const (
	hashWidth     = 50 // 32 bytes in base36
	secretSize    = 16
	secretWidth   = 25
	checksumSize  = 4
	checksumWidth = 7
)

// Token is a join token. Only Mint and Parse make one. It prints without its secret, whatever the verb or the encoder.
type Token struct {
	RootHash [32]byte // SHA-256 of the DER of the cluster's root CA
	ID       string   // public: names the token in lists and logs
	secret   sensitive.Bytes
}

// Mint returns a new token that pins the root: a random ID and 128 random bits of secret.
func Mint(rootHash [32]byte) (Token, error) {
	span := new(big.Int).Exp(big.NewInt(36), big.NewInt(IDLength), nil)
	n, err := rand.Int(rand.Reader, span)
	if err != nil {
		return Token{}, warden.Errorf(warden.CodeInternal, "minting join token", "%w", err)
	}
	secret := make([]byte, secretSize)
	rand.Read(secret) // never fails (crypto/rand since Go 1.24)
	return Token{RootHash: rootHash, ID: warden.Base36(n.Bytes(), IDLength), secret: sensitive.New(secret)}, nil
}

// ValidID reports whether s has the shape of a token ID.
func ValidID(s string) bool {
	_, err := warden.ParseBase36(s, 8, IDLength)
	return err == nil
}

// Parse is the inverse of Text: exactly its spelling, nothing around it. Errors: CodeInvalid with a hint; the text of the
// error repeats nothing of the input.
func Parse(text string) (Token, error) {
	bad := func(what, hint string) (Token, error) {
		return Token{}, warden.Hint(warden.Errorf(warden.CodeInvalid, "parsing join token", "malformed join token: %s", what), hint)
	}
	const again = "copy the whole token as wardenctl swarm join-token printed it"
	switch {
	case strings.HasPrefix(text, "SWMTKN-"):
		return bad("it is one of Docker Swarm", "this is a Docker Swarm token; ask a Warden manager: wardenctl swarm join-token worker")
	case strings.HasPrefix(text, "WDNKEY-"):
		return bad("it is an unlock key", "this is an unlock key, which is given to wardenctl swarm unlock only; rotate it if others have seen it")
	case len(text) > warden.TokenTextMax:
		return bad(fmt.Sprintf("more than %d characters", warden.TokenTextMax), again)
	case !strings.HasPrefix(text, Prefix):
		return bad("it does not begin with "+Prefix, again)
	}
	parts := strings.Split(strings.TrimPrefix(text, Prefix), "-")
	if len(parts) != 4 {
		return bad("it has not four parts after "+Prefix, again)
	}
	if parts[3] != checksum(strings.TrimSuffix(text, "-"+parts[3])) {
		return bad("the checksum does not match: it is mistyped or incomplete", again)
	}
	hash, err := warden.ParseBase36(parts[0], sha256.Size, hashWidth)
	if err != nil {
		return bad("the root hash is not base36 of 32 bytes", again)
	}
	if !ValidID(parts[1]) {
		return bad("the ID is not base36", again)
	}
	secret, err := warden.ParseBase36(parts[2], secretSize, secretWidth)
	if err != nil {
		return bad("the secret is not base36 of 16 bytes", again)
	}
	return Token{RootHash: [32]byte(hash), ID: parts[1], secret: sensitive.New(secret)}, nil
}

func checksum(text string) string {
	sum := sha256.Sum256([]byte(text))
	return warden.Base36(sum[:checksumSize], checksumWidth)
}

// Text returns the token as it is handed to a joiner. Parse is its inverse.
func (t Token) Text() sensitive.Bytes {
	var text string
	t.use(func(secret []byte) {
		text = t.public() + warden.Base36(secret, secretWidth)
	})
	return sensitive.New([]byte(text + "-" + checksum(text)))
}

// Key returns K = SHA-256(secret): what the state holds, and what proofs are made with.
func (t Token) Key() [32]byte {
	var key [32]byte
	t.use(func(secret []byte) { key = sha256.Sum256(secret) })
	return key
}

func (t Token) use(f func(secret []byte)) {
	if err := t.secret.Use(func(b []byte) error { f(b); return nil }); err != nil {
		panic("tokens: a Token that neither Mint nor Parse made") // else its key would be a constant that everybody knows
	}
}

// public returns all before the secret.
func (t Token) public() string {
	return Prefix + warden.Base36(t.RootHash[:], hashWidth) + "-" + t.ID + "-"
}

// String returns the public parts, with "REDACTED" in the place of secret and checksum.
func (t Token) String() string { return t.public() + sensitive.Redacted }

// Format prints String whatever the verb.
func (t Token) Format(s fmt.State, _ rune) { io.WriteString(s, t.String()) }

// LogValue logs String.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText gives String to text and JSON encoders: the result does not parse, on purpose.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.String()), nil }
