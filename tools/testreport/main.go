// Command testreport reads the output of `go test -json` and prints what a person needs: each package's result, the whole
// output of what failed, and at the end the name and reason of every test that did not run, then one line with the counts.
// It exits 1 where anything failed or nothing ran.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

func main() { os.Exit(report(os.Stdin, os.Stdout)) }

func report(in io.Reader, out io.Writer) int {
	var passed, failed, skipped int
	var skips []string
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
					fmt.Fprint(out, strings.Join(output[id], ""))
				}
				continue
			}
			switch e.Action {
			case "pass":
				passed++
			case "fail":
				failed++
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
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if failed > 0 || passed == 0 {
		return 1
	}
	return 0
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
