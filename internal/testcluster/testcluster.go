// Package testcluster runs real daemons for tests: each host is a process of its own with its own state directory, socket
// and loopback address, driven through the real wardenctl. Nothing in it is faked.
//
// The binaries come from WARDEN_TEST_BIN, which `make test` sets to the test build; without it they are built once.
package testcluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var (
	buildOnce sync.Once
	buildDir  string
	buildErr  error
	hosts     atomic.Int32
)

// Bin returns the folder with warden and wardenctl, of the test build.
func Bin(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv("WARDEN_TEST_BIN"); dir != "" {
		return dir
	}
	buildOnce.Do(func() {
		if buildDir, buildErr = os.MkdirTemp("", "warden-bin-"); buildErr != nil {
			return
		}
		mod, err := exec.Command("go", "env", "GOMOD").Output()
		if err != nil {
			buildErr = err
			return
		}
		cmd := exec.Command("make", "-C", filepath.Dir(strings.TrimSpace(string(mod))), "TEST_BIN="+buildDir, "bin/test/warden")
		if out, err := cmd.CombinedOutput(); err != nil {
			buildErr = fmt.Errorf("building: %v\n%s", err, out)
		}
	})
	if buildErr != nil {
		t.Fatal(buildErr)
	}
	return buildDir
}

// Root skips the test where it can't run: tasks need root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: tasks run in namespaces of their own")
	}
}

// Canary is what tests plant in secrets. At the end of each test everything that any command printed, any daemon logged and
// any state directory holds is searched for it (I10).
const Canary = "canary-7f3a9e51c2"

// Cluster is a set of hosts that end with the test.
type Cluster struct {
	t   testing.TB
	Dir string
	mu  sync.Mutex // guards all and said
	all []*Host
	// said is all that any command or daemon printed, for the search for canaries.
	said bytes.Buffer
}

// New returns a cluster without hosts.
func New(t testing.TB) *Cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "warden-test-") // short: paths of sockets are bounded
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{t: t, Dir: dir}
	t.Cleanup(func() {
		c.searchCanary()
		if t.Failed() {
			for _, h := range c.all {
				t.Logf("log of %s:\n%s", h.Name, tail(h.LogPath, 60))
			}
		}
		for _, h := range c.all {
			h.end()
		}
		os.RemoveAll(dir)
	})
	return c
}

// Host is one daemon's place: it may run or not.
type Host struct {
	c                                   *Cluster
	Name, Address, State, Sock, LogPath string
	Args                                []string
	cmd                                 *exec.Cmd
	exited                              chan struct{}
}

// Address returns an address on loopback, of an IP that this process gives to nobody else, so that no connection that anybody makes can
// take the port while a daemon is stopped, as it can where the IP is 127.0.0.1 and the port one that was free a moment ago.
func Address(port int) string {
	return fmt.Sprintf("127.%d.%d.%d:%d", 1+os.Getpid()/250%250, 1+os.Getpid()%250, 1+hosts.Add(1)%250, port)
}

// Host starts a daemon with an address of its own and waits for its socket. args go to `warden run`.
func (c *Cluster) Host(name string, args ...string) *Host {
	c.t.Helper()
	base := filepath.Join(c.Dir, name)
	if err := os.MkdirAll(base, 0o700); err != nil {
		c.t.Fatal(err)
	}
	h := &Host{
		c: c, Name: name, Address: Address(2377),
		State: filepath.Join(base, "state"), Sock: filepath.Join(base, "sock"), LogPath: filepath.Join(base, "log"), Args: args,
	}
	c.mu.Lock()
	c.all = append(c.all, h)
	c.mu.Unlock()
	h.Start()
	return h
}

// Start runs the daemon and waits for its socket.
func (h *Host) Start() {
	h.c.t.Helper()
	h.StartOnly()
	Await(h.c.t, 20*time.Second, func() error {
		select {
		case <-h.exited:
			h.c.t.Fatalf("%s ended at its start:\n%s", h.Name, tail(h.LogPath, 20))
		default:
		}
		_, stderr, code := h.Try("version")
		if code != 0 {
			return errors.New(stderr)
		}
		_, err := os.Stat(h.Sock)
		return err
	})
}

// StartOnly runs the daemon and waits for nothing.
func (h *Host) StartOnly() {
	h.c.t.Helper()
	log, err := os.OpenFile(h.LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.c.t.Fatal(err)
	}
	os.Remove(h.Sock)
	args := append([]string{"run", "--state-dir", h.State, "--socket", h.Sock, "--listen", h.Address, "--hostname", h.Name, "--log-level", "debug",
		"--executor", "process"}, h.Args...) // the last of a flag counts
	cmd := exec.Command(filepath.Join(Bin(h.c.t), "warden"), args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		h.c.t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); log.Close(); close(exited) }()
	h.cmd, h.exited = cmd, exited
}

// Exited is closed when the daemon's process has ended.
func (h *Host) Exited() <-chan struct{} { return h.exited }

// Pid returns the daemon's process ID.
func (h *Host) Pid() int { return h.cmd.Process.Pid }

// Kill ends the daemon by SIGKILL and waits.
func (h *Host) Kill() { h.signal(syscall.SIGKILL) }

// Stop ends the daemon by SIGTERM and waits.
func (h *Host) Stop() { h.signal(syscall.SIGTERM) }

// Signal sends a signal and does not wait.
func (h *Host) Signal(s syscall.Signal) { _ = h.cmd.Process.Signal(s) }

func (h *Host) signal(s syscall.Signal) {
	h.c.t.Helper()
	_ = h.cmd.Process.Signal(s)
	select {
	case <-h.exited:
	case <-time.After(30 * time.Second):
		h.c.t.Fatalf("%s did not end after %s", h.Name, s)
	}
}

// end stops what still runs, tasks included.
func (h *Host) end() {
	if h.cmd == nil {
		return
	}
	select {
	case <-h.exited:
		h.StartOnly() // its tasks outlive it: only a daemon can end them
	default:
	}
	_ = h.cmd.Process.Signal(syscall.SIGCONT)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for ctx.Err() == nil { // the socket may not be there yet
		out, _, code := h.try(ctx, nil, "swarm", "leave", "--force")
		if code == 0 || strings.Contains(out, "uninitialized") {
			break
		}
		_, stderr, _ := h.try(ctx, nil, "status")
		if strings.Contains(stderr, "uninitialized") || isDone(h.exited) {
			break
		}
	}
	_ = h.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-h.exited:
	case <-ctx.Done():
		_ = h.cmd.Process.Kill()
		<-h.exited
	}
}

func isDone(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Ctl runs wardenctl against the host and returns what it printed; any error ends the test.
func (h *Host) Ctl(args ...string) string {
	h.c.t.Helper()
	out, stderr, code := h.Try(args...)
	if code != 0 {
		h.c.t.Fatalf("%s: wardenctl %s = exit %d\n%s%s", h.Name, strings.Join(args, " "), code, out, stderr)
	}
	return out
}

// CtlIn is Ctl with standard input.
func (h *Host) CtlIn(stdin string, args ...string) string {
	h.c.t.Helper()
	out, stderr, code := h.try(context.Background(), strings.NewReader(stdin), args...)
	if code != 0 {
		h.c.t.Fatalf("%s: wardenctl %s = exit %d\n%s%s", h.Name, strings.Join(args, " "), code, out, stderr)
	}
	return out
}

// Try runs wardenctl against the host and returns all of it.
func (h *Host) Try(args ...string) (stdout, stderr string, code int) {
	return h.try(context.Background(), nil, args...)
}

// TryIn is Try with standard input.
func (h *Host) TryIn(stdin string, args ...string) (stdout, stderr string, code int) {
	return h.try(context.Background(), strings.NewReader(stdin), args...)
}

func (h *Host) try(ctx context.Context, stdin io.Reader, args ...string) (string, string, int) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(Bin(h.c.t), "wardenctl"), append([]string{"--host", "unix://" + h.Sock}, args...)...)
	var out, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &stderr
	err := cmd.Run()
	h.c.mu.Lock()
	fmt.Fprintf(&h.c.said, "%s%s", out.Bytes(), stderr.Bytes())
	h.c.mu.Unlock()
	if err == nil {
		return out.String(), stderr.String(), 0
	}
	return out.String(), stderr.String() + fmt.Sprintf("(%v)\n", err), cmd.ProcessState.ExitCode()
}

// Said returns all that any wardenctl printed, and every daemon logged.
func (c *Cluster) Said() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	b.Write(c.said.Bytes())
	for _, h := range c.all {
		log, _ := os.ReadFile(h.LogPath)
		b.Write(log)
	}
	return b.String()
}

// searchCanary fails the test where the canary is found.
func (c *Cluster) searchCanary() {
	if strings.Contains(c.Said(), Canary) {
		c.t.Errorf("the canary is in an output or a log")
	}
	for _, h := range c.all {
		_ = filepath.WalkDir(h.State, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil // gone meanwhile
			}
			if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(Canary)) {
				c.t.Errorf("the canary is in %s", path)
			}
			return nil
		})
	}
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		c.t.Error(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		if f[1] == "/run/secrets" {
			c.t.Errorf("a mount of secrets shows on the host: %s", line)
		}
		if f[2] == "tmpfs" || f[2] == "ramfs" {
			c.searchMount(f[1])
		}
	}
}

// searchMount searches the small files of one mount that is in memory: where a secret could have been left in passing.
func (c *Cluster) searchMount(root string) {
	_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // gone meanwhile
		}
		info, err := d.Info()
		if err != nil || info.Size() > 1<<20 {
			return nil
		}
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(Canary)) {
			c.t.Errorf("the canary is in %s", path)
		}
		return nil
	})
}

// Line returns the trimmed output of Ctl.
func (h *Host) Line(args ...string) string {
	h.c.t.Helper()
	return strings.TrimSpace(h.Ctl(args...))
}

// Token mints a join token.
func (h *Host) Token(args ...string) string {
	h.c.t.Helper()
	return h.Line(append([]string{"swarm", "join-token", "-q"}, args...)...)
}

// Join lets h join at the others with a token.
func (h *Host) Join(token string, at ...*Host) {
	h.c.t.Helper()
	args := []string{"swarm", "join", "--token", token}
	for _, a := range at {
		args = append(args, a.Address)
	}
	h.Ctl(args...)
}

// ID returns the node's ID.
func (h *Host) ID() string {
	h.c.t.Helper()
	return h.Line("swarm", "status", "--format", "{{.NodeID}}")
}

// Await asks until ask returns nil. It fails the test with the last answer when the time is over.
func Await(t testing.TB, limit time.Duration, ask func() error) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited %s: %v", limit, err)
		}
	}
}

// AwaitRunning waits until a service has n tasks running, and returns the host names that they run on. at is where wardenctl asks: a Host, or
// one of package bed.
func AwaitRunning(t testing.TB, at interface {
	Try(args ...string) (stdout, stderr string, code int)
}, service string, n int) (nodes []string) {
	t.Helper()
	Await(t, time.Minute, func() error {
		out, stderr, _ := at.Try("service", "ps", service, "--filter", "desired-state=running", "--format", "{{.Node}} {{.CurrentState}} {{.Error}}")
		nodes = nil
		for line := range strings.Lines(out) {
			if w := strings.Fields(line); len(w) > 1 && w[1] == "Running" {
				nodes = append(nodes, w[0])
			}
		}
		if len(nodes) != n {
			return fmt.Errorf("%d of %d tasks running:\n%s%s", len(nodes), n, out, stderr)
		}
		return nil
	})
	return nodes
}

func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
