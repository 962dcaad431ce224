package courier_test

import (
	"bytes"
	"testing"

	"warden"
	"warden/internal/courier"
)

func TestOpenIsTheInverseOfSeal(t *testing.T) {
	in, err := courier.NewInbox()
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := courier.Seal(in.Public(), []byte("secret"))
	if err != nil || bytes.Contains(sealed, []byte("secret")) || len(sealed) != len("secret")+courier.Overhead {
		t.Fatalf("Seal = %q, %v", sealed, err)
	}
	got, err := in.Open(sealed)
	if err != nil {
		t.Fatal(err)
	}
	got.Use(func(b []byte) error {
		if string(b) != "secret" {
			t.Errorf("Open(Seal(%q)) = %q", "secret", b)
		}
		return nil
	})
	other, err := courier.NewInbox()
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(sealed)
	changed[0] ^= 1
	for what, open := range map[string]func() error{
		"a changed message": func() error { _, err := in.Open(changed); return err },
		"another inbox":     func() error { _, err := other.Open(sealed); return err },
		"nothing":           func() error { _, err := in.Open(nil); return err },
		"no inbox":          func() error { _, err := (*courier.Inbox)(nil).Open(sealed); return err },
	} {
		if err := open(); warden.CodeOf(err) != warden.CodeInvalid {
			t.Errorf("opening %s: %v", what, err)
		}
	}
	if _, err := courier.Seal([]byte("short"), nil); warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("sealing to a bad key: %v", err)
	}
}
