package powerloss_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/executor"
	"warden/executor/process"
	"warden/internal/sensitive"
)

func openTasks(base string) (*process.Executor, []executor.Task, error) {
	e, err := process.New(filepath.Join(state(base), "tasks"), "/proc/self/exe", slog.New(slog.DiscardHandler), process.WithoutCgroups)
	if err != nil {
		return nil, nil, err
	}
	tasks, err := e.Adopt(context.Background())
	return e, tasks, err
}

func init() {
	sequences["tasks"] = func(base string, note func(string, ...any)) error {
		ctx := context.Background()
		e, _, err := openTasks(base)
		if err != nil {
			return err
		}
		start := func() (executor.Task, error) {
			t, err := e.Start(ctx, executor.Spec{TaskID: warden.NewID(), Image: "host", Command: []string{"sleep", "100"},
				Secrets: []executor.SecretFile{{Target: "s", Mode: 0o400, Data: sensitive.New([]byte("secret"))}}})
			if err == nil {
				note("started %s", t.ID())
			}
			return t, err
		}
		t, err := start()
		if err != nil {
			return err
		}
		if err := t.Stop(ctx, 0); err != nil {
			return err
		}
		note("stopped %s", t.ID())
		if err := t.Remove(ctx); err != nil {
			return err
		}
		note("removed %s", t.ID())
		_, err = start()
		return err
	}
}

// checkTasks wants the next daemon to find the tasks that were started and not removed, to end them, and to leave nothing.
func checkTasks(base string, notes []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	_, tasks, err := openTasks(base)
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
	if _, tasks, err = openTasks(base); err != nil || len(tasks) > 0 {
		return fmt.Errorf("after their removal: %d tasks, %w", len(tasks), err)
	}
	dir := filepath.Join(state(base), "tasks")
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		return fmt.Errorf("left is %v, %w", entries, err)
	}
	return nil
}

// TestTasks: wherever a daemon is killed as it starts, stops and removes a task, the next one finds the task, or nothing of it.
func TestTasks(t *testing.T) {
	needRoot(t)
	attack{sequence: "tasks", check: checkTasks, kills: 10, isShared: true}.run(t)
}
