package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"warden/internal/testcluster"
)

// canary is planted in secrets; no output, log, file or mount may show it.
const canary = testcluster.Canary

// six is a cluster of three managers and three workers: w1 and w2 in the default zone, w3 in zone pci.
type six struct {
	*testcluster.Cluster
	m         [3]*testcluster.Host
	w         [3]*testcluster.Host
	unlockKey string
}

// newThree returns a cluster of three managers.
func newThree(t *testing.T, initArgs ...string) *six {
	t.Helper()
	testcluster.Root(t)
	c := &six{Cluster: testcluster.New(t)}
	for i := range c.m {
		c.m[i] = c.Host(fmt.Sprintf("m%d", i+1))
	}
	out := c.m[0].Ctl(append([]string{"swarm", "init"}, initArgs...)...)
	for word := range strings.FieldsSeq(out) {
		if strings.HasPrefix(word, "WDNKEY-1-") {
			c.unlockKey = word
		}
	}
	token := c.m[0].Token("manager")
	c.m[1].Join(token, c.m[0])
	c.m[2].Join(token, c.m[1], c.m[0])
	c.awaitVoters(t, c.m[0], 3)
	return c
}

// newPair returns a cluster of one manager and one worker.
func newPair(t *testing.T) (c *six, m, w *testcluster.Host) {
	t.Helper()
	testcluster.Root(t)
	c = &six{Cluster: testcluster.New(t)}
	m, w = c.Host("m1"), c.Host("w1")
	m.Ctl("swarm", "init")
	w.Join(m.Token("worker"), m)
	c.awaitReady(t, m, 2)
	return c, m, w
}

// newSix returns a cluster of three managers and three workers, the third in zone pci.
func newSix(t *testing.T, initArgs ...string) *six {
	t.Helper()
	c := newThree(t, initArgs...)
	for i := range c.w {
		c.w[i] = c.Host(fmt.Sprintf("w%d", i+1))
	}
	c.m[0].Ctl("zone", "create", "pci")
	token := c.m[0].Token("worker")
	c.w[0].Join(token, c.m[0])
	c.w[1].Join(token, c.m[2])
	c.w[2].Join(c.m[1].Token("--zone", "pci", "worker"), c.m[1])
	c.awaitReady(t, c.m[0], 6)
	return c
}

// awaitVoters waits until n managers have a vote, and are reachable or lead.
func (c *six) awaitVoters(t testing.TB, at *testcluster.Host, n int) {
	t.Helper()
	testcluster.Await(t, 40*time.Second, func() error {
		out, stderr, _ := at.Try("node", "ls", "--filter", "role=manager", "--format", "{{.ManagerStatus}}")
		if got := strings.Count(out, "Leader") + strings.Count(out, "Reachable"); got != n {
			return fmt.Errorf("%d voters of %d: %q %s", got, n, out, stderr)
		}
		return nil
	})
}

// awaitReady waits until n nodes are ready.
func (c *six) awaitReady(t testing.TB, at *testcluster.Host, n int) {
	t.Helper()
	testcluster.Await(t, 40*time.Second, func() error {
		out, stderr, _ := at.Try("node", "ls", "--format", "{{.Status}}")
		if got := strings.Count(out, "Ready"); got != n {
			return fmt.Errorf("%d nodes ready of %d: %q %s", got, n, out, stderr)
		}
		return nil
	})
}

// taskPid returns the process ID, on this machine, of a program whose command line holds the mark.
func taskPid(mark string) []int {
	parents := map[int]int{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !strings.Contains(string(b), mark) {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		_, after, _ := strings.Cut(string(stat), ") ") // what follows the program's name: state, parent
		var state string
		var pid, parent int
		if _, err := fmt.Sscan(after, &state, &parent); err != nil {
			panic(fmt.Sprintf("%s/stat = %q", dir, stat))
		}
		if _, err := fmt.Sscanf(filepath.Base(dir), "%d", &pid); err == nil && pid != os.Getpid() {
			parents[pid] = parent
		}
	}
	var pids []int
	for pid, parent := range parents {
		if _, forked := parents[parent]; !forked { // one that a shell has just forked still has the shell's words
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// TestCore is the whole story: join by token, autolock, a secret on tmpfs in its zone, a real server that takes its password
// from it, refusal in the wrong zone, the leader killed, everything restarted and unlocked, a node evicted.
func TestCore(t *testing.T) {
	c := newSix(t, "--autolock")
	if c.unlockKey == "" {
		t.Fatal("swarm init --autolock showed no unlock key")
	}
	m := c.m[0]

	// A secret for zone pci, from standard input.
	m.CtlIn(canary, "secret", "create", "--zone", "pci", "redis-password", "-")
	if out := m.Ctl("secret", "inspect", "redis-password"); strings.Contains(out, canary) {
		t.Fatal("secret inspect shows the value")
	}

	// The wrong zone is refused at once, with the reason.
	_, stderr, code := m.Try("service", "create", "--name", "thief", "--secret", "redis-password", "host", "sleep", "1000")
	if code != 3 || !strings.Contains(stderr, "pci") || !strings.Contains(stderr, "[wrong-zone]") {
		t.Fatalf("a service outside the secret's zone = exit %d, %s", code, stderr)
	}

	// A real server in the right one.
	at, _, err := net.SplitHostPort(testcluster.Address(2378)) // an IP of its own: elsewhere a connection may have the port
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/usr/bin/redis-server"); err != nil {
		t.Skip("needs redis-server: the service of this test is a real one")
	}
	m.Ctl("service", "create", "--name", "redis", "--zone", "pci", "--secret", "source=redis-password,target=password", "host",
		"sh", "-c", `exec redis-server --bind `+at+` --save "" --dir /tmp --requirepass "$(cat /run/secrets/password)" --proc-title-template redis-of-the-test`)
	if nodes := testcluster.AwaitRunning(t, m, "redis", 1); nodes[0] != "w3" {
		t.Fatalf("redis runs on %v, want the node in zone pci", nodes)
	}
	// A client that proves it: a task of its own, with the same secret.
	m.Ctl("service", "create", "--name", "client", "--zone", "pci", "--restart-condition", "none", "--secret", "source=redis-password,target=password", "host",
		"sh", "-c", `until redis-cli -h `+at+` ping 2>&1 | grep -q NOAUTH; do :; done; REDISCLI_AUTH="$(cat /run/secrets/password)" redis-cli -h `+at+` set proof 42; stat -f -c %T /run/secrets; stat -c %a /run/secrets/password`)
	testcluster.Await(t, 40*time.Second, func() error {
		out, stderr, _ := m.Try("service", "logs", "client")
		for _, want := range []string{"OK", "tmpfs", "400"} {
			if !strings.Contains(out, want) {
				return fmt.Errorf("the client said %q %s, want %s in it", out, stderr, want)
			}
		}
		return nil
	})

	// TestI7: on no disk, in no mount that the host can see.
	c.noCanaryAtRest(t)

	// The leader dies; another takes over; writes go on.
	m.Kill()
	next := c.m[1]
	testcluster.Await(t, 40*time.Second, func() error {
		_, stderr, code := next.Try("zone", "create", "after-the-kill")
		if code != 0 && !strings.Contains(stderr, "[exists]") {
			return fmt.Errorf("zone create after the leader was killed: %s", stderr)
		}
		return nil
	})
	testcluster.AwaitRunning(t, next, "redis", 1)

	// Everything stops; every manager comes back locked and serves nothing but its lock.
	for _, h := range c.m[1:] {
		h.Kill()
	}
	pids := taskPid("redis-of-the-test")
	for _, h := range c.m {
		h.Start()
		out, _, code := h.Try("status")
		if code == 0 || !strings.Contains(out, "locked") {
			t.Fatalf("status of a locked manager = exit %d, %s", code, out)
		}
		if _, stderr, code := h.Try("node", "ls"); code != 3 || !strings.Contains(stderr, "[locked]") {
			t.Fatalf("node ls on a locked manager = exit %d, %s", code, stderr)
		}
	}
	if _, stderr, code := c.m[0].TryIn("WDNKEY-1-nonsense\n", "swarm", "unlock"); code == 0 {
		t.Fatalf("a malformed unlock key = exit 0, %s", stderr)
	}
	for _, h := range c.m {
		h.CtlIn(c.unlockKey+"\n", "swarm", "unlock")
	}
	c.awaitVoters(t, m, 3)
	c.awaitReady(t, m, 6)
	testcluster.AwaitRunning(t, m, "redis", 1)
	if now := taskPid("redis-of-the-test"); len(pids) == 0 || fmt.Sprint(now) != fmt.Sprint(pids) {
		t.Fatalf("the task's processes were %v before the restart of all managers and %v after", pids, now)
	}

	// A worker's daemon dies and comes back: its task and its secret were never touched.
	c.w[2].Kill()
	c.w[2].Start()
	c.awaitReady(t, m, 6)
	if now := taskPid("redis-of-the-test"); fmt.Sprint(now) != fmt.Sprint(pids) {
		t.Fatalf("the task's processes were %v before the daemon was killed and %v after", pids, now)
	}

	// The node is compromised: out, with what it held.
	id := c.w[2].ID()
	out := m.Ctl("node", "rm", "--force", "--compromised", "w3")
	if !strings.Contains(out, "redis-password") {
		t.Fatalf("node rm --compromised does not list the secret that the node held:\n%s", out)
	}
	testcluster.Await(t, 40*time.Second, func() error {
		out, _, _ := c.w[2].Try("status")
		if !strings.Contains(out, "evicted") {
			return fmt.Errorf("status of the evicted node: %s", out)
		}
		if now := taskPid("redis-of-the-test"); len(now) > 0 {
			return fmt.Errorf("its task still runs: %v", now)
		}
		if _, err := os.Stat(filepath.Join(c.w[2].State, "identity")); err == nil {
			return fmt.Errorf("its identity is still on disk")
		}
		return nil
	})
	out = m.Ctl("node", "ls", "-q")
	if strings.Contains(out, id) {
		t.Fatalf("node ls still shows the evicted node:\n%s", out)
	}
	// Nothing else is in zone pci: the task waits, and says why.
	testcluster.Await(t, 40*time.Second, func() error {
		out, _, _ := m.Try("service", "ps", "redis", "--no-trunc", "--format", "{{.CurrentState}} {{.Error}}")
		if !strings.Contains(out, "no suitable node") {
			return fmt.Errorf("service ps: %s", out)
		}
		return nil
	})

	c.noCanaryAtRest(t)
	if said := c.Said(); strings.Contains(said, canary) {
		t.Fatal("the canary is in some output or log") // I10
	}
	if said := strings.Count(c.Said(), c.unlockKey); said != 1 {
		t.Fatalf("the unlock key was shown %d times, want once: by swarm init", said)
	}
}

// noCanaryAtRest searches all state directories, and the table of mounts of this host.
func (c *six) noCanaryAtRest(t testing.TB) {
	t.Helper()
	for _, h := range append(c.m[:], c.w[:]...) {
		err := filepath.WalkDir(h.State, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil // gone meanwhile
			}
			b, err := os.ReadFile(path)
			if err == nil && (strings.Contains(string(b), canary) || c.unlockKey != "" && strings.Contains(string(b), c.unlockKey)) {
				t.Errorf("%s holds a canary", path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), "/run/secrets") {
		t.Errorf("a mount of secrets shows on the host:\n%s", mounts)
	}
}
