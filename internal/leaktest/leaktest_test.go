package leaktest

import (
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { Main(m) }

// runner is a testing.M whose only test is this function.
type runner func()

func (r runner) Run() int { r(); return 0 }

// TestLeaks: what is left is seen, and what ends late is not held against anybody.
func TestLeaks(t *testing.T) {
	open, err := files()
	if err != nil {
		t.Fatal(err)
	}
	before := state{open, []goleak.Option{goleak.IgnoreCurrent()}}
	check := func(when, want string) {
		t.Helper()
		if err := before.await(time.Millisecond); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", when, err, want)
		}
	}
	check("nothing left", "")

	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	check("an open file", "files are left open")
	f.Close()
	check("a closed file", "")

	end, ended := make(chan struct{}), make(chan struct{})
	go func() { <-end; close(ended) }()
	check("a goroutine", "goroutines are left")
	late := time.AfterFunc(50*time.Millisecond, func() { close(end) })
	defer late.Stop()
	if err := before.await(patience); err != nil {
		t.Errorf("a goroutine that ends late: %v", err)
	}
	<-ended
}

// TestRun: tests that pass and leave something fail.
func TestRun(t *testing.T) {
	if code := run(runner(func() {}), patience, nil); code != 0 {
		t.Errorf("a run that leaves nothing = %d", code)
	}
	var left *os.File
	if code := run(runner(func() { left, _ = os.Open(os.DevNull) }), time.Millisecond, nil); code == 0 {
		t.Error("a run that leaves a file open = 0")
	}
	left.Close()
}
