package secrets_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"warden"
	"warden/internal/sensitive"
	"warden/secrets"
)

func newKeyset(t testing.TB) *secrets.Keyset {
	t.Helper()
	ks, err := secrets.NewKeyset()
	if err != nil {
		t.Fatal(err)
	}
	return ks
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func reveal(t testing.TB, b sensitive.Bytes) (s string) {
	t.Helper()
	if err := b.Use(func(b []byte) error { s = string(b); return nil }); err != nil {
		t.Fatal(err)
	}
	return s
}

// I8: what is sealed for one purpose opens for that one alone, however the words are cut.
func TestI8PurposeBinds(t *testing.T) {
	ks := newKeyset(t)
	word := rapid.StringN(0, 3, -1)
	rapid.Check(t, func(rt *rapid.T) {
		a, b := rapid.SliceOfN(word, 0, 4).Draw(rt, "a"), rapid.SliceOfN(word, 0, 4).Draw(rt, "b")
		sealed, err := ks.Seal([]byte("plaintext"), a...)
		if err != nil {
			rt.Fatal(err)
		}
		if got, err := ks.Open(sealed, a...); err != nil || string(got) != "plaintext" {
			rt.Fatalf("Open(Seal(%q)) = %q, %v", a, got, err)
		}
		_, err = ks.Open(sealed, b...)
		if same := fmt.Sprintf("%q", a) == fmt.Sprintf("%q", b); same != (err == nil) || !same && warden.CodeOf(err) != warden.CodeCorrupt {
			rt.Fatalf("sealed for %q, Open for %q = %v", a, b, err)
		}
	})
	sealed := must[[]byte](t)(ks.Seal(nil, "ab", "c"))
	for _, other := range [][]string{{"a", "bc"}, {"abc"}, {"ab", "c", ""}, {"", "ab", "c"}, {"c", "ab"}, {}} {
		if _, err := ks.Open(sealed, other...); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf(`sealed for "ab", "c", Open for %q = %v, want code corrupt`, other, err)
		}
	}
}

func TestVersionsOpenToTheirValue(t *testing.T) {
	ks := newKeyset(t)
	for _, value := range [][]byte{nil, []byte("v"), []byte("canary-value"), bytes.Repeat([]byte{0xa5}, warden.SecretBytesMax)} {
		ciphertext, wrapped, err := secrets.SealVersion(ks, "c", "s", 3, value)
		if err != nil {
			t.Fatal(err)
		}
		if got := reveal(t, must[sensitive.Bytes](t)(secrets.OpenVersion(ks, "c", "s", 3, ciphertext, wrapped))); got != string(value) {
			t.Errorf("OpenVersion(SealVersion(%d bytes)) = %d other bytes", len(value), len(got))
		}
		if len(value) > 8 && bytes.Contains(ciphertext, value) {
			t.Error("the ciphertext holds the value")
		}
	}
	if _, _, err := secrets.SealVersion(ks, "c", "s", 3, make([]byte, warden.SecretBytesMax+1)); warden.CodeOf(err) != warden.CodeTooLarge {
		t.Errorf("SealVersion of too much = %v, want code too-large", err)
	}
}

// I8: neither layer of a version opens at another place, and layers of two versions never mix.
func TestI8VersionsAreBoundToTheirPlace(t *testing.T) {
	ks := newKeyset(t)
	seal := func(ks *secrets.Keyset, cluster, secret string, version uint64) (ciphertext, wrapped []byte) {
		ciphertext, wrapped, err := secrets.SealVersion(ks, cluster, secret, version, []byte("value"))
		if err != nil {
			t.Fatal(err)
		}
		return ciphertext, wrapped
	}
	ciphertext, wrapped := seal(ks, "c", "s", 1)
	again, wrappedAgain := seal(ks, "c", "s", 1)
	if bytes.Equal(ciphertext, again) || bytes.Equal(wrapped, wrappedAgain) {
		t.Error("sealing twice gives the same bytes")
	}
	refused := func(what string, ks *secrets.Keyset, cluster, secret string, version uint64, ciphertext, wrapped []byte) {
		t.Helper()
		_, err := secrets.OpenVersion(ks, cluster, secret, version, ciphertext, wrapped)
		if warden.CodeOf(err) != warden.CodeCorrupt || !strings.Contains(err.Error(), secret) {
			t.Errorf("OpenVersion with %s = %v, want code corrupt and the secret's ID", what, err)
		}
	}
	refused("another cluster", ks, "d", "s", 1, ciphertext, wrapped)
	refused("another secret", ks, "c", "t", 1, ciphertext, wrapped)
	refused("another version", ks, "c", "s", 2, ciphertext, wrapped)
	refused("another keyset", newKeyset(t), "c", "s", 1, ciphertext, wrapped)
	refused("the layers swapped", ks, "c", "s", 1, wrapped, ciphertext)
	refused("another seal's key", ks, "c", "s", 1, ciphertext, wrappedAgain)
	refused("nothing", ks, "c", "s", 1, nil, nil)
	for i := range (len(ciphertext) + len(wrapped)) * 8 {
		c, w := bytes.Clone(ciphertext), bytes.Clone(wrapped)
		if i/8 < len(c) {
			c[i/8] ^= 1 << (i % 8)
		} else {
			w[i/8-len(c)] ^= 1 << (i % 8)
		}
		refused(fmt.Sprintf("bit %d flipped", i), ks, "c", "s", 1, c, w)
	}
	// The ciphertext is bound by itself, even where the data key is the right one.
	clearKey := must[[]byte](t)(ks.Open(wrapped, "warden secret data key 1", "c", "s", "1"))
	moved := must[[]byte](t)(ks.Seal(clearKey, "warden secret data key 1", "c", "s", "2"))
	refused("the data key moved to another version", ks, "c", "s", 2, ciphertext, moved)
}

func TestRotationRewrapsAndDropsOldKeys(t *testing.T) {
	first := newKeyset(t)
	ciphertext, wrapped, err := secrets.SealVersion(first, "c", "s", 1, []byte("value"))
	if err != nil {
		t.Fatal(err)
	}
	second := must[*secrets.Keyset](t)(first.Rotate())
	if !first.UnderPrimary(wrapped) || second.UnderPrimary(wrapped) {
		t.Error("UnderPrimary does not see that the primary changed")
	}
	if got := reveal(t, must[sensitive.Bytes](t)(secrets.OpenVersion(second, "c", "s", 1, ciphertext, wrapped))); got != "value" {
		t.Errorf("after Rotate the version opens to %q", got)
	}
	if _, err := secrets.Rewrap(second, "c", "s", 2, wrapped); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Errorf("Rewrap for another version = %v, want code corrupt", err)
	}
	rewrapped := must[[]byte](t)(secrets.Rewrap(second, "c", "s", 1, wrapped))
	last := must[*secrets.Keyset](t)(second.OnlyPrimary())
	if !second.UnderPrimary(rewrapped) || !last.UnderPrimary(rewrapped) {
		t.Error("Rewrap does not wrap under the primary")
	}
	if got := reveal(t, must[sensitive.Bytes](t)(secrets.OpenVersion(last, "c", "s", 1, ciphertext, rewrapped))); got != "value" {
		t.Errorf("after Rewrap and OnlyPrimary the version opens to %q", got)
	}
	for name, c := range map[string]struct {
		ks      *secrets.Keyset
		wrapped []byte
	}{"last keyset, old wrap": {last, wrapped}, "first keyset, new wrap": {first, rewrapped}} {
		if _, err := secrets.OpenVersion(c.ks, "c", "s", 1, ciphertext, c.wrapped); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("%s: OpenVersion = %v, want code corrupt", name, err)
		}
	}
}

func TestBytesAndParseKeysetAreInverse(t *testing.T) {
	ks := must[*secrets.Keyset](t)(newKeyset(t).Rotate())
	data := must[[]byte](t)(ks.Bytes())
	parsed := must[*secrets.Keyset](t)(secrets.ParseKeyset(data))
	sealed := must[[]byte](t)(ks.Seal([]byte("x"), "p"))
	if got, err := parsed.Open(sealed, "p"); err != nil || string(got) != "x" {
		t.Errorf("the parsed keyset opens to %q, %v", got, err)
	}
	for name, bad := range map[string][]byte{"nothing": nil, "half": data[:len(data)/2], "garbage": []byte("garbage")} {
		if ks, err := secrets.ParseKeyset(bad); ks != nil || warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("ParseKeyset(%s) = %v, want code corrupt", name, err)
		}
	}
}

func TestI10ErrorsAndVerbsShowNothing(t *testing.T) {
	ks := newKeyset(t)
	data := must[[]byte](t)(ks.Bytes())
	secret := data[len(data)-24 : len(data)-12]
	ciphertext, wrapped, err := secrets.SealVersion(ks, "c", "s", 1, []byte("canary-value"))
	if err != nil {
		t.Fatal(err)
	}
	value := must[sensitive.Bytes](t)(secrets.OpenVersion(ks, "c", "s", 1, ciphertext, wrapped))
	_, parseErr := secrets.ParseKeyset(append(bytes.Clone(data), "canary-value"...))
	_, openErr := secrets.OpenVersion(ks, "c", "s", 2, ciphertext, wrapped)
	for _, verb := range strings.Split("v +v #v s q x X d", " ") {
		out := fmt.Sprintf("%"+verb, []any{ks, *ks, value, parseErr, openErr})
		for _, s := range []string{"canary-value", fmt.Sprintf("%x", "canary-value"), string(secret), fmt.Sprintf("%x", secret), strings.Trim(fmt.Sprint(secret), "[]")} {
			if strings.Contains(strings.ToLower(out), s) {
				t.Errorf("Sprintf(%%%s) = %s shows %q", verb, out, s)
			}
		}
	}
}
