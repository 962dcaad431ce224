// Package conformance is the suite that each executor passes: what executor.Executor promises, tried on real tasks.
//
// It knows nothing of how an executor works; what it must know of the host it is told by Host. The programs that it runs are
// shell scripts, so an image needs /bin/sh, coreutils, findutils, grep, util-linux and perl-base, as every Debian has. An implementation's own test
// calls Run and adds what is particular to it. The suite needs root.
package conformance

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/executor"
	"warden/internal/sensitive"
)

// Host is what the suite must know of the implementation and the machine.
type Host struct {
	Image string // one that has a shell
	// Reopen returns a new executor on the state of e: what a daemon has that starts again after e's died.
	Reopen func(t *testing.T, e executor.Executor) executor.Executor
	// Paths returns files and directories of the host that must never hold a secret, the executor's state among them.
	Paths func(e executor.Executor) []string
	// Residue names all that is left of a task on this host: directories, cgroups, containers, mounts.
	Residue  func(t *testing.T, e executor.Executor, taskID string) []string
	OwnFiles bool // the image has files of its own; else it is the host's, of which some are hidden and the rest is not suid
	IDs      bool // a secret can be given to another uid than the task's own
	Memory   bool // memory limits are enforced on this machine
	Pids     int  // processes that a task may have; 0: not enforced on this machine
}

// Run runs the suite. open returns an executor with a state of its own, which lives until the end of t.
func Run(t *testing.T, open func(t *testing.T) executor.Executor, h Host) {
	if os.Geteuid() != 0 {
		t.Skip("executors need root")
	}
	for _, c := range []struct {
		name string
		test func(*testing.T, suite)
	}{
		{"Exit", testExit}, {"Refusals", testRefusals}, {"Wait", testWait}, {"Stop", testStop}, {"StopKillsAll", testStopKillsAll},
		{"StopSooner", testStopSooner}, {"Reaps", testReaps}, {"Environment", testEnvironment}, {"Logs", testLogs}, {"LogsFollow", testLogsFollow},
		{"LogsBounded", testLogsBounded}, {"Secrets", testSecrets}, {"SecretsNowhereElse", testSecretsNowhereElse},
		{"SecretsOfOthers", testSecretsOfOthers}, {"Isolation", testIsolation}, {"SystemCalls", testSystemCalls},
		{"MemoryLimit", testMemoryLimit}, {"PidsLimit", testPidsLimit}, {"Adopt", testAdopt}, {"Remove", testRemove}, {"Many", testMany},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, suite{Host: h, e: open(t)}) })
	}
}

// suite is one test's executor and its helpers.
type suite struct {
	Host
	e executor.Executor
}

func (s suite) spec(script string) executor.Spec {
	return executor.Spec{TaskID: warden.NewID(), ServiceName: "conformance", Image: s.Image, Command: []string{"/bin/sh", "-c", script}}
}

// secret returns a secret file with a value that is found nowhere by chance.
func secret(target string) (executor.SecretFile, string) {
	canary := "canary-" + warden.NewID()
	return executor.SecretFile{Target: target, Mode: 0o400, Data: sensitive.New([]byte(canary))}, canary
}

// start starts a task that is removed at the end of the test.
func (s suite) start(t *testing.T, spec executor.Spec) executor.Task {
	t.Helper()
	task, err := s.e.Start(t.Context(), spec)
	if err != nil {
		t.Fatalf("Start(%q) = %v (hint: %s)", spec.Command, err, warden.HintOf(err))
	}
	t.Cleanup(func() { // t.Context is done by then
		if err := task.Remove(context.Background()); err != nil {
			t.Errorf("Remove() = %v", err)
		}
		if left := s.Residue(t, s.e, task.ID()); len(left) > 0 {
			t.Errorf("Remove() left %q", left)
		}
	})
	return task
}

func wait(t *testing.T, task executor.Task) executor.Exit {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	exit, err := task.Wait(ctx)
	if err != nil {
		t.Fatalf("Wait() = %v", err)
	}
	if exit.At.IsZero() || time.Since(exit.At) > time.Hour {
		t.Errorf("Wait().At = %v", exit.At)
	}
	return exit
}

// output returns all lines of the task's log.
func output(t *testing.T, task executor.Task) (stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	err := task.Logs(t.Context(), executor.LogOptions{Tail: -1}, func(l executor.Line) error {
		w := &out
		if l.Stderr {
			w = &errs
		}
		fmt.Fprintf(w, "%s\n", l.Data)
		return nil
	})
	if err != nil {
		t.Fatalf("Logs() = %v", err)
	}
	return out.String(), errs.String()
}

// sh runs a script to its end and wants exit code 0; it returns its output.
func (s suite) sh(t *testing.T, script string, secrets ...executor.SecretFile) string {
	t.Helper()
	spec := s.spec(script)
	spec.Secrets = secrets
	task := s.start(t, spec)
	exit := wait(t, task)
	stdout, stderr := output(t, task)
	if exit.Code != 0 || exit.Error != "" {
		t.Errorf("script ended with %+v\nstdout: %s\nstderr: %s\nscript: %s", exit, stdout, stderr, script)
	}
	return stdout
}

// follow runs Logs with Follow in the background; line returns the next line, end what Logs returned.
func follow(t *testing.T, task executor.Task, tail int64) (line func() string, end func() error) {
	lines, done := make(chan string, 1), make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	go func() { // ends with the log, or with ctx
		err := task.Logs(ctx, executor.LogOptions{Follow: true, Tail: tail}, func(l executor.Line) error {
			select {
			case lines <- string(bytes.Clone(l.Data)):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		close(lines)
		done <- err
	}()
	return func() string { return <-lines }, func() error { return <-done }
}
