package fuzz_test

import (
	"bytes"
	"strings"
	"testing"

	"warden"
	"warden/autolock"
)

// FuzzUnlockKey: whatever parses as an unlock key has exactly one spelling but for white space around it; the rest is
// CodeInvalid with a hint, and no refusal quotes what was typed.
func FuzzUnlockKey(f *testing.F) {
	for range 3 {
		key, err := autolock.NewUnlockKey()
		if err != nil {
			f.Fatal(err)
		}
		err = key.Text().Use(func(text []byte) error {
			if parsed, err := autolock.ParseUnlockKey(text); err != nil || parsed.Recipient() != key.Recipient() {
				f.Fatalf("the seed parses to %v, %v", parsed, err)
			}
			f.Add(bytes.Clone(text))
			f.Add(bytes.Clone(text[:len(text)-1]))
			f.Add(bytes.ToUpper(text))
			f.Add(append([]byte(" \t"), append(bytes.Clone(text), '\r', '\n')...))
			return nil
		})
		if err != nil {
			f.Fatal(err)
		}
	}
	f.Add([]byte("WDNKEY-1-"))
	f.Add([]byte("WDNKEY-1-" + strings.Repeat("z", 50) + "-0000000"))
	f.Add([]byte("SWMKEY-1-abc"))
	f.Add([]byte("WDNTKN-1-abc"))
	f.Fuzz(func(t *testing.T, text []byte) {
		before := bytes.Clone(text)
		key, err := autolock.ParseUnlockKey(text)
		if !bytes.Equal(before, text) {
			t.Fatal("ParseUnlockKey changed its input")
		}
		if err != nil {
			if warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" {
				t.Fatalf("ParseUnlockKey = %v [%s], want [invalid] with a hint", err, warden.CodeOf(err))
			}
			if typed := string(bytes.TrimSpace(text)); len(typed) > 40 && strings.Contains(err.Error()+warden.HintOf(err), typed) {
				t.Fatalf("ParseUnlockKey = %v quotes what was typed", err)
			}
			return
		}
		if err := key.Text().Use(func(again []byte) error {
			if !bytes.Equal(again, bytes.Trim(text, " \t\r\n")) {
				t.Fatalf("%q parses, but is spelt %q", text, again)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
}
