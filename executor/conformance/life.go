package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"warden"
	"warden/executor"
	"warden/internal/sensitive"
)

func testExit(t *testing.T, s suite) {
	for _, c := range []struct {
		script string
		code   int
		signal string
	}{
		{"exit 0", 0, ""}, {"exit 7", 7, ""}, {"exit 255", 255, ""}, {"kill -KILL $$", 137, "SIGKILL"}, {"kill -SEGV $$", 139, "SIGSEGV"},
		{"kill -TERM $$", 143, "SIGTERM"}, {"sh -c 'kill -KILL $$'; exit 9", 9, ""},
	} {
		exit := wait(t, s.start(t, s.spec(c.script)))
		if exit.Code != c.code || exit.Signal != c.signal || exit.Error != "" || exit.OutOfMemory {
			t.Errorf("%q ended with %+v, want code %d, signal %q", c.script, exit, c.code, c.signal)
		}
	}
}

func testRefusals(t *testing.T, s suite) {
	with := func(change func(*executor.Spec)) executor.Spec {
		spec := s.spec("exit 0")
		change(&spec)
		return spec
	}
	target := func(names ...string) func(*executor.Spec) {
		return func(spec *executor.Spec) {
			for _, n := range names {
				file, _ := secret(n)
				spec.Secrets = append(spec.Secrets, file)
			}
		}
	}
	for name, spec := range map[string]executor.Spec{
		"malformed ID":    with(func(p *executor.Spec) { p.TaskID = "../x" }),
		"unknown image":   with(func(p *executor.Spec) { p.Image = "warden-no-such-image:latest" }),
		"missing command": with(func(p *executor.Spec) { p.Command = []string{"warden-no-such-command"} }),
		"missing path":    with(func(p *executor.Spec) { p.Command = []string{"/usr/bin/warden-no-such-command"} }),
		"no program":      with(func(p *executor.Spec) { p.Command = []string{"/etc/passwd"} }),
		"a directory":     with(func(p *executor.Spec) { p.Command = []string{"/usr"} }),
		"NUL in command":  with(func(p *executor.Spec) { p.Command = []string{"/bin/true", "a\x00b"} }),
		"NUL in env":      with(func(p *executor.Spec) { p.Env = []string{"A=a\x00b"} }),
		"env without =":   with(func(p *executor.Spec) { p.Env = []string{"A"} }),
		"target outside":  with(target("../x")),
		"target path":     with(target("a/b")),
		"no target":       with(target("")),
		"target twice":    with(target("a", "a")),
		"mode":            with(func(p *executor.Spec) { target("a")(p); p.Secrets[0].Mode = 0o4755 }),
		"negative limit":  with(func(p *executor.Spec) { p.LimitMemoryBytes = -1 }),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.e.Start(t.Context(), spec)
			if warden.CodeOf(err) != warden.CodeInvalid {
				t.Errorf("Start(%s) = %v, want code %s", name, err, warden.CodeInvalid)
			}
			if warden.ValidID(spec.TaskID) {
				if left := s.Residue(t, s.e, spec.TaskID); len(left) > 0 {
					t.Errorf("Start(%s) left %q", name, left)
				}
			}
		})
	}
	spec := with(target("a"))
	spec.Secrets[0].Data = sensitive.New(make([]byte, warden.SecretBytesMax+1))
	if _, err := s.e.Start(t.Context(), spec); warden.CodeOf(err) != warden.CodeTooLarge {
		t.Errorf("Start(secret over the bound) = %v, want code %s", err, warden.CodeTooLarge)
	}
	spec = s.spec("sleep 60")
	s.start(t, spec)
	if _, err := s.e.Start(t.Context(), spec); warden.CodeOf(err) != warden.CodeExists {
		t.Errorf("Start(same ID) = %v, want code %s", err, warden.CodeExists)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	spec = s.spec("sleep 60")
	if _, err := s.e.Start(cancelled, spec); !errors.Is(err, context.Canceled) {
		t.Errorf("Start(cancelled) = %v, want %v", err, context.Canceled)
	}
	if left := s.Residue(t, s.e, spec.TaskID); len(left) > 0 {
		t.Errorf("Start(cancelled) left %q", left)
	}
}

func testWait(t *testing.T, s suite) {
	task := s.start(t, s.spec("sleep 60"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := task.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait() of a running task = %v, want %v", err, context.DeadlineExceeded)
	}
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			if exit, err := task.Wait(t.Context()); err != nil || exit.Code != 137 {
				t.Errorf("Wait() = %+v, %v, want code 137", exit, err)
			}
		})
	}
	if err := task.Stop(t.Context(), 0); err != nil {
		t.Errorf("Stop() = %v", err)
	}
	all.Wait()
}

func testStop(t *testing.T, s suite) {
	for _, c := range []struct {
		name, script string
		grace        time.Duration
		code         int
		signal       string
	}{
		{"obedient", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done", time.Minute, 5, ""},
		{"plain", "echo ready; exec sleep 60", time.Minute, 143, "SIGTERM"},
		{"deaf", "trap '' TERM; echo ready; while :; do sleep 0.01; done", 50 * time.Millisecond, 137, "SIGKILL"},
		{"no grace", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done", 0, 137, "SIGKILL"},
	} {
		task := s.start(t, s.spec(c.script))
		line, _ := follow(t, task, -1)
		if got := line(); got != "ready" {
			t.Fatalf("%s: first line = %q", c.name, got)
		}
		if err := task.Stop(t.Context(), c.grace); err != nil {
			t.Errorf("%s: Stop() = %v", c.name, err)
		}
		if exit := wait(t, task); exit.Code != c.code || exit.Signal != c.signal {
			t.Errorf("%s: ended with %+v, want code %d, signal %q", c.name, exit, c.code, c.signal)
		}
		if err := task.Stop(t.Context(), time.Minute); err != nil {
			t.Errorf("%s: Stop() of an ended task = %v", c.name, err)
		}
	}
}

// testStopKillsAll: what the program left running in the background, in sessions of its own, ends with it.
func testStopKillsAll(t *testing.T, s suite) {
	task := s.start(t, s.spec("setsid sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.01; echo alive; done' & exec sleep 60"))
	line, end := follow(t, task, -1)
	line()
	if err := task.Stop(t.Context(), time.Minute); err != nil {
		t.Fatalf("Stop() = %v", err)
	}
	for line() != "" { // the log ends only when nobody can write to it
	}
	if err := end(); err != nil {
		t.Errorf("Logs() = %v", err)
	}
}

// testStopSooner: a second order with a shorter grace counts, and an order stands when its caller has gone.
func testStopSooner(t *testing.T, s suite) {
	task := s.start(t, s.spec("trap 'echo asked' TERM; echo ready; while :; do sleep 0.01; done"))
	line, _ := follow(t, task, -1)
	line()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := task.Stop(ctx, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop() = %v, want %v", err, context.DeadlineExceeded)
	}
	if got := line(); got != "asked" {
		t.Errorf("line after Stop = %q, want asked", got)
	}
	if err := task.Stop(t.Context(), 0); err != nil {
		t.Errorf("second Stop() = %v", err)
	}
	if exit := wait(t, task); exit.Code != 137 {
		t.Errorf("ended with %+v, want code 137", exit)
	}
}

// testReaps: orphans of the task do not stay as zombies.
func testReaps(t *testing.T, s suite) {
	s.sh(t, `for i in 1 2 3 4 5; do (sh -c 'true' &); done
		for i in $(seq 500); do grep -qs '^State:.Z' /proc/[0-9]*/status || exit 0; sleep 0.01; done; exit 1`)
}

func testEnvironment(t *testing.T, s suite) {
	t.Setenv("WARDEN_CANARY", "of the daemon")
	spec := s.spec(`set -e; test "$GREETING" = 'a b=c'; test -n "$PATH"; test "$#" = 0; test -z "$WARDEN_CANARY"
		test "$(umask)" = 0022; test "$(ulimit -c)" = 0; test "$(cat <&0 | wc -c)" = 0; echo x > file; test "$(cat file)" = x
		test "$(grep -c '^Sig\(Ign\|Blk\):.0000000000000000' /proc/self/status)" = 2
		test "$(ls -l /proc/self/fd | wc -l)" = 5`) // three, the directory, and the line "total"
	spec.Env = []string{"GREETING=a b=c"}
	task := s.start(t, spec)
	if exit := wait(t, task); exit.Code != 0 {
		t.Errorf("ended with %+v: %v", exit, fmt.Sprint(output(t, task)))
	}
	spec = s.spec("")
	spec.Command = []string{"printf", "%s|", "a b", "", "$HOME"}
	task = s.start(t, spec)
	wait(t, task)
	if got, _ := output(t, task); got != "a b||$HOME|\n" {
		t.Errorf("arguments came as %q", got)
	}
}

func testAdopt(t *testing.T, s suite) {
	file, canary := secret("password")
	spec := s.spec("trap 'cat /run/secrets/password; exit 4' TERM; echo ready; while :; do sleep 0.01; done")
	spec.Secrets = []executor.SecretFile{file}
	running, ended := s.start(t, spec), s.start(t, s.spec("echo over; exit 3"))
	line, _ := follow(t, running, -1)
	line()
	first := wait(t, ended)

	again := s.Reopen(t, s.e)
	tasks, err := again.Adopt(t.Context())
	if err != nil {
		t.Fatalf("Adopt() = %v", err)
	}
	ids := make([]string, 0, 2)
	byID := map[string]executor.Task{}
	for _, task := range tasks {
		ids, byID[task.ID()] = append(ids, task.ID()), task
	}
	want := []string{running.ID(), ended.ID()}
	slices.Sort(want)
	if !slices.Equal(ids, want) {
		t.Fatalf("Adopt() = %q, want %q", ids, want)
	}
	if exit := wait(t, byID[ended.ID()]); exit != first || exit.Code != 3 {
		t.Errorf("adopted task ended with %+v, want %+v", exit, first)
	}
	if out, _ := output(t, byID[ended.ID()]); out != "over\n" {
		t.Errorf("log of an adopted task = %q", out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if exit, err := byID[running.ID()].Wait(ctx); err == nil {
		t.Errorf("Wait() of an adopted running task = %+v", exit)
	}
	line, end := follow(t, byID[running.ID()], 1)
	if got := line(); got != "ready" { // it follows: what comes from now on it sees
		t.Errorf("log of an adopted running task = %q", got)
	}
	if err := byID[running.ID()].Stop(t.Context(), time.Minute); err != nil {
		t.Errorf("Stop() of an adopted task = %v", err)
	}
	if exit := wait(t, byID[running.ID()]); exit.Code != 4 {
		t.Errorf("adopted task ended with %+v, want code 4", exit)
	}
	if got := line(); got != canary {
		t.Errorf("secret of an adopted task = %q", got)
	}
	if err := end(); err != nil {
		t.Errorf("Logs() of an adopted task = %v", err)
	}
	for _, task := range tasks {
		if err := task.Remove(t.Context()); err != nil {
			t.Errorf("Remove() of an adopted task = %v", err)
		}
		if left := s.Residue(t, s.e, task.ID()); len(left) > 0 {
			t.Errorf("Remove() of an adopted task left %q", left)
		}
	}
	if tasks, err := s.Reopen(t, s.e).Adopt(t.Context()); err != nil || len(tasks) != 0 {
		t.Errorf("Adopt() when all are removed = %d tasks, %v", len(tasks), err)
	}
}

func testRemove(t *testing.T, s suite) {
	task := s.start(t, s.spec("trap '' TERM; echo ready; while :; do sleep 0.01; done"))
	line, _ := follow(t, task, -1)
	line()
	for range 2 {
		if err := task.Remove(t.Context()); err != nil {
			t.Fatalf("Remove() = %v", err)
		}
	}
	if exit := wait(t, task); exit.Code != 137 {
		t.Errorf("removed task ended with %+v", exit)
	}
	if out, _ := output(t, task); out != "" {
		t.Errorf("Logs() of a removed task = %q", out)
	}
	if left := s.Residue(t, s.e, task.ID()); len(left) > 0 {
		t.Errorf("Remove() left %q", left)
	}
}

// testMany: tasks started at once do not meet.
func testMany(t *testing.T, s suite) {
	var all sync.WaitGroup
	for range 12 {
		file, canary := secret("name")
		spec := s.spec("cat /run/secrets/name; ls /run/secrets | wc -l")
		spec.Secrets = []executor.SecretFile{file}
		all.Go(func() {
			task, err := s.e.Start(t.Context(), spec)
			if err != nil {
				t.Errorf("Start() = %v", err)
				return
			}
			exit, err := task.Wait(t.Context())
			var out []string
			logErr := task.Logs(t.Context(), executor.LogOptions{Tail: -1}, func(l executor.Line) error { out = append(out, string(l.Data)); return nil })
			if err := errors.Join(err, logErr, task.Remove(t.Context())); err != nil || exit.Code != 0 || strings.Join(out, "") != canary+"1" {
				t.Errorf("task ended with %+v, %v, output %q", exit, err, out)
			}
		})
	}
	all.Wait()
}
