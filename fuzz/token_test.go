package fuzz_test

import (
	"strings"
	"testing"

	"warden"
	"warden/tokens"
)

// FuzzToken: whatever parses as a join token has exactly one spelling, and prints without its secret.
func FuzzToken(f *testing.F) {
	var valid []string
	for i := range byte(3) {
		tok, err := tokens.Mint([32]byte{i, 31: 255 - i})
		if err != nil {
			f.Fatal(err)
		}
		tok.Text().Use(func(b []byte) error { valid = append(valid, string(b)); return nil })
	}
	for _, s := range valid {
		if _, err := tokens.Parse(s); err != nil {
			f.Fatalf("the seed does not parse: %v", err)
		}
		f.Add(s)
		f.Add(s[:len(s)-1])
		f.Add(strings.ToUpper(s))
	}
	f.Add("WDNTKN-1-abc")
	f.Add("SWMTKN-1-abc-def")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := tokens.Parse(s)
		if err != nil {
			if warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" {
				t.Fatalf("Parse = %v [%s], want [invalid] with a hint", err, warden.CodeOf(err))
			}
			return
		}
		tok.Text().Use(func(b []byte) error {
			if string(b) != s {
				t.Fatal("a second spelling of the same token parses")
			}
			return nil
		})
		if secret := strings.Split(s, "-")[4]; strings.Contains(tok.String(), secret) && !strings.Contains(tokens.Prefix+tok.ID, secret) {
			t.Fatal("String shows the secret")
		}
	})
}
