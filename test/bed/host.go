package bed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"warden/internal/testcluster"
)

// Host is one machine of the bed, with a place for one daemon.
type Host struct {
	Name, IP string
	// Log is the path of what the daemon prints.
	Log string

	b                *Bed
	ns               *namespace
	dir, state, sock string
	clock            *clock
	port             string // of the bridge, where the host is; guarded by b.mu, as is what follows
	isRelayed        bool   // it is not at the bridge itself, but at a relay
	hasOwnDisk       bool
	args, env        []string // of the daemon
	daemon           program
	engine           *engine // nil without one
}

// program is one that a host runs, and starts again.
type program struct {
	pid   int           // in the host
	ended chan struct{} // closed when it has ended; nil before its first start
}

// Option changes a host.
type Option func(*Host) error

// WithDisk puts the daemon's state on a disk of its own, of so many bytes, which Fill can fill.
func WithDisk(size int) Option {
	return func(h *Host) error {
		h.hasOwnDisk = true
		return h.ns.client.Call("Holder.Mount", Disk{Path: h.state, Bytes: size}, nil)
	}
}

// WithArgs gives the daemon more arguments; the last of a flag counts.
func WithArgs(args ...string) Option {
	return func(h *Host) error {
		h.args = append(h.args, args...)
		return nil
	}
}

// Host makes a host without a daemon that runs.
func (b *Bed) Host(name string, options ...Option) *Host {
	b.t.Helper()
	h, err := b.newHost(name, options)
	if err != nil {
		b.t.Fatalf("making host %s: %v", name, err)
	}
	return h
}

func (b *Bed) newHost(name string, options []Option) (*Host, error) {
	dir := filepath.Join(b.Dir, name)
	h := &Host{Name: name, b: b, dir: dir, Log: filepath.Join(dir, "log"), state: filepath.Join(dir, "state"), sock: filepath.Join(dir, "sock")}
	err := os.Mkdir(h.dir, 0o700)
	if err == nil {
		err = os.Mkdir(h.state, 0o700)
	}
	if err == nil {
		h.clock, err = newClock(filepath.Join(dir, "clock"))
	}
	if err != nil {
		return nil, err
	}
	if h.ns, err = newNamespace(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, h)
	n := len(b.all)
	if n > hostsMax {
		return nil, fmt.Errorf("more than %d hosts", hostsMax)
	}
	h.IP = fmt.Sprintf("10.66.0.%d", n)
	h.port = fmt.Sprintf("port%d", n)
	// The other end is born in the host: no moment in which it could be seen elsewhere.
	if _, err := b.wire.run(fmt.Sprintf("link add %s type veth peer name eth0 netns %d\nlink set %s master bridge0 up\n", h.port, h.ns.holder.Process.Pid, h.port),
		"ip", "-batch", "-"); err != nil {
		return nil, err
	}
	if _, err := h.ns.run(fmt.Sprintf("link set lo up\nlink set eth0 addrgenmode none\naddr add %s/24 dev eth0\nlink set eth0 up\n", h.IP), "ip", "-batch", "-"); err != nil {
		return nil, err
	}
	for _, o := range options {
		if err := o(h); err != nil {
			return nil, err
		}
	}
	b.note("host %s is %s", name, h.IP)
	return h, nil
}

// Hosts makes hosts with the same options and starts their daemons, all at once.
func (b *Bed) Hosts(names []string, options ...Option) []*Host {
	b.t.Helper()
	hosts := make([]*Host, len(names))
	b.parallel(len(names), func(i int) (err error) {
		if hosts[i], err = b.newHost(names[i], options); err != nil {
			return fmt.Errorf("making host %s: %w", names[i], err)
		}
		return hosts[i].start()
	})
	return hosts
}

// parallel calls f(0) to f(n-1) at once, and fails the test with their errors.
func (b *Bed) parallel(n int, f func(i int) error) {
	b.t.Helper()
	failed := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { failed[i] = f(i) })
	}
	wg.Wait()
	if err := errors.Join(failed...); err != nil {
		b.t.Fatal(err)
	}
}

// Cluster makes a cluster of managers m1, m2, … and workers w1, w2, …, all with the same options, and returns them when
// all are ready.
func (b *Bed) Cluster(managers, workers int, options ...Option) (m, w []*Host) {
	b.t.Helper()
	var names []string
	for i := range managers {
		names = append(names, fmt.Sprintf("m%d", i+1))
	}
	for i := range workers {
		names = append(names, fmt.Sprintf("w%d", i+1))
	}
	all := b.Hosts(names, options...)
	b.Form(all[:managers], all[managers:])
	return all[:managers], all[managers:]
}

// Form makes a cluster of hosts whose daemons run, and returns when all are ready.
func (b *Bed) Form(m, w []*Host) {
	b.t.Helper()
	m[0].Ctl("swarm", "init")
	manager, worker := m[0].Token("manager"), m[0].Token("worker")
	at := make([]*Host, len(m)+len(w))
	for i := range at {
		at[i] = m[b.Rand.IntN(len(m))]
	}
	b.parallel(len(m)-1, func(i int) error { return m[i+1].join(manager, m[0]) })
	b.parallel(len(w), func(i int) error { return w[i].join(worker, at[len(m)+i], m[0]) })
	b.AwaitReady(m[0], len(m)+len(w))
}

// AwaitReady waits until n nodes show as ready at h.
func (b *Bed) AwaitReady(at *Host, n int) {
	b.t.Helper()
	testcluster.Await(b.t, time.Minute, func() error {
		out, stderr, _ := at.Try("node", "ls", "--format", "{{.Hostname}} {{.Status}}")
		if got := strings.Count(out, " Ready"); got != n {
			return fmt.Errorf("%d nodes ready of %d:\n%s%s", got, n, out, stderr)
		}
		return nil
	})
}

// Address is where the daemon serves as a manager.
func (h *Host) Address() string { return h.IP + ":2377" }

// Start starts the daemon and waits until it answers.
func (h *Host) Start() {
	h.b.t.Helper()
	if err := h.start(); err != nil {
		h.b.t.Fatal(err)
	}
}

func (h *Host) start() error {
	if err := h.startOnly(); err != nil {
		return fmt.Errorf("starting the daemon of %s: %w", h.Name, err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for {
		_, stderr, code := h.Try("version")
		if code == 0 {
			return nil
		}
		select {
		case <-h.daemon.ended:
			log, _ := os.ReadFile(h.Log)
			return fmt.Errorf("the daemon of %s ended at its start:\n%s", h.Name, log[max(0, len(log)-2000):])
		case <-deadline:
			return fmt.Errorf("the daemon of %s does not answer: %s", h.Name, stderr)
		case <-tick.C:
		}
	}
}

// StartOnly starts the daemon and waits for nothing.
func (h *Host) StartOnly() {
	h.b.t.Helper()
	if err := h.startOnly(); err != nil {
		h.b.t.Fatalf("starting the daemon of %s: %v", h.Name, err)
	}
}

func (h *Host) startOnly() error {
	if h.isRunning() {
		return errors.New("it runs")
	}
	argv := append([]string{"warden", "run", "--state-dir", h.state, "--socket", h.sock, "--listen", h.Address(), "--hostname", h.Name,
		"--log-level", "debug", "--executor", "process"}, h.args...)
	if h.engine != nil && h.engine.ended == nil {
		if err := h.startEngine(); err != nil {
			return err
		}
	}
	return h.daemon.start(h, "the daemon", Program{Path: filepath.Join(h.b.bin, "warden"), Argv: argv, Env: append(h.env, h.clock.env()), Log: h.Log})
}

func (h *Host) isRunning() bool { return h.daemon.isRunning() }

// start starts the program; what says which.
func (p *program) start(h *Host, what string, how Program) error {
	h.b.note("start %s: %s", h.Name, what)
	if err := h.ns.client.Call("Holder.Start", how, &p.pid); err != nil {
		return err
	}
	ended, pid := make(chan struct{}), p.pid
	p.ended = ended
	go func() { // ends with the program, or its host
		var status syscall.WaitStatus
		if err := h.ns.client.Call("Holder.Wait", pid, &status); err == nil {
			h.b.note("%s of %s ended: status %#x", what, h.Name, int(status))
		}
		close(ended)
	}()
	return nil
}

func (p *program) isRunning() bool {
	if p.ended == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

func (p *program) signal(h *Host, what string, s syscall.Signal) {
	h.b.t.Helper()
	h.b.note("%s to %s of %s", s, what, h.Name)
	if err := h.ns.client.Call("Holder.Kill", Signal{PID: p.pid, Signal: s}, nil); err != nil {
		h.b.t.Errorf("%s to %s of %s: %v", s, what, h.Name, err)
	}
}

func (p *program) end(h *Host, what string, s syscall.Signal) {
	h.b.t.Helper()
	p.signal(h, what, s)
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		h.b.t.Fatalf("%s of %s does not end after %s", what, h.Name, s)
	}
}

// Ended is closed when the daemon's process has ended.
func (h *Host) Ended() <-chan struct{} { return h.daemon.ended }

// Kill ends the daemon by SIGKILL and waits. Its tasks go on.
func (h *Host) Kill() { h.b.t.Helper(); h.end(syscall.SIGKILL) }

// Stop ends the daemon by SIGTERM and waits. Its tasks go on.
func (h *Host) Stop() { h.b.t.Helper(); h.end(syscall.SIGTERM) }

// Pause stops the daemon until Resume, by SIGSTOP, and waits until it has stopped: the kernel still takes connections for it. Its
// tasks go on. Pausing a paused one is no error.
func (h *Host) Pause() { h.b.t.Helper(); h.signal(syscall.SIGSTOP) }

// Resume lets a paused daemon go on.
func (h *Host) Resume() { h.b.t.Helper(); h.signal(syscall.SIGCONT) }

func (h *Host) signal(s syscall.Signal) { h.b.t.Helper(); h.daemon.signal(h, "the daemon", s) }

func (h *Host) end(s syscall.Signal) { h.b.t.Helper(); h.daemon.end(h, "the daemon", s) }

// Run runs a program in the host, and returns what it printed. Errors: it cannot be started, or ended with another status
// than 0.
func (h *Host) Run(argv ...string) (string, error) { return h.ns.run("", argv...) }

// Root returns the path, from outside, of the host's root directory: its disk and its /proc show nowhere else.
func (h *Host) Root() string { return fmt.Sprintf("/proc/%d/root", h.ns.holder.Process.Pid) }

// State returns the path, from outside, of the daemon's state directory.
func (h *Host) State() string { return filepath.Join(h.Root(), h.state) }

// Ctl runs wardenctl against the daemon and returns what it printed; any error ends the test.
func (h *Host) Ctl(args ...string) string {
	h.b.t.Helper()
	out, stderr, code := h.Try(args...)
	if code != 0 {
		h.b.t.Fatalf("%s: wardenctl %s = exit %d\n%s%s", h.Name, strings.Join(args, " "), code, out, stderr)
	}
	return out
}

// Try runs wardenctl against the daemon and returns all of it. Any goroutine may call it.
func (h *Host) Try(args ...string) (stdout, stderr string, code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(h.b.bin, "wardenctl"), append([]string{"--host", "unix://" + h.sock}, args...)...)
	var out, errs bytes.Buffer
	cmd.Env = append(os.Environ(), h.clock.env())
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Sprintf("%s(%v)\n", errs.String(), err), cmd.ProcessState.ExitCode()
	}
	return out.String(), errs.String(), 0
}

// Token mints a join token.
func (h *Host) Token(args ...string) string {
	h.b.t.Helper()
	return strings.TrimSpace(h.Ctl(append([]string{"swarm", "join-token", "-q"}, args...)...))
}

// Join lets h join at the others with a token.
func (h *Host) Join(token string, at ...*Host) {
	h.b.t.Helper()
	if err := h.join(token, at...); err != nil {
		h.b.t.Fatal(err)
	}
}

func (h *Host) join(token string, at ...*Host) error {
	args := []string{"swarm", "join", "--token", token}
	for _, a := range at {
		args = append(args, a.Address())
	}
	if _, stderr, code := h.Try(args...); code != 0 {
		return fmt.Errorf("%s: swarm join = exit %d\n%s", h.Name, code, stderr)
	}
	return nil
}
