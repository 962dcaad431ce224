// Package powerloss attacks what writes files: it traces a process, records every call that changes a file below one
// directory, ends the process by SIGKILL after any of them, and from the record makes the trees that a loss of power could
// leave behind. A test opens each with the product's own code.
//
// The model of a disk is stricter than any one file system, and follows what fsync(2) promises and nothing more:
//
//   - The content, size and mode of a file are durable after fsync of the file, content and size after fdatasync. A name in a
//     directory (made, removed, renamed) is durable after fsync of that directory: neither the fsync of the file nor that of a
//     directory above makes it so.
//   - What is not durable may be there or not, each piece for itself and in any order: data without its name, a name without
//     its data, a later name without an earlier one. Of a write each page of 4 KiB of the file is a piece, and of one page
//     some sectors of 512 bytes may be there alone. A file may have grown and hold zeros where its data is missing.
//   - A rename is one step: both of its names change, or neither. An fsync that was acknowledged keeps its word; a sector is
//     whole. Lost data is zeros or what was there before, never what another file held.
//
// A second folder below the root can be another machine's disk (Trace.Beside), of which nothing is lost.
//
// It deliberately does not simulate disks that lie about a flush, and knows neither symlinks, extended attributes, renames
// between directories nor files that are mapped for writing: a trace that has one is an error.
//
// References: fsync(2), rename(2); Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), for what file
// systems do with what is not synced.
package powerloss

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Kind says what an operation does.
type Kind int

// Kinds of operations.
const (
	Create   Kind = iota // File gets the name Name in Dir; new, of Mode; or one more name, if it is known already
	Unlink               // Name in Dir, which was File's, goes
	Rename               // Name in Dir, which was File's, becomes To, which may have been another's
	Write                // Data at Off of File
	Truncate             // File gets Size
	Chmod                // File gets Mode
	Sync                 // fsync of File, which may be a directory
	DataSync             // fdatasync of File
	SyncAll              // sync or syncfs
	Note                 // the process says Text to the tracer
)

var kindNames = [...]string{"create", "unlink", "rename", "write", "truncate", "chmod", "fsync", "fdatasync", "sync", "note"}

// Op is one operation that has been done. Files and directories are numbered; 0 is the root of the record.
type Op struct {
	Kind     Kind
	File     int
	Dir      int
	Name, To string
	Off      int64
	Data     []byte
	Size     int64
	Mode     fs.FileMode // permissions, and fs.ModeDir of a directory
	Text     string
}

// String returns the operation without its data.
func (o Op) String() string {
	switch s := kindNames[o.Kind]; o.Kind {
	case Create:
		return fmt.Sprintf("%s %s in %d = %d %v", s, o.Name, o.Dir, o.File, o.Mode)
	case Unlink:
		return fmt.Sprintf("%s %s in %d", s, o.Name, o.Dir)
	case Rename:
		return fmt.Sprintf("%s %s to %s in %d", s, o.Name, o.To, o.Dir)
	case Write:
		return fmt.Sprintf("%s %d bytes at %d of %d", s, len(o.Data), o.Off, o.File)
	case Truncate:
		return fmt.Sprintf("%s %d to %d", s, o.File, o.Size)
	case Chmod:
		return fmt.Sprintf("%s %d %v", s, o.File, o.Mode)
	case Note:
		return fmt.Sprintf("%s %q", s, o.Text)
	default:
		return fmt.Sprintf("%s %d", s, o.File)
	}
}

// Record is what was on a disk at first, all of it durable, and what was done to it since.
type Record struct {
	Ops    []Op
	start  []*node
	beside map[int]bool // files and directories of which nothing is lost
}

// isBeside reports whether an operation is on what is never lost.
func (r *Record) isBeside(o Op) bool {
	switch o.Kind {
	case Create, Unlink, Rename:
		return r.beside[o.Dir]
	case Note, SyncAll:
		return false
	default:
		return r.beside[o.File]
	}
}

// Own returns the operations that a loss of power may take back, and the notes.
func (r *Record) Own() []Op {
	return slices.DeleteFunc(slices.Clone(r.Ops), r.isBeside)
}

// Notes returns what the process said in the first n operations, in order.
func (r *Record) Notes(n int) (notes []string) {
	for _, o := range r.Ops[:n] {
		if o.Kind == Note {
			notes = append(notes, o.Text)
		}
	}
	return notes
}

// node is a file or a directory.
type node struct {
	mode  fs.FileMode
	data  []byte
	names map[string]int // of a directory

	isShared bool   // among disks: nobody changes it
	sum      []byte // of data; nil: not known
}

// File is one entry of a Tree.
type File struct {
	Mode fs.FileMode
	Data []byte
}

// Tree is what is below a directory, by path; "." is the directory itself.
type Tree map[string]File

// modeBits are what is known of a mode.
const modeBits = fs.ModePerm | fs.ModeDir | fs.ModeSocket

// ReadTree reads what is below dir. Errors: for what is neither a file, a directory nor a socket.
func ReadTree(dir string) (Tree, error) {
	t := Tree{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f := File{Mode: info.Mode() & modeBits}
		switch {
		case info.Mode().IsRegular():
			f.Data, err = os.ReadFile(path)
		case info.Mode()&^modeBits != 0:
			return fmt.Errorf("%s is neither a file, a directory nor a socket", path)
		}
		rel, rerr := filepath.Rel(dir, path)
		t[rel] = f
		return errors.Join(err, rerr)
	})
	return t, err
}

// WriteTree puts t into dir, which must not exist.
func (t Tree) WriteTree(dir string) error {
	for _, path := range t.paths() { // a directory comes before what it holds
		at, f := filepath.Join(dir, path), t[path]
		var err error
		switch f.Mode.Type() {
		case fs.ModeDir:
			err = os.Mkdir(at, 0o700)
		case fs.ModeSocket: // nobody listens
			err = syscall.Mknod(at, syscall.S_IFSOCK|0o600, 0)
		default:
			err = os.WriteFile(at, f.Data, 0o600)
		}
		if err = errors.Join(err, os.Chmod(at, f.Mode.Perm())); err != nil {
			return err
		}
	}
	return nil
}

func (t Tree) paths() []string {
	paths := make([]string, 0, len(t))
	for path := range t {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths
}

// Diff says how t and o differ, "" if they don't.
func (t Tree) Diff(o Tree) string {
	for _, path := range t.paths() {
		f, ok := o[path]
		switch {
		case !ok:
			return path + " is missing"
		case f.Mode != t[path].Mode:
			return fmt.Sprintf("%s has mode %v, want %v", path, f.Mode, t[path].Mode)
		case !slices.Equal(f.Data, t[path].Data):
			return fmt.Sprintf("%s differs, %d bytes and %d", path, len(f.Data), len(t[path].Data))
		}
	}
	for _, path := range o.paths() {
		if _, ok := t[path]; !ok {
			return path + " is too much"
		}
	}
	return ""
}

// ident is a file as the kernel knows it.
type ident struct{ dev, ino uint64 }

func identOf(s *syscall.Stat_t) ident { return ident{uint64(s.Dev), s.Ino} }

// newRecord numbers what is below root. beside is a folder of which nothing is lost, or "".
func newRecord(root, beside string) (*Record, map[ident]int, error) {
	r, ids := &Record{beside: map[int]bool{}}, map[ident]int{}
	at := map[string]int{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		id, n := len(r.start), &node{mode: info.Mode() & modeBits, names: map[string]int{}}
		if info.Mode().IsRegular() {
			n.data, err = os.ReadFile(path)
		}
		r.start = append(r.start, n)
		r.beside[id] = isBelow(path, beside)
		at[path] = id
		if id > 0 {
			r.start[at[filepath.Dir(path)]].names[filepath.Base(path)] = id
		}
		ids[identOf(info.Sys().(*syscall.Stat_t))] = id
		return err
	})
	return r, ids, err
}

// isBelow reports whether an absolute path is dir or below it; nothing is below "".
func isBelow(path, dir string) bool {
	return dir != "" && (path == dir || strings.HasPrefix(path, dir+"/"))
}
