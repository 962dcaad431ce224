package keyset_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	tinkkeyset "github.com/tink-crypto/tink-go/v2/keyset"
	tinkpb "github.com/tink-crypto/tink-go/v2/proto/tink_go_proto"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/internal/keyset"
)

func newSet(t *testing.T) keyset.Set {
	t.Helper()
	set, err := keyset.New()
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func seal(t *testing.T, s keyset.Set, text string) []byte {
	t.Helper()
	sealed, err := s.Seal([]byte(text), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func opens(s keyset.Set, sealed []byte, text string) bool {
	got, err := s.Open(sealed, []byte("aad"))
	return err == nil && string(got) == text
}

func TestRotationKeepsOldKeysUntilTheyAreDropped(t *testing.T) {
	first := newSet(t)
	old := seal(t, first, "old")
	second, err := first.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	recent := seal(t, second, "new")
	last, err := second.OnlyPrimary()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		set     keyset.Set
		sealed  []byte
		text    string
		opens   bool
		primary bool
	}{
		{"first, old", first, old, "old", true, true}, {"first, new", first, recent, "new", false, false},
		{"second, old", second, old, "old", true, false}, {"second, new", second, recent, "new", true, true},
		{"last, old", last, old, "old", false, false}, {"last, new", last, recent, "new", true, true},
	} {
		if got := opens(c.set, c.sealed, c.text); got != c.opens {
			t.Errorf("%s: opens = %v, want %v", c.name, got, c.opens)
		}
		if got := c.set.UnderPrimary(c.sealed); got != c.primary {
			t.Errorf("%s: UnderPrimary = %v, want %v", c.name, got, c.primary)
		}
	}
	if first.UnderPrimary(nil) || first.UnderPrimary(old[:4]) {
		t.Error("UnderPrimary of too few bytes = true")
	}
}

func TestBytesAndParseAreInverse(t *testing.T) {
	set, err := newSet(t).Rotate()
	if err != nil {
		t.Fatal(err)
	}
	data, err := set.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := keyset.Parse(data)
	if err != nil || !opens(parsed, seal(t, set, "x"), "x") || !opens(set, seal(t, parsed, "y"), "y") {
		t.Errorf("Parse(Bytes()) = %v, or the sets differ", err)
	}
	again, err := parsed.Bytes()
	if err != nil || !bytes.Equal(again, data) {
		t.Errorf("Bytes(Parse(b)) differs from b (%v)", err)
	}
}

func TestOpenRefusesEveryBitFlipAndOtherAssociatedData(t *testing.T) {
	set := newSet(t)
	sealed := seal(t, set, "text")
	for i := range len(sealed) * 8 {
		flipped := bytes.Clone(sealed)
		flipped[i/8] ^= 1 << (i % 8)
		if _, err := set.Open(flipped, []byte("aad")); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("Open with bit %d flipped = %v, want code corrupt", i, err)
		}
	}
	for n := range sealed {
		if _, err := set.Open(sealed[:n], []byte("aad")); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("Open of the first %d bytes = %v, want code corrupt", n, err)
		}
	}
	if _, err := set.Open(sealed, []byte("aae")); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Errorf("Open with other aad = %v, want code corrupt", err)
	}
}

// Only enabled, self-marking XChaCha20-Poly1305 keys are accepted: nobody can hand us a weaker keyset.
func TestParseRefusesOtherKeys(t *testing.T) {
	write := func(h *tinkkeyset.Handle) []byte {
		var out bytes.Buffer
		if err := insecurecleartextkeyset.Write(h, tinkkeyset.NewBinaryWriter(&out)); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	of := func(template *tinkpb.KeyTemplate) []byte {
		h, err := tinkkeyset.NewHandle(template)
		if err != nil {
			t.Fatal(err)
		}
		return write(h)
	}
	change := func(f func(*tinkpb.Keyset)) []byte {
		data, err := newSet(t).Bytes()
		ks := new(tinkpb.Keyset)
		if err != nil || proto.Unmarshal(data, ks) != nil {
			t.Fatal("unreadable keyset", err)
		}
		f(ks)
		if data, err = proto.Marshal(ks); err != nil {
			t.Fatal(err)
		}
		return data
	}
	raw := aead.XChaCha20Poly1305KeyTemplate()
	raw.OutputPrefixType = tinkpb.OutputPrefixType_RAW
	for name, data := range map[string][]byte{
		"nothing":   nil,
		"garbage":   []byte("garbage"),
		"oversize":  make([]byte, 9<<10),
		"AES-GCM":   of(aead.AES256GCMKeyTemplate()),
		"no prefix": of(raw),
		"disabled":  change(func(k *tinkpb.Keyset) { k.Key[0].Status = tinkpb.KeyStatusType_DISABLED }),
		"one disabled": change(func(k *tinkpb.Keyset) {
			old := proto.Clone(k.Key[0]).(*tinkpb.Keyset_Key)
			old.KeyId, old.Status = old.KeyId+1, tinkpb.KeyStatusType_DISABLED
			k.Key = append(k.Key, old)
		}),
		"no primary":  change(func(k *tinkpb.Keyset) { k.PrimaryKeyId++ }),
		"short key":   change(func(k *tinkpb.Keyset) { v := k.Key[0].KeyData.Value; k.Key[0].KeyData.Value = v[:len(v)-1] }),
		"no key data": change(func(k *tinkpb.Keyset) { k.Key[0].KeyData = nil }),
		"key twice":   change(func(k *tinkpb.Keyset) { k.Key = append(k.Key, k.Key[0]) }),
	} {
		if _, err := keyset.Parse(data); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("Parse(%s) = %v, want code corrupt", name, err)
		}
	}
}

func TestRotateIsBounded(t *testing.T) {
	set, err := newSet(t), error(nil)
	for range 63 {
		if set, err = set.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := set.Rotate(); warden.CodeOf(err) != warden.CodeTooLarge {
		t.Errorf("Rotate of a full set = %v, want code too-large", err)
	}
	data, err := set.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keyset.Parse(data); err != nil {
		t.Errorf("Parse of a full set of %d bytes = %v", len(data), err)
	}
}

func TestI10NoVerbPrintsAKey(t *testing.T) {
	set := newSet(t)
	data, err := set.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	ks := new(tinkpb.Keyset)
	if err := proto.Unmarshal(data, ks); err != nil {
		t.Fatal(err)
	}
	value := ks.Key[0].KeyData.Value
	secret := value[len(value)-32:]
	for _, verb := range strings.Split("v +v #v s q x X d c U", " ") {
		out := fmt.Sprintf("%"+verb, []any{set, &set, struct{ in keyset.Set }{set}})
		for _, s := range []string{string(secret), fmt.Sprintf("%x", secret), fmt.Sprintf("%X", secret), strings.Trim(fmt.Sprint(secret), "[]")} {
			if strings.Contains(out, s) {
				t.Errorf("Sprintf(%%%s) shows the key", verb)
			}
		}
	}
}
