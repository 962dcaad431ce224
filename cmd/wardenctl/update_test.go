package main

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"

	"warden/api"
)

// served starts the fake and returns a function that runs one command line against it.
func served(t *testing.T, f *fake) func(stdin io.Reader, args ...string) (exit int, out, errs string) {
	t.Helper()
	socket := t.TempDir() + "/s"
	stop, err := f.serve(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return func(stdin io.Reader, args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		exit := run(t.Context(), append([]string{"--host", "unix://" + socket}, args...), stdin, &out, &errs)
		return exit, out.String(), errs.String()
	}
}

// An update that somebody else's overtook is made again from what the service is now, a few times.
func TestUpdateIsMadeAgainAfterAConflict(t *testing.T) {
	f := newFakeManager(testNow)
	ctl := served(t, f)
	if exit, _, errs := ctl(nil, "service", "create", "--name", "web", "host", "sleep", "5"); exit != exitDone {
		t.Fatal(errs)
	}
	f.races = updateTries - 1
	if exit, out, errs := ctl(nil, "service", "update", "--env-add", "A=B", "web"); exit != exitDone || out != "web\n" {
		t.Errorf("update after %d conflicts = %d %q %s", updateTries-1, exit, out, errs)
	}
	if exit, out, errs := ctl(nil, "service", "inspect", "--format", "{{join .Spec.TaskTemplate.ContainerSpec.Env \" \"}} {{.Version.Number}}", "web"); out != "A=B 6\n" {
		t.Errorf("inspect = %d %q %s", exit, out, errs)
	}
	f.races = updateTries
	if exit, _, errs := ctl(nil, "service", "update", "--env-add", "A=C", "web"); exit != exitFailed || !strings.Contains(errs, "[conflict]") {
		t.Errorf("update with endless conflicts = %d %s", exit, errs)
	}
}

// On a terminal "node rm --rotate" asks for each value without showing it; an empty answer makes one.
func TestNodeRotateAsks(t *testing.T) {
	f := newFakeManager(testNow)
	ctl := served(t, f)
	for _, name := range []string{"a", "b", "c"} {
		if exit, _, errs := ctl(strings.NewReader("first"), "secret", "create", name, "-"); exit != exitDone {
			t.Fatal(errs)
		}
	}
	user, program := terminal(t)
	go func() { // ends with the last answer
		for _, answer := range []string{"CANARY-TYPED\n", "\n", "\n"} {
			io.WriteString(user, answer)
		}
	}()
	exit, out, errs := ctl(program, "node", "rm", "--compromised", "--rotate", "w1")
	if exit != exitDone {
		t.Fatalf("node rm --rotate = %d\n%s%s", exit, out, errs)
	}
	if !strings.Contains(errs, "New value of secret a (empty: a random one is made): ") || strings.Count(out, ": version 2") != 3 {
		t.Errorf("it said\n%s%s", out, errs)
	}
	if len(f.rotates) != 3 || f.rotates[0] != "a CANARY-TYPED" {
		t.Fatalf("rotated %d secrets, the first as %q", len(f.rotates), f.rotates)
	}
	b, c := strings.TrimPrefix(f.rotates[1], "b "), strings.TrimPrefix(f.rotates[2], "c ")
	if len(b) != 43 || len(c) != 43 || b == c || strings.Trim(b+c, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
		t.Errorf("values were made as %q and %q", b, c)
	}
	for _, value := range []string{"CANARY-TYPED", b, c} {
		if strings.Contains(out+errs, value) {
			t.Errorf("a value was shown:\n%s%s", out, errs)
		}
	}
	if !echoes(t, program) {
		t.Error("the terminal does not echo any more")
	}
}

// Of an evicted manager all secrets get new values, whatever was assigned to it.
func TestSeenBy(t *testing.T) {
	secrets := []*api.Secret{{Id: "2", Name: "b", CurrentVersion: 2}, {Id: "1", Name: "a", CurrentVersion: 3}, {Id: "3", Name: "c", CurrentVersion: 1}}
	uses := []*api.SecretUse{{SecretId: "1", Version: 3, Current: true}, {SecretId: "2", Version: 1}, {SecretId: "2", Version: 2, Current: true}, {SecretId: "3", Version: 1, Current: true}}
	show := func(evicted ...*api.RemoveNodeReply) (out string) {
		for _, s := range seenBy(evicted, secrets, uses) {
			out += s.secret.GetName()
			if !s.current() {
				out += "-"
			}
		}
		return out
	}
	worker := &api.RemoveNodeReply{Exposures: []*api.Exposure{{SecretId: "2", Version: 1}, {SecretId: "1", Version: 3}, {SecretId: "1", Version: 1}, {SecretId: "gone", Version: 1}}}
	other := &api.RemoveNodeReply{Exposures: []*api.Exposure{{SecretId: "2", Version: 2}}}
	for want, evicted := range map[string][]*api.RemoveNodeReply{
		"ab-": {worker}, "ab": {worker, other}, "b": {other}, "abc": {{AllSecrets: true}}, "": {{}},
	} {
		if got := show(evicted...); got != want {
			t.Errorf("seenBy = %q, want %q", got, want)
		}
	}
}

// Where there is nobody to ask, nothing happens: neither the eviction nor a rotation.
func TestNodeRotateWithoutATerminalDoesNothing(t *testing.T) {
	f := newFakeManager(testNow)
	ctl := served(t, f)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, stdin := range []io.Reader{null, strings.NewReader("value\n")} {
		if exit, _, errs := ctl(stdin, "node", "rm", "--compromised", "--rotate", "w1"); exit != exitUsage || !strings.Contains(errs, "nothing was done") {
			t.Errorf("node rm --rotate without a terminal = %d %s", exit, errs)
		}
	}
	if exit, _, errs := ctl(nil, "node", "inspect", "w1"); exit != exitDone {
		t.Errorf("the node is gone: %s", errs)
	}
}
