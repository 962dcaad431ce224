// Package warden is the vocabulary that all packages share: identifiers, roles, error codes and bounds.
//
// It imports the standard library only and does no I/O but drawing random identifiers. Nothing here knows of
// protobuf, TLS or raft.
package warden

import (
	"crypto/rand"
	"fmt"
	"math/big"
	"regexp"
	"strings"
)

// IDLength is the length of an ID in characters: 128 random bits in base36.
const IDLength = 25

// NewID returns a random identifier: 128 bits from crypto/rand in lower-case base36, padded to IDLength characters.
// Safe for concurrent use.
func NewID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails (crypto/rand since Go 1.24)
	return Base36(b[:], IDLength)
}

// Base36 returns b as a big-endian number in lower-case base36, padded with zeros to width characters.
func Base36(b []byte, width int) string {
	s := new(big.Int).SetBytes(b).Text(36)
	if len(s) < width {
		s = strings.Repeat("0", width-len(s)) + s
	}
	return s
}

// ParseBase36 is the inverse of Base36: exactly size bytes, one spelling. Errors: CodeInvalid.
func ParseBase36(s string, size, width int) ([]byte, error) {
	if len(s) != width || strings.ToLower(s) != s {
		return nil, Errorf(CodeInvalid, "parsing base36", "want %d lower-case characters, got %d", width, len(s))
	}
	for _, c := range s {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z') {
			return nil, Errorf(CodeInvalid, "parsing base36", "character outside 0-9a-z")
		}
	}
	n, ok := new(big.Int).SetString(s, 36)
	if !ok || n.BitLen() > size*8 {
		return nil, Errorf(CodeInvalid, "parsing base36", "number exceeds %d bytes", size)
	}
	return n.FillBytes(make([]byte, size)), nil
}

var idPattern = regexp.MustCompile(`^[0-9a-z]{25}$`)

// ValidID reports whether s has the shape of an ID.
func ValidID(s string) bool { return idPattern.MatchString(s) }

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$`)

// CheckName refuses a name that is not 1 to NameMax characters of a-z, 0-9, '.', '_' and '-', with a letter or digit at both
// ends. Names are never normalized. kind is for the message. Errors: CodeInvalid.
func CheckName(kind, s string) error {
	if len(s) > NameMax || !namePattern.MatchString(s) || strings.Contains(s, "..") {
		return Hint(Errorf(CodeInvalid, "checking the name of the "+kind, "%q is not a valid name", Clip(s, 80)),
			fmt.Sprintf("use 1 to %d characters of a-z, 0-9, '.', '_', '-', with a letter or a digit at both ends", NameMax))
	}
	return nil
}

// Clip shortens what a message quotes (by %q: the cut may be within a character) to max bytes and an ellipsis.
func Clip(s string, max int) string {
	if len(s) > max {
		return s[:max] + "…"
	}
	return s
}
