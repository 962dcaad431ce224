package powerloss_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"warden/executor"
	"warden/executor/docker"
	"warden/test/powerloss"
)

// openContainers opens the docker executor of a folder and adopts what is there. The gate that it installs is a small file: the engine runs
// this program in its place.
func openContainers(base, host string) (*docker.Executor, []executor.Task, error) {
	e, err := docker.New(filepath.Join(state(base), "tasks"), filepath.Join(base, "self"), host, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, nil, err
	}
	tasks, err := e.Adopt(context.Background())
	return e, tasks, err
}

func init() {
	sequences["containers"] = func(base string, note func(string, ...any)) (err error) {
		en, host, err := openEngine(base)
		if err != nil {
			return err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, en.forget())
			}
		}()
		e, _, err := openContainers(base, host)
		if err != nil {
			return err
		}
		return life(func() (executor.Task, error) { return e.Start(context.Background(), spec("app", "sleep", "100")) }, note)
	}
	// live containers is the next daemon, and another one on the same state whose engine has lost its containers too.
	sequences["live containers"] = func(base string, _ func(string, ...any)) error {
		notes, err := readNotes(base)
		if err != nil {
			return err
		}
		without := base + ".without"
		tree, err := powerloss.ReadTree(base)
		if err != nil {
			return err
		}
		err = errors.Join(liveContainers(base, notes), tree.WriteTree(without), os.RemoveAll(filepath.Join(without, "engine.json")))
		if err != nil {
			return err
		}
		if err := liveContainers(without, nil); err != nil {
			return fmt.Errorf("without the containers: %w", err)
		}
		return os.RemoveAll(without)
	}
}

// liveContainers wants the daemon to start, to adopt each task that runs and was not to stop, to leave no container that runs without a record,
// and to be able to remove all.
func liveContainers(base string, notes []string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	en, host, err := openEngine(base)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, en.forget()) }()
	ran := en.running()
	_, tasks, err := openContainers(base, host)
	if err != nil {
		return err
	}
	adopted := map[string]executor.Task{}
	for _, t := range tasks {
		adopted[t.ID()] = t
	}
	for id := range en.running() {
		if adopted[id] == nil {
			return fmt.Errorf("task %s runs, and has no record", id)
		}
	}
	for _, n := range notes {
		id, was := strings.CutPrefix(n, "started ")
		if !was || !ran[id] || slices.Contains(notes, "stopped "+id) {
			continue
		}
		if adopted[id] == nil {
			return fmt.Errorf("task %s was started and ran, and is not found", id)
		}
	}
	for id, t := range adopted {
		if !ran[id] {
			if _, err := t.Wait(ctx); err != nil {
				return fmt.Errorf("task %s, which does not run: %w", id, err)
			}
		}
		if err := t.Remove(ctx); err != nil {
			return err
		}
	}
	return await("nothing is left", func() error {
		entries, err := os.ReadDir(filepath.Join(state(base), "tasks"))
		if err != nil || len(entries) != 1 || entries[0].Name() != "gate" || en.left() > 0 {
			return fmt.Errorf("left are %v and %d containers, %v", entries, en.left(), err)
		}
		want, err1 := os.ReadFile(filepath.Join(base, "self"))
		got, err2 := os.ReadFile(filepath.Join(state(base), "tasks", "gate"))
		info, err3 := entries[0].Info()
		if err := errors.Join(err1, err2, err3); err != nil {
			return err
		}
		if !bytes.Equal(got, want) || info.Mode() != 0o755 {
			return fmt.Errorf("the gate is not what it was made of, mode %v", info.Mode())
		}
		return nil
	})
}

func prepareContainers(t *testing.T, base string) {
	if err := os.WriteFile(filepath.Join(base, "self"), bytes.Repeat([]byte("gate"), 3000), 0o700); err != nil {
		t.Fatal(err)
	}
}

// TestContainers: wherever a daemon is killed or loses power as it starts, stops and removes a container, the next one starts, no container runs
// without a record, what was started and runs is found, and no secret is on the disk.
func TestContainers(t *testing.T) {
	needRoot(t)
	attack{sequence: "containers", prepare: prepareContainers, check: func(base string, _ []string) error { return hidden(base) },
		live: liveBy("live containers"), kills: 10, lives: 20}.run(t)
}
