// Package bed is a network of hosts for tests, on one machine: each host is a network, mount and process namespace of its own,
// in which a real daemon runs; a bridge in one more namespace is the network between them. Hosts can be cut off from each
// other, one way too, lose packets, be slow or far, run out of disk, have a clock that is out; daemons can be killed and paused.
//
// Nothing of the machine's own network changes, and no namespace has a name: all of a host ends with the process that is
// process 1 of it, and that ends when it loses the test process, however that ended. What is left of a test process that was
// killed, a folder and empty cgroups, the next one to make a bed removes.
//
// A package that makes beds calls Main first in its TestMain:
//
//	func TestMain(m *testing.M) { bed.Main(); leaktest.Main(m) }
//
// It does not simulate time. What the kernel draws (which packets a lossy path loses) a seed does not reproduce.
package bed

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"warden/internal/testcluster"
)

const (
	// SeedVar names the environment variable with the seed of a run to repeat.
	SeedVar = "WARDEN_BED_SEED"

	dirPrefix = "warden-bed-"
	lockFile  = "lock" // locked while its bed's process lives
	keptFile  = "kept" // there if a test failed: its folder is no left-over
	hostsMax  = 250    // of one /24
	logLines  = 40     // of each host are shown when a test failed
)

// Bed is a network and its hosts. It ends with the test, or by End.
type Bed struct {
	// Dir holds a folder for each host, and events: what was done to whom and when. It is kept if the test fails.
	Dir string
	// Rand draws the random choices of a test; SeedVar repeats them. Only the test's own goroutine uses it.
	Rand *rand.Rand

	t      testing.TB
	bin    string
	isOver bool
	lock   *os.File
	wire   *namespace // with the bridge
	mu     sync.Mutex // guards what follows; held across nft and ip, so that what one writes is what it saw
	all    []*Host
	faults map[path]fault
	events *os.File
}

// New returns a bed without hosts. It skips the test where this machine can have none.
func New(t testing.TB) *Bed {
	t.Helper()
	if !isMainCalled {
		t.Fatal("TestMain of this package must call bed.Main first")
	}
	testcluster.Root(t)
	for _, program := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s (Debian: iproute2, nftables): hosts are network namespaces: %v", program, err)
		}
	}
	removeLeftovers(t)
	b := &Bed{t: t, bin: testcluster.Bin(t), faults: map[path]fault{}}
	t.Cleanup(b.End)
	var err error
	if b.Dir, err = os.MkdirTemp("", dirPrefix); err != nil { // short: paths of sockets are bounded
		t.Fatal(err)
	}
	if b.lock, err = os.Create(filepath.Join(b.Dir, lockFile+".new")); err == nil { // locked when it gets its name
		err = errors.Join(unix.Flock(int(b.lock.Fd()), unix.LOCK_EX), os.Rename(b.lock.Name(), filepath.Join(b.Dir, lockFile)))
	}
	if err != nil {
		t.Fatal(err)
	}
	if b.events, err = os.Create(filepath.Join(b.Dir, "events")); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	if s := os.Getenv(SeedVar); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("%s = %q: %v", SeedVar, s, err)
		}
	}
	b.Rand = rand.New(rand.NewPCG(seed, 0))
	t.Logf("bed in %s, %s=%d", b.Dir, SeedVar, seed)
	b.note("seed %d", seed)

	if b.wire, err = newNamespace(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	if _, err := b.wire.run("link add bridge0 type bridge\nlink set bridge0 up\n", "ip", "-batch", "-"); err != nil {
		t.Skipf("needs bridges: %v", err)
	}
	if out, err := b.wire.run(table([]string{dropLost("192.0.2.1", 50), dropBeyond("192.0.2.1", 1)}), "nft", "-f", "-"); err != nil {
		t.Skipf("needs nft with numgen and limit: %v: %s", err, out)
	}
	return b
}

// note writes down what was done.
func (b *Bed) note(format string, args ...any) {
	fmt.Fprintf(b.events, "%s %s\n", time.Now().UTC().Format("15:04:05.000"), fmt.Sprintf(format, args...))
}

// End collects what a failed test leaves to look at, and ends all hosts with all that runs in them. Calling it again is no
// error.
func (b *Bed) End() {
	b.t.Helper()
	if b.Dir == "" || b.isOver {
		return
	}
	b.isOver = true
	failed := b.t.Failed()
	if failed {
		b.collect()
	}
	for _, h := range b.all {
		h.ns.end()
	}
	if b.wire != nil {
		b.wire.end()
	}
	if err := removeCgroups(b.Dir); err != nil {
		b.t.Error(err)
	}
	if b.events != nil {
		b.events.Close()
	}
	if failed {
		if err := os.WriteFile(filepath.Join(b.Dir, keptFile), nil, 0o600); err != nil {
			b.t.Error(err)
		}
		b.t.Logf("logs and state of all hosts are kept in %s", b.Dir)
	} else if err := os.RemoveAll(b.Dir); err != nil {
		b.t.Error(err)
	}
	b.lock.Close()
}

// collect writes into each host's folder what ends with the host, and shows the last of each log.
func (b *Bed) collect() {
	b.t.Helper()
	for _, h := range b.all {
		log, _ := os.ReadFile(h.Log)
		lines := strings.Split(strings.TrimSpace(string(log)), "\n")
		b.t.Logf("log of %s:\n%s", h.Name, strings.Join(lines[max(0, len(lines)-logLines):], "\n"))
		var s strings.Builder
		for _, argv := range [][]string{{"ip", "addr"}, {"nft", "list", "ruleset"}, {"ps", "axf"}} {
			out, err := h.Run(argv...)
			fmt.Fprintf(&s, "# %s (%v)\n%s\n", strings.Join(argv, " "), err, out)
		}
		if h.isRunning() {
			h.Resume()
			out, stderr, code := h.Try("status", "--json", "--timeout", "5s")
			fmt.Fprintf(&s, "# wardenctl status --json (exit %d)\n%s%s\n", code, out, stderr)
		}
		err := os.WriteFile(filepath.Join(h.dir, "host"), []byte(s.String()), 0o600)
		if h.hasOwnDisk {
			err = errors.Join(err, os.CopyFS(h.state, os.DirFS(h.State())))
		}
		if err != nil {
			b.t.Logf("collecting from %s: %v", h.Name, err)
		}
	}
}

// removeLeftovers removes what beds left whose process was killed.
func removeLeftovers(t testing.TB) {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		lock, err := os.Open(filepath.Join(dir, lockFile))
		if err != nil {
			continue // just made, or just gone
		}
		_, kept := os.Stat(filepath.Join(dir, keptFile))
		if kept != nil && unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			if err := removeCgroups(dir); err != nil {
				t.Log(err)
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Logf("removing a left-over bed: %v", err)
			}
		}
		lock.Close()
	}
}

// Networks returns what /proc/PID/ns/net says in each network namespace of the bed.
func (b *Bed) Networks() (ids []string) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	all := []*namespace{b.wire}
	for _, h := range b.all {
		all = append(all, h.ns)
	}
	for _, n := range all {
		id, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", n.holder.Process.Pid))
		if err != nil {
			b.t.Fatal(err)
		}
		ids = append(ids, id)
	}
	return ids
}

// Cgroups returns the directories that the daemons of the bed in dir made for their tasks, one for each controller and state
// directory, whose hash is in its name (executor/process), and those of its engines.
func Cgroups(dir string) (all []string) {
	states, _ := filepath.Glob(filepath.Join(dir, "*", "state"))
	for _, state := range states {
		sum := sha256.Sum256([]byte(filepath.Join(state, "tasks")))
		found, _ := filepath.Glob("/sys/fs/cgroup/*/warden-" + hex.EncodeToString(sum[:6]))
		all = append(all, found...)
	}
	engines, _ := filepath.Glob(filepath.Join(dir, "*", engineDir))
	for _, e := range engines {
		for _, pattern := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
			found, _ := filepath.Glob(pattern + engineCgroup(e))
			all = append(all, found...)
		}
	}
	return all
}

// removeCgroups removes the cgroups of a bed whose processes have ended: the kernel may take a moment to notice.
func removeCgroups(dir string) error {
	deadline := time.After(time.Minute)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		var failed error
		for _, group := range Cgroups(dir) {
			tasks, _ := filepath.Glob(filepath.Join(group, "*", "cgroup.procs"))
			for _, task := range tasks {
				failed = errors.Join(failed, rmdir(filepath.Dir(task)))
			}
			failed = errors.Join(failed, rmdir(group))
		}
		if failed == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline:
			return failed
		}
	}
}

func rmdir(dir string) error {
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("removing %s: %w", dir, err)
	}
	return nil
}
