package fuzz_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store/sealedlog"
)

// glass is a sealer that hides nothing, so that the fuzzer reaches what parses the opened bytes: it puts the place before them.
type glass struct{}

func (glass) Seal(plaintext, aad []byte) ([]byte, error) {
	return append(bytes.Clone(aad), plaintext...), nil
}

func (glass) Open(sealed, aad []byte) ([]byte, error) {
	if plain, ok := bytes.CutPrefix(sealed, aad); ok {
		return bytes.Clone(plain), nil
	}
	return nil, errors.New("it belongs elsewhere")
}

// FuzzSealedSnapshot: a snapshot of any bytes opens with the right length or is refused with a code that says so.
func FuzzSealedSnapshot(f *testing.F) {
	const cluster, node, term, index = "cluster000000000000000000", "node000000000000000000000", 3, 9
	open := func(dir string) (*sealedlog.Snapshots, error) {
		return sealedlog.OpenSnapshots(dir, cluster, node, glass{}, 2, slog.New(slog.DiscardHandler))
	}
	id := ""
	for _, body := range []string{"", "x", "some more"} {
		dir := f.TempDir()
		sn, err := open(dir)
		if err != nil {
			f.Fatal(err)
		}
		sink, err := sn.Create(raft.SnapshotVersionMax, index, term, raft.Configuration{Servers: []raft.Server{{ID: node, Address: node}}}, 1, nil)
		if err != nil {
			f.Fatal(err)
		}
		_, err = io.WriteString(sink, body)
		if err := errors.Join(err, sink.Close()); err != nil {
			f.Fatal(err)
		}
		if _, err := open(dir); err != nil {
			f.Fatal("seed does not open:", err)
		}
		id = sink.ID()
		meta, err1 := os.ReadFile(filepath.Join(dir, "snapshots", id, "meta"))
		state, err2 := os.ReadFile(filepath.Join(dir, "snapshots", id, "state"))
		if err := errors.Join(err1, err2); err != nil {
			f.Fatal(err)
		}
		f.Add(id, meta, state)
		f.Add(id, meta[:len(meta)/2], state)
		f.Add(id, meta, state[:len(state)-1])
	}
	f.Fuzz(func(t *testing.T, id string, meta, state []byte) {
		dir := t.TempDir()
		at := filepath.Join(dir, "snapshots", filepath.Base(id))
		if os.MkdirAll(at, 0o700) != nil || os.WriteFile(filepath.Join(at, "meta"), meta, 0o600) != nil || os.WriteFile(filepath.Join(at, "state"), state, 0o600) != nil {
			return // not a file name
		}
		sn, err := open(dir)
		if err != nil {
			switch warden.CodeOf(err) {
			case warden.CodeCorrupt, warden.CodeForeign, warden.CodeUnsupported:
				return
			}
			t.Fatalf("OpenSnapshots = %v [%s]", err, warden.CodeOf(err))
		}
		list, err := sn.List()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range list {
			_, r, err := sn.Open(m.ID)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, r); err != nil || n != m.Size {
				t.Fatalf("body of %d bytes, %v; metadata says %d", n, err, m.Size)
			}
			r.Close()
		}
	})
}
