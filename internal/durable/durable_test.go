package durable_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"warden"
	"warden/internal/durable"
)

// steps returns the points that one WriteFile passes.
func steps(t *testing.T) []string {
	t.Helper()
	var seen []string
	defer durable.SetFault(func(point string) error { seen = append(seen, point); return nil })()
	if err := durable.WriteFile(filepath.Join(t.TempDir(), "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return seen
}

func TestWriteFileSyncsBeforeItRenames(t *testing.T) {
	want := []string{}
	for _, s := range []string{"create", "chmod", "write", "sync", "rename", "sync directory"} {
		want = append(want, "before "+s, "after "+s)
	}
	if got := steps(t); !slices.Equal(got, want) {
		t.Errorf("points of WriteFile = %q, want %q", got, want)
	}
}

// A crash at any point leaves the old content or the new, and the next write removes what it left behind.
func TestCrashLeavesOldOrNew(t *testing.T) {
	for _, point := range steps(t) {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "f")
			if err := durable.WriteFile(path, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			power := errors.New("power lost")
			undo := durable.SetFault(func(at string) error {
				if at == point {
					return power
				}
				return nil
			})
			err := durable.WriteFile(path, []byte("new"), 0o600)
			undo()
			if !errors.Is(err, power) {
				t.Fatalf("WriteFile = %v, want the fault", err)
			}
			want := "old"
			if point == "after rename" || strings.HasSuffix(point, "sync directory") {
				want = "new"
			}
			if got, err := durable.ReadPrivate(path, 10); err != nil || string(got) != want {
				t.Errorf("after the crash ReadPrivate = %q, %v, want %q", got, err, want)
			}
			if err := durable.WriteFile(path, []byte("next"), 0o600); err != nil {
				t.Fatal(err)
			}
			if names := names(t, dir); !slices.Equal(names, []string{"f"}) {
				t.Errorf("after the next write the directory holds %q, want f alone", names)
			}
		})
	}
}

// An error that is no crash leaves no temporary file.
func TestFailedWriteCleansUp(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.MkdirAll(filepath.Join(path, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(path, []byte("x"), 0o600); err == nil {
		t.Fatal("WriteFile over a directory succeeded")
	}
	if names := names(t, dir); !slices.Equal(names, []string{"f"}) {
		t.Errorf("the directory holds %q, want f alone", names)
	}
	if err := durable.WriteFile(filepath.Join(dir, "none", "f"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("WriteFile into a missing directory = %v, want fs.ErrNotExist", err)
	}
	if err := durable.WriteFile(filepath.Join(dir, "g"), nil, 0o600|fs.ModeSetuid); err == nil {
		t.Error("WriteFile with a setuid bit succeeded")
	}
}

func TestModeIsExactWhateverTheUmask(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o077, 0o777} {
		for _, mode := range []os.FileMode{0o600, 0o644, 0o400} {
			t.Run(fmt.Sprintf("%04o/%04o", umask, mode), func(t *testing.T) {
				dir := t.TempDir()
				old := syscall.Umask(umask)
				err := durable.WriteFile(filepath.Join(dir, "f"), []byte("x"), mode)
				mkdirErr := durable.MkdirPrivate(filepath.Join(dir, "a", "b"))
				syscall.Umask(old)
				if err != nil || mkdirErr != nil {
					t.Fatal(err, mkdirErr)
				}
				for name, want := range map[string]os.FileMode{"f": mode, "a": 0o700, "a/b": 0o700} {
					if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != want {
						t.Errorf("mode of %s = %v (%v), want %v", name, info.Mode(), err, want)
					}
				}
			})
		}
	}
}

// The temporary file holds what the file will: it is never wider than 0600 before the mode that was asked for is set.
func TestTemporaryFileIsPrivate(t *testing.T) {
	dir := t.TempDir()
	defer syscall.Umask(syscall.Umask(0))
	defer durable.SetFault(func(point string) error {
		if point == "before create" {
			return nil
		}
		for _, name := range names(t, dir) {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: mode of %s = %v (%v), want 0600", point, name, info.Mode(), err)
			}
		}
		return nil
	})()
	if err := durable.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestConcurrentWritesNeverMix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for range 5 {
				if err := durable.WriteFile(path, []byte(strings.Repeat(string(rune('a'+i)), 4096)), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	got, err := durable.ReadPrivate(path, 4096)
	if err != nil || len(got) != 4096 || strings.Trim(string(got), string(got[:1])) != "" {
		t.Errorf("ReadPrivate = %d bytes, %v, want 4096 equal ones", len(got), err)
	}
	if names := names(t, dir); !slices.Equal(names, []string{"f"}) {
		t.Errorf("the directory holds %q, want f alone", names)
	}
}

func TestWriteFileReplacesASymlink(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(target, []byte("kept"), 0o644), os.Symlink(target, link)); err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(link, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if kept, err := os.ReadFile(target); err != nil || string(kept) != "kept" {
		t.Errorf("the symlink's target holds %q, %v, want it untouched", kept, err)
	}
}

func TestReadPrivateRefusals(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, mode := range map[string]os.FileMode{"group": 0o640, "other": 0o604, "x": 0o700, "ok": 0o600, "ro": 0o400} {
		if err := durable.WriteFile(at(name), []byte("12345678"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(at("ok"), at("link")), os.Mkdir(at("dir"), 0o700), syscall.Mkfifo(at("fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		max  int64
		code warden.Code
	}{
		{"ok", 8, ""}, {"ro", 8, ""}, {"ok", 7, warden.CodeTooLarge}, {"none", 8, warden.CodeNotFound},
		{"group", 8, warden.CodePermissions}, {"other", 8, warden.CodePermissions}, {"x", 8, warden.CodePermissions},
		{"link", 8, warden.CodePermissions}, {"dir", 8, warden.CodePermissions}, {"fifo", 8, warden.CodePermissions},
	} {
		data, err := durable.ReadPrivate(at(c.name), c.max)
		if warden.CodeOf(err) != c.code || (err == nil) != (string(data) == "12345678") {
			t.Errorf("ReadPrivate(%s, %d) = %q, %v, want code %q", c.name, c.max, data, err, c.code)
		}
		if err != nil && !strings.Contains(err.Error(), at(c.name)) {
			t.Errorf("ReadPrivate(%s) = %v, want the file named", c.name, err)
		}
	}
	if _, err := durable.ReadPrivate(at("none"), 8); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadPrivate(none) = %v, want fs.ErrNotExist", err)
	}
	if _, err := durable.ReadPrivate(at("group"), 8); !strings.Contains(warden.HintOf(err), "chmod 600 "+at("group")) {
		t.Errorf("hint = %q, want the chmod", warden.HintOf(err))
	}
}

func TestForeignOwnerIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: chown")
	}
	dir := t.TempDir()
	file, sub := filepath.Join(dir, "f"), filepath.Join(dir, "d")
	if err := errors.Join(durable.WriteFile(file, nil, 0o600), durable.MkdirPrivate(sub), os.Chown(file, 12345, 0), os.Chown(sub, 12345, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := durable.ReadPrivate(file, 1); warden.CodeOf(err) != warden.CodePermissions {
		t.Errorf("ReadPrivate of another user's file = %v, want code permissions", err)
	}
	if err := durable.MkdirPrivate(sub); warden.CodeOf(err) != warden.CodePermissions {
		t.Errorf("MkdirPrivate of another user's directory = %v, want code permissions", err)
	}
}

func TestMkdirPrivate(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.Mkdir(at("wide"), 0o755), os.Chmod(at("wide"), 0o755), os.Mkdir(at("ok"), 0o700),
		os.Symlink(at("ok"), at("link")), os.WriteFile(at("file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, code := range map[string]warden.Code{"wide": warden.CodePermissions, "ok": "", "link": warden.CodePermissions, "file": warden.CodePermissions, "new": "", "x/y/z": ""} {
		if err := durable.MkdirPrivate(at(name)); warden.CodeOf(err) != code {
			t.Errorf("MkdirPrivate(%s) = %v, want code %q", name, err, code)
		}
	}
}

func TestRemoveAll(t *testing.T) {
	dir := t.TempDir()
	if err := durable.MkdirPrivate(filepath.Join(dir, "a/b/c")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // nothing there is no error
		if err := durable.RemoveAll(filepath.Join(dir, "a")); err != nil {
			t.Fatal(err)
		}
	}
	if err := durable.RemoveAll(filepath.Join(dir, "a/b")); err != nil {
		t.Errorf("RemoveAll in a missing directory = %v, want nil", err)
	}
	if names := names(t, dir); len(names) != 0 {
		t.Errorf("the directory holds %q, want nothing", names)
	}
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
