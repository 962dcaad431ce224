package process_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor"
	"warden/executor/conformance"
	"warden/executor/process"
	"warden/internal/leaktest"
	"warden/internal/sensitive"
)

const self = "/proc/self/exe"

// daemonVerb makes the test binary a daemon that starts one task and waits to be killed.
const daemonVerb = "test-daemon"

func TestMain(m *testing.M) {
	process.Main(os.Args)
	if len(os.Args) == 4 && os.Args[1] == daemonVerb {
		daemon(os.Args[2], os.Args[3])
	}
	leaktest.Main(m)
}

// opened is an executor with what its constructor was told.
type opened struct {
	*process.Executor
	dir     string
	options []process.Option
}

func open(t *testing.T, dir string, options ...process.Option) opened {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the process executor needs root")
	}
	e, err := process.New(dir, self, slog.New(slog.DiscardHandler), options...)
	if err != nil {
		t.Fatalf("New() = %v", err)
	}
	return opened{e, dir, options}
}

func residue(t *testing.T, e executor.Executor, id string) (left []string) {
	t.Helper()
	for _, pattern := range []string{filepath.Join(e.(opened).dir, "*"+id+"*"), "/sys/fs/cgroup/*/*/" + id, "/sys/fs/cgroup/*/" + id, "/sys/fs/cgroup/*/*/*/" + id} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), id) {
		left = append(left, "a mount")
	}
	return left
}

func host(ids bool) conformance.Host {
	h := conformance.Host{
		Image: process.Image, IDs: ids, Residue: residue,
		Reopen: func(t *testing.T, e executor.Executor) executor.Executor {
			return open(t, e.(opened).dir, e.(opened).options...)
		},
		Paths: func(e executor.Executor) []string { return []string{e.(opened).dir, "/dev/shm", "/run"} },
	}
	for controller, present := range map[string]func(){"memory": func() { h.Memory = true }, "pids": func() { h.Pids = process.PidsMax }} {
		if unix.Access("/sys/fs/cgroup/"+controller, unix.W_OK) == nil {
			present()
		} else if all, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); err == nil && strings.Contains(string(all), controller) {
			present()
		}
	}
	return h
}

func TestConformance(t *testing.T) {
	conformance.Run(t, func(t *testing.T) executor.Executor { return open(t, filepath.Join(t.TempDir(), "tasks")) }, host(true))
}

// TestConformanceOldKernel: the same on a machine without user namespaces and detached mounts.
func TestConformanceOldKernel(t *testing.T) {
	conformance.Run(t, func(t *testing.T) executor.Executor {
		e := open(t, filepath.Join(t.TempDir(), "tasks"), process.WithoutUserNamespaces, process.WithBindMounts)
		if e.SecretMounts() != "bind" {
			t.Errorf("SecretMounts() = %q, want bind", e.SecretMounts())
		}
		return e
	}, host(false))
}

// daemon starts a task whose script comes from the environment of nobody but this helper, prints its ID, and waits.
func daemon(dir, script string) {
	fail := func(err error) {
		fmt.Println("error", err)
		os.Exit(1)
	}
	value, err := io.ReadAll(os.Stdin)
	if err != nil {
		fail(err)
	}
	e, err := process.New(dir, self, slog.New(slog.DiscardHandler))
	if err != nil {
		fail(err)
	}
	task, err := e.Start(context.Background(), executor.Spec{TaskID: warden.NewID(), Image: process.Image, Command: []string{"/bin/sh", "-c", script},
		Secrets: []executor.SecretFile{{Target: "password", Mode: 0o400, Data: sensitive.New(value)}}})
	if err != nil {
		fail(err)
	}
	fmt.Println("started", task.ID())
	select {}
}

// killedDaemon runs such a daemon until its task runs, and kills it.
func killedDaemon(t *testing.T, dir, script, secret string) (taskID string) {
	t.Helper()
	cmd := exec.Command(self, daemonVerb, dir, script)
	cmd.Stdin = strings.NewReader(secret)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Groups: []uint32{0, 42}}} // which no task may inherit
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	id, ok := strings.CutPrefix(strings.TrimSpace(line), "started ")
	if !ok {
		t.Fatalf("daemon said %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	return id
}

func adopt(t *testing.T, e executor.Executor) executor.Task {
	t.Helper()
	tasks, err := e.Adopt(t.Context())
	if err != nil || len(tasks) != 1 {
		t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	t.Cleanup(func() {
		if err := tasks[0].Remove(context.Background()); err != nil {
			t.Errorf("Remove() = %v", err)
		}
		if left := residue(t, e, tasks[0].ID()); len(left) > 0 {
			t.Errorf("Remove() left %q", left)
		}
	})
	return tasks[0]
}

func logs(t *testing.T, task executor.Task) string {
	t.Helper()
	var all strings.Builder
	err := task.Logs(t.Context(), executor.LogOptions{Tail: -1}, func(l executor.Line) error { fmt.Fprintln(&all, string(l.Data)); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// firstLine waits for the task's first line of output.
func firstLine(t *testing.T, task executor.Task) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var first string
	_ = task.Logs(ctx, executor.LogOptions{Follow: true, Tail: -1}, func(l executor.Line) error { first = string(l.Data); return io.EOF })
	return first
}

// TestI7DaemonKilled: kill -9 of the daemon changes neither task nor secret; the next daemon finds both.
func TestI7DaemonKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tasks")
	e := open(t, dir)
	canary := "canary-" + warden.NewID()
	id := killedDaemon(t, dir, "trap 'cat /run/secrets/password; exit 6' TERM; echo ready; while :; do sleep 0.01; done", canary)
	task := adopt(t, e)
	if task.ID() != id || firstLine(t, task) != "ready" {
		t.Fatalf("adopted %s with log %q, want %s", task.ID(), logs(t, task), id)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if exit, err := task.Wait(ctx); err == nil {
		t.Fatalf("the task ended with its daemon: %+v", exit)
	}
	if err := task.Stop(t.Context(), warden.StopGraceDefault); err != nil {
		t.Fatal(err)
	}
	exit, err := task.Wait(t.Context())
	if err != nil || exit.Code != 6 || logs(t, task) != "ready\n"+canary+"\n" {
		t.Errorf("task ended with %+v, %v, log %q", exit, err, logs(t, task))
	}
}

// TestDaemonKilledInStart: wherever the daemon is killed, its task either runs on or leaves nothing.
func TestDaemonKilledInStart(t *testing.T) {
	for _, stage := range []string{"*", "*/lock", "*/supervisor", "*/task.json", "*/log", "*/exit.json"} {
		dir := filepath.Join(t.TempDir(), "tasks")
		e := open(t, dir)
		cmd := exec.Command(self, daemonVerb, dir, "sleep 60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; {
			if found, _ := filepath.Glob(filepath.Join(dir, stage)); len(found) > 0 || time.Now().After(deadline) {
				break
			}
			if tasks, _ := filepath.Glob(filepath.Join(dir, "*/task.json")); stage == "*/exit.json" && len(tasks) > 0 {
				break // its moment was missed
			}
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		tasks, err := e.Adopt(t.Context())
		if err != nil || len(tasks) > 1 {
			t.Errorf("%s: Adopt() = %d tasks, %v", stage, len(tasks), err)
		}
		for _, task := range tasks {
			if err := task.Remove(t.Context()); err != nil {
				t.Errorf("%s: Remove() = %v", stage, err)
			}
			if left := residue(t, e, task.ID()); len(left) > 0 {
				t.Errorf("%s: Remove() left %q", stage, left)
			}
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("%s: left %v, %v", stage, left, err)
		}
	}
}

// TestCPULimit: the quota is in force while the task runs.
func TestCPULimit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tasks")
	e := open(t, dir)
	task, err := e.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: process.Image, Command: []string{"/bin/sleep", "60"}, LimitNanoCPUs: 250_000_000})
	if warden.CodeOf(err) == warden.CodeUnsupported {
		t.Skip("no writable cpu cgroup on this machine")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer task.Remove(context.Background())
	var got []string
	for _, name := range []string{"cpu.cfs_quota_us", "cpu.max"} {
		for _, depth := range []string{"*/", "*/*/", "*/*/*/"} {
			found, _ := filepath.Glob("/sys/fs/cgroup/" + depth + task.ID() + "/" + name)
			for _, path := range found {
				b, _ := os.ReadFile(path)
				got = append(got, strings.TrimSpace(string(b)))
			}
		}
	}
	if len(got) != 1 || got[0] != "25000" && got[0] != "25000 100000" {
		t.Errorf("quota = %q, want 25000 of 100000 microseconds", got)
	}
}

// TestEndedUnderNoDaemon: a task that ends while there is no daemon is found with its exit and its log.
func TestEndedUnderNoDaemon(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tasks")
	e := open(t, dir)
	killedDaemon(t, dir, "while test -d /proc/$$ && ! test $(cat /proc/uptime | cut -d. -f1) -gt 0; do :; done; grep Groups: /proc/self/status; exit 4", "x")
	task := adopt(t, e)
	exit, err := task.Wait(t.Context())
	if err != nil || exit.Code != 4 || strings.TrimSpace(logs(t, task)) != "Groups:" {
		t.Errorf("task ended with %+v, %v, log %q", exit, err, logs(t, task))
	}
}

// pids returns the processes of a task by what they see as their host's name.
func pids(t *testing.T, id string) (found []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range all {
		cmdline, _ := os.ReadFile(dir + "/cmdline")
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil && strings.Contains(string(cmdline), id) {
			found = append(found, pid)
		}
	}
	return found
}

// supervisorOf returns the pid of the task's supervisor.
func supervisorOf(t *testing.T, id string) int {
	t.Helper()
	for _, pid := range pids(t, id) {
		if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.Contains(string(cmdline), "internal-supervise") {
			return pid
		}
	}
	t.Fatalf("task %s has no supervisor", id)
	return 0
}

// TestInitHasNoRights: process 1 of a task, which is ours, has no more rights on this host than the program, and neither it
// nor the supervisor can be looked into or dumps core.
func TestInitHasNoRights(t *testing.T) {
	for _, options := range [][]process.Option{nil, {process.WithoutUserNamespaces}} {
		e := open(t, filepath.Join(t.TempDir(), "tasks"), options...)
		task, err := e.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: process.Image, Command: []string{"/bin/sleep", "60"}})
		if err != nil {
			t.Fatal(err)
		}
		defer task.Remove(context.Background())
		supervisor := supervisorOf(t, task.ID())
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", supervisor, supervisor))
		if err != nil {
			t.Skip("this kernel does not list children")
		}
		init := strings.TrimSpace(string(children))
		status, err := os.ReadFile("/proc/" + init + "/status")
		if err != nil {
			t.Fatalf("init %q: %v", children, err)
		}
		for _, want := range []string{"\nCapEff:\t0000000000000000\n", "\nCapPrm:\t0000000000000000\n", "\nCapBnd:\t0000000000000000\n", "\nNoNewPrivs:\t1\n", "\nSeccomp:\t2\n", "\nGroups:\t \n"} {
			if !strings.Contains(string(status), want) {
				t.Errorf("status of init lacks %q:\n%s", want, status)
			}
		}
		for who, path := range map[string]string{"init": "/proc/" + init, "supervisor": fmt.Sprintf("/proc/%d", supervisor)} {
			var s unix.Stat_t // what is not dumpable belongs to root, or to root of its namespace
			if err := unix.Stat(path+"/environ", &s); err != nil || who == "supervisor" && s.Uid != 0 {
				t.Errorf("%s: owner %d, %v", who, s.Uid, err)
			}
			if limits, err := os.ReadFile(path + "/limits"); err != nil || !strings.Contains(string(limits), "Max core file size        0                    0") {
				t.Errorf("%s may dump core: %s, %v", who, limits, err)
			}
		}
		if uid := regexp.MustCompile(`\nUid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)\n`).FindStringSubmatch(string(status)); uid == nil {
			t.Errorf("status of init has no uid:\n%s", status)
		} else {
			for _, text := range uid[1:] {
				if n, err := strconv.Atoi(text); err != nil || n < 100_000 {
					t.Errorf("init has uid %s of the host", text)
				}
			}
		}
	}
}

// TestSupervisorKilled: all of the task dies with its supervisor, its secret with it, and Wait says so, in each mode and
// also of a handle that was adopted. Without cgroups nothing but the kernel sees to it.
func TestSupervisorKilled(t *testing.T) {
	for _, options := range [][]process.Option{nil, {process.WithoutCgroups}, {process.WithoutCgroups, process.WithoutUserNamespaces}} {
		dir := filepath.Join(t.TempDir(), "tasks")
		e := open(t, dir, options...)
		id := warden.NewID()
		task, err := e.Start(t.Context(), executor.Spec{TaskID: id, Image: process.Image,
			Command: []string{"/bin/sh", "-c", "setsid sh -c 'sleep 60 & echo ready; sleep 60' " + id + " & exec sleep 60"}})
		if err != nil {
			t.Fatal(err)
		}
		firstLine(t, task)
		adopted := adopt(t, open(t, dir, options...))
		running := pids(t, id)
		supervisor := supervisorOf(t, id)
		if len(running) < 2 {
			t.Fatalf("processes of the task: %v", running)
		}
		if err := unix.Kill(supervisor, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for _, handle := range []executor.Task{task, adopted} {
			exit, err := handle.Wait(t.Context())
			if err != nil || exit.Error != "supervisor died" || exit.Code != 137 {
				t.Errorf("Wait() = %+v, %v", exit, err)
			}
		}
		if err := adopted.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		for deadline := time.Now().Add(time.Minute); len(pids(t, id)) > 0; {
			if time.Now().After(deadline) {
				t.Fatalf("processes %v outlived the supervisor", pids(t, id))
			}
		}
	}
}

// TestAdoptClearsAway: what dead daemons left half made or half removed goes.
func TestI7StopOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	open(t, filepath.Join(dir, "probe")) // skips without root
	if err := unix.Mount("test", dir, "tmpfs", 0, "mode=700,size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	e := open(t, filepath.Join(dir, "tasks"))
	ignores := "trap '' TERM; echo ready; while :; do sleep 1000; done"
	var tasks []executor.Task
	for range 2 {
		task, err := e.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: process.Image, Command: []string{"sh", "-c", ignores}})
		if err != nil {
			t.Fatal(err)
		}
		firstLine(t, task)
		tasks = append(tasks, task)
	}
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	if _, err := io.Copy(fill, rand.Reader); err == nil {
		t.Fatal("the disk is not full")
	}
	start := time.Now()
	if err := tasks[0].Stop(t.Context(), 100*time.Millisecond); err != nil {
		t.Errorf("Stop() on a full disk = %v", err)
	}
	if took := time.Since(start); took >= warden.StopGraceDefault { // which the supervisor, who has no word of another, gives it
		t.Errorf("Stop() took %v with a grace of 100 ms", took)
	}
	for _, task := range tasks {
		if err := task.Remove(t.Context()); err != nil {
			t.Errorf("Remove() on a full disk = %v", err)
		}
		if left := pids(t, task.ID()); len(left) > 0 {
			t.Errorf("processes %v outlive their task", left)
		}
		if left := residue(t, e, task.ID()); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestAdoptClearsAway(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tasks")
	e := open(t, dir)
	half, gone := filepath.Join(dir, warden.NewID()), filepath.Join(dir, ".removing-"+warden.NewID())
	for _, d := range []string{half, gone} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "lock"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tasks, err := e.Adopt(t.Context())
	if err != nil || len(tasks) != 0 {
		t.Errorf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("Adopt() left %v, %v", left, err)
	}
}

// TestI7StateHoldsNoCommand: the task's directory names neither command nor environment, and is closed to others.
func TestI7StateHoldsNoCommand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tasks")
	e := open(t, dir)
	task, err := e.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: process.Image, Command: []string{"/bin/sleep", "60.00125"},
		Env: []string{"TOKEN=in-the-environment"}})
	if err != nil {
		t.Fatal(err)
	}
	defer task.Remove(context.Background())
	files, err := filepath.Glob(filepath.Join(dir, task.ID(), "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, path := range append(files, dir, filepath.Dir(files[0])) {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
		}
		if b, _ := os.ReadFile(path); strings.Contains(string(b), "60.00125") || strings.Contains(string(b), "in-the-environment") {
			t.Errorf("%s holds the command or the environment", path)
		}
	}
}

func TestNewRefusesOpenDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the process executor needs root")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := process.New(dir, self, slog.New(slog.DiscardHandler)); warden.CodeOf(err) != warden.CodePermissions {
		t.Errorf("New(directory open to others) = %v, want code %s", err, warden.CodePermissions)
	}
}
