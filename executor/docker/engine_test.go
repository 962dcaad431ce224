package docker_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor"
	"warden/executor/docker"
)

// holderVerb makes the test binary the holder of an engine's namespaces: they must outlive the engine, or its containers lose
// what it mounted for them.
const holderVerb = "test-holder"

// holder starts the engine of its arguments whenever it reads a line, and says its pid. It ends with its standard input.
func holder() {
	fail := func(err error) {
		fmt.Println("error", err)
		os.Exit(1)
	}
	err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), os.MkdirAll("/run/docker", 0o755),
		unix.Mount("own", "/run/docker", "tmpfs", 0, ""))
	for name, line := range map[string]string{"passwd": remapUser + ":x:5000:5000::/:/bin/false", "group": remapUser + ":x:5000:",
		"subuid": remapUser + ":" + remapIDs, "subgid": remapUser + ":" + remapIDs} {
		own := filepath.Join("/run/docker", name) // seen by this engine alone
		b, readErr := os.ReadFile("/etc/" + name)
		err = errors.Join(err, os.WriteFile(own, append(b, line+"\n"...), 0o644))
		if readErr == nil { // on a host without the file, only the test of remapping fails
			err = errors.Join(err, unix.Mount(own, "/etc/"+name, "", unix.MS_BIND, ""))
		}
	}
	if err != nil {
		fail(err)
	}
	// Who inherits what a killed engine leaves must reap it: the next engine takes a zombie for its containerd.
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fail(err)
	}
	go func() { // ends with the process
		for range children {
			for {
				if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}()
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		log, err := os.OpenFile(os.Args[2], os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			fail(err)
		}
		cmd := exec.Command(os.Args[3], os.Args[4:]...)
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			fail(err)
		}
		log.Close()
		fmt.Println(cmd.Process.Pid)
	}
	os.Exit(0)
}

// Whom the uids of containers belong to where an engine remaps them.
const (
	remapUser = "warden-test-remap"
	remapIDs  = "300000:65536"
)

// ownEngine is a Docker Engine of the test's own: data, sockets, network and mount namespace apart from the machine's.
type ownEngine struct {
	lab
	dir, cgroup string
	holder      *exec.Cmd
	in          io.WriteCloser
	out         *bufio.Reader
	pid         int
}

// newEngine prepares an engine that does not run yet.
func newEngine(t *testing.T, live bool, options ...string) *ownEngine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("an engine of its own needs root")
	}
	dockerd, err := exec.LookPath("dockerd")
	if err != nil {
		t.Skip("no dockerd is installed")
	}
	if testing.Short() {
		t.Skip("starts an engine of its own")
	}
	dir, err := os.MkdirTemp("", "warden-engine-") // short: paths of sockets are bounded
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { // for an engine that remaps users
		t.Fatal(err)
	}
	e := &ownEngine{dir: dir, cgroup: "warden-test-" + warden.NewID()}
	e.host = "unix://" + filepath.Join(dir, "sock")
	config := filepath.Join(dir, "daemon.json")
	if err := os.WriteFile(config, []byte(fmt.Sprintf(`{"live-restore":%t,"shutdown-timeout":2}`, live)), 0o600); err != nil {
		t.Fatal(err)
	}
	e.holder = exec.Command(self, append([]string{holderVerb, filepath.Join(dir, "log"), dockerd, "-H", e.host, "--data-root", filepath.Join(dir, "data"),
		"--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"), "--config-file", config, "--cgroup-parent", "/" + e.cgroup}, options...)...)
	e.holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}
	e.holder.Stderr = os.Stderr
	in, err1 := e.holder.StdinPipe()
	out, err2 := e.holder.StdoutPipe()
	if err := errors.Join(err1, err2, e.holder.Start()); err != nil {
		t.Fatal(err)
	}
	e.in, e.out = in, bufio.NewReader(out)
	t.Cleanup(func() { e.end(t) })
	if line, err := e.out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("the engine's holder said %q, %v", line, err)
	}
	return e
}

// run starts the engine and waits until it answers.
func (e *ownEngine) run(t *testing.T) {
	t.Helper()
	_, err := fmt.Fprintln(e.in, "start")
	line, readErr := e.out.ReadString('\n')
	pid, parseErr := strconv.Atoi(strings.TrimSpace(line))
	if err := errors.Join(err, readErr, parseErr); err != nil {
		t.Fatalf("starting an engine: %v (%q)", err, line)
	}
	e.pid = pid
	await(t, time.Minute, func() error {
		if !docker.Answers(t.Context(), e.host, time.Second) {
			log, _ := os.ReadFile(filepath.Join(e.dir, "log"))
			return fmt.Errorf("the engine does not answer:\n%s", log[max(0, len(log)-2000):])
		}
		return nil
	})
	if e.cli == nil {
		e.open(t, e.host)
	}
}

// halt ends the engine by a signal and waits until it is gone.
func (e *ownEngine) halt(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := unix.Kill(e.pid, s); err != nil {
		t.Fatal(err)
	}
	await(t, time.Minute, func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", e.pid))
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			return nil
		}
		return errors.New("the engine has not ended")
	})
	e.pid = 0
}

// end kills all that runs in the engine's mount namespace and under its cgroup, and removes its files.
func (e *ownEngine) end(t *testing.T) {
	if t.Failed() {
		log, _ := os.ReadFile(filepath.Join(e.dir, "log"))
		t.Logf("log of the engine:\n%s", log[max(0, len(log)-4000):])
	}
	mine, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", e.holder.Process.Pid))
	if err != nil {
		t.Error(err)
	}
	await(t, 30*time.Second, func() error {
		var left []string
		all, _ := filepath.Glob("/proc/[0-9]*")
		for _, path := range all {
			pid, _ := strconv.Atoi(filepath.Base(path))
			if pid == e.holder.Process.Pid {
				continue
			}
			ns, _ := os.Readlink(path + "/ns/mnt")
			cgroups, _ := os.ReadFile(path + "/cgroup")
			if ns == mine || bytes.Contains(cgroups, []byte("/"+e.cgroup+"/")) {
				_ = unix.Kill(pid, unix.SIGKILL)
				left = append(left, path)
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("%q do not end", left)
		}
		return nil
	})
	e.in.Close()
	_ = e.holder.Wait()
	await(t, 30*time.Second, func() error { return errors.Join(os.RemoveAll(e.dir), e.removeCgroups()) })
}

// removeCgroups removes the engine's part of every hierarchy.
func (e *ownEngine) removeCgroups() (failed error) {
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + e.cgroup, "/sys/fs/cgroup/" + e.cgroup} {
		roots, _ := filepath.Glob(pattern)
		for _, root := range roots {
			var dirs []string
			_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			slices.Reverse(dirs)
			for _, dir := range dirs {
				if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
					failed = errors.Join(failed, err)
				}
			}
		}
	}
	return failed
}

// runs reports whether a process is there and has not ended: one that nobody has waited for yet has.
func runs(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err == nil && !bytes.Contains(b, []byte("State:\tZ")) && !bytes.Contains(b, []byte("State:\tX"))
}

// TestEngineMissingAtTheStart: without an engine the executor opens, adopts, and refuses tasks with a reason; with the engine there, it
// works.
func TestEngineMissingAtTheStart(t *testing.T) {
	t.Parallel()
	own := newEngine(t, false)
	e := own.executor(t, tasksDir(t))
	if tasks, err := e.Adopt(t.Context()); err != nil || len(tasks) != 0 {
		t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	_, err := e.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: "any", Command: []string{"sleep", "60"}})
	if warden.CodeOf(err) != warden.CodeUnavailable || !strings.Contains(err.Error(), "not reachable") || warden.HintOf(err) == "" {
		t.Errorf("Start() = %v (hint: %s)", err, warden.HintOf(err))
	}
	if left, err := filepath.Glob(filepath.Join(e.dir, "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("Start() left %q, %v", left, err)
	}
	own.run(t)
	file, canary := password()
	task := start(t, e, executor.Spec{Command: script("cat /run/secrets/password"), Secrets: []executor.SecretFile{file}})
	if exit := wait(t, task); exit.Code != 0 || logs(t, task) != canary+"\n" {
		t.Errorf("ended with %+v, log %q", exit, logs(t, task))
	}
}

// counting prints a number again and again until it is asked to end.
const counting = `trap 'cat /run/secrets/password; echo; exit 4' TERM; n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done`

// TestEngineRestartsUnderTasks: with live-restore tasks go on while the engine is stopped or killed and started again; Wait waits, a
// followed log goes on without a gap, and the daemon may die meanwhile.
func TestEngineRestartsUnderTasks(t *testing.T) {
	t.Parallel()
	own := newEngine(t, true)
	own.run(t)
	for _, s := range []syscall.Signal{unix.SIGTERM, unix.SIGKILL} {
		e := own.executor(t, tasksDir(t))
		file, canary := password()
		task := start(t, e, executor.Spec{Command: script(counting), Secrets: []executor.SecretFile{file}})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		lines, end := make(chan string, 1<<16), make(chan error, 1)
		go func() { // ends with the log, or with ctx
			end <- task.Logs(ctx, executor.LogOptions{Follow: true, Tail: -1}, func(l executor.Line) error { lines <- string(l.Data); return nil })
			close(lines)
		}()
		next, last := 1, ""
		count := func(until int) {
			for next < until {
				select {
				case line, more := <-lines:
					if !more {
						exit, err := task.Wait(ctx)
						t.Fatalf("%v: the log ended after %q with %v, the task with %+v, %v", s, last, <-end, exit, err)
					}
					last = line
				case <-ctx.Done():
					t.Fatalf("%v: no line after %q", s, last)
				}
				if last != strconv.Itoa(next) {
					t.Fatalf("%v: line %q follows %d", s, last, next-1)
				}
				next++
			}
		}
		count(20)
		pid := own.inspect(t, task.ID()).State.Pid
		own.halt(t, s)
		if !runs(pid) {
			t.Fatalf("%v: the task went with the engine", s)
		}
		tasks, err := own.executor(t, e.dir).Adopt(t.Context()) // a daemon that starts while there is no engine
		if err != nil || len(tasks) != 1 {
			t.Fatalf("%v: Adopt() without an engine = %d tasks, %v", s, len(tasks), err)
		}
		for _, handle := range []executor.Task{task, tasks[0]} {
			short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			if exit, err := handle.Wait(short); err == nil {
				t.Errorf("%v: Wait() without an engine = %+v", s, exit)
			}
			cancel()
		}
		own.run(t)
		count(next + 50)
		if err := tasks[0].Stop(t.Context(), 20*time.Second); err != nil {
			t.Fatal(err)
		}
		for _, handle := range []executor.Task{task, tasks[0]} {
			if exit := wait(t, handle); exit.Code != 4 || exit.Error != "" {
				t.Errorf("%v: ended with %+v", s, exit)
			}
		}
		for line := range lines {
			last = line
		}
		if err := <-end; err != nil || last != canary {
			t.Errorf("%v: the log ended with %q, %v", s, last, err)
		}
		if err := task.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEngineTakesTasksWithIt: without live-restore an engine that ends takes its containers with it; the tasks have failed, and their
// end is known whether or not the engine comes back.
func TestEngineTakesTasksWithIt(t *testing.T) {
	t.Parallel()
	own := newEngine(t, false)
	own.run(t)
	e := own.executor(t, tasksDir(t))
	for _, s := range []syscall.Signal{unix.SIGTERM, unix.SIGKILL} {
		task := start(t, e, executor.Spec{Command: script("echo ready; exec sleep 600")})
		if got := firstLine(t, task); got != "ready" {
			t.Fatalf("first line = %q", got)
		}
		pid := own.inspect(t, task.ID()).State.Pid
		own.halt(t, s)
		own.run(t)
		if exit := wait(t, task); exit.Code == 0 {
			t.Errorf("%v: ended with %+v", s, exit)
		}
		if runs(pid) {
			t.Errorf("%v: the task is reported ended and runs", s)
		}
	}
	task := start(t, e, executor.Spec{Command: script("echo ready; exec sleep 600")})
	if got := firstLine(t, task); got != "ready" {
		t.Fatalf("first line = %q", got)
	}
	pid := own.inspect(t, task.ID()).State.Pid
	own.halt(t, unix.SIGKILL)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Error == "" { // how it ended nobody says, that it did the kernel does
		t.Errorf("ended with %+v", exit)
	}
	own.run(t)
}

// TestEngineHangs: an engine that does not answer holds nothing up for ever, changes no task's state, and keeps no task alive that has
// to end.
func TestEngineHangs(t *testing.T) {
	t.Parallel()
	own := newEngine(t, true)
	own.run(t)
	e := own.executor(t, tasksDir(t))
	file, _ := password()
	task := start(t, e, executor.Spec{Command: script("echo ready; exec sleep 600"), Secrets: []executor.SecretFile{file}})
	if got := firstLine(t, task); got != "ready" {
		t.Fatalf("first line = %q", got)
	}
	pid := own.inspect(t, task.ID()).State.Pid
	if err := unix.Kill(own.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Kill(own.pid, unix.SIGCONT) })
	await(t, limit, func() error { // its threads stop one after the other
		if docker.Answers(t.Context(), own.host, time.Second) {
			return errors.New("the engine answers")
		}
		return nil
	})
	next := own.executor(t, e.dir)
	tasks, err := next.Adopt(t.Context())
	if err != nil || len(tasks) != 1 {
		t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	_, err = next.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: own.base, Command: []string{"sleep", "60"}})
	if warden.CodeOf(err) != warden.CodeTimeout || warden.HintOf(err) == "" {
		t.Errorf("Start() = %v (hint: %s)", err, warden.HintOf(err))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if exit, err := tasks[0].Wait(ctx); err == nil {
		t.Errorf("Wait() = %+v", exit)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := tasks[0].Stop(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop() = %v", err)
	}
	await(t, limit, func() error {
		if runs(pid) {
			return errors.New("the task runs on")
		}
		return nil
	})
	if err := unix.Kill(own.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for _, handle := range []executor.Task{task, tasks[0]} {
		if exit := wait(t, handle); exit.Signal != "SIGKILL" || exit.Error != "" {
			t.Errorf("ended with %+v", exit)
		}
	}
}

// TestEngineRemapsUsers: where containers have a user namespace, root of an image is a uid that the host does not know, and owns its
// secrets.
func TestEngineRemapsUsers(t *testing.T) {
	t.Parallel()
	own := newEngine(t, false, "--userns-remap="+remapUser)
	own.run(t)
	e := own.executor(t, tasksDir(t))
	for _, c := range []struct{ user, want string }{{"", "300000 300000"}, {"app", "301234 301235"}} {
		image := own.base
		if c.user != "" {
			image = own.image(t, "USER "+c.user)
		}
		file, canary := password()
		other, _ := password()
		other.Target, other.UID, other.GID, other.Mode = "other", 1000, 1001, 0o440
		task := start(t, e, executor.Spec{Image: image, Command: script("cat /run/secrets/password; echo; stat -c '%u %g' /run/secrets/other; exec sleep 60"), Secrets: []executor.SecretFile{file, other}})
		if got := firstLine(t, task); got != canary {
			t.Errorf("USER %q: first line = %q", c.user, got)
		}
		if ids := hostIDs(t, own.inspect(t, task.ID()).State.Pid); ids[0] != c.want || ids[1] != c.want {
			t.Errorf("USER %q: ids = %q, want %q", c.user, ids, c.want)
		}
		await(t, limit, func() error {
			if got := logs(t, task); got != canary+"\n1000 1001\n" {
				return fmt.Errorf("log = %q", got)
			}
			return nil
		})
		if err := task.Stop(t.Context(), 0); err != nil {
			t.Error(err)
		}
	}
}
