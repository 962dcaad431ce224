package docker

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"warden"
	"warden/executor"
	"warden/internal/durable"
)

// Times of clearing away what dead daemons left.
const (
	adoptTime   = 5 * time.Second // for the engine, within Adopt
	sweepPause  = 2 * time.Second // between attempts in the background
	sweepPauses = 30 * time.Second
)

// Adopt returns the tasks on record, as executor.Executor says. It needs no engine: whether a task runs, the kernel says, and how it
// ended, the engine when it answers. What was left half made or half removed goes now, or once the engine answers. Errors:
// CodeCorrupt for a record that does not parse.
func (e *Executor) Adopt(ctx context.Context) ([]executor.Task, error) {
	const op = "adopting tasks"
	entries, err := os.ReadDir(e.dir) // sorted
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	var tasks []executor.Task
	unfinished := false
	for _, entry := range entries {
		if !entry.IsDir() || !warden.ValidID(entry.Name()) {
			continue
		}
		t, err := e.adopt(entry.Name())
		if err != nil {
			return nil, warden.Wrap(op, err)
		}
		if t != nil {
			tasks = append(tasks, t)
		} else {
			unfinished = true
		}
	}
	bounded, cancel := context.WithTimeout(ctx, adoptTime)
	defer cancel()
	if err := e.sweep(bounded); ctx.Err() != nil {
		return nil, warden.Wrap(op, ctx.Err())
	} else if err != nil {
		e.logger.Warn("could not look for containers without a task", "error", err)
		unfinished = true
	}
	if unfinished {
		e.sweepLater()
	}
	return tasks, nil
}

// adopt returns the task of one directory; nil for one that is being started, or never was.
func (e *Executor) adopt(id string) (*task, error) {
	if e.claim(id) != nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.tasks[id], nil
	}
	defer e.unclaim(id)
	op := "adopting task " + id
	r, err := loadRecord(e.taskDir(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	t := &task{e: e, id: id, record: r, done: make(chan struct{})}
	if r.Exit == nil {
		if t.pidfd, err = r.findProcess(); err != nil {
			return nil, warden.Recode(warden.CodeInternal, op, err)
		}
		if !r.StopBy.IsZero() {
			t.order(r.StopBy, true)
		}
	}
	e.mu.Lock()
	e.tasks[id] = t
	e.mu.Unlock()
	t.watch()
	e.logger.Info("adopted task", "task_id", id, "container_id", r.Container, "running", t.pidfd != nil)
	return t, nil
}

// sweep removes the containers of this state directory, and the directories, that belong to no task.
func (e *Executor) sweep(ctx context.Context) error {
	entries, err := os.ReadDir(e.dir)
	if err != nil {
		return warden.Recode(warden.CodeInternal, "sweeping", err)
	}
	ids := map[string]bool{}
	for _, entry := range entries {
		if entry.IsDir() && warden.ValidID(entry.Name()) {
			ids[entry.Name()] = true
		}
	}
	containers, err := e.engine.mine(ctx, e.mark, "")
	if err != nil {
		return err
	}
	for _, id := range containers {
		ids[id] = true
	}
	for id := range ids {
		if _, err := os.Lstat(filepath.Join(e.taskDir(id), recordFile)); err == nil || e.claim(id) != nil {
			continue // a task's, or soon to be one's
		}
		err := e.discard(ctx, id)
		e.unclaim(id)
		if err != nil {
			return err
		}
	}
	return nil
}

// discard removes all of a start that was not finished. The caller has claimed the ID.
func (e *Executor) discard(ctx context.Context, id string) error {
	containers, err := e.engine.mine(ctx, e.mark, id)
	if err != nil {
		return err
	}
	for c := range containers {
		if err := e.engine.remove(ctx, c); err != nil {
			return err
		}
	}
	if len(containers) > 0 {
		e.logger.Info("removed the container of an unfinished start", "task_id", id)
	}
	return e.wipeDir(id)
}

func (e *Executor) wipeDir(id string) error {
	if !warden.ValidID(id) {
		return nil // of a container that somebody labelled
	}
	return durable.RemoveAll(e.taskDir(id))
}

// sweepLater sweeps in the background until it has worked, and has worked after the last moment at which the engine may still do
// what a caller that is gone asked of it. One goroutine at a time.
func (e *Executor) sweepLater() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sweepUntil = time.Now().Add(workTime)
	if e.sweeping {
		return
	}
	e.sweeping = true
	go func() { // ends when the engine has answered
		ctx := context.Background()
		for wait := sweepPause; ; wait = min(2*wait, sweepPauses) {
			pause(ctx, wait)
			asked := time.Now()
			if err := e.sweep(ctx); err == nil && e.swept(asked) {
				return
			}
		}
	}()
}

// swept reports whether a sweep that began then was the last one that is due.
func (e *Executor) swept(began time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sweeping = began.Before(e.sweepUntil)
	return !e.sweeping
}
