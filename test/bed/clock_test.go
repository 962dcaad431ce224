package bed_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"warden/internal/testcluster"
	"warden/test/bed"
)

const day = 24 * time.Hour

// TestSkew: a daemon goes by its host's clock, from its start on and when that is changed, and no other host does.
func TestSkew(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	x, y := b.Host("x"), b.Host("y")
	x.Skew(-3 * time.Hour)
	x.Start()
	y.Start()
	n := 0
	check := func(h *bed.Host, d time.Duration) {
		t.Helper()
		testcluster.Await(t, limit, func() error {
			n++
			_, _, _ = h.Try("zone", "create", fmt.Sprintf("zone-%d", n)) // done or refused, it is logged
			log, err := os.ReadFile(h.Log)
			if err != nil {
				return err
			}
			lines := strings.Split(strings.TrimSpace(string(log)), "\n")
			stamp, _, _ := strings.Cut(strings.TrimPrefix(lines[len(lines)-1], "time="), " ")
			at, err := time.Parse(time.RFC3339, stamp)
			if off := time.Until(at) - d; err != nil || off.Abs() > time.Minute {
				return fmt.Errorf("the clock of %s is %s off what it was set to: %w", h.Name, off, err)
			}
			return nil
		})
	}
	check(x, -3*time.Hour) // as it started
	x.Ctl("swarm", "init")
	y.Ctl("swarm", "init")
	check(y, 0)
	x.Skew(100 * day)
	check(x, 100*day)
	x.Skew(-3 * time.Hour)
	check(x, -3*time.Hour)
	x.Skew(0)
	check(x, 0)
}

var seenAt = regexp.MustCompile(`"SeenAt": "([^"]+)"`)

// TestClocks: the clock of a follower or a worker is hours or months out, ahead and behind; then that of the leader, whom another
// relieves, and changes go on, also when it is right again. No change that was confirmed is lost, no task ends, no node needs to join again, and
// with the clock right all is as before.
func TestClocks(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	m, w := b.Cluster(3, 1)
	lead := awaitLeader(t, m[0], m)
	follower := m[(slices.Index(m, lead)+1)%3]
	other := m[(slices.Index(m, lead)+2)%3]
	other.Ctl("service", "create", "--name", "app", "host", "sleep", "31536000")
	testcluster.AwaitRunning(t, other, "app", 1)
	task := pids(t, w[0], "sleep\x0031536000")
	if len(task) != 1 {
		t.Fatalf("processes of the task = %v", task)
	}

	var confirmed []string
	create := func(name string) error {
		_, stderr, code := other.Try("zone", "create", name, "--timeout", "10s")
		if code != 0 && !strings.Contains(stderr, "[exists]") {
			return errors.New(stderr)
		}
		confirmed = append(confirmed, name)
		return nil
	}
	// asBefore wants all that was confirmed at all managers, and the same task.
	asBefore := func(when string) {
		t.Helper()
		b.AwaitReady(other, 4)
		for _, h := range m {
			testcluster.Await(t, limit, func() error {
				out, stderr, _ := h.Try("zone", "ls", "--local", "--format", "{{.Name}}")
				have := strings.Fields(out)
				for _, name := range confirmed {
					if !slices.Contains(have, name) {
						return fmt.Errorf("%s: zone %s, which was confirmed, is not at %s: %s%s", when, name, h.Name, out, stderr)
					}
				}
				return nil
			})
		}
		if now := pids(t, w[0], "sleep\x0031536000"); !slices.Equal(now, task) {
			t.Errorf("%s: processes of the task = %v, before %v", when, now, task)
		}
	}
	for i, c := range []struct {
		at *bed.Host
		by time.Duration
	}{{follower, 3 * time.Hour}, {follower, -3 * time.Hour}, {follower, 100 * day}, {w[0], 100 * day}, {w[0], -3 * time.Hour}} {
		when := fmt.Sprintf("%s off by %s", c.at.Name, c.by)
		c.at.Skew(c.by)
		testcluster.Await(t, limit, func() error { return create(fmt.Sprintf("while-%d", i)) })
		testcluster.Await(t, limit, func() error {
			out, stderr, code := other.Try("status")
			if code == 0 || !saysSkewed(out, c.at, c.by) {
				return fmt.Errorf("%s: status = exit %d, and does not say so:\n%s%s", when, code, out, stderr)
			}
			return nil
		})
		c.at.Kill()
		c.at.Start()
		testcluster.Await(t, limit, func() error { return create(fmt.Sprintf("restarted-%d", i)) }) // it may have come to lead before it was killed
		testcluster.Await(t, limit, func() error {
			if out, stderr, _ := c.at.Try("status", "--timeout", "5s"); c.by < 0 && !strings.Contains(out, "this node's certificate is valid from") {
				return fmt.Errorf("%s: its status does not say so:\n%s%s", when, out, stderr)
			}
			return nil
		})
		c.at.Skew(0)
		asBefore(when)
	}

	// A worker that was started while its clock was behind gets secrets as soon as it is right.
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s3cret"), 0o600); err != nil {
		t.Fatal(err)
	}
	other.Ctl("secret", "create", "password", secret)
	other.Ctl("service", "create", "--name", "secretive", "--secret", "password", "host", "sleep", "31536001")
	testcluster.AwaitRunning(t, other, "secretive", 1)

	// A leader that is ahead, then one that is behind: another takes over, and all goes by the time of the majority, also when that
	// leader is right again.
	for i, by := range []time.Duration{3 * time.Hour, -3 * time.Hour} {
		lead = awaitLeader(t, other, m)
		at := other // who is asked has the right time
		if lead == other {
			at = follower
		}
		lead.Skew(by)
		testcluster.Await(t, limit, func() error {
			name := fmt.Sprintf("leader-off-%d", i)
			if _, stderr, code := at.Try("zone", "create", name, "--timeout", "10s"); code != 0 && !strings.Contains(stderr, "[exists]") {
				return errors.New(stderr)
			}
			confirmed = append(confirmed, name)
			return nil
		})
		if now := awaitLeader(t, at, m); now == lead {
			t.Errorf("%s leads on, %s off", lead.Name, by)
		}
		lead.Skew(0)
		testcluster.Await(t, limit/2, func() error { // not at once, where an election is under way
			if err := create(fmt.Sprintf("leader-right-%d", i)); err != nil {
				return fmt.Errorf("a change when the leader's clock, which was %s off, is right again: %w", by, err)
			}
			return nil
		})
		asBefore(fmt.Sprintf("the leader off by %s", by))
	}

	// The clocks of all managers are set forward at once: no worker counts as silent for that.
	seen := func(ago time.Duration) func() error { // by the clocks of managers, a minute or none behind
		return func() error {
			out, stderr, _ := other.Try("node", "inspect", "w1")
			if m := seenAt.FindStringSubmatch(out); m != nil {
				if at, err := time.Parse(time.RFC3339, m[1]); err == nil && (time.Since(at)-ago).Abs() < 20*time.Second {
					return nil
				}
			}
			return fmt.Errorf("w1 is to be seen %s ago:\n%s%s", ago, out, stderr)
		}
	}
	for range 2 {
		for _, by := range []time.Duration{-time.Minute, 0} {
			for _, h := range m {
				h.Skew(by)
			}
			testcluster.Await(t, limit, seen(-by))
		}
	}
	asBefore("all managers set forward")
}

// TestNoCertificateIsValid by the clock of a leader that has to dial another for its time: it hears it, and that one or the third takes over.
func TestNoCertificateIsValid(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	m, _ := b.Cluster(3, 0)
	for i, by := range []time.Duration{-400 * day, 400 * day} {
		lead := awaitLeader(t, m[0], m)
		rest := slices.DeleteFunc(slices.Clone(m), func(h *bed.Host) bool { return h == lead })
		rest[0].Kill()
		lead.Skew(by)
		rest[0].Start()
		testcluster.Await(t, limit/2, func() error {
			if _, stderr, code := rest[1].Try("zone", "create", fmt.Sprintf("zone-%d", i), "--timeout", "5s"); code != 0 && !strings.Contains(stderr, "[exists]") {
				return errors.New(stderr)
			}
			return nil
		})
		if now := awaitLeader(t, rest[1], m); now == lead {
			t.Errorf("%s leads on, %s off", lead.Name, by)
		}
		lead.Skew(0)
		b.AwaitReady(lead, 3)
	}
}

// saysSkewed reports whether a status says that a host's clock is so far ahead of a manager's, and that of no other host.
func saysSkewed(status string, h *bed.Host, by time.Duration) (says bool) {
	way := "ahead of"
	if by < 0 {
		way = "behind"
	}
	for line := range strings.Lines(status) {
		line = strings.TrimSpace(line)
		if !strings.Contains(line, "): its clock is ") || strings.HasPrefix(line, "wardenctl: ") {
			continue
		}
		if !strings.HasPrefix(line, h.Name+" (") || !strings.Contains(line, fmt.Sprintf("its clock is %s %s that of manager ", by.Abs(), way)) {
			return false
		}
		says = true
	}
	return says
}

// pids returns the processes of a host whose command line begins with the mark.
func pids(t *testing.T, h *bed.Host, mark string) (all []int) {
	t.Helper()
	found, _ := filepath.Glob(filepath.Join(h.Root(), "proc/[0-9]*/cmdline"))
	for _, path := range found {
		if b, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(b), mark) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			all = append(all, pid)
		}
	}
	return all
}
