package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/internal/testcluster"
	"warden/internal/thief"
)

// TestManagersComeAndGo grows a cluster to five managers, loses two, is refused what would lose the majority, and shrinks to
// one, which stays the last.
func TestManagersComeAndGo(t *testing.T) {
	testcluster.Root(t)
	c := &six{Cluster: testcluster.New(t)}
	var m []*testcluster.Host
	for i := range 5 {
		m = append(m, c.Host(fmt.Sprintf("m%d", i+1)))
	}
	m[0].Ctl("swarm", "init")
	token := m[0].Token("manager")
	for i, h := range m[1:] {
		h.Join(token, m[i], m[0])
	}
	c.awaitVoters(t, m[0], 5)

	m[3].Kill()
	m[4].Kill()
	m[0].Ctl("zone", "create", "three-of-five")
	testcluster.Await(t, 40*time.Second, func() error {
		_, stderr, code := m[0].Try("node", "demote", "m3")
		if code != 3 || !strings.Contains(stderr, "[no-quorum]") || !strings.Contains(stderr, "majority") {
			return fmt.Errorf("demoting one of three that are left of five = exit %d, %s", code, stderr)
		}
		return nil
	})
	m[3].Start()
	m[4].Start()
	c.awaitVoters(t, m[0], 5)

	for left := 4; left >= 1; left-- {
		name := fmt.Sprintf("m%d", left+1)
		testcluster.Await(t, 40*time.Second, func() error {
			out, stderr, _ := m[0].Try("node", "ls", "--filter", "role=manager", "-q")
			if n := len(strings.Fields(out)); n != left {
				_, refusal, _ := m[0].Try("node", "demote", name) // asked again where another was silent just now
				return fmt.Errorf("%d managers, want %d: %s%s", n, left, stderr, refusal)
			}
			if _, err := os.Stat(filepath.Join(m[left].State, "raft")); err == nil {
				return fmt.Errorf("%s still has the replicated state", name)
			}
			return nil
		})
	}
	if _, stderr, code := m[0].Try("node", "demote", "m1"); code != 3 || !strings.Contains(stderr, "[no-quorum]") {
		t.Errorf("demoting the last manager = exit %d, %s", code, stderr)
	}
	if out := m[0].Ctl("zone", "ls"); !strings.Contains(out, "three-of-five") {
		t.Errorf("zone ls = %s", out)
	}
	c.awaitReady(t, m[0], 5)

	// A worker leaves by itself; its record goes when the operator says so.
	m[4].Ctl("swarm", "leave")
	if _, err := os.Stat(filepath.Join(m[4].State, "identity")); err == nil {
		t.Error("a node that left keeps its identity on disk")
	}
	testcluster.Await(t, 40*time.Second, func() error {
		if _, stderr, code := m[0].Try("node", "rm", "m5"); code != 0 {
			return errors.New(stderr)
		}
		return nil
	})
}

// TestLeaderDemotesItself: the leader hands over first, and the call succeeds.
func TestLeaderDemotesItself(t *testing.T) {
	c := newThree(t)
	c.awaitVoters(t, c.m[0], 3)
	c.m[0].Ctl("node", "demote", "m1")
	c.awaitVoters(t, c.m[1], 2)
	testcluster.Await(t, 60*time.Second, func() error {
		if _, err := os.Stat(filepath.Join(c.m[0].State, "raft")); err == nil {
			return errors.New("the demoted leader still has the replicated state")
		}
		return nil
	})
	c.awaitReady(t, c.m[1], 3)
}

// TestEvictedManager: what a manager knew is replaced, and its certificate opens nothing.
func TestEvictedManager(t *testing.T) {
	c := newThree(t)
	w := c.Host("w1")
	m := c.m[0]
	worker := m.Token("worker")
	w.Join(worker, c.m[2])
	c.awaitReady(t, m, 4)
	m.CtlIn(canary, "secret", "create", "one", "-")
	m.CtlIn("another", "secret", "create", "two", "-")
	stolenKey := thief.Steal(t, c.m[2].State)
	issuer := leaf(t, w).AuthorityKeyId

	out := m.Ctl("node", "rm", "--force", "--compromised", "m3")
	for _, want := range []string{"one", "two", "revoked", "issuing CA", "keyset", "root"} {
		if !strings.Contains(out, want) {
			t.Errorf("evicting a manager does not speak of %q:\n%s", want, out)
		}
	}
	for _, h := range c.m[:2] {
		for _, door := range []string{warden.DoorRaft, warden.DoorPeer, warden.DoorControl} {
			if err := stolenKey.Refused(h.Address, door); err == nil {
				t.Errorf("the certificate of the evicted manager stays at %s of %s", door, h.Name)
			}
		}
	}
	if _, stderr, code := c.Host("late").Try("swarm", "join", "--token", worker, m.Address); code != 3 || !strings.Contains(stderr, "[revoked]") {
		t.Errorf("joining by a token from before the eviction = exit %d, %s", code, stderr)
	}
	testcluster.Await(t, 60*time.Second, func() error {
		if _, err := os.Stat(filepath.Join(c.m[2].State, "identity")); err == nil {
			return errors.New("the evicted manager did not wipe itself")
		}
		for _, h := range []*testcluster.Host{c.m[0], c.m[1], w} {
			if string(leaf(t, h).AuthorityKeyId) == string(issuer) {
				return fmt.Errorf("%s still has a certificate of the old issuing CA", h.Name)
			}
		}
		return nil
	})
	c.awaitVoters(t, m, 2)
	c.awaitReady(t, m, 3)
	// The secrets open under the new keyset.
	m.Ctl("service", "create", "--name", "app", "--secret", "one", "host", "sh", "-c", "test -s /run/secrets/one && exec sleep 1000")
	testcluster.AwaitRunning(t, m, "app", 1)
}

// TestEvictionReachesAFollowerThatWasDown: it comes back by a snapshot, whose restore fires no watch, and cuts the node all
// the same; and a lagging follower does catch up by snapshot.
func TestEvictionReachesAFollowerThatWasDown(t *testing.T) {
	c := newThree(t)
	victim := c.Host("victim")
	m := c.m[0]
	victim.Join(m.Token("worker"), m)
	c.awaitReady(t, m, 4)
	victim.Kill()
	s := thief.Steal(t, victim.State)
	c.m[2].Kill()
	m.Ctl("node", "rm", "--force", "victim")
	// Enough commands that the log which the follower lacks is compacted away (the test build compacts early).
	for i := range 100 {
		name := fmt.Sprintf("z%d", i)
		m.Ctl("zone", "create", name)
		m.Ctl("zone", "rm", name)
	}
	testcluster.Await(t, 40*time.Second, func() error {
		found, _ := filepath.Glob(filepath.Join(m.State, "raft", "snapshots", "*"))
		if len(found) == 0 {
			return errors.New("no snapshot")
		}
		return nil
	})
	c.m[2].Start()
	c.awaitVoters(t, m, 3)
	testcluster.Await(t, 40*time.Second, func() error {
		found, _ := filepath.Glob(filepath.Join(c.m[2].State, "raft", "snapshots", "*"))
		if len(found) == 0 {
			return errors.New("the follower was sent no snapshot")
		}
		return nil
	})
	orderedAgain(t, s, c.m[2])
}
