package warden_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"warden"
)

// codes returns the value of every constant of type Code that errors.go declares.
func codes(t *testing.T) map[string]bool {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, decl := range file.Decls {
		gen, ok := decl.(*ast.GenDecl)
		if !ok || gen.Tok != token.CONST {
			continue
		}
		for _, spec := range gen.Specs {
			value := spec.(*ast.ValueSpec)
			if typ, ok := value.Type.(*ast.Ident); !ok || typ.Name != "Code" {
				continue
			}
			for _, v := range value.Values {
				code, err := strconv.Unquote(v.(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				if found[code] {
					t.Errorf("errors.go: code %q has two constants", code)
				}
				found[code] = true
			}
		}
	}
	if len(found) < 30 {
		t.Fatalf("errors.go: found %d codes, want all of them", len(found))
	}
	return found
}

func TestEveryCodeIsDocumented(t *testing.T) {
	page, err := os.ReadFile("docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	known := codes(t)
	row := regexp.MustCompile("^\\| `([a-z-]+)` \\|(.*)\\|$")
	documented := map[string]bool{}
	for line := range strings.Lines(string(page)) {
		m := row.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		code, cells := m[1], strings.Split(m[2], " | ")
		if documented[code] {
			t.Errorf("docs/errors.md: code %q has two rows", code)
		}
		documented[code] = true
		if !known[code] {
			t.Errorf("docs/errors.md: the row %q is no code of errors.go", code)
		}
		if len(cells) != 4 {
			t.Errorf("docs/errors.md: row %q has %d cells after the code, want exit, meaning, cause, what to do", code, len(cells))
			continue
		}
		for _, cell := range cells {
			if strings.TrimSpace(cell) == "" {
				t.Errorf("docs/errors.md: row %q has an empty cell", code)
			}
		}
		if got, want := strings.TrimSpace(cells[0]), exit(warden.Code(code)); got != want {
			t.Errorf("docs/errors.md: exit of %q = %q, want %q", code, got, want)
		}
	}
	for code := range known {
		if !documented[code] {
			t.Errorf("docs/errors.md: code %q has no row", code)
		}
	}
}

func exit(code warden.Code) string {
	switch {
	case code == warden.CodeUsage:
		return "2"
	case code.Refusal():
		return "3 *refused*"
	}
	return "1"
}
