package bed_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"warden/internal/testcluster"
	"warden/test/bed"
)

// traced starts a manager that runs a task, and returns the folder of the bed and its processes, each by its directory in /proc
// and its start: IDs are used again, those of namespaces too.
func traced(t *testing.T) (dir string, processes []string) {
	t.Helper()
	b := bed.New(t)
	m := b.Host("m1", bed.WithDisk(48<<20))
	m.Start()
	m.Ctl("swarm", "init", "--availability", "active")
	m.Ctl("service", "create", "--name", "app", "host", "sleep", "31536000")
	testcluster.AwaitRunning(t, m, "app", 1)
	processes = processesOf(b)
	if len(processes) < 5 { // two that hold namespaces, the daemon, the task and what it runs under
		t.Errorf("processes of a bed with a task = %s", processes)
	}
	return b.Dir, processes
}

// processesOf returns the processes that are in the networks of a bed.
func processesOf(b *bed.Bed) (processes []string) {
	networks := b.Networks()
	found, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range found {
		network, _ := os.Readlink(filepath.Join(proc, "ns/net"))
		if slices.Contains(networks, network) {
			processes = append(processes, proc+"@"+started(proc))
		}
	}
	return processes
}

// started returns when a process was started, "" if it is not there.
func started(proc string) string {
	b, _ := os.ReadFile(filepath.Join(proc, "stat"))
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	return fields[19] // proc(5): 22, from 1; the first after the name is 3
}

// leftover says what is left of a bed.
func leftover(dir string, processes []string) error {
	for _, p := range processes {
		if proc, start, _ := strings.Cut(p, "@"); started(proc) == start {
			line, _ := os.ReadFile(filepath.Join(proc, "cmdline"))
			return fmt.Errorf("a process is left: %s %q", proc, line)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), dir) {
		return fmt.Errorf("a mount is left:\n%s", mounts)
	}
	if groups := bed.Cgroups(dir); len(groups) > 0 {
		return fmt.Errorf("cgroups are left: %s", groups)
	}
	if _, err := os.Stat(dir); err == nil {
		return fmt.Errorf("%s is left", dir)
	}
	return nil
}

// TestNothingIsLeft: at the end of a test all of its bed is gone.
func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	var dir string
	var processes []string
	if !t.Run("bed", func(t *testing.T) {
		dir, processes = traced(t)
		if err := leftover(dir, processes); err == nil {
			t.Error("leftover does not see a bed that is there")
		}
		for _, name := range []string{"bridge0", "port1"} {
			if i, err := net.InterfaceByName(name); err == nil {
				t.Errorf("%s of the bed is in the machine's own network", i.Name)
			}
		}
	}) || dir == "" {
		return // skipped
	}
	if err := leftover(dir, processes); err != nil {
		t.Error(err)
	}
}

// victimVar makes TestNothingOutlivesAKill the process to be killed.
const victimVar = "WARDEN_BED_VICTIM"

// TestNothingOutlivesAKill: a test process that is killed takes all hosts with it, and the next bed removes the rest.
func TestNothingOutlivesAKill(t *testing.T) {
	t.Parallel()
	if os.Getenv(victimVar) != "" {
		dir, processes := traced(t)
		fmt.Println(append([]string{victimVar, dir}, processes...))
		_, _ = io.Copy(io.Discard, os.Stdin) // until the kill, or the end of who should have killed
		return
	}
	testcluster.Root(t)
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestNothingOutlivesAKill$", "-test.timeout", "2m")
	cmd.Env = append(os.Environ(), victimVar+"=1", "WARDEN_TEST_BIN="+testcluster.Bin(t))
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var marks []string
	for lines := bufio.NewScanner(out); marks == nil && lines.Scan(); {
		if line, ok := strings.CutPrefix(lines.Text(), "["+victimVar+" "); ok {
			marks = strings.Fields(strings.TrimSuffix(line, "]"))
		}
	}
	if len(marks) < 2 {
		bed.New(t) // says why there can be none, if so
		t.Fatalf("the test process to be killed says %q, want its folder and its processes", marks)
	}
	dir, processes := marks[0], marks[1:]
	if err := leftover(dir, processes); err == nil {
		t.Error("leftover does not see a bed that is there")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	testcluster.Await(t, limit, func() error {
		err := leftover(dir, processes)
		if err == nil || strings.Contains(err.Error(), "cgroups") || err.Error() == dir+" is left" {
			return nil // the rest is for the next bed, of another test maybe
		}
		return fmt.Errorf("after the kill: %w", err)
	})
	bed.New(t)
	testcluster.Await(t, limit, func() error { // that of another test may have come first, and be at it
		if err := leftover(dir, processes); err != nil {
			return fmt.Errorf("after the next bed: %w", err)
		}
		return nil
	})
}

// failVar makes TestFailureIsKept the process whose test fails.
const failVar = "WARDEN_BED_FAIL"

// TestFailureIsKept: logs, state and what was done are there after a test that failed, also for the next bed.
func TestFailureIsKept(t *testing.T) {
	t.Parallel()
	if os.Getenv(failVar) != "" {
		traced(t)
		t.Fatal("fails on purpose")
	}
	b := bed.New(t) // skips
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestFailureIsKept$", "-test.timeout", "2m")
	cmd.Env = append(os.Environ(), failVar+"=1", "WARDEN_TEST_BIN="+testcluster.Bin(t))
	out, err := cmd.CombinedOutput()
	_, rest, _ := strings.Cut(string(out), "are kept in ")
	dir, _, _ := strings.Cut(rest, "\n")
	if err == nil || !strings.HasPrefix(filepath.Base(dir), "warden-bed-") || dir == b.Dir {
		t.Fatalf("a test that fails says %v:\n%s", err, out)
	}
	defer os.RemoveAll(dir)
	bed.New(t)
	for path, want := range map[string]string{"events": "start m1", "m1/log": "level=", "m1/host": "10.66.0.1/24", "m1/state/identity": ""} {
		b, err := os.ReadFile(filepath.Join(dir, path))
		if _, serr := os.Stat(filepath.Join(dir, path)); serr != nil || want != "" && !strings.Contains(string(b), want) {
			t.Errorf("%s of a test that failed = %q, %v, want %q in it", path, b, err, want)
		}
	}
	if groups := bed.Cgroups(dir); len(groups) > 0 {
		t.Errorf("cgroups of a test that failed are left: %s", groups)
	}
}

// TestSeed: the same seed draws the same.
func TestSeed(t *testing.T) {
	t.Setenv(bed.SeedVar, "42")
	if x, y := bed.New(t).Rand.Uint64(), bed.New(t).Rand.Uint64(); x != y {
		t.Errorf("two beds of one seed draw %d and %d", x, y)
	}
}
