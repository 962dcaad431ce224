package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"warden/internal/testcluster"
)

var unlockKeyText = regexp.MustCompile(`WDNKEY-1-[0-9a-z]+-[0-9a-z]+`)

// newKey returns the one unlock key in what a command printed, from here on what the canary search looks for.
func (c *six) newKey(t testing.TB, out string) string {
	t.Helper()
	found := unlockKeyText.FindAllString(out, -1)
	if len(found) != 1 {
		t.Fatalf("%d unlock keys in:\n%s", len(found), out)
	}
	c.unlockKey = found[0]
	return found[0]
}

// sealedUnder is the table of `swarm unlock-key` by host name: key ID, state, DEK.
func sealedUnder(h *testcluster.Host) map[string]string {
	out, _, _ := h.Try("swarm", "unlock-key")
	rows := map[string]string{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) >= 5 && strings.HasPrefix(f[1], "m") {
			rows[f[1]] = strings.Join(f[2:], " ")
		}
	}
	return rows
}

// awaitSealed waits until all managers are sealed under the cluster's key, with nothing under older ones.
func (c *six) awaitSealed(t testing.TB, at *testcluster.Host, n int) {
	t.Helper()
	testcluster.Await(t, 40*time.Second, func() error {
		id, _, _ := at.Try("swarm", "unlock-key", "-q")
		rows, good := sealedUnder(at), 0
		for _, r := range rows {
			if f := strings.Fields(r); len(f) == 5 && f[0] == strings.TrimSpace(id) && f[1] == "unlocked" && f[2] == f[4] {
				good++
			}
		}
		if good != n {
			return fmt.Errorf("%d of %d sealed under %s: %v", good, n, id, rows)
		}
		return nil
	})
}

// unlock waits for a started manager and unlocks it.
func unlock(t testing.TB, h *testcluster.Host, key string) {
	t.Helper()
	if out, stderr, code := h.TryIn(key+"\n", "swarm", "unlock"); code != 0 {
		t.Fatalf("%s: unlock: %s%s", h.Name, out, stderr)
	}
}

// needs returns the ID of the key that a locked manager asks for.
func needs(t testing.TB, h *testcluster.Host) string {
	t.Helper()
	id := strings.TrimSpace(first(h.Try("status", "--format", "{{.UnlockKeyID}}")))
	if id == "" {
		t.Fatalf("%s does not say which key it needs", h.Name)
	}
	return id
}

func first(s string, _ string, _ int) string { return s }

// load writes through m1 until the returned function is called, which says how often it did.
func load(c *six, at *testcluster.Host) (stop func() int) {
	done, writes := make(chan struct{}), 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			name := fmt.Sprintf("load-%d", i)
			if _, _, code := at.Try("zone", "create", name); code == 0 {
				writes++
			}
			at.Try("zone", "rm", name)
		}
	})
	return func() int { close(done); wg.Wait(); return writes }
}

// I9 on a live cluster: autolock is turned on, the unlock key rotated under load while one manager is down, and again while another is
// killed; each manager needs the key that its disk was last sealed under, and comes to the last one by itself. DEKs and the
// issuing CA rotate, too, and no task notices.
func TestI9LockOfALiveCluster(t *testing.T) {
	c := newSix(t)
	m := c.m[0]
	m.CtlIn(canary, "secret", "create", "s", "-")
	mark := fmt.Sprintf("lock-%d", os.Getpid())
	m.Ctl("service", "create", "--name", "app", "--replicas", "4", "--secret", "s", "host", "sh", "-c", "while :; do sleep 1000; done", mark)
	before := testcluster.AwaitRunning(t, m, "app", 4)
	pids := fmt.Sprint(taskPid(mark))
	raft := func(h *testcluster.Host) []byte {
		b, err := os.ReadFile(filepath.Join(h.State, "identity", "node.key"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if !bytes.Contains(raft(c.m[1]), []byte("PRIVATE KEY")) {
		t.Fatal("the key file is sealed without autolock")
	}

	oldest := c.newKey(t, m.Ctl("swarm", "update", "--autolock=true"))
	c.awaitSealed(t, m, 3)
	firstID := strings.TrimSpace(m.Ctl("swarm", "unlock-key", "-q"))
	for _, h := range c.m {
		if bytes.Contains(raft(h), []byte("PRIVATE KEY")) {
			t.Errorf("%s has its key in clear after autolock was turned on", h.Name)
		}
	}
	if _, stderr, code := m.Try("swarm", "update", "--autolock=true"); code != 1 || !strings.Contains(stderr, "autolock is on already") {
		t.Errorf("autolock on twice: %s", stderr)
	}

	// One manager is down over a rotation.
	c.m[2].Kill()
	stop := load(c, m)
	out, stderr, code := m.Try("swarm", "unlock-key", "--rotate")
	if code != 0 || !strings.Contains(stderr, "manager m3") || !strings.Contains(stderr, "old unlock key "+firstID) || strings.Contains(stderr, "manager m1") || strings.Contains(stderr, "manager m2") {
		t.Fatalf("a rotation with m3 down: %d\n%s\n%s", code, out, stderr)
	}
	second := c.newKey(t, out)
	c.m[1].Kill()
	c.m[1].Start()
	secondID := needs(t, c.m[1])
	if _, stderr, code := c.m[1].TryIn(oldest+"\n", "swarm", "unlock"); code == 0 || !strings.Contains(stderr, "wrong-unlock") || !strings.Contains(stderr, secondID) {
		t.Errorf("the old key on a manager that was sealed anew: %s", stderr)
	}
	unlock(t, c.m[1], second)
	c.awaitSealed(t, m, 2)

	// Another is killed in the midst of the next.
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		testcluster.Await(t, 40*time.Second, func() error {
			if out, stderr, code := m.Try("swarm", "unlock-key", "-q"); code != 0 || strings.TrimSpace(out) == secondID { // no answer says nothing
				return fmt.Errorf("not rotated yet: %s", stderr)
			}
			return nil
		})
		c.m[1].Kill()
	}()
	third := c.newKey(t, m.Ctl("swarm", "unlock-key", "--rotate"))
	<-killed
	c.m[1].Start()
	key := third
	if needs(t, c.m[1]) == secondID {
		key = second
	}
	unlock(t, c.m[1], key)
	c.awaitSealed(t, m, 2)
	if n := stop(); n == 0 {
		t.Error("no write under load succeeded")
	}

	// The one that was down needs the key that it was sealed under, and asks its peers before its raft starts.
	c.m[2].Start()
	if id := needs(t, c.m[2]); id != firstID {
		t.Errorf("m3 needs %s, want %s", id, firstID)
	}
	if _, _, code := c.m[2].TryIn(third+"\n", "swarm", "unlock"); code == 0 {
		t.Error("m3 opens with a key that it was never sealed under")
	}
	unlock(t, c.m[2], oldest)
	c.awaitSealed(t, m, 3)
	log, err := os.ReadFile(c.m[2].LogPath)
	if err != nil || !bytes.Contains(log, []byte("sealed the key file as another manager says")) {
		t.Errorf("m3 did not ask its peers before it started: %v", err)
	}

	// A whole cluster that is off, one of it under an older key: there is no peer to ask.
	c.m[2].Stop()
	fourth := c.newKey(t, first2(m.Try("swarm", "unlock-key", "--rotate")))
	c.awaitSealed(t, m, 2)
	for _, h := range c.m[:2] {
		h.Stop()
	}
	c.m[2].Start()
	unlock(t, c.m[2], third)
	for _, h := range c.m[:2] {
		h.Start()
		unlock(t, h, fourth)
	}
	c.awaitVoters(t, m, 3)
	c.awaitSealed(t, m, 3)

	// The other keys, with tasks that run.
	if out := m.Ctl("swarm", "rotate-dek"); !strings.Contains(out, "Done: on 3 managers") {
		t.Errorf("rotate-dek: %s", out)
	}
	m.Ctl("service", "create", "--name", "chat", "host", "sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done")
	testcluster.AwaitRunning(t, m, "chat", 1)
	followed := make(chan string, 1)
	go func() { followed <- first(m.Try("service", "logs", "-f", "chat")) }()
	issuer := leaf(t, c.w[0]).AuthorityKeyId
	if out := m.Ctl("swarm", "ca", "--rotate-issuing"); !strings.Contains(out, "generation 2") {
		t.Errorf("ca --rotate-issuing: %s", out)
	}
	testcluster.Await(t, 60*time.Second, func() error {
		for _, h := range append(c.m[:], c.w[:]...) {
			if bytes.Equal(leaf(t, h).AuthorityKeyId, issuer) {
				return fmt.Errorf("%s has a leaf of the old issuing CA", h.Name)
			}
			if strings.Contains(first(h.Try("node", "ls", "--format", "{{.Status}}")), "Down") {
				t.Fatalf("a node is down while leaves are renewed")
			}
		}
		if out := first(m.Try("status")); strings.Contains(out, "have a leaf of") {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	said := func() int { return strings.Count(first(m.Try("service", "logs", "chat")), "line ") }
	written := said() // by now; what comes after it crossed the rotation
	testcluster.Await(t, 40*time.Second, func() error {
		if n := said(); n < written+5 {
			return fmt.Errorf("chat has written %d lines, %d of them since", n, n-written)
		}
		return nil
	})
	m.Ctl("service", "rm", "chat")
	lines := regexp.MustCompile(`line (\d+)\n`).FindAllStringSubmatch(<-followed, -1)
	for i, l := range lines {
		if l[1] != fmt.Sprint(i) {
			t.Errorf("line %d of a log that was followed over the rotation is %s", i, l[1])
			break
		}
	}
	if len(lines) <= written {
		t.Errorf("%d lines of a log that was followed over the rotation, after which there were %d", len(lines), written)
	}
	after := testcluster.AwaitRunning(t, m, "app", 4)
	slices.Sort(before)
	slices.Sort(after)
	if !slices.Equal(before, after) || fmt.Sprint(taskPid(mark)) != pids {
		t.Errorf("the tasks were %v, are %v; processes %s and %v", before, after, pids, taskPid(mark))
	}
	if out := m.Ctl("swarm", "ca"); !strings.HasPrefix(out, "-----BEGIN CERTIFICATE-----") {
		t.Errorf("swarm ca: %s", out)
	}
	c.awaitReady(t, m, 6)
	c.noCanaryAtRest(t)
	shown := c.Said()
	for _, key := range []string{oldest, second, third, fourth} {
		if n := strings.Count(shown, key); n != 1 {
			t.Errorf("an unlock key was shown %d times, want once", n)
		}
	}

	// Off: what is down meanwhile needs its key once more.
	c.m[2].Stop()
	if out := m.Ctl("swarm", "update", "--autolock=false"); !strings.Contains(out, "in clear") {
		t.Errorf("autolock off: %s", out)
	}
	c.m[2].Start()
	unlock(t, c.m[2], fourth)
	testcluster.Await(t, 40*time.Second, func() error {
		for _, h := range c.m {
			if !bytes.Contains(raft(h), []byte("PRIVATE KEY")) {
				return fmt.Errorf("%s is still sealed", h.Name)
			}
		}
		return nil
	})
	c.m[2].Kill()
	c.m[2].Start()
	c.awaitVoters(t, m, 3)
}

// first2 is first of a command that must not fail.
func first2(out, stderr string, code int) string {
	if code != 0 {
		panic(stderr)
	}
	return out
}
