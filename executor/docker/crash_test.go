package docker_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"warden"
	"warden/executor"
	"warden/executor/docker"
	"warden/internal/sensitive"
)

// daemon starts one task with a secret that it reads, prints its ID, and waits. args: folder, engine, task ID, image, script.
func daemon(args []string) {
	fail := func(err error) {
		fmt.Println("error", err)
		os.Exit(1)
	}
	value, err := io.ReadAll(os.Stdin)
	if err != nil {
		fail(err)
	}
	e, err := docker.New(args[0], self, args[1], slog.New(slog.DiscardHandler))
	if err != nil {
		fail(err)
	}
	_, err = e.Start(context.Background(), executor.Spec{TaskID: args[2], Image: args[3], Command: script(args[4]),
		Secrets: []executor.SecretFile{{Target: "password", Mode: 0o400, Data: sensitive.New(value)}}})
	if err != nil {
		fail(err)
	}
	fmt.Println("started")
	select {}
}

// startDaemon starts such a daemon.
func (l *lab) startDaemon(t testing.TB, dir, taskID, text, secret string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(self, daemonVerb, dir, l.host, taskID, l.base, text)
	cmd.Stdin = strings.NewReader(secret)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewReader(out)
}

func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

const obedient = "trap 'cat /run/secrets/password; exit 6' TERM; echo ready; while :; do sleep 0.01; done"

// TestI7DaemonKilled: kill -9 of the daemon changes neither task nor secret; the next daemon finds both.
func TestI7DaemonKilled(t *testing.T) {
	l := engineLab(t)
	dir, id, canary := tasksDir(t), warden.NewID(), "canary-"+warden.NewID()
	cmd, out := l.startDaemon(t, dir, id, obedient, canary)
	if line, err := out.ReadString('\n'); line != "started\n" {
		kill(cmd)
		t.Fatalf("daemon said %q, %v", line, err)
	}
	kill(cmd)
	e := l.executor(t, dir)
	tasks, err := e.Adopt(t.Context())
	if err != nil || len(tasks) != 1 || tasks[0].ID() != id {
		t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	task := tasks[0]
	cleanUp(t, e, task)
	if got := firstLine(t, task); got != "ready" {
		t.Errorf("first line = %q", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if exit, err := task.Wait(ctx); err == nil {
		t.Fatalf("the task ended with its daemon: %+v", exit)
	}
	if err := task.Stop(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code != 6 || logs(t, task) != "ready\n"+canary+"\n" {
		t.Errorf("task ended with %+v, log %q", exit, logs(t, task))
	}
}

// TestStopStands: an order to stop outlives the daemon that got it.
func TestStopStands(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	task := start(t, e, executor.Spec{Command: script("trap 'echo asked' TERM; echo ready; while :; do sleep 0.01; done")})
	if got := firstLine(t, task); got != "ready" {
		t.Fatalf("first line = %q", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := task.Stop(ctx, 3*time.Second); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop() = %v", err)
	}
	next := l.executor(t, e.dir)
	tasks, err := next.Adopt(t.Context())
	if err != nil || len(tasks) != 1 {
		t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	if exit := wait(t, tasks[0]); exit.Signal != "SIGKILL" || !strings.HasPrefix(logs(t, task), "ready\nasked\n") {
		t.Errorf("task ended with %+v, log %q", exit, logs(t, task))
	}
}

// TestDaemonKilledInStart: wherever the daemon is killed, its task either runs on with its secret or nothing of it runs, and the
// next daemon clears away the rest.
func TestDaemonKilledInStart(t *testing.T) {
	l := engineLab(t)
	exists := func(name string) func(dir, id string) bool {
		return func(dir, id string) bool { _, err := os.Lstat(filepath.Join(dir, id, name)); return err == nil }
	}
	state := func(f func(pid int) bool) func(dir, id string) bool {
		return func(_, id string) bool {
			for _, c := range l.containers(t, id) {
				r, err := l.cli.ContainerInspect(t.Context(), c, client.ContainerInspectOptions{})
				return err == nil && f(r.Container.State.Pid)
			}
			return false
		}
	}
	for _, stage := range []struct {
		name    string
		reached func(dir, id string) bool
	}{
		{"directory", exists(".")}, {"socket", exists("gate.sock")}, {"container", func(_, id string) bool { return len(l.containers(t, id)) > 0 }},
		{"gate", state(func(pid int) bool { return pid > 0 })},
		{"secrets", state(func(pid int) bool {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
			return bytes.Contains(b, []byte("/run/secrets ")) && bytes.Contains(b, []byte(" - tmpfs warden "))
		})},
		{"record", exists("task.json")},
	} {
		t.Run(stage.name, func(t *testing.T) {
			dir, id, canary := tasksDir(t), warden.NewID(), "canary-"+warden.NewID()
			cmd, _ := l.startDaemon(t, dir, id, "cat /run/secrets/password; echo; exec sleep 60", canary)
			recorded := exists("task.json")
			for deadline := time.Now().Add(limit); !stage.reached(dir, id) && !recorded(dir, id); { // the latter: its moment was missed
				if time.Now().After(deadline) {
					kill(cmd)
					t.Fatal("the stage was never reached")
				}
			}
			kill(cmd)
			e := l.executor(t, dir)
			tasks, err := e.Adopt(t.Context())
			if err != nil || len(tasks) > 1 {
				t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
			}
			if len(tasks) == 1 {
				cleanUp(t, e, tasks[0])
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				defer cancel()
				_, err := tasks[0].Wait(ctx)
				switch line := firstLine(t, tasks[0]); {
				case err == nil || line == "": // it has ended, or its gate was about to, before the program said anything
					if exit := wait(t, tasks[0]); exit.Code != 125 {
						t.Errorf("the task ended with %+v", exit)
					}
				case line != canary:
					t.Errorf("the task runs without its secret: %q", logs(t, tasks[0]))
				}
				return
			}
			await(t, limit, func() error { // the engine may still have been at work for the dead daemon, and have started the gate
				if left := l.residue(t, dir, id); len(left) > 0 {
					return fmt.Errorf("Adopt() left %q", left)
				}
				return nil
			})
		})
	}
}

// TestGateFailsClosed: a gate whose daemon has died ends by itself, before any other daemon comes.
func TestGateFailsClosed(t *testing.T) {
	l := engineLab(t)
	for deadline := time.Now().Add(limit); !failsClosed(t, l); { // the daemon may have let the gate through before it was killed
		if time.Now().After(deadline) {
			t.Fatal("of no daemon that was killed the gate stayed closed")
		}
	}
}

// failsClosed kills a daemon whose gate waits. It reports false where the gate was let through before that; the program ends with it then,
// unless it is on record.
func failsClosed(t *testing.T, l *lab) bool {
	dir, id := tasksDir(t), warden.NewID()
	cmd, _ := l.startDaemon(t, dir, id, "echo ran; exec sleep 600", "x")
	await(t, limit, func() error {
		if len(l.containers(t, id)) == 0 {
			return errors.New("no container is made")
		}
		return nil
	})
	kill(cmd)
	e := l.executor(t, dir)
	if _, err := os.Lstat(filepath.Join(dir, id, "task.json")); err == nil {
		tasks, err := e.Adopt(t.Context())
		if err != nil || len(tasks) != 1 {
			t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
		}
		cleanUp(t, e, tasks[0])
		return false
	}
	defer func() {
		if tasks, err := e.Adopt(context.Background()); err != nil || len(tasks) > 0 {
			t.Errorf("Adopt() = %d tasks, %v", len(tasks), err)
		}
	}()
	made := "" // the container, if the engine has kept it: one that it was still making goes with the call of the dead daemon
	await(t, limit, func() error {
		made = ""
		for _, c := range l.containers(t, id) {
			r, err := l.cli.ContainerInspect(t.Context(), c, client.ContainerInspectOptions{})
			if errdefs.IsNotFound(err) {
				return errors.New("the engine is dropping the container")
			}
			if err != nil {
				t.Fatal(err)
			}
			if r.Container.State.Running {
				return errors.New("the container runs")
			}
			made = c
		}
		return nil
	})
	if made == "" {
		return true
	}
	out, err := l.cli.ContainerLogs(t.Context(), made, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true})
	if errdefs.IsNotFound(err) {
		return true
	}
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	said, err := io.ReadAll(out)
	if err != nil {
		t.Errorf("log = %q, %v", said, err)
	}
	return !bytes.Contains(said, []byte("ran"))
}
