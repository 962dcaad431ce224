// Package durable writes files so that a crash or a loss of power leaves the old content or the new, never a part of
// either, and reads files that hold keys only where nobody else can.
//
// It does not lock: one daemon owns a state directory. It does not erase: what a file held before stays in the file
// system's free blocks. It knows nothing of what it writes.
//
// Invariants: a file appears under its name only when complete and synced; its mode is the mode asked for whatever the
// umask; no secret is ever in a file that others may open, the temporary one included; what a crash leaves behind (a
// temporary file) is removed by the next write of that name.
//
// It trusts the kernel and the file system to keep what fsync acknowledged (rename(2), fsync(2)). An error of a write does
// not tell whether it was done: a failed sync of the directory may come after the rename.
package durable

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"warden"
)

// writing is held across each WriteFile, so that one does not sweep away another's temporary file; it guards fault too.
var writing sync.Mutex

// WriteFile puts data at path in one step: a temporary file in the same directory, created anew and private, given the
// exact mode, written, synced, renamed over path, and the directory synced. mode has permission bits only. The directory
// must exist. A symlink at path is replaced, not followed. Safe for concurrent use in one process; the last one wins.
//
// On an error path holds its old content, or already the new.
func WriteFile(path string, data []byte, mode os.FileMode) error {
	writing.Lock()
	defer writing.Unlock()
	err := writeFile(path, data, mode)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		err = warden.Hint(err, "free space on the file system of "+filepath.Dir(path)+", then try again")
	}
	return err
}

func writeFile(path string, data []byte, mode os.FileMode) (err error) {
	op := "writing " + path
	if mode&^fs.ModePerm != 0 {
		return warden.Errorf(warden.CodeInternal, op, "mode %v has more than permission bits", mode)
	}
	dir, prefix := filepath.Dir(path), tempPrefix(path)
	if err := sweep(dir, prefix); err != nil {
		return fail(op, err)
	}
	var random [8]byte
	rand.Read(random[:])
	temp := filepath.Join(dir, prefix+hex.EncodeToString(random[:]))

	var f *os.File
	crashed := false
	defer func() {
		if f != nil {
			f.Close()
		}
		if err != nil && !crashed {
			os.Remove(temp)
		}
	}()
	for _, s := range []struct {
		name string
		do   func() error
	}{
		{"create", func() error {
			f, err = os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
			return err
		}},
		{"chmod", func() error { return f.Chmod(mode) }}, // the umask may have taken bits away
		{"write", func() error { _, err := f.Write(data); return err }},
		{"sync", func() error { return f.Sync() }},
		{"rename", func() error { return os.Rename(temp, path) }},
		{"sync directory", func() error { return SyncDir(dir) }},
	} {
		if err := crash("before " + s.name); err != nil {
			crashed = true
			return fail(op, err)
		}
		if err := s.do(); err != nil {
			return fail(op, err)
		}
		if err := crash("after " + s.name); err != nil {
			crashed = true
			return fail(op, err)
		}
	}
	return nil
}

// tempPrefix is what the names of path's temporary files begin with.
func tempPrefix(path string) string { return "." + filepath.Base(path) + ".tmp-" }

// sweep removes the temporary files that a crash left in dir: they may hold keys in clear that are sealed by now.
func sweep(dir, prefix string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// ReadPrivate returns the content of a file that only its owner may open. Errors: CodePermissions if the mode is wider than
// 0600, the owner is neither root nor this process's user, or it is a symlink or no regular file; CodeTooLarge above max
// bytes; CodeNotFound, for which errors.Is(err, fs.ErrNotExist) holds; CodeConflict if it grows meanwhile.
//
// The file's name is durable when it returns: a process that was killed in WriteFile between the rename and the
// sync left a name that power loss could take back, under whoever builds on it.
func ReadPrivate(path string, max int64) ([]byte, error) {
	op := "reading " + path
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, warden.Hint(warden.Errorf(warden.CodePermissions, op, "it is a symlink"), "put the file itself at "+path)
	}
	if err != nil {
		return nil, fail(op, err)
	}
	defer f.Close()
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return nil, fail(op, err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, fail(op, err)
	}
	if !info.Mode().IsRegular() {
		return nil, warden.Errorf(warden.CodePermissions, op, "it is not a regular file")
	}
	if err := checkOwner(op, path, info); err != nil {
		return nil, err
	}
	if wider := info.Mode().Perm() &^ 0o600; wider != 0 {
		return nil, warden.Hint(warden.Errorf(warden.CodePermissions, op, "mode %04o is wider than 0600: others may have read it", info.Mode().Perm()),
			"chmod 600 "+path+"; if others could read it, replace what it holds")
	}
	if info.Size() > max {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d", info.Size(), max)
	}
	data := make([]byte, info.Size()+1) // in one buffer: no copies of keys left by growing
	switch n, err := io.ReadFull(f, data); {
	case err == nil:
		return nil, warden.Errorf(warden.CodeConflict, op, "it grew while it was read")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return data[:n:n], nil
	default:
		return nil, fail(op, err)
	}
}

// MkdirPrivate makes the directory path with mode 0700 whatever the umask, missing parents likewise, and syncs the
// directory that it is in. One that exists is accepted if it is as private, and its name synced likewise: who made it may
// have been killed before that. Errors: CodePermissions if it is wider than
// 0700, belongs to another user than root and this process's, or is a symlink or no directory.
func MkdirPrivate(path string) error {
	op := "making directory " + path
	parent := filepath.Dir(path)
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) && parent != path {
		if err := MkdirPrivate(parent); err != nil {
			return err
		}
	}
	switch err := os.Mkdir(path, 0o700); {
	case err == nil:
		if err := os.Chmod(path, 0o700); err != nil { // the umask may have taken bits away
			return fail(op, err)
		}
	case !errors.Is(err, fs.ErrExist):
		return fail(op, err)
	}
	if err := SyncDir(parent); err != nil {
		return fail(op, err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		return fail(op, err)
	}
	if !info.IsDir() {
		return warden.Hint(warden.Errorf(warden.CodePermissions, op, "it exists and is not a directory"), "name the directory itself, not a symlink or file")
	}
	if err := checkOwner(op, path, info); err != nil {
		return err
	}
	if info.Mode().Perm()&^0o700 != 0 {
		return warden.Hint(warden.Errorf(warden.CodePermissions, op, "mode %04o is wider than 0700", info.Mode().Perm()), "chmod 700 "+path)
	}
	return nil
}

// RemoveAll removes path and all below it, and syncs the directory that it was in. Nothing there is no error.
func RemoveAll(path string) error {
	op := "removing " + path
	if err := os.RemoveAll(path); err != nil {
		return fail(op, err)
	}
	if err := SyncDir(filepath.Dir(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(op, err)
	}
	return nil
}

// SyncDir makes the names in the directory durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fail("syncing directory "+path, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fail("syncing directory "+path, err)
	}
	return nil
}

func checkOwner(op, path string, info fs.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return warden.Hint(warden.Errorf(warden.CodePermissions, op, "it belongs to another user"),
			fmt.Sprintf("chown %d %s; if others could read it, replace what it holds", os.Geteuid(), path))
	}
	return nil
}

// fail gives an error of the file system its code. An error that has one keeps it.
func fail(op string, err error) error {
	if _, ok := errors.AsType[*warden.Error](err); ok {
		return warden.Wrap(op, err)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return warden.Recode(warden.CodeNotFound, op, err)
	case errors.Is(err, fs.ErrPermission):
		return warden.Recode(warden.CodePermissions, op, err)
	}
	return warden.Recode(warden.CodeInternal, op, err)
}
