package sensitive_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"warden"
	"warden/internal/sensitive"
)

const canary = "canary-5f1c9a"

// leaks reports whether out shows the canary in any of the spellings that fmt has for bytes.
func leaks(out string) bool {
	out = strings.ToLower(out)
	decimal := strings.Trim(fmt.Sprint([]byte(canary)), "[]")
	goSyntax := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", []byte(canary)), "[]byte{"), "}")
	for _, s := range []string{canary, hex.EncodeToString([]byte(canary)), decimal, goSyntax, fmt.Sprintf("% x", canary)} {
		if strings.Contains(out, s) {
			return true
		}
	}
	return false
}

type holder struct {
	Exported   sensitive.Bytes
	unexported sensitive.Bytes
	ptr        *sensitive.Bytes
	list       []sensitive.Bytes
	byName     map[string]sensitive.Bytes
	any        any
}

func newHolder() holder {
	b := sensitive.New([]byte(canary))
	return holder{Exported: b, unexported: b, ptr: &b, list: []sensitive.Bytes{b}, byName: map[string]sensitive.Bytes{"k": b}, any: b}
}

// I10: bytes that are sensitive do not print, however deep they are and whatever the verb.
func TestI10NoVerbPrintsTheBytes(t *testing.T) {
	h := newHolder()
	for _, v := range []any{h.Exported, &h.Exported, h, &h, []any{h}, map[string]holder{"h": h}} {
		for _, verb := range strings.Split("v +v #v s q x X d o b c U e g t p T 20s", " ") {
			if out := fmt.Sprintf("%"+verb, v); leaks(out) {
				t.Errorf("Sprintf(%%%s, %T) = %q shows the bytes", verb, v, out)
			}
		}
	}
	if got := fmt.Sprint(h.Exported); got != sensitive.Redacted {
		t.Errorf("Sprint(Bytes) = %q, want %q", got, sensitive.Redacted)
	}
	if got := h.Exported.String(); got != sensitive.Redacted {
		t.Errorf("String() = %q, want %q", got, sensitive.Redacted)
	}
}

func TestI10NoEncoderShowsTheBytes(t *testing.T) {
	h := newHolder()
	out, err := json.Marshal(h)
	if err != nil || leaks(string(out)) || !strings.Contains(string(out), `"Exported":"REDACTED"`) {
		t.Errorf("json.Marshal(holder) = %q, %v, want it redacted", out, err)
	}
	text, err := h.Exported.MarshalText()
	if err != nil || string(text) != sensitive.Redacted {
		t.Errorf("MarshalText() = %q, %v, want %q", text, err, sensitive.Redacted)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("tried", "bytes", h.Exported, "in", h, "ptr", &h)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("tried", "bytes", h.Exported, "in", h, "ptr", &h)
	if leaks(log.String()) {
		t.Errorf("slog wrote %q, which shows the bytes", log.String())
	}
}

func TestUseLendsTheBytesAndReturnsTheError(t *testing.T) {
	b := sensitive.New([]byte(canary))
	want := errors.New("of f")
	err := b.Use(func(got []byte) error {
		if string(got) != canary {
			t.Errorf("Use lends %q, want %q", got, canary)
		}
		return want
	})
	if err != want {
		t.Errorf("Use = %v, want f's own error", err)
	}
	if b.Len() != len(canary) {
		t.Errorf("Len() = %d, want %d", b.Len(), len(canary))
	}
}

func TestWipeZeroesTheBufferAndRefusesLaterUse(t *testing.T) {
	buf := []byte(canary)
	b := sensitive.New(buf)
	twin := b
	b.Wipe()
	b.Wipe()
	if !bytes.Equal(buf, make([]byte, len(canary))) {
		t.Errorf("after Wipe the buffer holds %q, want zeroes", buf)
	}
	for name, b := range map[string]sensitive.Bytes{"wiped": b, "its copy": twin, "the zero value": {}} {
		err := b.Use(func([]byte) error { t.Errorf("Use of %s called f", name); return nil })
		if warden.CodeOf(err) != warden.CodeInternal || b.Len() != 0 {
			t.Errorf("Use of %s = %v with Len %d, want code internal and 0", name, err, b.Len())
		}
	}
	(sensitive.Bytes{}).Wipe()
}

func TestEmptyBytesCanBeUsed(t *testing.T) {
	called := false
	if err := sensitive.New(nil).Use(func(b []byte) error { called = len(b) == 0; return nil }); err != nil || !called {
		t.Errorf("Use of empty Bytes = %v, called %v, want nil, true", err, called)
	}
}

func TestWipeInsideUseTakesEffectAfterwards(t *testing.T) {
	buf := []byte(canary)
	b := sensitive.New(buf)
	err := b.Use(func(outer []byte) error {
		return b.Use(func(inner []byte) error {
			b.Wipe()
			if string(inner) != canary || string(outer) != canary {
				t.Errorf("Wipe zeroed bytes that were in use")
			}
			return nil
		})
	})
	if err != nil || !bytes.Equal(buf, make([]byte, len(canary))) {
		t.Errorf("after Use the buffer holds %q (%v), want zeroes", buf, err)
	}
}

func TestConcurrentUseAndWipe(t *testing.T) {
	b := sensitive.New([]byte(canary))
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for range 200 {
				_ = b.Use(func(got []byte) error {
					if string(got) != canary {
						t.Errorf("Use lends %q while it is being wiped", got)
					}
					return nil
				})
			}
			b.Wipe()
		})
	}
	all.Wait()
}
