package adversary

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"warden/internal/leaktest"
)

func TestMain(m *testing.M) {
	code := leaktest.Run(m)
	if program != "" {
		os.RemoveAll(filepath.Dir(program))
	}
	os.Exit(code)
}

var (
	buildOnce sync.Once
	program   string
	buildOut  []byte
	buildErr  error
)

// intruderBin returns the path of the intruder, which everybody may execute.
func intruderBin(t testing.TB) string {
	t.Helper()
	buildOnce.Do(func() {
		var dir string
		if dir, buildErr = os.MkdirTemp("", "intruder-"); buildErr != nil {
			return
		}
		program = filepath.Join(dir, "intruder")
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./intruder")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		buildOut, buildErr = cmd.CombinedOutput()
		os.Chmod(dir, 0o755)
	})
	if buildErr != nil {
		t.Fatalf("building: %v\n%s", buildErr, buildOut)
	}
	return program
}

// intruder is one that runs.
type intruder struct {
	cmd   *exec.Cmd
	stdin io.Closer
	lines chan string // of its output; closed at its end
}

// intrude starts one that gives way to everything else. It ends with its standard input, and so with this process.
func intrude(t testing.TB, args ...string) *intruder {
	t.Helper()
	cmd := exec.Command("nice", append([]string{"-n", "19", intruderBin(t)}, args...)...)
	stdin, err := cmd.StdinPipe()
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
	in := &intruder{cmd: cmd, stdin: stdin, lines: make(chan string, 1024)}
	read := make(chan struct{})
	go func() { // ends with the program
		defer close(read)
		for s := bufio.NewScanner(out); s.Scan(); {
			in.lines <- s.Text()
		}
		close(in.lines)
	}()
	t.Cleanup(func() {
		stdin.Close()
		timer := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		defer timer.Stop()
		for range in.lines {
		}
		<-read
		cmd.Wait()
	})
	return in
}

// line returns its next line of output.
func (in *intruder) line(t testing.TB) string {
	t.Helper()
	select {
	case l, ok := <-in.lines:
		if !ok {
			t.Fatal("the intruder ended early")
		}
		return l
	case <-time.After(60 * time.Second):
		t.Fatal("the intruder says nothing")
		return ""
	}
}

// end tells it to end, and returns what it says at last.
func (in *intruder) end(t testing.TB) string {
	t.Helper()
	in.stdin.Close()
	var said []string
	for {
		select {
		case l, ok := <-in.lines:
			if !ok {
				return strings.Join(said, "; ")
			}
			said = append(said, l)
		case <-time.After(time.Minute):
			t.Fatal("the intruder does not end")
		}
	}
}
