package agent_test

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"warden"
	"warden/executor"
)

// fakeExecutor is a machine: what it runs outlives the agents that use it.
type fakeExecutor struct {
	mu      sync.Mutex
	tasks   map[string]*fakeTask
	started []string                     // IDs, in order
	secrets map[string]map[string]string // by task ID: values by target
	files   []executor.SecretFile        // of all starts
	hold    chan struct{}                // Start of image "slow" waits for it
	fail    error                        // what Adopt gives
}

var _ executor.Executor = (*fakeExecutor)(nil)

func newFakeExecutor() *fakeExecutor {
	return &fakeExecutor{tasks: map[string]*fakeTask{}, secrets: map[string]map[string]string{}, hold: make(chan struct{})}
}

func (e *fakeExecutor) Name() string         { return "fake" }
func (e *fakeExecutor) SecretMounts() string { return "detached" }

// Start runs an image: "host" until it is stopped, "exit0" and "exit3" not at all, "invalid" and "broken" can't be started,
// "slow" when it is let.
func (e *fakeExecutor) Start(ctx context.Context, s executor.Spec) (executor.Task, error) {
	e.mu.Lock()
	e.started = append(e.started, s.TaskID)
	e.mu.Unlock()
	switch s.Image {
	case "invalid":
		return nil, warden.Errorf(warden.CodeInvalid, "starting", "no such program")
	case "broken":
		return nil, errors.New("the machine is broken")
	case "slow":
		select {
		case <-e.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	values := map[string]string{}
	for _, f := range s.Secrets {
		if err := f.Data.Use(func(b []byte) error { values[f.Target] = string(b); return nil }); err != nil {
			return nil, err
		}
	}
	t := &fakeTask{e: e, id: s.TaskID, ended: make(chan struct{}), stubborn: s.Image == "stubborn"}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tasks[t.id], e.secrets[t.id] = t, values
	e.files = append(e.files, s.Secrets...)
	switch s.Image {
	case "exit0":
		t.end(executor.Exit{})
	case "exit3":
		t.end(executor.Exit{Code: 3})
	case "oom":
		t.end(executor.Exit{Code: 137, Signal: "SIGKILL", OutOfMemory: true})
	}
	return t, nil
}

func (e *fakeExecutor) Adopt(context.Context) ([]executor.Task, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []executor.Task
	for _, id := range slices.Sorted(maps.Keys(e.tasks)) {
		all = append(all, e.tasks[id])
	}
	return all, e.fail
}

func (e *fakeExecutor) has(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.tasks[id] != nil
}

func (e *fakeExecutor) starts() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.started)
}

type fakeTask struct {
	e        *fakeExecutor
	id       string
	once     sync.Once
	ended    chan struct{}
	exit     executor.Exit // set before ended is closed
	stubborn bool          // ends only when it is killed
	grace    time.Duration // of the last Stop; guarded by e.mu
}

func (t *fakeTask) end(x executor.Exit) {
	t.once.Do(func() {
		t.exit = x
		close(t.ended)
	})
}

func (t *fakeTask) ID() string { return t.id }

func (t *fakeTask) Wait(ctx context.Context) (executor.Exit, error) {
	select {
	case <-t.ended:
		return t.exit, nil
	case <-ctx.Done():
		return executor.Exit{}, ctx.Err()
	}
}

func (t *fakeTask) Stop(ctx context.Context, grace time.Duration) error {
	t.e.mu.Lock()
	t.grace = grace
	t.e.mu.Unlock()
	if t.stubborn {
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-t.ended:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	t.end(executor.Exit{Code: 143, Signal: "SIGTERM"})
	return nil
}

func (t *fakeTask) Logs(ctx context.Context, o executor.LogOptions, f func(executor.Line) error) error {
	for _, line := range []string{"one", "two"} {
		if err := f(executor.Line{Time: time.Unix(1, 0), Data: []byte(line)}); err != nil {
			return err
		}
	}
	if o.Follow {
		select {
		case <-t.ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (t *fakeTask) Remove(context.Context) error {
	t.end(executor.Exit{Code: 137, Signal: "SIGKILL"})
	t.e.mu.Lock()
	defer t.e.mu.Unlock()
	delete(t.e.tasks, t.id)
	return nil
}
