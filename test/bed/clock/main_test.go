package main

import (
	"encoding/json"
	"go/format"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"warden/internal/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// TestSkewIsOneLine: package time of this Go differs in what Now asks, and in nothing else.
func TestSkewIsOneLine(t *testing.T) {
	_, source, err := packageTime()
	if err != nil {
		t.Fatal(err)
	}
	got, err := skew(source)
	if err != nil {
		t.Fatal(err)
	}
	have, want := strings.Split(got, "\n"), strings.Split(source, "\n")
	if len(have) != len(want) {
		t.Fatalf("skew makes %d lines of %d", len(have), len(want))
	}
	var changed []string
	for i := range want {
		if have[i] != want[i] {
			changed = append(changed, have[i])
		}
	}
	if len(changed) != 1 || changed[0]+"\n" != gets {
		t.Errorf("skew changes %q, want one line", changed)
	}
}

func TestSkewOfAnotherGo(t *testing.T) {
	for _, source := range []string{
		"",
		"func Now() Time {\n\tsec, nsec, mono := now()\n",
		head + asks + "}\nfunc after() {\n" + asks + "}\n",
		head + asks + "}\nfunc skewedNow() {}\n",
		"func Later() Time {\n" + asks,
	} {
		if got, err := skew(source); err == nil || got != "" {
			t.Errorf("skew(%q) = %q, %v, want an error", source, got, err)
		}
	}
}

// TestAdd: what the overlay has already stays.
func TestAdd(t *testing.T) {
	dir := t.TempDir()
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, []byte(`{"Replace":{"/a":"/b"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(overlay); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(overlay)
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Replace map[string]string }
	if err := json.Unmarshal(b, &got); err != nil || len(got.Replace) != 3 || got.Replace["/a"] != "/b" {
		t.Errorf("the overlay is %s, %v", b, err)
	}
	if err := os.WriteFile(overlay, []byte(`{`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(overlay); err == nil {
		t.Error("add adds to what is no overlay")
	}
}

func TestOffsetIsFormatted(t *testing.T) {
	if got, err := format.Source(offset); err != nil || string(got) != string(offset) {
		t.Errorf("offset.go.txt is not as gofmt would write it: %v", err)
	}
}

// TestNothingElseKnowsIt: no source of the product names the variable.
func TestNothingElseKnowsIt(t *testing.T) {
	out, err := exec.Command("git", "-C", "../../..", "grep", "-l", "WARDEN_TEST"+"_CLOCK", "--", "*.go", "*.txt", "Makefile").Output()
	if err != nil {
		t.Skipf("needs git and its folder: %v", err)
	}
	for path := range strings.Lines(string(out)) {
		if path = strings.TrimSpace(path); path != "Makefile" && !strings.HasPrefix(path, "test/bed/") {
			t.Errorf("%s knows of the clock of tests", path)
		}
	}
}
