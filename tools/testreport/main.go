// Command testreport runs `go test -json …`, its arguments, and prints what a person needs: each package's result, the whole
// output of what failed, and at the end the name and reason of every test that did not run, those that failed with what they said
// first (their whole output may be far above, or cut by who keeps it), one line with the counts, and what the tests left on the machine.
// It exits 1 where anything failed, nothing ran, or anything is left.
//
// Tests get a temporary folder of their own (TMPDIR), which is kept if one failed.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
)

type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(1)
	}
}

func run(argv []string) error {
	if len(argv) == 0 {
		return errors.New("want the command that runs the tests")
	}
	tmp, err := os.MkdirTemp("", "wt-") // short: paths of sockets are bounded
	if err == nil {
		err = os.Chmod(tmp, 0o777|os.ModeSticky) // as /tmp: some tests run as other users
	}
	if err != nil {
		return err
	}
	m := look(tmp)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return err
	}
	isGood := report(out, os.Stdout)
	err = cmd.Wait() // says no more than the report, but for what keeps the tests from being built
	if !isGood || err != nil {
		return errors.Join(err, fmt.Errorf("what the tests left is in %s", tmp))
	}
	if left := m.awaitLeft(patience); len(left) > 0 {
		return fmt.Errorf("the tests left behind:\n  %s", strings.Join(left, "\n  "))
	}
	return os.RemoveAll(tmp)
}

// report tells whether tests ran and all of them passed.
func report(in io.Reader, out io.Writer) bool {
	var passed, failed, skipped int
	var skips, fails []string
	output := map[string][]string{}
	s := bufio.NewScanner(in)
	s.Buffer(nil, 16<<20)
	for s.Scan() {
		var e event
		if json.Unmarshal(s.Bytes(), &e) != nil || e.Action == "" { // a build error, or a line of the go command itself
			fmt.Fprintln(out, s.Text())
			continue
		}
		id := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			output[id] = append(output[id], e.Output)
			if e.Action == "build-output" {
				fmt.Fprint(out, e.Output)
			}
		case "pass", "fail", "skip":
			if e.Test == "" {
				if e.Action != "skip" {
					fmt.Fprintf(out, "%-4s  %s  %.1fs\n", e.Action, e.Package, e.Elapsed)
				}
				if e.Action == "fail" {
					failed++
					fails = append(fails, id+said(output[id]))
					fmt.Fprint(out, strings.Join(output[id], ""))
				}
				continue
			}
			switch e.Action {
			case "pass":
				passed++
			case "fail":
				failed++
				fails = append(fails, id+said(output[id]))
				fmt.Fprintf(out, "FAIL  %s\n%s", id, strings.Join(output[id], ""))
			case "skip":
				skipped++
				skips = append(skips, id+"\n      "+reason(output[id]))
			}
			delete(output, id)
		}
	}
	if err := s.Err(); err != nil {
		fmt.Fprintln(out, "testreport:", err)
		failed++
	}
	for _, k := range skips {
		fmt.Fprintln(out, "skip  "+k)
	}
	for _, k := range fails {
		fmt.Fprintln(out, "fail  "+k)
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	return failed == 0 && passed > 0
}

const (
	saidLines = 5
	saidBytes = 300 // of each line
)

// where begins a message of a test or of the race detector, and what the runtime says of a panic.
var where = regexp.MustCompile(`^\s*(\S+\.go:\d+: |WARNING: DATA RACE|panic: |fatal error: )`)

// said returns the first messages of a test, each on a line of its own after the first.
func said(lines []string) (all string) {
	n := 0
	for _, l := range lines {
		if n == saidLines {
			break
		}
		if where.MatchString(l) {
			l = strings.TrimSpace(l)
			all += "\n      " + l[:min(len(l), saidBytes)]
			n++
		}
	}
	return all
}

// reason is what a test said before it skipped itself.
func reason(lines []string) string {
	for i := len(lines) - 1; i >= 0; i-- {
		l := strings.TrimSpace(lines[i])
		if l != "" && !strings.HasPrefix(l, "---") && !strings.HasPrefix(l, "===") {
			return l
		}
	}
	return "gave no reason"
}
