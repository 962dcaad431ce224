package agent

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"time"

	"warden"
	"warden/api"
	"warden/executor"
	"warden/internal/sensitive"
)

// Back-off of stopping and wiping a task, which is tried until it works.
const (
	wipeBackoffMin = 500 * time.Millisecond
	wipeBackoffMax = 30 * time.Second
)

// task is one that this node has. Its life is one goroutine at a time (Agent.live).
type task struct {
	id   string
	stop chan struct{} // closed: it has to end
	drop chan struct{} // closed: it has to end, and all of it has to go
	exec executor.Task // nil until it was started; written by live under Agent.mu, read by live, and under Agent.mu elsewhere

	// The fields below are guarded by Agent.mu.
	record             *api.Task       // as assigned; nil for one that was adopted and not named yet
	status             *api.TaskStatus // replaced, never changed
	stopping, dropping bool            // the channels above are closed
	grace              time.Duration
	living             bool // a goroutine runs live
}

// order makes the task end, and go where drop is set. Called with Agent.mu held.
func (t *task) order(drop bool) {
	if !t.stopping {
		t.stopping = true
		close(t.stop)
	}
	if drop && !t.dropping {
		t.dropping = true
		close(t.drop)
	}
}

// told reports whether the task has to end.
func (t *task) told() bool {
	select {
	case <-t.stop:
		return true
	default:
		return false
	}
}

// live takes the task from where it is to its end and, when it is dropped, wipes it. It returns when the task is gone, or
// with ctx: then the task stays as it is (I7), and live may be called again.
func (a *Agent) live(ctx context.Context, t *task) {
	if !a.ended(t) && t.exec == nil {
		a.begin(ctx, t)
	}
	if !a.ended(t) && t.exec != nil {
		a.attend(ctx, t)
	}
	select {
	case <-t.drop:
	case <-ctx.Done():
		return
	}
	if t.exec != nil {
		a.insist(ctx, "wiping task", t, func() error { return t.exec.Remove(ctx) })
	}
	if ctx.Err() == nil {
		a.forget(t)
	}
}

// begin starts the task, unless it is told to stop first.
func (a *Agent) begin(ctx context.Context, t *task) {
	if t.told() {
		a.set(t, api.TaskState_TASK_SHUTDOWN, "stopped before it was started", "")
		return
	}
	a.set(t, api.TaskState_TASK_ACCEPTED, "accepted", "")
	select {
	case a.starts <- struct{}{}:
	case <-t.stop:
		a.set(t, api.TaskState_TASK_SHUTDOWN, "stopped before it was started", "")
		return
	case <-ctx.Done():
		return
	}
	defer func() { <-a.starts }()
	a.set(t, api.TaskState_TASK_PREPARING, "preparing", "")
	started, err := a.start(ctx, t)
	switch {
	case err == nil:
		a.mu.Lock()
		t.exec = started
		a.mu.Unlock()
		a.set(t, api.TaskState_TASK_RUNNING, "running", "")
	case ctx.Err() != nil: // nothing is left of it; the next daemon starts it, or says that it is lost where "starting" was reported
	case t.told():
		a.set(t, api.TaskState_TASK_SHUTDOWN, "stopped while it was started", "")
	case warden.CodeOf(err) == warden.CodeInvalid, warden.CodeOf(err) == warden.CodeTooLarge:
		a.set(t, api.TaskState_TASK_REJECTED, "rejected", err.Error())
	default:
		a.set(t, api.TaskState_TASK_FAILED, "could not be started", err.Error())
	}
}

// start has the executor start the task, unless it is told to stop meanwhile. No copy of a secret is left when it returns.
func (a *Agent) start(ctx context.Context, t *task) (executor.Task, error) {
	a.mu.Lock()
	record := t.record
	a.mu.Unlock()
	spec, err := a.spec(record)
	defer wipe(spec)
	if err != nil {
		return nil, err
	}
	a.set(t, api.TaskState_TASK_STARTING, "starting", "")
	ctx, cancel := context.WithCancel(ctx)
	settled := onClose(ctx, t.stop, cancel)
	defer settled()
	defer cancel()
	return a.cfg.Executor.Start(ctx, spec)
}

// onClose calls f when c is closed, unless ctx ends first; the function it returns waits for that to be settled.
func onClose(ctx context.Context, c <-chan struct{}, f func()) (settled func()) {
	done := make(chan struct{})
	go func() { // ends with ctx at the latest
		defer close(done)
		select {
		case <-c:
			f()
		case <-ctx.Done():
		}
	}()
	return func() { <-done }
}

// attend waits for the running task's end and brings it about when it is ordered.
func (a *Agent) attend(ctx context.Context, t *task) {
	type outcome struct {
		exit executor.Exit
		err  error
	}
	waitCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan outcome, 1)
	go func() { // ends with waitCtx, or with the task
		exit, err := t.exec.Wait(waitCtx)
		over <- outcome{exit, err}
	}()
	var end outcome
	select {
	case end = <-over:
		if ctx.Err() != nil && end.err != nil {
			return
		}
		a.finish(t, end.exit, end.err)
		return
	case <-t.stop:
	case <-ctx.Done():
		<-over
		return
	}
	a.insist(ctx, "stopping task", t, func() error { return t.exec.Stop(ctx, a.grace(t)) })
	end = <-over
	if ctx.Err() != nil && end.err != nil {
		return
	}
	a.setExit(t, api.TaskState_TASK_SHUTDOWN, "stopped", "", end.exit)
}

// finish sets the state of a task that ended without being told to.
func (a *Agent) finish(t *task, exit executor.Exit, err error) {
	switch {
	case err != nil:
		a.set(t, api.TaskState_TASK_FAILED, "out of sight", err.Error())
	case exit.Error != "":
		a.setExit(t, api.TaskState_TASK_FAILED, "failed", exit.Error, exit)
	case exit.OutOfMemory && (exit.Signal != "" || exit.Code != 0):
		a.setExit(t, api.TaskState_TASK_FAILED, "failed", "the kernel killed some of it at its memory limit", exit)
	case exit.Signal != "":
		a.setExit(t, api.TaskState_TASK_FAILED, "failed", "ended by "+exit.Signal, exit)
	case exit.Code != 0:
		a.setExit(t, api.TaskState_TASK_FAILED, "failed", fmt.Sprintf("exit code %d", exit.Code), exit)
	default:
		a.setExit(t, api.TaskState_TASK_COMPLETE, "complete", "", exit)
	}
}

// insist calls f until it works or ctx ends.
func (a *Agent) insist(ctx context.Context, what string, t *task, f func() error) {
	for backoff := wipeBackoffMin; ; backoff = min(2*backoff, wipeBackoffMax) {
		err := f()
		if err == nil || ctx.Err() != nil {
			return
		}
		a.cfg.Logger.Error("failed at "+what, "task_id", t.id, "error", err)
		sleep(ctx, backoff)
		if ctx.Err() != nil {
			return
		}
	}
}

// spec returns what the executor needs, with copies of the secrets that are the caller's to wipe. Errors: CodeInvalid where
// the task needs a secret that this node was not given; CodeTooLarge.
func (a *Agent) spec(record *api.Task) (executor.Spec, error) {
	s := record.GetSpec()
	spec := executor.Spec{TaskID: record.GetId(), ServiceName: record.GetServiceName(), Image: s.GetImage(), Command: s.GetCommand(),
		Env: s.GetEnv(), Labels: s.GetLabels(), LimitNanoCPUs: s.GetResources().GetLimitNanoCpus(),
		LimitMemoryBytes: s.GetResources().GetLimitMemoryBytes(), StopGrace: graceOf(record)}
	bytesTotal := 0
	for _, ref := range s.GetSecrets() {
		a.mu.Lock()
		value, held := a.secrets[versionID(ref.GetSecretId(), ref.GetVersion())]
		a.mu.Unlock()
		data, err := sensitive.Bytes{}, error(nil)
		if held {
			data, err = clone(value)
		}
		if !held || err != nil {
			return spec, invalid("this node was not given version %d of secret %q", ref.GetVersion(), ref.GetSecretName())
		}
		spec.Secrets = append(spec.Secrets, executor.SecretFile{Target: ref.GetTarget(), UID: ref.GetUid(), GID: ref.GetGid(),
			Mode: cmp.Or(ref.GetMode(), modeDefault), Data: data})
		if bytesTotal += data.Len(); bytesTotal > warden.TaskSecretsMax {
			return spec, tooLarge("the sum of the task's secrets")
		}
	}
	return spec, nil
}

func clone(value sensitive.Bytes) (copied sensitive.Bytes, err error) {
	err = value.Use(func(b []byte) error {
		copied = sensitive.New(bytes.Clone(b))
		return nil
	})
	return copied, err
}

func wipe(spec executor.Spec) {
	for _, s := range spec.Secrets {
		s.Data.Wipe()
	}
}

func graceOf(record *api.Task) time.Duration {
	if ns := record.GetSpec().GetStopGraceNs(); ns > 0 {
		return time.Duration(ns)
	}
	return warden.StopGraceDefault
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
