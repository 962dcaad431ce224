package warden_test

import (
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// may says which packages of the module each package may import; ARCHITECTURE.md shows the same table. Test files may
// import more. "." is the root.
var may = map[string]string{
	".":                    "",
	"api":                  ".",
	"internal/sensitive":   ".",
	"internal/durable":     ".",
	"internal/keyset":      ". internal/sensitive",
	"internal/courier":     ". internal/sensitive",
	"internal/tally":       ". api",
	"autolock":             ". internal/sensitive internal/durable internal/keyset",
	"secrets":              ". internal/sensitive internal/keyset",
	"ca":                   ".",
	"tokens":               ". internal/sensitive",
	"policy":               ".",
	"scheduler":            ".",
	"store/sealedlog":      ".",
	"store/rafttransport":  ".",
	"store":                ". api store/sealedlog store/rafttransport internal/tally",
	"store/storetest":      ". api store",
	"door":                 ". ca",
	"join":                 ". api ca tokens",
	"dispatcher":           ". api store policy internal/sensitive internal/tally",
	"tmpfsmount":           ". internal/sensitive",
	"executor":             ". internal/sensitive",
	"executor/confine":     "",
	"executor/process":     ". executor executor/confine tmpfsmount internal/sensitive internal/durable",
	"executor/docker":      ". executor executor/confine tmpfsmount internal/durable",
	"executor/conformance": ". executor internal/sensitive",
	"agent":                ". api executor internal/sensitive internal/tally",
	"orchestrator":         ". api store scheduler internal/tally",
	"control":              ". api autolock store policy scheduler secrets tokens internal/sensitive internal/tally",
	"manager":              ". api ca tokens secrets door join dispatcher orchestrator control store store/sealedlog store/rafttransport internal/sensitive internal/tally",
	"metrics":              ". api",
	"daemon":               ". api agent autolock ca control door executor join manager policy tokens internal/courier internal/durable internal/sensitive internal/tally metrics",
	"internal/testcluster": "",
	"internal/leaktest":    "",
	"internal/thief":       "api autolock ca join tokens internal/testcluster",
	"e2e":                  "",
	"fuzz":                 "",
	"test/bed":             "internal/testcluster",
	"test/powerloss":       "",
	"test/history":         "",
	"bench":                "",
	"internal/collector":   "",
	"cmd/warden":           ". api daemon executor executor/docker executor/process internal/collector",
	"cmd/wardenctl":        ". api autolock internal/courier internal/sensitive",

	"executor/process/helper": "executor/process",
	"test/bed/clock":          "",
	"test/bed/containers":     "",
	"test/adversary":          "",
	"test/adversary/intruder": "",
}

// TestImports holds the layers: what a package may know of.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	short := func(path string) string {
		if path == "warden" {
			return "."
		}
		return strings.TrimPrefix(path, "warden/")
	}
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		pkg := short(words[0])
		ok, known := may[pkg]
		if !known {
			t.Errorf("package %s is not in the import table", pkg)
			continue
		}
		for _, dep := range words[1:] {
			if dep != "warden" && !strings.HasPrefix(dep, "warden/") {
				continue
			}
			if d := short(dep); !strings.Contains(" "+ok+" ", " "+d+" ") {
				t.Errorf("%s must not import %s", pkg, d)
			}
		}
	}
}

// TestLeaksAreLookedFor wants each package with tests to look at what they leave.
func TestLeaksAreLookedFor(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .TestImports " "}} {{join .XTestImports " "}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if words := strings.Fields(line); slices.Contains(words, "testing") && !slices.Contains(words, "warden/internal/leaktest") && words[0] != "warden/internal/leaktest" {
			t.Errorf("the tests of %s have no TestMain that calls leaktest.Main or leaktest.Run", words[0])
		}
	}
}

// TestPackageComments wants exactly one package comment per package.
func TestPackageComments(t *testing.T) {
	comments := map[string]int{}
	err := filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "testdata" || d.Name() == "bin" || path == "tools") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		dir := filepath.Dir(path)
		if _, seen := comments[dir]; !seen {
			comments[dir] = 0
		}
		if f.Doc != nil {
			comments[dir]++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir, n := range comments {
		if n != 1 {
			t.Errorf("package in %s has %d package comments, want exactly one", dir, n)
		}
	}
}
