// Package leaktest looks, when a package's tests are over, at what they left in their process: goroutines and open files.
// What they left on the machine (processes, mounts, namespaces, containers) tools/testreport looks at.
//
// Each package with tests has a TestMain that calls Main or Run; layout_test.go wants it.
package leaktest

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience is how long what ends has to be gone: closing is often asked for and not awaited, and idle connections of HTTP
// clients (the Docker Engine's, 30 s) end by themselves. Only a process that still has something waits.
const patience = 45 * time.Second

// Main runs the tests and ends the process, with status 1 if a test failed or something is left. Goroutines in these functions may be
// left: who names one says why.
func Main(m *testing.M, may ...string) { os.Exit(Run(m, may...)) }

// Run runs the tests and returns the status to end with, as Main. Where a test failed nothing is looked for: what it left says little.
func Run(m interface{ Run() int }, may ...string) int { return run(m, patience, may) }

func run(m interface{ Run() int }, patience time.Duration, may []string) int {
	open, err := files()
	if err != nil {
		return fail(err)
	}
	before := state{open, []goleak.Option{goleak.IgnoreCurrent()}}
	for _, f := range may {
		before.goroutines = append(before.goroutines, goleak.IgnoreAnyFunction(f))
	}
	if code := m.Run(); code != 0 || isFuzzing() {
		return code
	}
	if err := before.await(patience); err != nil {
		return fail(err)
	}
	return 0
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, "leaktest:", err)
	return 1
}

// isFuzzing tells whether this process is a fuzzer or a worker of one: `go test` ends these itself.
func isFuzzing() bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != "" && f.Value.String() != "false" {
			return true
		}
	}
	return false
}

// state is what a process had before its tests.
type state struct {
	files      map[string]string
	goroutines []goleak.Option
}

// await waits until nothing is left, or returns what is.
func (before state) await(patience time.Duration) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(patience); ; {
		err := before.left()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline:
			return err
		}
	}
}

// left returns what is there that was not before.
func (before state) left() error {
	after, err := files()
	if err != nil {
		return err
	}
	maps.DeleteFunc(after, func(fd, target string) bool { return before.files[fd] == target })
	if len(after) > 0 {
		return fmt.Errorf("files are left open: %q", slices.Sorted(maps.Values(after)))
	}
	if err := goleak.Find(before.goroutines...); err != nil {
		return fmt.Errorf("goroutines are left: %w", err)
	}
	return nil
}

// files returns what each open file of this process is. The runtime's own (its poller, its wake-up) are not among them.
func files() (map[string]string, error) {
	const dir = "/proc/self/fd"
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading which files are open: %w", err)
	}
	all := map[string]string{}
	for _, e := range list {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") { // the directory itself is closed by now
			continue
		}
		all[e.Name()] = target
	}
	return all, nil
}
