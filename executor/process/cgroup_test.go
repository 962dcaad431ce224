package process_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"warden"
	"warden/executor"
	"warden/executor/process"
)

// A task is in its cgroup from its first process on; its supervisor, which goes there to start it, has come back.
func TestSupervisorLeavesTheCgroup(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tasks")
	e := open(t, dir)
	id := warden.NewID()
	task, err := e.Start(t.Context(), executor.Spec{TaskID: id, Image: process.Image, Command: []string{"sleep", "1000"}, LimitMemoryBytes: 64 << 20, LimitNanoCPUs: 1e9})
	if warden.CodeOf(err) == warden.CodeUnsupported {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer task.Remove(t.Context())
	var record struct{ PID int }
	b, err := os.ReadFile(filepath.Join(dir, id, "task.json"))
	if err == nil {
		err = json.Unmarshal(b, &record)
	}
	if err != nil || record.PID == 0 {
		t.Fatalf("task.json = %s, %v", b, err)
	}
	found := 0
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + id, "/sys/fs/cgroup/*/*/" + id, "/sys/fs/cgroup/*/*/*/" + id} {
		groups, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range groups {
			for _, file := range []string{"cgroup.procs", "tasks"} {
				b, err := os.ReadFile(filepath.Join(g, file))
				if err != nil {
					continue // version 2 has no tasks
				}
				found++
				members := strings.Fields(string(b))
				if len(members) < 2 || slices.Contains(members, strconv.Itoa(record.PID)) {
					t.Errorf("%s of %s has %s, want the task's init and program and not the supervisor, %d", file, g, members, record.PID)
				}
			}
		}
	}
	if found == 0 {
		t.Error("the task has no cgroup")
	}
}
