package warden_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

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
