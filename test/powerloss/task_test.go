package powerloss_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/executor"
	"warden/executor/process"
	"warden/internal/sensitive"
	"warden/test/powerloss"
)

// canary is the secret of every task.
const canary = "canary-of-the-tasks"

// hidden wants no file to hold the secret.
func hidden(base string) error {
	tree, err := powerloss.ReadTree(state(base))
	for path, f := range tree {
		if bytes.Contains(f.Data, []byte(canary)) {
			return fmt.Errorf("%s holds a secret", path)
		}
	}
	return err
}

// prepareTasks builds what supervisors run: without the race detector, with which each would take a second to end.
func prepareTasks(t *testing.T, base string) {
	helper := filepath.Join(t.TempDir(), "helper")
	if out, err := exec.Command("go", "build", "-o", helper, "warden/executor/process/helper").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(base, "self"), []byte(helper), 0o600); err != nil {
		t.Fatal(err)
	}
}

func openTasks(base string) (*process.Executor, []executor.Task, error) {
	self, err := os.ReadFile(filepath.Join(base, "self"))
	if err != nil {
		return nil, nil, err
	}
	e, err := process.New(filepath.Join(state(base), "tasks"), string(self), slog.New(slog.DiscardHandler), process.WithoutCgroups)
	if err != nil {
		return nil, nil, err
	}
	tasks, err := e.Adopt(context.Background())
	return e, tasks, err
}

// life starts a task, stops it, removes it, and starts another.
func life(start func() (executor.Task, error), note func(string, ...any)) error {
	ctx := context.Background()
	t, err := start()
	if err != nil {
		return err
	}
	note("started %s", t.ID())
	if err := t.Stop(ctx, 0); err != nil {
		return err
	}
	note("stopped %s", t.ID())
	if err := t.Remove(ctx); err != nil {
		return err
	}
	note("removed %s", t.ID())
	if t, err = start(); err == nil {
		note("started %s", t.ID())
	}
	return err
}

// spec is a task of its own ID, with a secret.
func spec(image string, command ...string) executor.Spec {
	return executor.Spec{TaskID: warden.NewID(), Image: image, Command: command,
		Secrets: []executor.SecretFile{{Target: "s", Mode: 0o400, Data: sensitive.New([]byte(canary))}}}
}

// tasks is a life of the process executor. With survives, a start whose supervisor dies may fail: then nothing is left of it, and the next one works.
func tasks(survives bool) func(string, func(string, ...any)) error {
	return func(base string, note func(string, ...any)) error {
		e, _, err := openTasks(base)
		if err != nil {
			return err
		}
		start := func() (executor.Task, error) {
			return e.Start(context.Background(), spec("host", "sh", "-c", "echo out; exec sleep 100"))
		}
		return life(func() (executor.Task, error) {
			t, err := start()
			if err == nil || !survives {
				return t, err
			}
			if left, err := os.ReadDir(filepath.Join(state(base), "tasks")); err != nil || len(left) > 0 {
				return nil, fmt.Errorf("a start that failed left %v, %v", left, err)
			}
			return start()
		}, note)
	}
}

func init() {
	sequences["tasks"] = tasks(false)
	sequences["tasks and supervisors"] = tasks(true)
}

// leftTasks returns what the next daemon finds, once nothing secret shows.
func leftTasks(base string) ([]executor.Task, error) {
	if err := hidden(base); err != nil {
		return nil, err
	}
	_, tasks, err := openTasks(base)
	return tasks, err
}

// checkTasks wants the next daemon to find the tasks that were started and not removed, to end them, and to leave nothing.
func checkTasks(base string, notes []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	tasks, err := leftTasks(base)
	if err != nil {
		return err
	}
	ids := []string{}
	for _, t := range tasks {
		ids = append(ids, t.ID())
		short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		exit, err := t.Wait(short)
		cancel()
		switch has := slices.Contains(notes, "stopped "+t.ID()); {
		case has && err != nil:
			err = errors.New("a task that was stopped runs")
		case err == nil && exit.Error != "" && !strings.Contains(exit.Error, "supervisor died"):
			err = errors.New(exit.Error)
		default:
			err = nil
		}
		if err := errors.Join(err, t.Remove(ctx)); err != nil {
			return err
		}
	}
	for _, n := range notes {
		what, id, _ := strings.Cut(n, " ")
		switch found := slices.Contains(ids, id); {
		case what == "started" && !found && !slices.Contains(notes, "stopped "+id):
			return fmt.Errorf("task %s was started and is not found", id)
		case what == "removed" && found:
			return fmt.Errorf("task %s was removed and is found", id)
		}
	}
	return noTasks(base)
}

// noTasks wants nothing to be left.
func noTasks(base string) error {
	_, tasks, err := openTasks(base)
	if err != nil || len(tasks) > 0 {
		return fmt.Errorf("after their removal: %d tasks, %w", len(tasks), err)
	}
	entries, err := os.ReadDir(filepath.Join(state(base), "tasks"))
	if err != nil || len(entries) > 0 {
		return fmt.Errorf("left is %v, %w", entries, err)
	}
	return nil
}

// checkLostTasks wants the next daemon to start, to find nothing but tasks that have ended, and to be able to remove them. A task of which
// nothing is found is one that the manager is told is lost, as nothing runs after a loss of power.
func checkLostTasks(base string, _ []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	tasks, err := leftTasks(base)
	if err != nil {
		return err
	}
	for _, t := range tasks {
		exit, err := t.Wait(ctx)
		if err == nil && exit.At.IsZero() {
			err = errors.New("it ended at no time")
		}
		err = errors.Join(err, t.Logs(ctx, executor.LogOptions{Tail: -1}, func(executor.Line) error { return nil }))
		if err := errors.Join(err, t.Remove(ctx)); err != nil {
			return fmt.Errorf("task %s: %w", t.ID(), err)
		}
	}
	return noTasks(base)
}

// TestTasks: wherever a daemon is killed as it starts, stops and removes a task, the next one finds the task, or nothing of it.
func TestTasks(t *testing.T) {
	needRoot(t)
	attack{sequence: "tasks", prepare: prepareTasks, check: checkTasks, kills: 10, isShared: true}.run(t)
}

// TestLostTasks: wherever power is lost, or a supervisor is killed, as a task is started, stopped and removed, the next daemon starts, finds
// tasks that have ended or nothing of them, and no secret is on the disk. What is recorded is the daemon's and the supervisors'.
func TestLostTasks(t *testing.T) {
	needRoot(t)
	attack{sequence: "tasks and supervisors", prepare: prepareTasks, check: checkLostTasks, kills: 10, losses: 60, isFollowed: true}.run(t)
}
