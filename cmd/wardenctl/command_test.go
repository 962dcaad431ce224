package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"warden"
)

func everyCommand(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, sub := range cmd.Commands() {
		everyCommand(sub, visit)
	}
}

func TestEveryCommandHasHelpWithExamplesThatExist(t *testing.T) {
	root := (&cli{stdout: &checkedWriter{w: io.Discard}}).root()
	everyCommand(root, func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		if strings.HasPrefix(path, "wardenctl completion ") {
			return // cobra's own
		}
		if cmd.Short == "" || cmd.Example == "" || !cmd.Runnable() {
			t.Errorf("%s: short help %q, example %q, runnable %v, want all", path, cmd.Short, cmd.Example, cmd.Runnable())
		}
		for line := range strings.Lines(cmd.Example) {
			_, typed, ok := strings.Cut(line, "wardenctl ")
			if !ok {
				t.Errorf("%s: example %q does not use wardenctl", path, line)
				continue
			}
			typed, _, _ = strings.Cut(strings.TrimSpace(typed), ")")
			found, rest, err := root.Find(strings.Fields(typed))
			if err != nil || found == root {
				t.Errorf("%s: example %q is of no command: %v", path, line, err)
				continue
			}
			for _, word := range rest {
				if word == "--" { // a task's command follows
					break
				}
				word, _, _ = strings.Cut(word, "=")
				if name, ok := strings.CutPrefix(word, "--"); ok && found.CommandPath() != "wardenctl service create" && found.Flag(name) == nil {
					t.Errorf("%s: example %q has the unknown flag --%s", path, line, name)
				}
			}
		}
	})
}

// Secrets are never taken from the environment: only WARDEN_HOST is read.
func TestOnlyHostComesFromTheEnvironment(t *testing.T) {
	t.Setenv("WARDEN_JOIN_TOKEN", fakeToken)
	t.Setenv("WARDEN_TOKEN", fakeToken)
	t.Setenv("WARDEN_HOST", "unix:///nowhere/warden.sock")
	var out, errs bytes.Buffer
	if exit := run(t.Context(), []string{"swarm", "join", "192.0.2.1"}, strings.NewReader(""), &out, &errs); exit != exitUsage {
		t.Errorf("run(swarm join without a token) = %d, want %d", exit, exitUsage)
	}
	if exit := run(t.Context(), []string{"status"}, strings.NewReader(""), &out, &errs); exit != exitFailed || !strings.Contains(errs.String(), "/nowhere/warden.sock") {
		t.Errorf("run(status) = %d %q, want %d and the path of WARDEN_HOST", exit, errs.String(), exitFailed)
	}
}

func TestReport(t *testing.T) {
	cmd := &cobra.Command{Use: "wardenctl"}
	for _, c := range []struct {
		name string
		err  error
		exit int
		want string
	}{
		{"nothing", nil, exitDone, ""},
		{"code and hint", warden.Hint(warden.Errorf(warden.CodeDenied, "asking", "no"), "ask root"), exitRefused, "wardenctl: error: asking: no [denied]\nwardenctl: hint: ask root\n"},
		{"failed", warden.Errorf(warden.CodeNotFound, "", "no x"), exitFailed, "wardenctl: error: no x [not-found]\n"},
		{"parser", errors.New("unknown flag: --x"), exitUsage, "wardenctl: error: unknown flag: --x [usage]\nwardenctl: hint: see `wardenctl --help`\n"},
		{"forced", exitError{warden.Errorf(warden.CodeLocked, "", "locked"), exitFailed}, exitFailed, "wardenctl: error: locked [locked]\n"},
		{"several", several{warden.Errorf(warden.CodeNotFound, "", "a"), warden.Errorf(warden.CodeInUse, "", "b")}, exitRefused,
			"wardenctl: error: a [not-found]\nwardenctl: error: b [in-use]\n"},
		{"a key", warden.Errorf(warden.CodeInvalid, "", "bad WDNKEY-1-abc-def and WDNTKN-1-x"), exitFailed, "wardenctl: error: bad WDNKEY-REDACTED and WDNTKN-REDACTED [invalid]\n"},
		{"terminal escapes", warden.Errorf(warden.CodeInvalid, "", "a\x1b[2J\nwardenctl: hint: b"), exitFailed, `wardenctl: error: a\x1b[2J\nwardenctl: hint: b [invalid]` + "\n"},
	} {
		var out bytes.Buffer
		if exit := report(&out, cmd, c.err); exit != c.exit || out.String() != c.want {
			t.Errorf("%s: report(%v) = %d %q, want %d %q", c.name, c.err, exit, out.String(), c.exit, c.want)
		}
	}
}

// Every code that is a refusal ends with 3, usage with 2, all others with 1.
func TestExitCodes(t *testing.T) {
	for code, want := range map[warden.Code]int{
		warden.CodeUsage: exitUsage, warden.CodeLocked: exitRefused, warden.CodeNoQuorum: exitRefused, warden.CodeExpired: exitRefused,
		warden.CodeInternal: exitFailed, warden.CodeInvalid: exitFailed, warden.CodeNoLeader: exitFailed, warden.CodeTimeout: exitFailed,
	} {
		if got := report(io.Discard, &cobra.Command{}, warden.Errorf(code, "", "x")); got != want {
			t.Errorf("report(%s) = %d, want %d", code, got, want)
		}
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("the disk is full") }

func TestOutputThatCannotBeWrittenIsAFailure(t *testing.T) {
	var errs bytes.Buffer
	if exit := run(t.Context(), []string{"help"}, strings.NewReader(""), brokenWriter{}, &errs); exit != exitFailed || !strings.Contains(errs.String(), "the disk is full") {
		t.Errorf("run(help) into a broken pipe = %d %q, want %d and the reason", exit, errs.String(), exitFailed)
	}
}

func TestSocketPath(t *testing.T) {
	for _, c := range []struct {
		flag, env, want string
		code            warden.Code
	}{
		{"", "", warden.DefaultSocket, ""},
		{"", "unix:///a", "/a", ""},
		{"unix:///b", "unix:///a", "/b", ""},
		{"unix://relative", "", "", warden.CodeUsage},
		{"/plain/path", "", "", warden.CodeUsage},
		{"", "tcp://192.0.2.1:2377", "", warden.CodeUnsupported},
	} {
		if got, err := socketPath(c.flag, c.env); got != c.want || warden.CodeOf(err) != c.code {
			t.Errorf("socketPath(%q, %q) = %q, %v, want %q, %q", c.flag, c.env, got, err, c.want, c.code)
		}
	}
}

func TestInterruptedStreamsEndWell(t *testing.T) {
	f := newFakeManager(testNow)
	socket := t.TempDir() + "/s"
	stop, err := f.serve(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for args, want := range map[string]int{"events": exitDone, "service logs -f web": exitDone, "node ls": exitFailed, "service logs web": exitFailed} {
		var errs bytes.Buffer
		words := append([]string{"--host", "unix://" + socket}, strings.Fields(args)...)
		if exit := run(ctx, words, strings.NewReader(""), io.Discard, &errs); exit != want {
			t.Errorf("run(%s), interrupted = %d %s, want %d", args, exit, errs.String(), want)
		}
	}
}
