package warden_test

import (
	"bufio"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"warden/internal/testcluster"
)

// sources calls f with each Go file of the module and its text.
func sources(t *testing.T, f func(path, text string)) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != "." || d.Name() == "testdata" || d.Name() == "bin" || path == "tools") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".go") {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			f(path, string(b))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func document(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// section returns what follows the heading up to the next one of two hashes.
func section(t *testing.T, text, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(text, "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("no section %q", heading)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	return rest
}

var (
	testName = regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9_]*)`")
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9_]*)\(`)
	quoted   = regexp.MustCompile("`([^`]+)`")
)

// TestInvariantsNameTheirTests wants a line for each of I1 to I12 in ARCHITECTURE.md, a test on it that is named after the
// invariant, and each test that any document names in the tree.
func TestInvariantsNameTheirTests(t *testing.T) {
	exists := map[string]bool{}
	sources(t, func(path, text string) {
		if strings.HasSuffix(path, "_test.go") {
			for _, m := range testFunc.FindAllStringSubmatch(text, -1) {
				exists[m[1]] = true
			}
		}
	})
	lines := map[string]string{}
	for line := range strings.Lines(section(t, document(t, "ARCHITECTURE.md"), "6. Invariants")) {
		if cells := strings.Split(line, "|"); len(cells) > 3 {
			lines[strings.TrimSpace(cells[1])] = cells[3]
		}
	}
	for i := 1; i <= 12; i++ {
		name := fmt.Sprintf("I%d", i)
		own := regexp.MustCompile(`^Test` + name + `[A-Z]`)
		if !slices.ContainsFunc(testName.FindAllStringSubmatch(lines[name], -1), func(m []string) bool { return own.MatchString(m[1]) }) {
			t.Errorf("invariant %s = %q, want a test that is named after it", name, lines[name])
		}
	}
	for _, path := range documents(t) {
		for _, m := range testName.FindAllStringSubmatch(document(t, path), -1) {
			if !exists[m[1]] {
				t.Errorf("%s names %s, which does not exist", path, m[1])
			}
		}
	}
}

func documents(t *testing.T) (paths []string) {
	t.Helper()
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/decisions/*.md", "changes/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, found...)
	}
	return paths
}

// TestImportTableIsShown wants the table of TestImports in ARCHITECTURE.md, row for row.
func TestImportTableIsShown(t *testing.T) {
	shown := map[string]string{}
	for line := range strings.Lines(section(t, document(t, "ARCHITECTURE.md"), "2. Import table")) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			continue
		}
		var deps []string
		for _, m := range quoted.FindAllStringSubmatch(cells[2], -1) {
			deps = append(deps, m[1])
		}
		shown[quoted.FindStringSubmatch(cells[1])[1]] = strings.Join(deps, " ")
	}
	for pkg, want := range may {
		if got, ok := shown[pkg]; !ok || got != want {
			t.Errorf("ARCHITECTURE.md lets %s import %q (row there: %v), layout_test.go %q", pkg, got, ok, want)
		}
	}
	for pkg := range shown {
		if _, ok := may[pkg]; !ok {
			t.Errorf("ARCHITECTURE.md has a row for %s, layout_test.go none", pkg)
		}
	}
}

// TestDependenciesAreExplained wants a row in docs/dependencies.md for each module of go.mod that our own code imports, and no
// row for another.
func TestDependenciesAreExplained(t *testing.T) {
	imported := map[string]bool{}
	sources(t, func(path, text string) {
		f, err := parser.ParseFile(token.NewFileSet(), path, text, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range f.Imports {
			imported[strings.Trim(spec.Path.Value, `"`)] = true
		}
	})
	rows := map[string]bool{}
	for line := range strings.Lines(document(t, "docs/dependencies.md")) {
		if m := quoted.FindStringSubmatch(line); m != nil && strings.HasPrefix(line, "| `") {
			rows[m[1]] = true
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) v\S+`).FindAllStringSubmatch(document(t, "go.mod"), -1) {
		direct := false
		for path := range imported {
			direct = direct || path == m[1] || strings.HasPrefix(path, m[1]+"/")
		}
		if direct != rows[m[1]] {
			t.Errorf("docs/dependencies.md has a row for %s = %v, our code imports it = %v", m[1], rows[m[1]], direct)
		}
		delete(rows, m[1])
	}
	for module := range rows {
		t.Errorf("docs/dependencies.md has a row for %s, which is not in go.mod", module)
	}
}

// TestDocumentedCommandsExist takes every command of README's transcript, and every command line that a document quotes, to
// the help of the real program: the command must be there, and each flag in its help.
func TestDocumentedCommandsExist(t *testing.T) {
	bin := testcluster.Bin(t)
	seen := 0
	for _, path := range documents(t) {
		for _, call := range commandLines(document(t, path)) {
			if slices.ContainsFunc(call, func(w string) bool { return strings.Contains(w, "…") || w == "COMMAND" }) {
				continue
			}
			seen++
			checkCommandLine(t, bin, path, call)
		}
	}
	if seen < 15 {
		t.Errorf("%d command lines found, want those of the transcript", seen)
	}
}

var program = regexp.MustCompile(`(?:^|[|&;!] *|\bdo )(wardenctl|warden) ([^|&;]*)`)

// commandLines returns the calls of our programs in transcripts (lines that begin with "# " in a block of code) and in quotes.
func commandLines(text string) (calls [][]string) {
	add := func(line string) {
		for _, m := range program.FindAllStringSubmatch(line, -1) {
			calls = append(calls, append([]string{m[1]}, strings.Fields(m[2])...))
		}
	}
	inBlock := false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "```"):
			inBlock = !inBlock
		case inBlock && strings.HasPrefix(line, "# "):
			add(strings.TrimPrefix(line, "# "))
		case !inBlock:
			for _, m := range quoted.FindAllStringSubmatch(line, -1) {
				add(m[1])
			}
		}
	}
	return calls
}

var word = regexp.MustCompile(`^[a-z][a-z-]*$`)

// checkCommandLine asks the program for the help of the longest command that the words name.
func checkCommandLine(t *testing.T, bin, path string, call []string) {
	t.Helper()
	var words, flags []string
	for _, w := range call[1:] {
		if w == "host" { // the image: what follows is a task's command
			break
		}
		if strings.HasPrefix(w, "--") {
			name, _, _ := strings.Cut(w, "=")
			flags = append(flags, name)
		} else if word.MatchString(w) {
			words = append(words, w)
		}
	}
	for n := len(words); n >= 0; n-- {
		help, _ := exec.Command(filepath.Join(bin, call[0]), append(slices.Clone(words[:n]), "--help")...).Output()
		full := strings.Join(append([]string{call[0]}, words[:n]...), " ")
		if !regexp.MustCompile(`(?m)^  ` + regexp.QuoteMeta(full) + `( |$)`).Match(help) {
			continue
		}
		if n < len(words) && strings.Contains(string(help), "Available Commands:") {
			t.Errorf("%s: %q: %s has no such command", path, strings.Join(call, " "), full)
		}
		for _, f := range flags {
			if !regexp.MustCompile(regexp.QuoteMeta(f) + `[ \n]`).Match(help) {
				t.Errorf("%s: %q: %s has no flag %s", path, strings.Join(call, " "), full, f)
			}
		}
		return
	}
	t.Errorf("%s: %q: %s shows no help", path, strings.Join(call, " "), call[0])
}

// step is one command of the transcript and what it prints, as shown.
type step struct {
	command string
	shown   []string
}

// transcript returns the steps of README's first block of code.
func transcript(t *testing.T) (steps []step) {
	t.Helper()
	_, block, _ := strings.Cut(document(t, "README.md"), "\n```\n")
	block, _, ok := strings.Cut(block, "```")
	if !ok {
		t.Fatal("README.md has no transcript")
	}
	for line := range strings.Lines(block) {
		line = strings.TrimSpace(line)
		if command, ok := strings.CutPrefix(line, "# "); ok {
			steps = append(steps, step{command: command})
		} else if line != "" && line != "…" && len(steps) > 0 {
			last := &steps[len(steps)-1]
			last.shown = append(last.shown, line)
		}
	}
	return steps
}

// varying is what differs from run to run: IDs and their prefixes, keys, times.
var varying = regexp.MustCompile(`WDN[A-Z]+-1-[0-9a-z-]+|\b[0-9a-z]{25}\b|\b[0-9a-z]{12}\b|unlock key [0-9a-z]{10}|\d{4}-\d\d-\d\dT[0-9:]+Z|(\d+ |less than a |about a )(second|minute)s? ago`)

func steady(s string) string {
	return strings.Join(strings.Fields(varying.ReplaceAllString(s, "*")), " ")
}

// TestTranscript does what README's transcript says, in a shell, and wants to see what it shows.
func TestTranscript(t *testing.T) {
	testcluster.Root(t)
	dir, err := os.MkdirTemp("", "warden-readme-")
	if err != nil {
		t.Fatal(err)
	}
	sh := newShell(t, dir)
	net := fmt.Sprintf("127.%d.%d.", 1+os.Getpid()/250%250, 1+os.Getpid()%250)
	t.Cleanup(func() {
		for n := 1; n <= 3; n++ {
			sh.run(t, fmt.Sprintf("wardenctl --host unix://%s/n%d.sock swarm leave --force", dir, n))
		}
		sh.run(t, "kill $(jobs -p); wait")
		sh.end()
		os.RemoveAll(dir)
	})
	unlockKey := ""
	for i, s := range transcript(t) {
		command := strings.NewReplacer("/tmp/wd", dir, "127.66.7.", net).Replace(s.command)
		switch {
		case i == 0: // builds; the test has its own programs
			command = "export PATH=" + testcluster.Bin(t) + ":$PATH"
		case command == "wardenctl swarm unlock":
			command += " <<< " + unlockKey
			s.shown = s.shown[1:] // the prompt
		}
		command = regexp.MustCompile(`; sleep \d+$|& sleep \d+$`).ReplaceAllStringFunc(command, func(m string) string {
			return m[:1] + fmt.Sprintf(" for n in 1 2 3; do until wardenctl --host unix://%s/n$n.sock swarm status | grep -q ^State; do sleep 0.1; done; done >/dev/null 2>&1", dir)
		})
		var out string
		testcluster.Await(t, 40*time.Second, func() error {
			out = sh.run(t, command)
			rest := steady(out)
			for _, want := range s.shown {
				_, after, ok := strings.Cut(rest, steady(want))
				if !ok && (strings.Contains(command, " logs ") || strings.Contains(command, " ps ")) {
					return fmt.Errorf("%s =\n%s\nwant %q in it", command, out, want)
				}
				if !ok {
					t.Fatalf("%s =\n%s\nwant %q in it", command, out, want)
				}
				rest = after
			}
			return nil
		})
		if m := regexp.MustCompile(`WDNKEY-1-\S+`).FindString(out); m != "" {
			unlockKey = m
		}
	}
}

// shell is one bash that runs command after command.
type shell struct {
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
}

func newShell(t *testing.T, dir string) *shell {
	t.Helper()
	cmd := exec.Command("bash")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return &shell{in: in, out: bufio.NewReader(out), cmd: cmd}
}

const shellMark = "end of the command"

// run returns what the command prints. One that hangs is ended with all that the shell started.
func (s *shell) run(t *testing.T, command string) string {
	t.Helper()
	stuck := time.AfterFunc(2*time.Minute, func() { _ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) })
	defer stuck.Stop()
	fmt.Fprintf(s.in, "%s\necho; echo '%s'\n", command, shellMark)
	var b strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if strings.TrimSpace(line) == shellMark {
			return b.String()
		}
		if err != nil {
			t.Errorf("%s = %q, %v", command, b.String(), err)
			return b.String()
		}
		b.WriteString(line)
	}
}

func (s *shell) end() {
	s.in.Close()
	_ = s.cmd.Wait()
}
