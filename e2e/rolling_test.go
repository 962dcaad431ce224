package e2e

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"warden/internal/testcluster"
)

// taskSpaces returns the programs, one for each PID namespace (so for each task), whose command line holds the mark. A program keeps its
// process, whatever its shell forks in passing.
func taskSpaces(mark string) map[string]int {
	spaces := map[string]int{}
	for _, pid := range taskPid(mark) {
		if space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err == nil {
			spaces[space] = pid
		}
	}
	return spaces
}

// fewest counts the tasks with the mark until done is called, which returns the fewest that there were at once. Tasks come and go while it
// looks at one process after the other: who runs between two looks is seen by one of them.
func fewest(mark string) (done func() int) {
	stop, ended := make(chan struct{}), make(chan struct{})
	var least atomic.Int64
	least.Store(1 << 30)
	go func() { // ends with stop
		defer close(ended)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for before := taskSpaces(mark); ; {
			now := taskSpaces(mark)
			either := maps.Clone(before)
			maps.Copy(either, now)
			if n := int64(len(either)); n < least.Load() {
				least.Store(n)
			}
			before = now
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	return func() int {
		close(stop)
		<-ended
		return int(least.Load())
	}
}

// shortSum is what a task prints of its secret.
func shortSum(value string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(value)))[:16] }

// awaitRolled waits until each of n tasks of a service is what the service asks for, and runs.
func awaitRolled(t testing.TB, at *testcluster.Host, service string, n int) {
	t.Helper()
	testcluster.Await(t, 90*time.Second, func() error {
		out, stderr, _ := at.Try("service", "inspect", "--format", "{{with .UpdateStatus}}{{.State}} {{.Completed}}/{{.Replicas}}, {{.Running}} run{{end}}", service)
		if want := fmt.Sprintf("completed %d/%d, %d run\n", n, n, n); out != want {
			return fmt.Errorf("service %s: %s%s", service, out, stderr)
		}
		return nil
	})
}

// awaitSays waits until n lines of a service's log are the line.
func awaitSays(t testing.TB, at *testcluster.Host, service, line string, n int) {
	t.Helper()
	testcluster.Await(t, 40*time.Second, func() error {
		out, stderr, _ := at.Try("service", "logs", "--raw", service)
		if got := strings.Count(out, line+"\n"); got != n {
			return fmt.Errorf("%d lines of %s are %q, want %d:\n%s%s", got, service, line, n, out, stderr)
		}
		return nil
	})
}

// TestRolling is the story of change: a secret gets a new value and a service a new environment, task by task, through the death
// of a leader; what pins a version keeps it; what the operator can't want is refused; a version in use stays; a compromised node
// takes its secrets' values with it.
func TestRolling(t *testing.T) {
	c := newSix(t)
	m := c.m[0]
	mark := func(n int) string { return fmt.Sprintf("%d.%d", 80000+n, os.Getpid()) }
	program := func(n int) []string {
		return []string{"sh", "-c", `echo "has $(sha256sum < /run/secrets/db | cut -c1-16) mode $MODE"; exec sleep ` + mark(n)}
	}
	one, two := canary+"-one", canary+"-two"
	m.CtlIn(one, "secret", "create", "db", "-")
	m.CtlIn(canary+"-card", "secret", "create", "--zone", "pci", "card", "-")
	m.Ctl(append([]string{"service", "create", "--name", "web", "--replicas", "3", "--secret", "db", "--env", "MODE=slow", "host"}, program(1)...)...)
	m.Ctl(append([]string{"service", "create", "--name", "pins", "--secret", "source=db@1,target=db", "--env", "MODE=pinned", "host"}, program(2)...)...)
	m.Ctl("service", "create", "--name", "card", "--zone", "pci", "--secret", "card", "host", "sleep", mark(3))
	awaitRolled(t, m, "web", 3)
	awaitRolled(t, m, "pins", 1)
	awaitRolled(t, m, "card", 1)
	awaitSays(t, m, "web", "has "+shortSum(one)+" mode slow", 3)
	pinned := taskSpaces(mark(2))
	if len(pinned) != 1 || len(taskSpaces(mark(1))) != 3 {
		t.Fatalf("processes: %v and %v", pinned, taskSpaces(mark(1)))
	}

	// A new value reaches all that follow, one after the other.
	least := fewest(mark(1))
	out, stderr, code := m.TryIn(two, "secret", "rotate", "db", "-")
	if code != 0 || out != "db: version 2; tasks are replaced: web\n" {
		t.Fatalf("secret rotate = exit %d, %s%s", code, out, stderr)
	}
	awaitRolled(t, m, "web", 3)
	awaitSays(t, m, "web", "has "+shortSum(two)+" mode slow", 3)
	if n := least(); n < 2 {
		t.Errorf("%d of 3 tasks ran at one time of the rotation, want 2 at least", n)
	}
	if now := taskSpaces(mark(2)); fmt.Sprint(now) != fmt.Sprint(pinned) {
		t.Errorf("the task that pins a version was replaced: %v, then %v", pinned, now)
	}

	// The old version stays while it is pinned, and goes when nothing has it.
	_, stderr, code = m.Try("secret", "rm", "db@1")
	if code != 3 || !strings.Contains(stderr, "pinned by pins") || !strings.Contains(stderr, "[in-use]") {
		t.Errorf("removing a pinned version = exit %d, %s", code, stderr)
	}
	if _, stderr, code = m.Try("secret", "rm", "db@2"); code != 3 || !strings.Contains(stderr, "current") {
		t.Errorf("removing the current version = exit %d, %s", code, stderr)
	}
	m.Ctl("service", "update", "--secret-rm", "db@1", "--secret-add", "db", "pins")
	awaitRolled(t, m, "pins", 1)
	awaitSays(t, m, "pins", "has "+shortSum(two)+" mode pinned", 1)
	testcluster.Await(t, 40*time.Second, func() error { // when the last task that has it is known to have ended
		if _, stderr, code := m.Try("secret", "rm", "db@1"); code != 0 {
			return fmt.Errorf("secret rm db@1 = exit %d, %s", code, stderr)
		}
		return nil
	})
	if out := m.Line("secret", "ls", "--filter", "name=db", "--format", "{{.Version}} {{.Versions}} {{.Users}}"); out != "2 1 pins,web" {
		t.Errorf("secret ls = %q", out)
	}

	// What is no change of a task replaces none.
	before := taskSpaces(mark(1))
	if out := m.Ctl("service", "update", "--env-add", "MODE=slow", "web"); out != "web: nothing changed\n" {
		t.Errorf("an update that changes nothing = %q", out)
	}
	m.Ctl("service", "update", "--label-add", "a=b", "--update-delay", "1s", "--restart-delay", "2s", "web")
	m.Ctl("service", "scale", "web=4")
	awaitRolled(t, m, "web", 4)
	for space := range before {
		if _, ok := taskSpaces(mark(1))[space]; !ok {
			t.Errorf("a task was replaced without need: %v, then %v", before, taskSpaces(mark(1)))
		}
	}

	// The leader dies in the middle of an update: the next one goes on.
	least = fewest(mark(1))
	m.Ctl("service", "update", "--env-add", "MODE=fast", "web")
	testcluster.Await(t, 40*time.Second, func() error {
		if out := m.Line("service", "ls", "--filter", "name=web", "--format", "{{.UpToDate}}"); out != "1/4" && out != "2/4" && out != "3/4" {
			return fmt.Errorf("%s up to date", out)
		}
		return nil
	})
	m.Kill()
	next := c.m[1]
	awaitRolled(t, next, "web", 4)
	awaitSays(t, next, "web", "has "+shortSum(two)+" mode fast", 4)
	if n := least(); n < 3 {
		t.Errorf("%d of 4 tasks ran at one time of the update, want 3 at least", n)
	}
	m.Start()
	c.awaitVoters(t, next, 3)

	// An update that does not come to run takes no more than one task, and is undone like any other.
	next.Ctl("service", "update", "--update-delay", "0", "--image", "nothing", "web")
	testcluster.Await(t, 40*time.Second, func() error {
		out, _, _ := next.Try("service", "ps", "web", "--format", "{{.Image}} {{.CurrentState}}")
		if strings.Count(out, "nothing Rejected") < 2 {
			return fmt.Errorf("service ps:\n%s", out)
		}
		return nil
	})
	if n := len(taskSpaces(mark(1))); n != 3 {
		t.Errorf("%d of 4 old tasks run while the new ones fail, want 3", n)
	}
	next.Ctl("service", "update", "--image", "host", "web")
	awaitRolled(t, next, "web", 4)

	// A refused update loses nothing.
	kept := taskSpaces(mark(1))
	if _, stderr, code := next.Try("service", "update", "--zone", "pci", "--secret-add", "card@9", "web"); code == 0 || !strings.Contains(stderr, "no version 9") {
		t.Errorf("an update to a version that is not there = exit %d, %s", code, stderr)
	}
	if _, stderr, code := next.Try("service", "update", "--secret-add", "card", "web"); code != 3 || !strings.Contains(stderr, "[wrong-zone]") {
		t.Errorf("an update to a secret of another zone = exit %d, %s", code, stderr)
	}
	if now := taskSpaces(mark(1)); fmt.Sprint(now) != fmt.Sprint(kept) {
		t.Errorf("a refused update replaced tasks: %v, then %v", kept, now)
	}

	// A node is compromised while an update is under way: out, and what it had gets new values. Without a terminal or
	// --generate nothing happens.
	next.Ctl("service", "update", "--env-add", "MODE=last", "web")
	if _, stderr, code := next.Try("node", "rm", "--compromised", "--rotate", "w2"); code != 2 || !strings.Contains(stderr, "--generate") {
		t.Errorf("node rm --rotate without a terminal = exit %d, %s", code, stderr)
	}
	if out := next.Ctl("node", "ls", "--format", "{{.Hostname}}"); !slices.Contains(strings.Fields(out), "w2") {
		t.Fatal("the refused command removed the node")
	}
	out = next.Ctl("node", "rm", "--compromised", "--rotate", "--generate", "w2")
	if !strings.Contains(out, "db: version 3; tasks are replaced: pins, web\n") || strings.Contains(out, "card") || !strings.Contains(out, "shown nowhere") {
		t.Errorf("node rm --rotate says\n%s", out)
	}
	awaitRolled(t, next, "web", 4)
	awaitRolled(t, next, "pins", 1)
	if out := next.Line("secret", "ls", "--format", "{{.Name}} {{.Version}}"); out != "card 1\ndb 3" {
		t.Errorf("secret ls = %q", out)
	}
	if nodes := slices.Compact(testcluster.AwaitRunning(t, next, "web", 4)); fmt.Sprint(nodes) != "[w1]" {
		t.Errorf("web runs on %v", nodes)
	}
	testcluster.Await(t, 40*time.Second, func() error {
		if _, stderr, code := next.Try("secret", "rm", "db@2"); code != 0 {
			return fmt.Errorf("secret rm db@2 = exit %d, %s", code, stderr)
		}
		return nil
	})

	// A manager had everything: whatever is current gets a new value, under the keyset that was rotated with it.
	out = next.Ctl("node", "rm", "--compromised", "--rotate", "--generate", "m3")
	for _, want := range []string{"Every secret", "rotated the cluster keyset", "  db: version 4; tasks are replaced: pins, web\n", "  card: version 2; tasks are replaced: card\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("node rm --rotate of a manager says\n%s\nwant %q in it", out, want)
		}
	}
	awaitRolled(t, next, "web", 4)
	awaitRolled(t, next, "card", 1)
	c.noCanaryAtRest(t)
}
