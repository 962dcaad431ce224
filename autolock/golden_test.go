package autolock_test

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"warden/autolock"
)

var update = flag.Bool("update", false, "write testdata anew: only together with a new format version")

// Files of format version 1 stay readable: testdata holds one of each kind, made for this test, with its unlock key.
func TestFilesOfVersion1StayReadable(t *testing.T) {
	at := func(name string) string { return filepath.Join("testdata", name) }
	if *update {
		writeGolden(t, at)
	}
	text, err := os.ReadFile(at("v1-unlock.txt"))
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := autolock.ParseUnlockKey(text)
	if err != nil {
		t.Fatal(err)
	}
	var deks []*autolock.Keyring
	for _, name := range []string{"v1-worker.key", "v1-manager.key", "v1-sealed.key"} {
		data, err := os.ReadFile(at(name))
		if err != nil {
			t.Fatal(err)
		}
		id, err := open(data, unlock)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if id.Keyring != nil {
			deks = append(deks, id.Keyring)
		}
	}
	sealed, err := os.ReadFile(at("v1-record.bin"))
	if err != nil {
		t.Fatal(err)
	}
	for i, dek := range deks { // the manager's file and the sealed one are of one node
		if got, err := dek.Open(sealed, []byte("aad")); err != nil || string(got) != "record" {
			t.Errorf("the DEK of file %d opens the record to %q, %v", i, got, err)
		}
	}
	if len(deks) != 2 {
		t.Errorf("%d files have a DEK, want 2", len(deks))
	}
}

func writeGolden(t *testing.T, at func(string) string) {
	unlock := newUnlockKey(t)
	to := unlock.Recipient()
	manager := newNode(t, testCluster, "manager")
	_, clear := write(t, manager, nil)
	_, locked := write(t, manager, &to)
	_, worker := write(t, newNode(t, testCluster, "worker"), nil)
	record, err := manager.id.Keyring.Seal([]byte("record"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"v1-worker.key": worker, "v1-manager.key": clear, "v1-sealed.key": locked,
		"v1-record.bin": record, "v1-unlock.txt": []byte(reveal(t, unlock.Text()) + "\n")} {
		if err := os.WriteFile(at(name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
