package fuzz_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"warden"
	"warden/autolock"
)

// FuzzKeyFile: no bytes make ParseKeyFile or Unlock panic; what parses can be written again and then means the same; the
// rest is refused with a code that stops the start. With repair the digest at the end is made to fit, so that the fuzzer
// gets behind it.
func FuzzKeyFile(f *testing.F) {
	testdata := filepath.Join("..", "autolock", "testdata")
	text, err := os.ReadFile(filepath.Join(testdata, "v1-unlock.txt"))
	if err != nil {
		f.Fatal(err)
	}
	unlock, err := autolock.ParseUnlockKey(text)
	if err != nil {
		f.Fatal(err)
	}
	open := func(data []byte) (autolock.Identity, error) {
		file, err := autolock.ParseKeyFile(data)
		if err != nil {
			return autolock.Identity{}, err
		}
		if file.Locked {
			return file.Unlock(unlock)
		}
		return file.Identity()
	}
	seeds, err := filepath.Glob(filepath.Join(testdata, "v1-*.key"))
	if err != nil || len(seeds) != 3 {
		f.Fatalf("%d seeds, %v, want 3", len(seeds), err)
	}
	for _, seed := range seeds {
		data, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		if _, err := open(data); err != nil {
			f.Fatalf("seed %s: %v", seed, err)
		}
		for _, repair := range []bool{false, true} {
			f.Add(data, repair)
			f.Add(data[:len(data)/2], repair)
			f.Add(bytes.Replace(data, []byte("-----BEGIN CERTIFICATE"), []byte("-----BEGIN X"), 1), repair)
			f.Add(append(bytes.Clone(data), data...), repair)
		}
	}
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, data []byte, repair bool) {
		if i := bytes.LastIndex(data, []byte("-----BEGIN WARDEN DIGEST-----\n")); repair && i >= 0 {
			sum := sha256.Sum256(data[:i])
			data = append(bytes.Clone(data[:i]), pem.EncodeToMemory(&pem.Block{Type: "WARDEN DIGEST", Bytes: sum[:]})...)
		}
		id, err := open(data)
		switch warden.CodeOf(err) {
		case "":
		case warden.CodeCorrupt, warden.CodeForeign, warden.CodeUnsupported, warden.CodeWrongUnlock:
			return
		default:
			t.Fatalf("refused with %v [%s]", err, warden.CodeOf(err))
		}
		path := filepath.Join(t.TempDir(), "node.key")
		if err := autolock.WriteKeyFile(path, id, nil); err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		file, err := autolock.ReadKeyFile(path)
		if err != nil {
			t.Fatalf("what was written can't be read: %v", err)
		}
		if file.ClusterID != id.ClusterID || file.NodeID != id.NodeID || file.Role != id.Role || len(file.Chain) != len(id.Chain) {
			t.Fatalf("the file means %+v, then %+v", id, file)
		}
	})
}
