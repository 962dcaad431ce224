package sealedlog_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store/sealedlog"
)

// bodyOf is a body of more than one segment of 1 MiB.
func bodyOf(seed string) []byte { return bytes.Repeat([]byte("canary "+seed+"\n"), 130_000) }

func TestASnapshotComesBackAfterReopening(t *testing.T) {
	dir, s := filepath.Join(t.TempDir(), "raft"), newSealer(t)
	sn := openSnapshots(t, dir, s)
	if list, err := sn.List(); err != nil || len(list) != 0 {
		t.Fatalf("List() of none = %v, %v", list, err)
	}
	for i, body := range [][]byte{nil, []byte("x"), bodyOf("a")} {
		index := uint64(10 + i)
		id := snapshot(t, sn, index, body)
		for range 2 {
			list, err := sn.List()
			if err != nil || len(list) != 1 || list[0].ID != id {
				t.Fatalf("List() = %v, %v, want %s", list, err, id)
			}
			m, got, err := readSnapshot(sn, id)
			if err != nil || !bytes.Equal(got, body) {
				t.Fatalf("snapshot %s: %d bytes, %v; want %d", id, len(got), err, len(body))
			}
			c := configuration()
			if m.Index != index || m.Term != 3 || m.Size != int64(len(body)) || m.ConfigurationIndex != index-1 || m.Version != 1 ||
				len(m.Configuration.Servers) != 2 || m.Configuration.Servers[0] != c.Servers[0] || m.Configuration.Servers[1] != c.Servers[1] {
				t.Errorf("metadata = %+v", m)
			}
			sn = openSnapshots(t, dir, s)
		}
	}
}

func TestSnapshotsAreOrderedByTermThenIndexAndOldOnesGo(t *testing.T) {
	dir := t.TempDir()
	sn := openSnapshots(t, dir, newSealer(t))
	for _, index := range []uint64{9, 10, 100, 11} {
		snapshot(t, sn, index, []byte("x"))
	}
	names, err := os.ReadDir(filepath.Join(dir, "snapshots"))
	if err != nil || len(names) != 2 {
		t.Fatalf("kept %v, %v, want 2", names, err)
	}
	if list, err := sn.List(); err != nil || list[0].Index != 100 {
		t.Errorf("List() = %v, %v", list, err)
	}
	a, b := snapshot(t, sn, 100, []byte("1")), snapshot(t, sn, 100, []byte("2"))
	if a == b {
		t.Error("two snapshots have one ID")
	}
}

func TestWhatAnInterruptedSnapshotLeftIsRemoved(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	sn := openSnapshots(t, dir, s)
	sink, err := sn.Create(1, 5, 1, configuration(), 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if list, err := sn.List(); err != nil || len(list) != 0 {
		t.Errorf("List() before Close = %v, %v", list, err)
	}
	openSnapshots(t, dir, s)
	if names, _ := os.ReadDir(filepath.Join(dir, "snapshots")); len(names) != 0 {
		t.Errorf("left %v", names)
	}
	if err := sink.Close(); err == nil {
		t.Error("Close of a snapshot whose directory is gone succeeded")
	}
}

func TestACancelledSnapshotLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	sn := openSnapshots(t, dir, newSealer(t))
	sink, err := sn.Create(1, 5, 1, configuration(), 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sink.Cancel(), sink.Cancel()); err != nil {
		t.Error(err)
	}
	if err := sink.Close(); err == nil {
		t.Error("Close after Cancel succeeded")
	}
	if names, _ := os.ReadDir(filepath.Join(dir, "snapshots")); len(names) != 0 {
		t.Errorf("left %v", names)
	}
	if _, err := sn.Create(0, 5, 1, configuration(), 1, nil); warden.CodeOf(err) != warden.CodeUnsupported {
		t.Errorf("Create of version 0 = %v", err)
	}
}

func TestI8NothingSecretInASnapshot(t *testing.T) {
	dir := t.TempDir()
	sn := openSnapshots(t, dir, newSealer(t))
	id := snapshot(t, sn, 5, bodyOf("a"))
	for _, f := range []string{"meta", "state"} {
		b := readFile(t, filepath.Join(dir, "snapshots", id, f))
		if bytes.Contains(b, []byte("canary")) || bytes.Contains(b, []byte(other)) {
			t.Errorf("%s holds plaintext", f)
		}
	}
}

// TestI8DamagedOrMovedSnapshotsAreRefused: also where an older one would be whole, and by raft's own way in.
func TestI8DamagedOrMovedSnapshotsAreRefused(t *testing.T) {
	s := newSealer(t)
	change := func(f func([]byte) []byte) func(t *testing.T, path, older string) {
		return func(t *testing.T, path, _ string) { writeFile(t, path, f(readFile(t, path))) }
	}
	changes := map[string]func(t *testing.T, path, older string){
		"first bit": change(func(b []byte) []byte { b[0] ^= 1; return b }),
		"bit":       change(func(b []byte) []byte { b[len(b)/2] ^= 1; return b }),
		"last bit":  change(func(b []byte) []byte { b[len(b)-1] ^= 1; return b }),
		"cut":       change(func(b []byte) []byte { return b[:len(b)-1] }),
		"half":      change(func(b []byte) []byte { return b[:len(b)/2] }),
		"empty":     change(func([]byte) []byte { return nil }),
		"longer":    change(func(b []byte) []byte { return append(b, 0) }),
		"older":     func(t *testing.T, path, older string) { writeFile(t, path, readFile(t, older)) },
		"removed":   func(t *testing.T, path, _ string) { os.Remove(path) },
	}
	for _, file := range []string{"meta", "state"} {
		for name, change := range changes {
			t.Run(file+"/"+name, func(t *testing.T) {
				dir := t.TempDir()
				sn := openSnapshots(t, dir, s)
				older, id := snapshot(t, sn, 5, bodyOf("a")), snapshot(t, sn, 6, bodyOf("b"))
				path := filepath.Join(dir, "snapshots", id, file)
				change(t, path, filepath.Join(dir, "snapshots", older, file))
				_, err := sealedlog.OpenSnapshots(dir, cluster, node, s, 2, discard)
				if warden.CodeOf(err) != warden.CodeCorrupt || warden.HintOf(err) == "" || !strings.Contains(err.Error(), path) {
					t.Errorf("OpenSnapshots = %v [%s]", err, warden.CodeOf(err))
				}
				if _, _, err := readSnapshot(sn, id); warden.CodeOf(err) != warden.CodeCorrupt {
					t.Errorf("reading it = %v", err)
				}
				if _, b, err := readSnapshot(sn, older); err != nil || !bytes.Equal(b, bodyOf("a")) {
					t.Errorf("the older one: %v", err)
				}
			})
		}
	}
	t.Run("renamed", func(t *testing.T) {
		dir := t.TempDir()
		id := snapshot(t, openSnapshots(t, dir, s), 5, []byte("x"))
		if err := os.Rename(filepath.Join(dir, "snapshots", id), filepath.Join(dir, "snapshots", "4"+id)); err != nil {
			t.Fatal(err)
		}
		if _, err := sealedlog.OpenSnapshots(dir, cluster, node, s, 2, discard); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("OpenSnapshots = %v", err)
		}
	})
	t.Run("foreign", func(t *testing.T) {
		dir := t.TempDir()
		snapshot(t, openSnapshots(t, dir, s), 5, []byte("x"))
		if _, err := sealedlog.OpenSnapshots(dir, cluster, other, s, 2, discard); warden.CodeOf(err) != warden.CodeForeign {
			t.Errorf("OpenSnapshots of another node = %v", err)
		}
	})
	t.Run("another key", func(t *testing.T) {
		dir := t.TempDir()
		snapshot(t, openSnapshots(t, dir, s), 5, []byte("x"))
		if _, err := sealedlog.OpenSnapshots(dir, cluster, node, newSealer(t), 2, discard); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("OpenSnapshots with another key = %v", err)
		}
	})
}

func TestOpeningWhatIsNoSnapshot(t *testing.T) {
	sn := openSnapshots(t, t.TempDir(), newSealer(t))
	for _, id := range []string{"", "1-2-3", "../snapshots", "1-2-3/../1-2-3", "1-2-3.tmp"} {
		if _, _, err := sn.Open(id); warden.CodeOf(err) != warden.CodeNotFound {
			t.Errorf("Open(%q) = %v", id, err)
		}
	}
	var _ raft.SnapshotStore = sn
}
