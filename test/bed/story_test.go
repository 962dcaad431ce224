package bed_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/test/bed"
)

// leader returns the host that at, one of hosts, takes for the leader.
func leader(at *bed.Host, hosts []*bed.Host) (*bed.Host, error) {
	out, stderr, _ := at.Try("node", "ls", "--local", "--filter", "role=manager", "--format", "{{.Hostname}} {{.ManagerStatus}}")
	for line := range strings.Lines(out) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " Leader"); ok {
			if i := slices.IndexFunc(hosts, func(h *bed.Host) bool { return h.Name == name }); i >= 0 {
				return hosts[i], nil
			}
		}
	}
	return nil, fmt.Errorf("%s knows no leader:\n%s%s", at.Name, out, stderr)
}

func awaitLeader(t *testing.T, at *bed.Host, among []*bed.Host) (found *bed.Host) {
	t.Helper()
	testcluster.Await(t, limit, func() (err error) {
		found, err = leader(at, among)
		return err
	})
	return found
}

// TestPartitionedCluster: the leader is cut off from the majority, then a worker from all.
func TestPartitionedCluster(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	m, w := b.Cluster(3, 2)
	old := awaitLeader(t, m[0], m)
	rest := slices.DeleteFunc(slices.Clone(m), func(h *bed.Host) bool { return h == old })
	m[0].Ctl("service", "create", "--name", "app", "--replicas", "4", "host", "sleep", "31536000")
	testcluster.AwaitRunning(t, m[0], "app", 4)

	// The leader alone: the others elect one of them and go on; it refuses.
	b.Isolate(old)
	next := awaitLeader(t, rest[0], rest)
	testcluster.Await(t, limit, func() error {
		if _, stderr, code := next.Try("zone", "create", "of-the-majority"); code != 0 && !strings.Contains(stderr, "[exists]") {
			return errors.New(stderr)
		}
		return nil
	})
	out, stderr, code := old.Try("zone", "create", "of-the-minority", "--timeout", "20s")
	if code == 0 {
		t.Errorf("the leader that is cut off from the majority creates a zone: %s%s", out, stderr)
	}
	t.Logf("the leader that is cut off says, exit %d: %s", code, stderr)

	// Healed it follows.
	b.Heal()
	testcluster.Await(t, limit, func() error {
		if l, err := leader(old, m); err != nil || l == old {
			return fmt.Errorf("after the heal %s leads, or: %v", old.Name, err)
		}
		out, stderr, _ := old.Try("zone", "ls")
		if !strings.Contains(out, "of-the-majority") || strings.Contains(out, "of-the-minority") {
			return fmt.Errorf("zones after the heal:\n%s%s", out, stderr)
		}
		return nil
	})
	b.AwaitReady(old, 5)

	// A worker alone: its tasks move; healed it is ready again, and ends what is not its any more.
	lost := w[b.Rand.IntN(len(w))]
	b.Isolate(lost)
	testcluster.Await(t, limit, func() error {
		out, stderr, _ := old.Try("node", "ls", "--format", "{{.Hostname}} {{.Status}}")
		if !strings.Contains(out, lost.Name+" Down") {
			return fmt.Errorf("%s is cut off, and not down:\n%s%s", lost.Name, out, stderr)
		}
		return nil
	})
	testcluster.Await(t, limit, func() error {
		if nodes := testcluster.AwaitRunning(t, old, "app", 4); slices.Contains(nodes, lost.Name) {
			return fmt.Errorf("tasks are on %v, of which %s is cut off", nodes, lost.Name)
		}
		return nil
	})
	b.Heal()
	b.AwaitReady(old, 5)
	testcluster.Await(t, limit, func() error {
		if n := len(processes(t, lost, "sleep\x0031536000")); n != 0 {
			return fmt.Errorf("%d tasks of which the cluster moved all still run on %s", n, lost.Name)
		}
		return nil
	})
}

// TestEvictedWhileCutOff: a manager that is evicted while it is cut off hears of it once it is not any more, though the others have keys by
// then that its own replica does not show.
func TestEvictedWhileCutOff(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	m, _ := b.Cluster(3, 0)
	at, victim := m[0], m[2]
	leaf := func(h *bed.Host) string { return string(thief.Steal(t, h.State()).Cert.Certificate[0]) }
	before := map[*bed.Host]string{m[0]: leaf(m[0]), m[1]: leaf(m[1])}
	b.Isolate(victim)
	testcluster.Await(t, limit, func() error { // it may have led
		if out, stderr, code := at.Try("node", "rm", "--force", victim.Name); code != 0 && !strings.Contains(stderr, "[not-found]") {
			return errors.New(out + stderr)
		}
		return nil
	})
	testcluster.Await(t, limit, func() error {
		for h, old := range before {
			if leaf(h) == old {
				return fmt.Errorf("%s has its old certificate", h.Name)
			}
		}
		return nil
	})
	b.Heal()
	testcluster.Await(t, limit, func() error {
		out, stderr, _ := victim.Try("status")
		if !strings.Contains(out, "evicted") {
			return errors.New(out + stderr)
		}
		if _, err := os.Stat(filepath.Join(victim.State(), "identity")); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("it has its key: %v", err)
		}
		return nil
	})
}

// BenchmarkCluster makes a cluster of three managers and five workers, all ready, from nothing.
func BenchmarkCluster(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		bd := bed.New(b)
		b.StartTimer()
		bd.Cluster(3, 5)
		b.StopTimer()
		bd.End()
		b.StartTimer()
	}
}
