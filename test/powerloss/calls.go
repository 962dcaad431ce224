package powerloss

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// atCWD is the dirfd of a call that has none: paths begin at the working directory.
const atCWD = uint64(0xffffffffffffffff - 99)

// decode returns what to do when the call has come to its end without an error, nil if it changes nothing below the root. It knows
// the calls that Go programs make; others that would change files refuse the trace.
func (tr *Tracer) decode(tid int, i info) func(result int64) {
	a := i.args
	switch i.nr {
	case unix.SYS_OPENAT:
		return tr.open(tid, a[0], a[1], a[2])
	case unix.SYS_MKDIRAT:
		return tr.mkdir(tid, a[0], a[1])
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		if i.nr == unix.SYS_RENAMEAT2 && a[4]&^unix.RENAME_NOREPLACE != 0 {
			tr.refuse("renameat2 with flags %#x", a[4])
		}
		return tr.rename(tid, a[0], a[1], a[2], a[3])
	case unix.SYS_LINKAT:
		return tr.link(tid, a[0], a[1], a[2], a[3])
	case unix.SYS_UNLINKAT:
		return tr.unlink(tid, a[0], a[1])
	case unix.SYS_FCHMODAT:
		if path, ok := tr.path(tid, a[0], a[1]); ok {
			return tr.chmod(path)
		}
	case unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_WRITEV:
		return tr.write(tid, i)
	case unix.SYS_FTRUNCATE:
		if id, ok := tr.fd(tid, a[0]); ok {
			return func(int64) { tr.add(Op{Kind: Truncate, File: id, Size: int64(a[1])}) }
		}
	case unix.SYS_TRUNCATE:
		if path, ok := tr.path(tid, atCWD, a[0]); ok {
			if id, ok := tr.lookup(os.Stat(path)); ok {
				return func(int64) { tr.add(Op{Kind: Truncate, File: id, Size: int64(a[1])}) }
			}
		}
	case unix.SYS_FALLOCATE:
		return tr.fallocate(tid, a)
	case unix.SYS_FCHMOD:
		if id, ok := tr.fd(tid, a[0]); ok {
			return func(int64) { tr.add(Op{Kind: Chmod, File: id, Mode: fs.FileMode(a[1]) & fs.ModePerm}) }
		}
	case unix.SYS_FSYNC, unix.SYS_FDATASYNC:
		kind := Sync
		if i.nr == unix.SYS_FDATASYNC {
			kind = DataSync
		}
		if id, ok := tr.fd(tid, a[0]); ok {
			return func(int64) { tr.add(Op{Kind: kind, File: id}) }
		}
	case unix.SYS_SYNC, unix.SYS_SYNCFS:
		return func(int64) { tr.add(Op{Kind: SyncAll}) }
	case unix.SYS_MMAP:
		if a[2]&unix.PROT_WRITE != 0 && a[3]&unix.MAP_TYPE != unix.MAP_PRIVATE {
			tr.refuseFD(tid, a[4], "mmap for writing")
		}
	case unix.SYS_COPY_FILE_RANGE:
		return tr.copyRange(tid, a)
	case unix.SYS_BIND:
		return tr.bind(tid, a[1], a[2])
	case unix.SYS_SENDFILE, unix.SYS_PWRITEV, unix.SYS_PWRITEV2:
		tr.refuseFD(tid, a[0], "sendfile or pwritev")
	case unix.SYS_SPLICE:
		tr.refuseFD(tid, a[2], "splice")
	case unix.SYS_FSETXATTR:
		tr.refuseFD(tid, a[0], "fsetxattr")
	case unix.SYS_SYMLINKAT:
		tr.refusePath(tid, a[1], a[2], "symlinkat")
	case unix.SYS_MKNODAT:
		tr.refusePath(tid, a[0], a[1], "mknodat")
	case unix.SYS_SETXATTR:
		tr.refusePath(tid, atCWD, a[0], "setxattr")
	case unix.SYS_IO_URING_SETUP:
		tr.refuse("io_uring")
	default:
		return tr.legacy(tid, i)
	}
	return nil
}

func (tr *Tracer) refuseFD(tid int, fd uint64, what string) {
	if _, ours := tr.fd(tid, fd); ours {
		tr.refuse("%s of a file below the root", what)
	}
}

func (tr *Tracer) refusePath(tid int, dirfd, path uint64, what string) {
	if p, ours := tr.path(tid, dirfd, path); ours {
		tr.refuse("%s of %s", what, p)
	}
}

func (tr *Tracer) open(tid int, dirfd, at, flags uint64) func(int64) {
	if flags&(unix.O_CREAT|unix.O_TRUNC) == 0 {
		return nil
	}
	path, ok := tr.path(tid, dirfd, at)
	if !ok {
		return nil
	}
	if flags&unix.O_TMPFILE == unix.O_TMPFILE {
		tr.refuse("O_TMPFILE in %s", path)
	}
	old, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return tr.create(path)
	case err == nil && flags&unix.O_TRUNC != 0 && flags&unix.O_EXCL == 0 && old.Size() > 0:
		id := tr.named(path)
		return func(int64) { tr.add(Op{Kind: Truncate, File: id}) }
	}
	return nil
}

func (tr *Tracer) create(path string) func(int64) {
	if _, err := os.Lstat(filepath.Dir(path)); err != nil {
		return nil // it will fail
	}
	dir := tr.named(filepath.Dir(path))
	return func(int64) {
		id, mode := tr.made(path)
		tr.add(Op{Kind: Create, File: id, Dir: dir, Name: filepath.Base(path), Mode: mode})
	}
}

func (tr *Tracer) mkdir(tid int, dirfd, at uint64) func(int64) {
	path, ok := tr.path(tid, dirfd, at)
	if _, err := os.Lstat(path); !ok || err == nil {
		return nil
	}
	return tr.create(path)
}

func (tr *Tracer) rename(tid int, fromFD, fromAt, toFD, toAt uint64) func(int64) {
	from, ok := tr.path(tid, fromFD, fromAt)
	to, ok2 := tr.path(tid, toFD, toAt)
	if !ok && !ok2 {
		return nil
	}
	if _, err := os.Lstat(from); err != nil {
		return nil // it will fail
	}
	if filepath.Dir(from) != filepath.Dir(to) {
		tr.refuse("a rename from %s to another directory, %s", from, to)
	}
	o := Op{Kind: Rename, File: tr.named(from), Dir: tr.named(filepath.Dir(from)), Name: filepath.Base(from), To: filepath.Base(to)}
	return func(int64) { tr.add(o) }
}

func (tr *Tracer) link(tid int, fromFD, fromAt, toFD, toAt uint64) func(int64) {
	from, ok := tr.path(tid, fromFD, fromAt)
	to, ok2 := tr.path(tid, toFD, toAt)
	if !ok2 {
		return nil
	}
	if !ok {
		tr.refuse("a link of %s, which is not below the root", from)
		return nil
	}
	o := Op{Kind: Create, File: tr.named(from), Dir: tr.named(filepath.Dir(to)), Name: filepath.Base(to)}
	return func(int64) { tr.add(o) }
}

func (tr *Tracer) unlink(tid int, dirfd, at uint64) func(int64) {
	path, ok := tr.path(tid, dirfd, at)
	if !ok {
		return nil
	}
	if _, err := os.Lstat(path); err != nil {
		return nil // it will fail
	}
	o := Op{Kind: Unlink, File: tr.named(path), Dir: tr.named(filepath.Dir(path)), Name: filepath.Base(path)}
	return func(int64) { tr.add(o) }
}

func (tr *Tracer) chmod(path string) func(int64) {
	id := tr.named(path)
	return func(int64) {
		if info, err := os.Lstat(path); err == nil {
			tr.add(Op{Kind: Chmod, File: id, Mode: info.Mode().Perm()})
		}
	}
}

func (tr *Tracer) write(tid int, i info) func(int64) {
	a := i.args
	if i.nr == unix.SYS_WRITE && a[0] == NoteFD && tr.isNotes(tid) {
		return func(n int64) {
			tr.add(Op{Kind: Note, Text: strings.TrimSuffix(string(tr.read(tid, a[1], int(n))), "\n")})
		}
	}
	id, ok := tr.fd(tid, a[0])
	if !ok {
		return nil
	}
	return func(n int64) {
		o := Op{Kind: Write, File: id, Off: int64(a[3])}
		if i.nr != unix.SYS_PWRITE64 {
			o.Off = tr.position(tid, a[0]) - n
		}
		if i.nr == unix.SYS_WRITEV {
			o.Data = tr.vector(tid, a[1], int(a[2]), int(n))
		} else {
			o.Data = tr.read(tid, a[1], int(n))
		}
		if n > 0 {
			tr.add(o)
		}
	}
}

// isNotes reports whether the descriptor of notes is what it was when the process began: those that it starts have another there.
func (tr *Tracer) isNotes(tid int) bool {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, NoteFD))
	return err == nil && path == os.DevNull
}

// copyRange records what a copy has written.
func (tr *Tracer) copyRange(tid int, a [6]uint64) func(int64) {
	id, ok := tr.fd(tid, a[2])
	if !ok {
		return nil
	}
	if a[3] != 0 {
		tr.refuse("copy_file_range to an offset")
	}
	return func(n int64) {
		if n == 0 {
			return
		}
		o := Op{Kind: Write, File: id, Off: tr.position(tid, a[2]) - n, Data: make([]byte, n)}
		f, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(a[2])))
		if err == nil {
			defer f.Close()
			_, err = f.ReadAt(o.Data, o.Off)
		}
		if err != nil {
			tr.refuse("reading what was copied: %v", err)
		}
		tr.add(o)
	}
}

// bind makes a socket with a name.
func (tr *Tracer) bind(tid int, at, size uint64) func(int64) {
	if size < 3 {
		return nil
	}
	b := tr.read(tid, at, 3)
	if binary.NativeEndian.Uint16(b) != unix.AF_UNIX || b[2] == 0 {
		return nil
	}
	path, ok := tr.path(tid, atCWD, at+2)
	if !ok {
		return nil
	}
	return tr.create(path)
}

// vector reads the first n bytes of an array of struct iovec.
func (tr *Tracer) vector(tid int, at uint64, count, n int) (b []byte) {
	raw := tr.read(tid, at, 16*count)
	for ; len(raw) > 0 && len(b) < n; raw = raw[16:] {
		size := int(binary.NativeEndian.Uint64(raw[8:]))
		b = append(b, tr.read(tid, binary.NativeEndian.Uint64(raw), min(size, n-len(b)))...)
	}
	return b
}

// position returns where the next write of a descriptor goes.
func (tr *Tracer) position(tid int, fd uint64) (pos int64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", tid, int32(fd)))
	if err == nil {
		_, err = fmt.Sscanf(string(b), "pos: %d", &pos)
	}
	if err != nil {
		tr.refuse("finding the position of a write: %v", err)
	}
	return pos
}

func (tr *Tracer) fallocate(tid int, a [6]uint64) func(int64) {
	id, ok := tr.fd(tid, a[0])
	if !ok {
		return nil
	}
	if a[1] != 0 {
		tr.refuse("fallocate with mode %#x", a[1])
	}
	return func(int64) {
		info, err := os.Stat(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(a[0])))
		if err != nil {
			tr.refuse("finding the size of a file: %v", err)
			return
		}
		tr.add(Op{Kind: Truncate, File: id, Size: info.Size()})
	}
}
