// Command clock gives a build a wall clock that tests can skew: it adds to the overlay file of `go build -overlay` that it is
// given a package time of this Go whose Now adds an offset to the wall clock, and nothing else. All of a program so built goes
// by it, TLS and X.509 too, and no source of ours has a seam. What it makes lies beside the overlay file, made anew each time.
package main

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed offset.go.txt
var offset []byte

const (
	head = "func Now() Time {\n"
	asks = "\tsec, nsec, mono := runtimeNow()\n"
	gets = "\tsec, nsec, mono := skewedNow()\n"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: clock OVERLAY.json")
		os.Exit(2)
	}
	if err := add(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "clock:", err)
		os.Exit(1)
	}
}

// add adds the package to the overlay file, which may not exist yet.
func add(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	var overlay struct{ Replace map[string]string }
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &overlay)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("reading the overlay: %w", err)
	}
	dir, original, err := packageTime()
	if err != nil {
		return fmt.Errorf("finding package time: %w", err)
	}
	skewed, err := skew(original)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, "time.go"), err)
	}
	if overlay.Replace == nil {
		overlay.Replace = map[string]string{}
	}
	for name, content := range map[string][]byte{"time.go": []byte(skewed), "offset.go": offset} {
		made := filepath.Join(filepath.Dir(path), name)
		if err := os.WriteFile(made, content, 0o644); err != nil {
			return err
		}
		overlay.Replace[filepath.Join(dir, name)] = made
	}
	if b, err = json.Marshal(overlay); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}

// packageTime returns where package time is, and its time.go.
func packageTime() (dir, source string, err error) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "time").Output()
	if err != nil {
		return "", "", err
	}
	dir = strings.TrimSpace(string(out))
	b, err := os.ReadFile(filepath.Join(dir, "time.go"))
	return dir, string(b), err
}

// skew changes what Now asks for the time, which it must do once and first.
func skew(source string) (string, error) {
	if strings.Count(source, head+asks) != 1 || strings.Count(source, asks) != 1 || strings.Contains(source, "skewedNow") {
		return "", errors.New("another Go: its Now does not ask runtimeNow as this program knows it")
	}
	return strings.Replace(source, head+asks, head+gets, 1), nil
}
