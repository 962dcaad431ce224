package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLeft: a process, a mount and a file of the run are seen while they are there, and not after.
func TestLeft(t *testing.T) {
	m := look(t.TempDir())
	wants := func(when string, words ...string) {
		t.Helper()
		found := m.awaitLeft(time.Millisecond)
		found = slices.DeleteFunc(found, func(s string) bool { return !strings.Contains(s, m.tmp) && !strings.HasPrefix(s, "process ") }) // of others
		if len(found) != len(words) {
			t.Fatalf("%s: %q, want %q", when, found, words)
		}
		for i, word := range words {
			if !strings.HasPrefix(found[i], word) {
				t.Errorf("%s: %q, want %q", when, found, words)
			}
		}
	}
	wants("nothing")

	cmd := exec.Command("sleep", "60")
	cmd.Env = []string{"TMPDIR=" + m.tmp}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; runtime.Gosched() { // Start returns while the kernel has yet to lay out what it is given
		if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", cmd.Process.Pid)); err == nil && len(env) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a process that was started has no environment")
		}
	}
	wants("a process", "process ")
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	wants("an ended process")

	dir := filepath.Join(m.tmp, "d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	wants("a folder", "file ")
	if os.Geteuid() == 0 {
		if out, err := exec.Command("mount", "-t", "tmpfs", "none", dir).CombinedOutput(); err != nil {
			t.Fatalf("mounting: %v\n%s", err, out)
		}
		wants("a mount", "mount ", "file ")
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Fatalf("unmounting: %v\n%s", err, out)
		}
	}
}

// TestReport: what failed, and a run of nothing, are not good.
func TestReport(t *testing.T) {
	for _, c := range []struct {
		events string
		want   bool
		says   string
	}{
		{`{"Action":"pass","Package":"p","Test":"A"}` + "\n" + `{"Action":"pass","Package":"p"}`, true, "1 passed, 0 failed, 0 skipped"},
		{`{"Action":"output","Package":"p","Test":"A","Output":"why\n"}` + "\n" + `{"Action":"fail","Package":"p","Test":"A"}`, false, "FAIL  p A\nwhy\n"},
		{`{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:3: why\n"}` + "\n" + `{"Action":"output","Package":"p","Test":"A","Output":"a line of a log\n"}` +
			"\n" + `{"Action":"fail","Package":"p","Test":"A"}`, false, "fail  p A\n      a_test.go:3: why\n0 passed, 1 failed"},
		{`{"Action":"output","Package":"p","Output":"leaktest: left\n"}` + "\n" + `{"Action":"pass","Package":"p","Test":"A"}` + "\n" + `{"Action":"fail","Package":"p"}`, false, "leaktest: left\n"},
		{`{"Action":"output","Package":"p","Test":"A","Output":"needs root\n"}` + "\n" + `{"Action":"skip","Package":"p","Test":"A"}`, false, "skip  p A\n      needs root\n0 passed"},
		{"", false, "0 passed"},
	} {
		var out strings.Builder
		if got := report(strings.NewReader(c.events), &out); got != c.want || !strings.Contains(out.String(), c.says) {
			t.Errorf("report(%s) = %v\n%s\nwant %v, %q", c.events, got, out.String(), c.want, c.says)
		}
	}
}
