package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"warden/internal/testcluster"
)

// TestTasksMove: tasks leave a drained node and a node that is down, come to no other zone, and one that fails is replaced
// later each time.
func TestTasksMove(t *testing.T) {
	testcluster.Root(t)
	c := &six{Cluster: testcluster.New(t)}
	m := c.Host("m1")
	m.Ctl("swarm", "init")
	token := m.Token("worker")
	var w []*testcluster.Host
	for i := range 3 {
		h := c.Host(fmt.Sprintf("w%d", i+1))
		h.Join(token, m)
		w = append(w, h)
	}
	c.awaitReady(t, m, 4)
	m.CtlIn(canary, "secret", "create", "s", "-")
	mark := fmt.Sprintf("moves-%d", os.Getpid())
	m.Ctl("service", "create", "--name", "app", "--replicas", "3", "--secret", "s", "host", "sh", "-c", "while :; do sleep 1000; done", mark)
	nodes := testcluster.AwaitRunning(t, m, "app", 3)
	slices.Sort(nodes)
	if fmt.Sprint(nodes) != "[w1 w2 w3]" {
		t.Errorf("three tasks run on %v, want them spread over three nodes", nodes)
	}

	m.Ctl("node", "update", "--availability", "drain", "w1")
	testcluster.Await(t, 40*time.Second, func() error {
		if nodes := testcluster.AwaitRunning(t, m, "app", 3); slices.Contains(nodes, "w1") {
			return fmt.Errorf("tasks on %v", nodes)
		}
		return nil
	})

	// The daemon of w2 hangs: its tasks go on, but nobody hears of it. They move, and end when it is back.
	w[1].Signal(syscall.SIGSTOP)
	testcluster.Await(t, 60*time.Second, func() error {
		if nodes := testcluster.AwaitRunning(t, m, "app", 3); slices.Contains(nodes, "w2") {
			return fmt.Errorf("tasks on %v", nodes)
		}
		return nil
	})
	w[1].Signal(syscall.SIGCONT)
	c.awaitReady(t, m, 4)
	testcluster.Await(t, 40*time.Second, func() error {
		n := 0
		for _, pid := range taskPid(mark) {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && strings.TrimSpace(string(b)) == "sh" {
				n++
			}
		}
		if n != 3 {
			return fmt.Errorf("%d programs of the service run on this machine, want 3", n)
		}
		return nil
	})

	m.Ctl("service", "scale", "app=1")
	testcluster.AwaitRunning(t, m, "app", 1)
	m.Ctl("service", "rm", "app")
	testcluster.Await(t, 40*time.Second, func() error {
		if pids := taskPid(mark); len(pids) > 0 {
			return fmt.Errorf("processes %v outlive their service", pids)
		}
		return nil
	})
	testcluster.Await(t, 40*time.Second, func() error { // a task has ended before its manager knows
		if _, stderr, code := m.Try("secret", "rm", "s"); code != 0 {
			return errors.New(stderr)
		}
		return nil
	})

	m.Ctl("service", "create", "--name", "crash", "host", "sh", "-c", "echo started; exit 3")
	testcluster.Await(t, 60*time.Second, func() error {
		out := m.Ctl("service", "ps", "crash", "--format", "{{.CurrentState}} {{.Error}}")
		if strings.Count(out, "Failed") < 2 || !strings.Contains(out, "3") {
			return errors.New(out)
		}
		return nil
	})
	testcluster.Await(t, 40*time.Second, func() error {
		if out := m.Ctl("service", "logs", "crash"); !strings.Contains(out, "started") {
			return fmt.Errorf("the logs of ended tasks: %q", out)
		}
		return nil
	})
}

// TestI7SecretsLiveAsLongAsTheTask follows one secret through the death of its task's daemon, supervisor and program.
func TestI7SecretsLiveAsLongAsTheTask(t *testing.T) {
	c, m, w := newPair(t)
	m.CtlIn(canary, "secret", "create", "s", "-")
	mark := fmt.Sprintf("lives-%d", os.Getpid())
	m.Ctl("service", "create", "--name", "app", "--restart-condition", "none", "--secret", "s", "host", "sh", "-c", "while :; do sleep 1000; done", mark)
	testcluster.AwaitRunning(t, m, "app", 1)
	secret := func() (string, bool) { // as root on the host can: through the task's own mount namespace
		for _, pid := range taskPid(mark) {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/run/secrets/s", pid)); err == nil {
				return string(b), true
			}
		}
		return "", false
	}
	if s, ok := secret(); !ok || s != canary {
		t.Fatalf("the task's secret = %q, %v", s, ok)
	}
	w.Kill()
	if s, ok := secret(); !ok || s != canary {
		t.Fatalf("the task's secret after its daemon was killed = %q, %v", s, ok)
	}
	w.Start()
	c.awaitReady(t, m, 2)
	if s, ok := secret(); !ok || s != canary {
		t.Fatalf("the task's secret after the daemon came back = %q, %v", s, ok)
	}
	for _, pid := range taskPid(mark) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	testcluster.Await(t, 40*time.Second, func() error {
		out := m.Ctl("service", "ps", "app", "--format", "{{.CurrentState}}")
		if !strings.Contains(out, "Failed") {
			return errors.New(out)
		}
		if _, ok := secret(); ok {
			return errors.New("the secret outlives its task")
		}
		return nil
	})
	// No process of any task holds a mount of secrets any more.
	testcluster.Await(t, 40*time.Second, func() error {
		mounts, _ := filepath.Glob("/proc/[0-9]*/mounts")
		for _, path := range mounts {
			if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), " /run/secrets ") {
				cmd, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
				if strings.Contains(string(cmd), c.Dir) || strings.Contains(string(cmd), mark) {
					return fmt.Errorf("%s still has the mount: %q", path, cmd)
				}
			}
		}
		return nil
	})
}

// TestDev runs `warden dev` as a newcomer does, and ends it by Ctrl-C.
func TestDev(t *testing.T) {
	testcluster.Root(t)
	dir := t.TempDir()
	cmd := exec.Command(filepath.Join(testcluster.Bin(t), "warden"), "dev", "--managers", "1", "--workers", "1", "--dir", dir)
	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	testcluster.Await(t, 40*time.Second, func() error {
		b, _ := os.ReadFile(out.Name())
		if !strings.Contains(string(b), "Ctrl-C ends it") {
			return fmt.Errorf("dev said %s", b)
		}
		return nil
	})
	ls, err := exec.Command(filepath.Join(testcluster.Bin(t), "wardenctl"), "--host", "unix://"+filepath.Join(dir, "manager-1", "warden.sock"), "node", "ls").CombinedOutput()
	if err != nil || !strings.Contains(string(ls), "worker-1") {
		t.Errorf("node ls = %v\n%s", err, ls)
	}
	cmd.Process.Signal(syscall.SIGINT)
	select {
	case err := <-exited:
		if err != nil {
			t.Errorf("dev ended with %v", err)
		}
	case <-time.After(40 * time.Second):
		cmd.Process.Kill()
		t.Fatal("dev did not end after Ctrl-C")
	}
}

// TestNodeChangesZone moves a node: its certificate follows, and only then do tasks and secrets of the new zone come.
func TestNodeChangesZone(t *testing.T) {
	_, m, w := newPair(t)
	m.Ctl("zone", "create", "pci")
	m.CtlIn(canary, "secret", "create", "--zone", "pci", "s", "-")
	m.Ctl("service", "create", "--name", "here", "host", "sleep", "1000")
	m.Ctl("service", "create", "--name", "there", "--zone", "pci", "--secret", "s", "host", "sh", "-c", "test -s /run/secrets/s && exec sleep 1000")
	testcluster.AwaitRunning(t, m, "here", 1)
	if _, stderr, code := m.Try("node", "update", "--zone", "pcl", "w1"); code == 0 || !strings.Contains(stderr, "[not-found]") {
		t.Errorf("moving a node to a zone that nobody declared = exit %d, %s", code, stderr)
	}
	m.Ctl("node", "update", "--zone", "pci", "w1")
	testcluster.AwaitRunning(t, m, "there", 1)
	if zone := w.Line("swarm", "status", "--format", "{{.Zone}}"); zone != "pci" {
		t.Errorf("the node's certificate names zone %q", zone)
	}
	testcluster.AwaitRunning(t, m, "here", 0)
	if _, stderr, code := m.Try("zone", "rm", "pci"); code != 3 || !strings.Contains(stderr, "[in-use]") {
		t.Errorf("removing a zone that is used = exit %d, %s", code, stderr)
	}
}
