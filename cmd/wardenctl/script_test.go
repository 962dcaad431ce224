package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"warden"
	"warden/api"
	"warden/internal/leaktest"
)

// checked is a testing.M that also looks at what is left.
type checked struct{ m *testing.M }

func (c checked) Run() int { return leaktest.Run(c.m) }

func TestMain(m *testing.M) {
	testscript.Main(checked{m}, map[string]func(){"wardenctl": main})
}

// TestScript tells what a user types and sees. Each story starts with "daemon STATE", which puts a daemon in that state behind
// WARDEN_HOST; a daemon of another state afterwards replaces it.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("WARDEN_HOST", "unix://"+filepath.Join(env.WorkDir, "s.sock"))
			env.Setenv("GORACE", "atexit_sleep_ms=0") // else each command of a race build waits a second at its end
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"daemon": startDaemon, "exits": exits},
	})
}

// exits runs a command and wants this exit code: "exits 2 wardenctl nonsense".
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got, err := 0, ts.Exec(args[1], args[2:]...)
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		got, err = failed.ExitCode(), nil
	}
	ts.Check(err)
	if got != want {
		ts.Fatalf("%s: exit code = %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

func startDaemon(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: daemon STATE")
	}
	f := newFakeManager(time.Now().Add(-5 * time.Minute))
	switch args[0] {
	case "manager":
	case "silent":
		f.silent = []string{"m3eeeeeeeeeeeeeeeeeeeeeee"}
	case "unwell":
		f.status.Unwell = []string{"worker w1 is down"}
		f.status.Problems = []*api.TaskProblem{{TaskId: "t1", ServiceName: "web", Slot: 2, State: "pending", Reason: "no suitable node (1 node down)"}}
		f.status.Notes = []string{"w1 mounts secrets by bind: its kernel is old"}
	case "autolocked":
		f.lock("key0000001")
	case "old-key": // one manager is down, and sealed under an older key
		f.lock("key0000001")
		f.add(&api.Object{Of: &api.Object_Node{Node: &api.Node{Id: "m3eeeeeeeeeeeeeeeeeeeeeee", Hostname: "m3", Role: api.Role_ROLE_MANAGER, DesiredRole: api.Role_ROLE_MANAGER}}})
		f.states = append(f.states, &api.NodeState{NodeId: "m3eeeeeeeeeeeeeeeeeeeeeee", LockState: "old-key", UnlockKeyId: "key0000000", DekGeneration: 1})
	case "refusing":
		f.lock("key0000001")
		f.refuse = warden.Errorf(warden.CodeDenied, "rotating the unlock key", "not by you")
	case "lost":
		f.lock("key0000001")
		f.lose = warden.Errorf(warden.CodeTimeout, "rotating the unlock key", "the outcome is unknown")
	case "lost-but-made":
		f.lock("key0000001")
		f.lose, f.made = warden.Errorf(warden.CodeUnavailable, "rotating the unlock key", "the leader changed"), true
	case "worker":
		f.info.Role, f.info.Address = api.Role_ROLE_WORKER, ""
	case "locked":
		f.info = &api.InfoReply{State: "locked", NodeId: "m1aaaaaaaaaaaaaaaaaaaaaaa", Hostname: "m1", UnlockKeyId: "key0000001", Role: api.Role_ROLE_MANAGER}
	case "uninitialized":
		f.info = &api.InfoReply{State: "uninitialized", Hostname: "m1"}
	default:
		ts.Fatalf("no such state: %s", args[0])
	}
	at := time.Date(2026, 3, 1, 10, 0, 0, 5, time.UTC).UnixNano()
	f.events = []*api.Event{
		{TimeNs: at, Index: 3, Kind: api.Kind_KIND_NODE, Id: "w1bbbbbbbbbbbbbbbbbbbbbbb", Name: "w1", Action: "create"},
		{TimeNs: at, Index: 4, Kind: api.Kind_KIND_TASK, Id: "t1", Name: "web.1", Action: "update", Detail: "state: running\x1b[31m"},
	}
	f.chunks = []*api.LogChunk{
		{TaskId: "t1", NodeId: "w1bbbbbbbbbbbbbbbbbbbbbbb", TimeNs: at, Data: []byte("to the output")},
		{TaskId: "t1", NodeId: "w1bbbbbbbbbbbbbbbbbbbbbbb", TimeNs: at, Stderr: true, Data: []byte("to the errors")},
	}
	if err := os.Remove(ts.MkAbs("s.sock")); err != nil && !errors.Is(err, fs.ErrNotExist) { // of the daemon before
		ts.Check(err)
	}
	stop, err := f.serve(ts.MkAbs("s.sock"))
	ts.Check(err)
	ts.Defer(stop)
}
