package autolock_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"warden"
	"warden/autolock"
	"warden/internal/sensitive"
)

func newUnlockKey(t testing.TB) autolock.UnlockKey {
	t.Helper()
	key, err := autolock.NewUnlockKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func reveal(t testing.TB, b sensitive.Bytes) string {
	t.Helper()
	var s string
	if err := b.Use(func(b []byte) error { s = string(b); return nil }); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTextAndParseAreInverse(t *testing.T) {
	for range 50 {
		key := newUnlockKey(t)
		text := reveal(t, key.Text())
		if !strings.HasPrefix(text, "WDNKEY-1-") || len(text) > warden.UnlockKeyTextMax {
			t.Fatalf("Text() has the wrong form (%d characters)", len(text))
		}
		for _, spelling := range []string{text, text + "\n", "  " + text + "\r\n\t "} {
			parsed, err := autolock.ParseUnlockKey([]byte(spelling))
			if err != nil || parsed.Recipient() != key.Recipient() || reveal(t, parsed.Text()) != text {
				t.Fatalf("ParseUnlockKey(Text()) = %v, %v, want the same key", parsed, err)
			}
		}
	}
}

// Every typo of one character is decided offline, and no refusal quotes the key.
func TestEveryTypoIsRefused(t *testing.T) {
	text := reveal(t, newUnlockKey(t).Text())
	refused := func(what, s string) {
		t.Helper()
		_, err := autolock.ParseUnlockKey([]byte(s))
		if warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" {
			t.Errorf("ParseUnlockKey(%s) = %v, want code invalid and a hint", what, err)
		}
		if len(s) > 20 && err != nil && strings.Contains(err.Error()+warden.HintOf(err), text[10:20]) {
			t.Errorf("ParseUnlockKey(%s) quotes the key", what)
		}
	}
	const alphabet = "0123456789abcdefghijklmnopqrstuvwxyz-AZ \n_\x00\xff"
	for i := range text {
		for _, c := range []byte(alphabet) {
			if c == text[i] {
				continue
			}
			refused(fmt.Sprintf("character %d replaced by %q", i, c), text[:i]+string([]byte{c})+text[i+1:])
			if i > 0 { // around the key white space is accepted
				refused(fmt.Sprintf("%q put in before %d", c, i), text[:i]+string([]byte{c})+text[i:])
			}
		}
		refused(fmt.Sprintf("without character %d", i), text[:i]+text[i+1:])
		refused(fmt.Sprintf("the first %d", i), text[:i])
		if i > 0 && text[i] != text[i-1] {
			refused(fmt.Sprintf("characters %d and %d swapped", i-1, i), text[:i-1]+text[i:i+1]+text[i-1:i]+text[i+1:])
		}
	}
	refused("upper case", strings.ToUpper(text))
	private, err := warden.ParseBase36(text[9:59], 32, 50)
	if err != nil {
		t.Fatal(err)
	}
	for _, bit := range []struct{ at, mask byte }{{0, 1}, {0, 2}, {0, 4}, {31, 64}, {31, 128}} {
		twin := bytes.Clone(private) // X25519 takes it for the same key
		twin[bit.at] ^= bit.mask
		sum := sha256.Sum256(append([]byte("warden unlock key checksum 1\x00"), twin...))
		refused("the same key spelt otherwise", "WDNKEY-1-"+warden.Base36(twin, 50)+"-"+warden.Base36(sum[:4], 7))
	}
	refused("twice", text+text)
	refused("oversize", text+strings.Repeat(" ", warden.UnlockKeyTextMax))
}

func TestOtherKindsOfKeyGetTheirOwnHint(t *testing.T) {
	for text, want := range map[string]string{
		"SWMKEY-1-7c37Cc8654o6p38HnroywCi19pllOnGtbdZEgtKxZu8": "Docker swarm",
		"WDNTKN-1-xyz": "join token",
		"hunter2":      "does not begin with WDNKEY-1-",
	} {
		if _, err := autolock.ParseUnlockKey([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseUnlockKey(%s) = %v, want it to say %q", text, err, want)
		}
	}
}

func TestI10UnlockKeyDoesNotPrint(t *testing.T) {
	key := newUnlockKey(t)
	text := reveal(t, key.Text())
	body := text[len("WDNKEY-1-") : len("WDNKEY-1-")+50]
	private, err := warden.ParseBase36(body, 32, 50)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, verb := range strings.Split("v +v #v s q x X d c U p T", " ") {
		for _, v := range []any{key, &key, []any{key}, struct{ in autolock.UnlockKey }{key}, key.Text()} {
			fmt.Fprintf(&out, "%"+verb+"\n", v)
		}
	}
	slog.New(slog.NewJSONHandler(&out, nil)).Info("made", "key", key, "in", struct{ K autolock.UnlockKey }{key})
	slog.New(slog.NewTextHandler(&out, nil)).Info("made", "key", key, "in", struct{ K autolock.UnlockKey }{key})
	if err := json.NewEncoder(&out).Encode(key); err != nil {
		t.Error(err)
	}
	shown := strings.ToLower(out.String())
	for _, s := range []string{body, fmt.Sprintf("%x", private), strings.Trim(fmt.Sprint(private), "[]"), fmt.Sprintf("%x", text)} {
		if strings.Contains(shown, s) {
			t.Errorf("the key prints as %.16s…", s)
		}
	}
	if want := "unlock key " + key.Recipient().KeyID(); fmt.Sprint(key) != want {
		t.Errorf("Sprint(key) = %q, want %q", fmt.Sprint(key), want)
	}
}

func TestWipedAndZeroKeysHaveNoText(t *testing.T) {
	key := newUnlockKey(t)
	text := key.Text()
	key.Wipe()
	if err := key.Text().Use(func([]byte) error { return nil }); err == nil {
		t.Error("a wiped key has a text")
	}
	if reveal(t, text) == "" {
		t.Error("wiping the key wiped the text that was taken before")
	}
	if err := (autolock.UnlockKey{}).Text().Use(func([]byte) error { return nil }); err == nil {
		t.Error("the zero key has a text")
	}
}

func TestKeyIDIsShortAndOfThePublicHalf(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var a, b autolock.Recipient
		copy(a[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "a"))
		copy(b[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "b"))
		if len(a.KeyID()) != 10 || (a == b) != (a.KeyID() == b.KeyID()) || a.String() != a.KeyID() {
			t.Fatalf("KeyID of %x, %x = %q, %q", a[:], b[:], a.KeyID(), b.KeyID())
		}
	})
}
