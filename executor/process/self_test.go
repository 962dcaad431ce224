package process

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"log/slog"

	"golang.org/x/sys/unix"
)

// BuildHelper compiles the helper as the build does.
func BuildHelper(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "helper")
	cmd := exec.Command("go", "build", "-o", path, "./helper")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the helper: %v\n%s", err, out)
	}
	return path
}

// InMemory is what Self makes of a helper that the build has put there, until the test ends.
func InMemory(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	self, err := inMemory("test", b)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := strconv.Atoi(filepath.Base(self))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return self
}

// What is run from memory can't be changed, and what does not run is told of.
func TestInMemory(t *testing.T) {
	path := InMemory(t, BuildHelper(t))
	if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
		_, werr := f.WriteString("x")
		if f.Close(); werr == nil {
			t.Error("the helper could be written to")
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o555 {
		t.Errorf("Stat = %v, %v", info, err)
	}
	if path, err := inMemory("test", []byte("not a program")); err == nil {
		t.Errorf("what is no program is at %s", path)
	}
}

// Without a helper in it a daemon runs itself.
func TestSelf(t *testing.T) {
	got, err := Self(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, missing := payload.ReadFile("payload/helper"); missing != nil && got != own {
		t.Errorf("Self = %s, want %s", got, own)
	}
}
