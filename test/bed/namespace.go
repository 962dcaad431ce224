package bed

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// argv0 is how the process that holds a namespace is called.
const argv0 = "warden-bed-host"

// isMainCalled is set by Main before any test runs.
var isMainCalled bool

// Main belongs first in TestMain: in a process that is to hold a namespace it does that, and does not return.
func Main() {
	isMainCalled = true
	if os.Args[0] != argv0 {
		return
	}
	if err := hold(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// namespace is one set of namespaces, held by a process that is this very binary and does in them what it is asked.
type namespace struct {
	holder *exec.Cmd
	client *rpc.Client
}

// newNamespace makes the kinds of namespaces that flags say.
func newNamespace(flags uintptr) (*namespace, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "holder's end")
	defer theirs.Close()
	own := os.NewFile(uintptr(pair[0]), "own end")
	conn, err := net.FileConn(own)
	own.Close()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{argv0}
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // else all that is built with -race ends a second late
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Setsid: true}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	n := &namespace{holder: cmd, client: rpc.NewClient(conn)}
	if flags&unix.CLONE_NEWNS != 0 {
		err = n.client.Call("Holder.OwnMounts", 0, nil)
	}
	if err != nil {
		n.end()
		return nil, err
	}
	return n, nil
}

// end ends the namespaces, and returns when all that ran in them has ended: the kernel kills what is left in a process
// namespace before it lets its process 1 be waited for.
func (n *namespace) end() {
	_ = n.holder.Process.Kill()
	_ = n.holder.Wait()
	n.client.Close()
}

// run runs a program in the namespaces and returns what it printed, on both of its outputs.
func (n *namespace) run(stdin string, argv ...string) (string, error) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return "", err
	}
	var r Ran
	if err := n.client.Call("Holder.Run", Program{Path: path, Argv: argv, Stdin: stdin}, &r); err != nil {
		return "", err
	}
	if r.Status != 0 {
		return r.Output, fmt.Errorf("%s: status %#x: %s", strings.Join(argv, " "), int(r.Status), strings.TrimSpace(r.Output))
	}
	return r.Output, nil
}

// What follows runs in the holder.

// Holder is what a holder can be asked to do: its methods are called by net/rpc, each in a goroutine of its own.
type Holder struct {
	mu     sync.Mutex // guards what follows; held from fork to entry, so that the end of each child finds its entry
	ends   map[int]chan syscall.WaitStatus
	relays map[string]*relay
}

// Program is what to run, with Env besides the holder's. Without a Log its outputs come back.
type Program struct {
	Path       string
	Argv, Env  []string
	Stdin, Log string
}

// Ran is how a program ended.
type Ran struct {
	Output string
	Status syscall.WaitStatus
}

// Signal is what to send to whom.
type Signal struct {
	PID    int
	Signal syscall.Signal
}

// Disk is a tmpfs of Bytes at Path, which is made if need be where Make says so.
type Disk struct {
	Path  string
	Bytes int
	Make  bool
}

// hold serves until the test process has ended or closes.
func hold() error {
	f := os.NewFile(3, "test process")
	conn, err := net.FileConn(f)
	if err != nil {
		return err
	}
	f.Close()
	h := &Holder{ends: map[int]chan syscall.WaitStatus{}, relays: map[string]*relay{}}
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	go func() { // ends with the process
		for range children {
			h.reap()
		}
	}()
	server := rpc.NewServer()
	if err := server.Register(h); err != nil {
		return err
	}
	server.ServeConn(leash{conn})
	return nil
}

// leash ends the process when nobody is at the other end any more: ServeConn would wait for calls that are under way first.
type leash struct{ net.Conn }

func (l leash) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	if err != nil {
		os.Exit(0)
	}
	return n, err
}

// reap waits for all children that have ended: those that were asked for, and, for process 1, orphans.
func (h *Holder) reap() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if end, ok := h.ends[pid]; ok {
			end <- status
		}
	}
}

// start forks with three files.
func (h *Holder) start(p Program, files ...*os.File) (int, error) {
	attr := &syscall.ProcAttr{Env: append(os.Environ(), p.Env...), Sys: &syscall.SysProcAttr{Setsid: true}}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	pid, err := syscall.ForkExec(p.Path, p.Argv, attr)
	if err != nil {
		return 0, fmt.Errorf("starting %s: %w", p.Path, err)
	}
	h.ends[pid] = make(chan syscall.WaitStatus, 1)
	return pid, nil
}

// OwnMounts makes the mounts the host's own, with a /proc of its processes.
func (h *Holder) OwnMounts(int, *int) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	return nil
}

// Mount mounts a disk.
func (h *Holder) Mount(d Disk, _ *int) error {
	if d.Make {
		if err := os.MkdirAll(d.Path, 0o700); err != nil {
			return err
		}
	}
	if err := unix.Mount("disk", d.Path, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", d.Bytes)); err != nil {
		return fmt.Errorf("mounting %s: %w", d.Path, err)
	}
	return nil
}

// Run runs a program and waits for it.
func (h *Holder) Run(p Program, r *Ran) error {
	in, feed, err := os.Pipe()
	if err != nil {
		return err
	}
	output, out, err := os.Pipe()
	if err != nil {
		in.Close()
		feed.Close()
		return err
	}
	defer output.Close()
	go func() { // ends when the program has read it, or ends
		_, _ = io.WriteString(feed, p.Stdin)
		feed.Close()
	}()
	pid, err := h.start(p, in, out, out)
	in.Close()
	out.Close()
	if err != nil {
		return err
	}
	b, err := io.ReadAll(output)
	r.Output = string(b)
	return errors.Join(err, h.Wait(pid, &r.Status))
}

// Start starts a program that writes to its Log, and returns its process ID in the namespace.
func (h *Holder) Start(p Program, pid *int) error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	*pid, err = h.start(p, null, log, log)
	return err
}

// Wait waits for a program that was started. It is asked once.
func (h *Holder) Wait(pid int, status *syscall.WaitStatus) error {
	h.mu.Lock()
	end, ok := h.ends[pid]
	h.mu.Unlock()
	if !ok {
		return fmt.Errorf("no program %d", pid)
	}
	*status = <-end
	h.mu.Lock()
	delete(h.ends, pid)
	h.mu.Unlock()
	return nil
}

// Kill signals a program that was started and has not been waited for. It returns after SIGSTOP when all threads have stopped: until one of
// them has taken the signal, which on a busy machine takes a while, they all go on.
func (h *Holder) Kill(s Signal, _ *int) error {
	h.mu.Lock() // so that the ID stays the program's
	defer h.mu.Unlock()
	if _, ok := h.ends[s.PID]; !ok {
		return fmt.Errorf("no program %d", s.PID)
	}
	if err := syscall.Kill(s.PID, s.Signal); err != nil || s.Signal != syscall.SIGSTOP {
		return err
	}
	for {
		// Not to be told once only (WNOWAIT), so that a program can be stopped again; ECHILD if it has ended.
		if err := unix.Waitid(unix.P_PID, s.PID, nil, unix.WSTOPPED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
