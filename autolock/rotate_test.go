package autolock_test

import (
	"bytes"
	"testing"

	"warden"
	"warden/autolock"
)

// The generations that a file has followed come back, and those of a sealed one can't be changed.
func TestGenerationsAreKept(t *testing.T) {
	unlock := newUnlockKey(t)
	to := unlock.Recipient()
	for _, to := range []*autolock.Recipient{nil, &to} {
		n := newNode(t, testCluster, "manager")
		n.id.LockGeneration, n.id.DEKGeneration = 7, 1<<63
		_, data := write(t, n, to)
		got, err := open(data, unlock)
		if err != nil || got.LockGeneration != 7 || got.DEKGeneration != 1<<63 || !same(got, n) {
			t.Fatalf("generations %d and %d, %v, want 7 and 1<<63", got.LockGeneration, got.DEKGeneration, err)
		}
		file, err := autolock.ParseKeyFile(data)
		if err != nil || (file.Recipient() == nil) != (to == nil) || to != nil && *file.Recipient() != *to {
			t.Errorf("Recipient() = %v, %v, want %v", file.Recipient(), err, to)
		}
		for _, edit := range [][2]string{{"Lock-Generation: 7", "Lock-Generation: 8"}, {"Lock-Generation: 7\n", ""}, {"Lock-Generation: 7", "Lock-Generation: 07"}} {
			_, err := open(redigest(bytes.Replace(data, []byte(edit[0]), []byte(edit[1]), 1)), unlock)
			if to != nil && warden.CodeOf(err) != warden.CodeForeign && warden.CodeOf(err) != warden.CodeCorrupt {
				t.Errorf("with %q in place of %q: %v", edit[1], edit[0], err)
			}
		}
	}
	worker := newNode(t, testCluster, "worker")
	worker.id.DEKGeneration = 1
	if err := autolock.WriteKeyFile(t.TempDir()+"/node.key", worker.id, nil); warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("a worker with a generation of the DEK: %v", err)
	}
}

// A rotation in the middle has two keys, and the file keeps both; one that is finished opens nothing of before.
func TestKeyringRotates(t *testing.T) {
	n := newNode(t, testCluster, "manager")
	old := n.id.Keyring
	s := autolock.NewSealer(old)
	record, err := s.Seal([]byte("x"), []byte("aad"))
	if err != nil || !s.UnderPrimary(record) || old.Keys() != 1 {
		t.Fatalf("a fresh keyring: %v", err)
	}
	both, err := old.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	s.Swap(both)
	if got, err := s.Open(record, []byte("aad")); err != nil || string(got) != "x" || s.UnderPrimary(record) || both.Keys() != 2 {
		t.Errorf("after Rotate: %q, %v, under the primary: %t, %d keys", got, err, s.UnderPrimary(record), both.Keys())
	}
	n.id.Keyring = both
	_, data := write(t, n, nil)
	if got, err := open(data, autolock.UnlockKey{}); err != nil || got.Keyring.Keys() != 2 {
		t.Fatalf("a file of two keys: %v", err)
	}
	resealed, err := s.Seal([]byte("x"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := old.Open(resealed, []byte("aad")); err == nil {
		t.Error("the old keyring opens what is sealed after the rotation")
	}
	last, err := both.OnlyPrimary()
	if err != nil {
		t.Fatal(err)
	}
	s.Swap(last)
	if _, err := s.Open(record, []byte("aad")); err == nil || last.Keys() != 1 || !s.UnderPrimary(resealed) {
		t.Errorf("after OnlyPrimary the old record opens: %v, %d keys", err, last.Keys())
	}
}

func TestRecipientsOfLowOrderAreRefused(t *testing.T) {
	good := newUnlockKey(t).Recipient()
	if got, err := autolock.ParseRecipient(good[:]); err != nil || got != good {
		t.Errorf("ParseRecipient = %v, %v", got, err)
	}
	// The points of order 1, 2, 4 and 8 of the curve, RFC 7748 §6.1 and https://cr.yp.to/ecdh.html#validate.
	for _, bad := range [][]byte{
		nil, good[:31], append(good[:], 0), make([]byte, 32), append([]byte{1}, make([]byte, 31)...),
		{0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00},
		{0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57},
		append(append([]byte{0xec}, bytes.Repeat([]byte{0xff}, 30)...), 0x7f),
	} {
		if _, err := autolock.ParseRecipient(bad); warden.CodeOf(err) != warden.CodeInvalid {
			t.Errorf("ParseRecipient(%x) = %v, want [%s]", bad, err, warden.CodeInvalid)
		}
	}
}
