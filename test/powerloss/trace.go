package powerloss

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// NoteFD is the file descriptor that a traced process writes its notes to.
const NoteFD = 3

// Trace is a process to be traced.
type Trace struct {
	Argv, Env []string
	Root      string        // what is recorded: the directory and all below it, which must be absolute and free of symlinks
	KillAt    int           // after so many operations the process that did the last one is killed; 0: none
	Limit     time.Duration // it is killed after this long
	// IsShared says that other processes write below the root too: what is not known is numbered when it is met, and the record does not
	// tell what is on the disk.
	IsShared bool
	// IsOwnNetwork gives the process a network of its own, in which nothing is up. It needs root.
	IsOwnNetwork bool
	// Beside is a folder below the root that is another machine's disk, or "": what is done there is recorded and never lost.
	Beside string
	// IsFollowed says that the processes which it starts are recorded with it; when it ends they are killed, and it alone may write notes.
	IsFollowed bool
	After      *Tracer // nil, or an earlier process on the same tree, whose record goes on
}

// Tracer is a process that is traced, or was.
type Tracer struct {
	Record *Record
	First  int  // operation of the record that is the process's first
	Killed bool // by KillAt, and not one that it started
	Said   []byte

	t      Trace
	ids    map[ident]int
	mu     sync.Mutex // guards Record.Ops
	pid    int
	err    error
	inside map[int]func(result int64) // threads in a system call that changes something; at most one
	held   []int                      // threads that are about to enter one
	seen   map[int]bool               // threads that have been stopped and are not gone
	ended  bool                       // the process has: what it started does nothing more
}

// Run runs the process to its end. Below the root its threads do one operation at a time, so that the record has their order. It
// returns when nothing of the process is left. Errors: of the process, unless it was killed by KillAt; a call that changes
// files in a way that the model does not know.
func (t Trace) Run() (*Tracer, error) {
	tr := &Tracer{t: t, inside: map[int]func(int64){}, seen: map[int]bool{}}
	if t.After != nil {
		last := t.After.Record
		tr.Record, tr.ids = &Record{Ops: slices.Clone(last.Ops), start: last.start, beside: last.beside}, t.After.ids
	} else {
		var err error
		if tr.Record, tr.ids, err = newRecord(t.Root, t.Beside); err != nil {
			return nil, err
		}
	}
	tr.First = len(tr.Record.Ops)
	failed := make(chan error, 1)
	onThread(func() { failed <- tr.run() })
	return tr, <-failed
}

// onThread calls f in a goroutine, on a thread of its own that has no children and ends with f: all of ptrace is one thread's, and what it
// waits for is its children. It is not the main thread, which never ends and inherits the children of others.
func onThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if b, _ := os.ReadFile("/proc/thread-self/children"); len(b) > 0 || unix.Gettid() == unix.Getpid() {
			other := make(chan struct{})
			onThread(func() { close(other); f() })
			<-other // another one, as this is held until then
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
}

// Note adds a note as if the process had said it. For what another process was told.
func (tr *Tracer) Note(text string) { tr.add(Op{Kind: Note, Text: text}) }

func (tr *Tracer) add(o Op) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.Record.Ops = append(tr.Record.Ops, o)
}

const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL

func (tr *Tracer) run() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	said, err := os.CreateTemp("", "said-")
	if err != nil {
		return err
	}
	defer said.Close()
	defer os.Remove(said.Name())
	attr := &syscall.SysProcAttr{Ptrace: true, Setpgid: true}
	if tr.t.IsOwnNetwork {
		attr.Cloneflags = syscall.CLONE_NEWNET
	}
	tr.pid, err = syscall.ForkExec(tr.t.Argv[0], tr.t.Argv, &syscall.ProcAttr{Env: tr.t.Env, Sys: attr,
		Files: []uintptr{null.Fd(), said.Fd(), said.Fd(), null.Fd()}})
	if err != nil {
		return err
	}
	limit := time.AfterFunc(tr.t.Limit, func() { _ = syscall.Kill(tr.pid, syscall.SIGKILL) })
	status, err := tr.loop()
	late := !limit.Stop()
	tr.Said, _ = os.ReadFile(said.Name())
	switch {
	case tr.err != nil:
		return tr.err
	case err != nil:
		return err
	case tr.Killed && status.Signaled():
		return nil
	case late:
		return fmt.Errorf("the process took more than %s:\n%s", tr.t.Limit, tr.Said)
	case !status.Exited() || status.ExitStatus() != 0:
		return fmt.Errorf("the process ended with %#x:\n%s", status, tr.Said)
	}
	return nil
}

// loop serves the threads until the last one is gone. It returns how the process ended.
func (tr *Tracer) loop() (end unix.WaitStatus, err error) {
	var ws unix.WaitStatus
	if _, err := unix.Wait4(tr.pid, &ws, unix.WALL, nil); err != nil {
		return 0, err
	}
	tr.seen[tr.pid] = true
	set := options
	if tr.t.IsFollowed {
		set |= unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK
	}
	if err := unix.PtraceSetOptions(tr.pid, set); err != nil {
		return 0, err
	}
	tr.resume(tr.pid, 0)
	for {
		tid, err := unix.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return end, nil
		case err != nil:
			return 0, err
		case ws.Exited() || ws.Signaled():
			delete(tr.seen, tid)
			if tid == tr.pid {
				end, tr.ended = ws, true
			}
			delete(tr.inside, tid)
			tr.release()
		case ws.Stopped():
			tr.stopped(tid, ws)
		}
	}
}

// stopped handles one stop of a thread.
func (tr *Tracer) stopped(tid int, ws unix.WaitStatus) {
	first := !tr.seen[tid]
	tr.seen[tid] = true
	if tr.ended && first {
		_ = unix.Kill(tid, unix.SIGKILL)
	}
	switch sig := ws.StopSignal(); {
	case sig == unix.SIGTRAP|0x80:
		tr.syscall(tid)
	case sig == unix.SIGTRAP: // a clone, a fork, or an exec
		tr.resume(tid, 0)
	case sig == unix.SIGSTOP && first:
		tr.resume(tid, 0)
	default:
		tr.resume(tid, int(sig))
	}
}

// resume lets a thread go on to its next system call, or the end of this one. One that is dying cannot.
func (tr *Tracer) resume(tid, sig int) { _ = unix.PtraceSyscall(tid, sig) }

// syscall handles the entry to a system call, or the exit from one.
func (tr *Tracer) syscall(tid int) {
	info, err := syscallInfo(tid)
	if err != nil {
		return // it is dying
	}
	switch {
	case info.op == syscallEntry && tr.err == nil:
		done := tr.decode(tid, info)
		switch {
		case done == nil:
			tr.resume(tid, 0)
		case len(tr.inside) > 0 || tr.Killed || tr.ended:
			tr.held = append(tr.held, tid)
		default:
			tr.inside[tid] = done
			tr.resume(tid, 0)
		}
	case info.op == syscallExit && tr.inside[tid] != nil:
		n := len(tr.Record.Ops)
		if result := int64(info.args[0]); result >= 0 {
			tr.inside[tid](result)
		}
		delete(tr.inside, tid)
		if at := tr.t.KillAt; at > 0 && len(tr.Record.Ops) > n && len(tr.Record.Ops)-tr.First == at || tr.err != nil {
			if tr.err == nil && !tr.isOwn(tid) {
				_ = unix.Kill(tid, unix.SIGKILL) // all of its process
				tr.release()
				return
			}
			tr.Killed = true
			_ = unix.Kill(tr.pid, unix.SIGKILL)
			return
		}
		tr.release()
		tr.resume(tid, 0)
	default:
		tr.resume(tid, 0)
	}
}

// isOwn reports whether the thread is one of the process that was started, not of one that this has started.
func (tr *Tracer) isOwn(tid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", tr.pid, tid))
	return err == nil
}

// release lets the next thread that waits in. After the end of the process none waits: all are killed, once what one has begun is done.
func (tr *Tracer) release() {
	if tr.ended && len(tr.inside) == 0 {
		for tid := range tr.seen {
			_ = unix.Kill(tid, unix.SIGKILL)
		}
		return
	}
	for len(tr.inside) == 0 && len(tr.held) > 0 && !tr.Killed {
		tid := tr.held[0]
		tr.held = tr.held[1:]
		info, err := syscallInfo(tid)
		if err != nil {
			continue
		}
		if done := tr.decode(tid, info); done != nil { // anew: the files have changed
			tr.inside[tid] = done
		}
		tr.resume(tid, 0)
	}
}

const (
	syscallEntry = 1
	syscallExit  = 2
)

// info is struct ptrace_syscall_info of ptrace(2).
type info struct {
	op     uint8
	_      [3]uint8
	arch   uint32
	ip, sp uint64
	nr     uint64 // on exit: the result
	args   [6]uint64
}

func syscallInfo(tid int) (info, error) {
	var i info
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(i), uintptr(unsafe.Pointer(&i)), 0, 0)
	if e != 0 {
		return i, e
	}
	if i.op == syscallExit {
		i.args[0], i.nr = i.nr, 0
	}
	return i, nil
}

// read reads the memory of the process.
func (tr *Tracer) read(tid int, at uint64, n int) []byte {
	b := make([]byte, n)
	if n == 0 {
		return b
	}
	local := []unix.Iovec{{Base: &b[0], Len: uint64(n)}}
	got, err := unix.ProcessVMReadv(tid, local, []unix.RemoteIovec{{Base: uintptr(at), Len: n}}, 0)
	if err != nil || got != n {
		tr.refuse("reading %d bytes of the process: %d, %v", n, got, err)
	}
	return b
}

// text reads a string that ends with a zero.
func (tr *Tracer) text(tid int, at uint64) string {
	var b []byte
	for len(b) < unix.PathMax {
		part := tr.read(tid, at, int(256-at%256)) // never across a page
		if i := bytes.IndexByte(part, 0); i >= 0 || tr.err != nil {
			return string(append(b, part[:max(i, 0)]...))
		}
		b, at = append(b, part...), at+uint64(len(part))
	}
	return string(b)
}

// refuse ends the trace: the process does what the model does not know.
func (tr *Tracer) refuse(format string, args ...any) {
	if tr.err == nil {
		tr.err = fmt.Errorf("tracing: "+format, args...)
	}
}

// path returns the absolute path that a system call names, and whether it is below the root, or the root.
func (tr *Tracer) path(tid int, dirfd, at uint64) (string, bool) {
	path := tr.text(tid, at)
	if !filepath.IsAbs(path) {
		base := fmt.Sprintf("/proc/%d/cwd", tid)
		if int32(dirfd) != unix.AT_FDCWD {
			base = fmt.Sprintf("/proc/%d/fd/%d", tid, int32(dirfd))
		}
		dir, err := os.Readlink(base)
		if err != nil {
			return path, false
		}
		path = filepath.Join(dir, path)
	}
	path = filepath.Clean(path)
	if rest, ok := strings.CutPrefix(path, "/proc/self/fd/"); ok {
		fd, name, _ := strings.Cut(rest, "/")
		if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", tid, fd)); err == nil {
			path = filepath.Join(dir, name)
		}
	}
	return path, tr.below(path)
}

func (tr *Tracer) below(path string) bool { return isBelow(path, tr.t.Root) }

// fd returns the file of a descriptor, if it is below the root.
func (tr *Tracer) fd(tid int, fd uint64) (id int, ok bool) {
	link := fmt.Sprintf("/proc/%d/fd/%d", tid, int32(fd))
	path, err := os.Readlink(link)
	if err != nil || !tr.below(path) {
		return 0, false
	}
	return tr.lookup(os.Stat(link))
}

func (tr *Tracer) lookup(info os.FileInfo, err error) (id int, ok bool) {
	if err != nil {
		return 0, false
	}
	id, ok = tr.ids[identOf(info.Sys().(*syscall.Stat_t))]
	return id, ok
}

// named returns the number of what has the path.
func (tr *Tracer) named(path string) int {
	id, ok := tr.lookup(os.Lstat(path))
	switch {
	case ok:
	case tr.t.IsShared:
		id, _ = tr.made(path)
	default:
		tr.refuse("%s is not known", path)
	}
	return id
}

// made numbers what was just made.
func (tr *Tracer) made(path string) (id int, mode os.FileMode) {
	info, err := os.Lstat(path)
	if err != nil {
		tr.refuse("looking at what was made: %v", err)
		return 0, 0
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	id = len(tr.Record.start)
	for _, o := range tr.Record.Ops {
		id = max(id, o.File+1)
	}
	tr.ids[identOf(info.Sys().(*syscall.Stat_t))] = id
	tr.Record.beside[id] = isBelow(path, tr.t.Beside)
	return id, info.Mode() & modeBits
}
