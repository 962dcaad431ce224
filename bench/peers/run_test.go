package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runEnv makes the test binary the program itself. Its value is inherited by all that it starts.
const runEnv = "WARDEN_PEERS_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// program is a run of the program.
type program struct {
	*exec.Cmd
	t              *testing.T
	dir, mark      string
	stdout, stderr bytes.Buffer
}

func newProgram(t *testing.T, args ...string) *program {
	t.Helper()
	if testing.Short() {
		t.Skip("runs the program")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pt") // short: paths of sockets are bounded
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := onDisk(dir); err != nil {
		t.Skip(err)
	}
	p := &program{t: t, dir: dir, mark: runEnv + "=" + filepath.Base(dir)}
	p.Cmd = exec.Command(self, append([]string{"-quick", "-dir", dir}, args...)...)
	p.Env = append(os.Environ(), p.mark)
	p.Stdout, p.Stderr = &p.stdout, &p.stderr
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.WaitDelay = time.Second // a child that has its standard error must not hold it up
	return p
}

// processes are those that the program started and that are not gone, and the program.
func (p *program) processes() (pids []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(append(b, 0), []byte(p.mark+"\x00")) {
			line, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
			pids = append(pids, filepath.Base(filepath.Dir(path))+" "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return pids
}

func (p *program) await(what string, ok func() error) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := await(ctx, what, 10*time.Millisecond, func(context.Context) (bool, error) { err := ok(); return err == nil, err }); err != nil {
		p.t.Fatalf("%v\n%s%s", err, p.stdout.String(), p.stderr.String())
	}
}

// noneLeft wants all processes gone.
func (p *program) noneLeft() error {
	if left := p.processes(); len(left) > 0 {
		return fmt.Errorf("left running: %q", left)
	}
	return nil
}

// traces are the files that runs leave while they are under way: folders on the disk and in memory, and cgroups, of one name.
func (p *program) traces(names []string) (left []string) {
	for _, name := range names {
		for _, pattern := range []string{filepath.Join(p.dir, name), "/dev/shm/" + name, "/sys/fs/cgroup/" + name, "/sys/fs/cgroup/*/" + name} {
			found, _ := filepath.Glob(pattern)
			left = append(left, found...)
		}
	}
	return left
}

func (p *program) folders() (names []string) {
	entries, _ := os.ReadDir(p.dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// contains wants a container to have a cgroup.
func (p *program) contains() error {
	var found []string
	for _, name := range p.folders() {
		v1, _ := filepath.Glob("/sys/fs/cgroup/*/" + name + "/*/cgroup.procs")
		v2, _ := filepath.Glob("/sys/fs/cgroup/" + name + "/*/cgroup.procs")
		found = append(found, append(v1, v2...)...)
	}
	return want(found, 1)
}

// needEngine skips where no engine can be started.
func needEngine(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("an engine of its own needs root")
	}
	if _, err := exec.LookPath("dockerd"); err != nil {
		t.Skip("no dockerd is installed")
	}
}

// TestQuick runs a little of everything but what takes longest, and wants all figures and nothing left.
func TestQuick(t *testing.T) {
	works := []string{"join", "create1k", "secret", "write1", "restart"}
	if os.Geteuid() == 0 {
		if _, err := exec.LookPath("dockerd"); err == nil {
			works = append(works, dockerWork)
		}
	}
	out := t.TempDir()
	svg, md := filepath.Join(out, "c.svg"), filepath.Join(out, "t.md")
	p := newProgram(t, "-only", strings.Join(works, ","), "-svg", svg, "-md", md)
	if err := p.Run(); err != nil {
		t.Fatalf("%v\n%s", err, p.stderr.String())
	}
	table := p.stdout.String()
	for _, want := range []string{"QUICK", "128 at a time", "500 tasks stopped and restarted", "SwarmKit", "times better"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if strings.Contains(table, "failed") {
		t.Errorf("something failed:\n%s%s", table, p.stderr.String())
	}
	for _, path := range []string{svg, md} {
		if info, err := os.Stat(path); err != nil || info.Size() == 0 {
			t.Errorf("%s was not written: %v", path, err)
		}
	}
	p.await("all are gone", p.noneLeft)
	if left := p.folders(); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

// TestInterruptLeavesNothing: an interrupt, at many moments, ends all that was started and removes all that was written.
func TestInterruptLeavesNothing(t *testing.T) {
	for _, c := range []struct {
		work   string
		moment func(p *program) error
		signal syscall.Signal
	}{
		{"create1k", func(p *program) error { return want(p.folders(), 1) }, syscall.SIGINT},
		{"write3", func(p *program) error { return want(p.processes(), 4) }, syscall.SIGTERM},
		{"restart", func(p *program) error { return glob(p.dir + "/*/m0/sock") }, syscall.SIGINT},
		{dockerWork, func(p *program) error { return want(p.processes(), 2) }, syscall.SIGINT},
		{dockerWork, func(p *program) error { return glob(p.dir + "/*/docker.sock") }, syscall.SIGTERM},
		{dockerWork, (*program).contains, syscall.SIGINT},
	} {
		t.Run(c.work, func(t *testing.T) {
			if c.work == dockerWork {
				needEngine(t)
			}
			p := newProgram(t, "-only", c.work)
			if err := p.Start(); err != nil {
				t.Fatal(err)
			}
			p.await("the moment", func() error { return c.moment(p) })
			names := p.folders()
			to := p.Process.Pid
			if c.signal == syscall.SIGINT {
				to = -to // as a terminal does: to all of the process group
			}
			if err := syscall.Kill(to, c.signal); err != nil {
				t.Fatal(err)
			}
			if err := p.Wait(); err == nil || !strings.Contains(p.stderr.String(), "interrupted") {
				t.Errorf("it ended with %v: %s", err, p.stderr.String())
			}
			if err := p.noneLeft(); err != nil {
				t.Error(err)
			}
			if left := append(p.folders(), p.traces(names)...); len(left) > 0 {
				t.Errorf("left %q", left)
			}
		})
	}
}

// TestKilledEndsChildren: what the program started ends with it even if it is killed, an engine and its containers included.
func TestKilledEndsChildren(t *testing.T) {
	for work, moment := range map[string]func(p *program) error{
		"write3":   func(p *program) error { return want(p.processes(), 4) },
		dockerWork: (*program).contains,
	} {
		t.Run(work, func(t *testing.T) {
			if work == dockerWork {
				needEngine(t)
			}
			p := newProgram(t, "-only", work)
			if err := p.Start(); err != nil {
				t.Fatal(err)
			}
			p.await("the moment", func() error { return moment(p) })
			p.Process.Kill()
			p.Wait()
			p.await("all are gone", p.noneLeft)
			for _, name := range p.folders() { // nobody is left to do it
				p.await("the cgroups are removed", func() error { return removeCgroups(name) })
				os.RemoveAll(filepath.Join("/dev/shm", name))
			}
		})
	}
}

// TestLabIsProcessOne: a lab ends all processes that it sees, so it must not see the machine's.
func TestLabIsProcessOne(t *testing.T) {
	p := newProgram(t)
	p.Env = append(p.Env, childEnv+"=lab")
	p.Stdin = strings.NewReader("") // were it to begin, it would fail here
	if err := p.Run(); err == nil || !strings.Contains(p.stderr.String(), "process 1") {
		t.Errorf("it ended with %v: %s", err, p.stderr.String())
	}
}

func want(have []string, least int) error {
	if len(have) < least {
		return fmt.Errorf("%d of %d: %q", len(have), least, have)
	}
	return nil
}

func glob(pattern string) error {
	if found, _ := filepath.Glob(pattern); len(found) == 0 {
		return errors.New("no " + pattern)
	}
	return nil
}
