package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor/confine"
)

// gateVerb makes this binary a gate.
const gateVerb = "internal-gate"

// gateFailed is the exit code of a gate that was not let through, as docker run has it for its own failures.
const gateFailed = 125

// What daemon and gate say to each other, each a packet of its own, in this order. In the place of wordRunning the gate may send a
// refusal as JSON.
const (
	wordHello   = "hello"   // daemon: are you there?
	wordHere    = "here"    // gate, which proves that it lived when its pidfd was opened
	wordRun     = "run"     // daemon: the secrets are in place
	wordRunning = "running" // gate: the program runs
	wordKeep    = "keep"    // daemon: the task is on record, go on without me
	packetMax   = 4 << 10
)

// refusal is why the gate could not start the program.
type refusal struct {
	Code       warden.Code
	Text, Hint string
}

func (r refusal) err() error {
	err := warden.Errorf(r.Code, "starting the command", "%s", r.Text)
	if r.Hint != "" {
		err = warden.Hint(err, r.Hint)
	}
	return err
}

// Main does the job of a gate if args, which are os.Args, say so, and does not return then. Else it reports false. It belongs
// first in main, and in TestMain of tests that start tasks.
func Main(args []string) (handled bool) {
	if len(args) < 2 || args[1] != gateVerb {
		return false
	}
	code, err := gate(args[2:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "warden:", err) // on the task's log
	}
	os.Exit(code)
	return true
}

// gate is the life of a task's process 1. It knows no secret. The environment, and with it Go's runtime, is the task's to set. The
// connection ends with the process.
func gate(command []string) (code int, err error) {
	runtime.GOMAXPROCS(1)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil { // what it has open is not the program's to look at
		return gateFailed, err
	}
	conn, err := net.Dial("unixpacket", gateSocket)
	if err != nil {
		return gateFailed, errors.New("this container belongs to a task, which is started once: no daemon holds its gate open")
	}
	if err := conn.SetDeadline(time.Now().Add(gateTime)); err != nil {
		return gateFailed, err
	}
	if err := await(conn, wordHello); err != nil {
		return gateFailed, err
	}
	if _, err := conn.Write([]byte(wordHere)); err != nil {
		return gateFailed, err
	}
	if err := await(conn, wordRun); err != nil {
		return gateFailed, err
	}
	refuse := func(r refusal) (int, error) { // the daemon tells
		b, _ := json.Marshal(r)
		_, _ = conn.Write(b)
		return gateFailed, nil
	}
	if err := confine.Apply(); err != nil { // the gate itself needs none of these calls any more
		return refuse(refusal{warden.CodeInternal, "filtering its system calls: " + err.Error(), "kernel and engine must let seccomp(2) through"})
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals) // all
	pid, err := begin(command)
	if err != nil {
		return refuse(refused(command[0], err))
	}
	if _, err := conn.Write([]byte(wordRunning)); err != nil {
		return gateFailed, err
	}
	go func() { // ends with the process
		if await(conn, wordKeep) != nil {
			os.Exit(gateFailed)
		}
		_ = conn.Close()
		debug.FreeOSMemory()
	}()
	go func() { // ends with the process
		for s := range signals {
			if n, ok := s.(syscall.Signal); ok && n != unix.SIGCHLD && n != unix.SIGURG { // the latter is Go's own
				_ = unix.Kill(pid, n)
			}
		}
	}()
	return reap(pid), nil
}

// await reads one packet and wants it to be word.
func await(conn net.Conn, word string) error {
	b := make([]byte, packetMax)
	n, err := conn.Read(b)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("the daemon did not let the task through within %s", gateTime)
	case err != nil || n == 0:
		return errors.New("the daemon has gone before the task was on record")
	case string(b[:n]) != word:
		return errors.New("the daemon said something else than expected")
	}
	return nil
}

// begin starts the program with this process's environment, directory and output.
func begin(command []string) (pid int, err error) {
	path, err := exec.LookPath(command[0])
	if err != nil {
		return 0, err
	}
	if confine.Foreign(path) {
		return 0, unix.ENOEXEC
	}
	return syscall.ForkExec(path, command, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true}})
}

// refused says why begin failed. Code is CodeInvalid where the program can never run.
func refused(name string, err error) refusal {
	name = fmt.Sprintf("%.200q", name)
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return refusal{warden.CodeInvalid, name + ": not found in the image, or its interpreter is not", "check the command and the image's PATH"}
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EISDIR):
		return refusal{warden.CodeInvalid, name + ": not a program that the task's user may run",
			"the file and its directories need the x bit for the image's user, or for others where the image names none"}
	case errors.Is(err, unix.ENOEXEC):
		return refusal{warden.CodeInvalid, name + ": not a program of this machine", "tasks run programs of " + runtime.GOARCH + " alone"}
	case errors.Is(err, unix.E2BIG):
		return refusal{warden.CodeInvalid, "arguments and environment are too long together", ""}
	}
	return refusal{warden.CodeInternal, name + ": " + err.Error(), ""}
}

// reap waits for all children until the program ends, and returns its exit code, 128 + number for a signal.
func reap(program int) int {
	status, err := confine.Reap(program)
	switch {
	case err != nil:
		return gateFailed
	case status.Signaled():
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}
