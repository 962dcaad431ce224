package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// terminal returns both ends of a new pseudo-terminal: what the user's keyboard and screen are, and what a program gets.
func terminal(t *testing.T) (user, program *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { user.Close() })
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return user, program
}

func echoes(t *testing.T, f *os.File) bool {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

// promptWatch is a standard error that tells when the prompt is out, and types the answer then.
type promptWatch struct {
	bytes.Buffer
	prompted func()
}

func (w *promptWatch) Write(p []byte) (int, error) {
	n, err := w.Buffer.Write(p)
	if w.prompted != nil && strings.HasSuffix(w.String(), ": ") {
		w.prompted()
		w.prompted = nil
	}
	return n, err
}

// On a terminal the unlock key is asked for, and what is typed does not appear on the screen (I10).
func TestUnlockPromptDoesNotEcho(t *testing.T) {
	f := newFakeManager(testNow)
	f.info.State = "locked"
	socket := t.TempDir() + "/s"
	stop, err := f.serve(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	user, program := terminal(t)
	var out bytes.Buffer
	errs := &promptWatch{prompted: func() {
		if echoes(t, program) {
			t.Error("the prompt is out before echo is off")
		}
		io.WriteString(user, fakeUnlockKey+"\n")
	}}
	if exit := run(t.Context(), []string{"--host", "unix://" + socket, "swarm", "unlock"}, program, &out, errs); exit != exitDone {
		t.Fatalf("run(swarm unlock) on a terminal = %d, %s", exit, errs.String())
	}
	if !strings.HasPrefix(errs.String(), "Unlock key: ") {
		t.Errorf("prompt = %q, want the name of what is asked for", errs.String())
	}
	if !echoes(t, program) {
		t.Error("the terminal does not echo any more")
	}
	io.WriteString(program, "end of screen\n")
	screen, lines := "", bufio.NewReader(user)
	for !strings.Contains(screen, "end of screen") {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		screen += line
	}
	if strings.Contains(screen+out.String()+errs.String(), "WDNKEY") {
		t.Errorf("the key appears: %q, %q, %q", screen, out.String(), errs.String())
	}
}

func TestInterruptedPromptGivesTheEchoBack(t *testing.T) {
	_, program := terminal(t)
	ctx, cancel := context.WithCancel(t.Context())
	errs := &promptWatch{prompted: cancel}
	if exit := run(ctx, []string{"swarm", "unlock"}, program, io.Discard, errs); exit != exitFailed || !strings.Contains(errs.String(), "interrupted") {
		t.Errorf("run(swarm unlock), interrupted = %d %q, want %d and that it was interrupted", exit, errs.String(), exitFailed)
	}
	if !echoes(t, program) {
		t.Error("the terminal does not echo any more")
	}
}
