package powerloss_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"warden/test/powerloss"
)

// copied copies a file, for which the kernel is asked to do it.
func copied(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	g, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(g, f)
	return errors.Join(err, g.Close())
}

// listened makes a socket by a path that begins at a descriptor.
func listened(dir, name string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name)})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	return errors.Join(os.Chmod(filepath.Join(dir, name), 0o666), l.Close())
}

func init() {
	sequences["calls"] = func(base string, note func(string, ...any)) error {
		dir := state(base)
		path := func(name string) string { return filepath.Join(dir, name) }
		f, err := os.OpenFile(path("a"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		_, err1 := f.Write([]byte("hello"))
		_, err2 := f.Write([]byte(" world"))
		_, err3 := f.WriteAt([]byte("J"), 0)
		_, err4 := unix.Writev(int(f.Fd()), [][]byte{[]byte("!"), []byte("?!")})
		if err := errors.Join(err1, err2, err3, err4, f.Sync(), f.Truncate(20), syscall.Fallocate(int(f.Fd()), 0, 0, 5000), f.Chmod(0o640)); err != nil {
			return err
		}
		note("a is synced")
		if err := copied(path("a"), path("copy")); err != nil {
			return err
		}
		if err := listened(dir, "socket"); err != nil {
			return err
		}
		if err := errors.Join(os.Mkdir(path("d"), 0o700), os.Link(path("a"), path("b")), os.Rename(path("b"), path("c")), os.WriteFile(path("d/x"), []byte("x"), 0o600),
			os.WriteFile(path("d/x"), []byte("y"), 0o600), os.Truncate(path("d/x"), 0), os.WriteFile(path("d/y"), nil, 0o600), os.Rename(path("d"), path("e")),
			os.WriteFile(path("e/z"), []byte("z"), 0o600), os.Chmod(path("e/z"), 0o400), os.Remove(path("e/y"))); err != nil {
			return err
		}
		if _, err := os.OpenFile(path("none/x"), os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			return errors.New("made a file where no directory is")
		}
		if err := os.RemoveAll(path("e")); err != nil {
			return err
		}
		note("threads")
		var wg sync.WaitGroup
		errs := make([]error, 4)
		for i := range errs {
			wg.Go(func() {
				name := path(fmt.Sprint("t", i))
				for k := range 8 {
					f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
					if err == nil {
						_, err = fmt.Fprintf(f, "%d\n", k)
						err = errors.Join(err, f.Sync(), f.Close(), os.Rename(name, name+"~"), os.Rename(name+"~", name))
					}
					errs[i] = errors.Join(errs[i], err)
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}
	sequences["mapped"] = func(base string, _ func(string, ...any)) error {
		f, err := os.OpenFile(filepath.Join(state(base), "old"), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = syscall.Mmap(int(f.Fd()), 0, 3, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
		return err
	}
	sequences["fails"] = func(string, func(string, ...any)) error { return errors.New("it fails") }
}

// TestTrace: the record of a process, killed or not, tells what is on the disk, to the byte.
func TestTrace(t *testing.T) {
	s := &scene{t: t, dir: scratch(t)}
	s.base = s.folder()
	if err := os.WriteFile(filepath.Join(state(s.base), "old"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	full, _ := s.trace("calls", s.copy(s.base), 0, nil)
	ops := full.Record.Ops
	tree := full.Record.Kept(len(ops))
	if f := tree["copy"]; !bytes.HasPrefix(f.Data, []byte("Jello world!?!")) || tree["socket"].Mode != fs.ModeSocket|0o666 {
		t.Errorf("copy = %.20q, socket has mode %v", f.Data, tree["socket"].Mode)
	}
	var kinds []string
	for _, o := range ops {
		if k := strings.Fields(o.String())[0]; !slices.Contains(kinds, k) {
			kinds = append(kinds, k)
		}
	}
	if want := []string{"create", "write", "fsync", "truncate", "chmod", "note", "rename", "unlink"}; !slices.Equal(kinds, want) {
		t.Errorf("kinds of operations = %q, want %q", kinds, want)
	}
	if got := full.Record.Notes(len(ops)); !slices.Equal(got, []string{"a is synced", "threads"}) {
		t.Errorf("Notes() = %q", got)
	}
	at := some(len(ops), 40)
	s.each(len(at), func(i int) bool {
		base := s.copy(s.base)
		defer os.RemoveAll(base)
		tr, ok := s.trace("calls", base, at[i], nil)
		if len(tr.Record.Ops) != at[i] || !tr.Killed {
			t.Errorf("killed after %d operations: %d are in the record, killed %t", at[i], len(tr.Record.Ops), tr.Killed)
		}
		return ok
	})
}

// TestTraceRefuses: what the model does not know is an error, and so is a process that fails.
func TestTraceRefuses(t *testing.T) {
	s := &scene{t: t, dir: scratch(t)}
	for sequence, want := range map[string]string{"mapped": "mmap for writing", "fails": "it fails"} {
		base := s.folder()
		if err := os.WriteFile(filepath.Join(state(base), "old"), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		told := fmt.Sprintf(`{"Sequence":%q,"Base":%q}`, sequence, base)
		_, err := powerloss.Trace{Argv: []string{os.Args[0]}, Env: append(os.Environ(), childVar+"="+told, "GORACE=atexit_sleep_ms=0"), Root: state(base), Limit: limit}.Run()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("tracing %q = %v, want %q", sequence, err, want)
		}
	}
}
