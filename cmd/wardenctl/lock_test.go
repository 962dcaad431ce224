package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A new unlock key that could not be written, as nobody reads it or the disk is full, is said to be lost: a broken pipe does not end the
// program without a word, and what the cluster took is named.
func TestNewKeyThatNobodyReads(t *testing.T) {
	f := newFakeManager(testNow)
	f.lock("key0000001")
	socket := t.TempDir() + "/s"
	stop, err := f.serve(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	r, broken, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer broken.Close()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, out := range []*os.File{broken, full} {
		for _, args := range []string{"swarm unlock-key --rotate", "swarm unlock-key --rotate -q"} {
			var errs bytes.Buffer
			cmd := exec.Command("wardenctl", append([]string{"--host", "unix://" + socket}, strings.Fields(args)...)...)
			cmd.Stdout, cmd.Stderr = out, &errs
			err := cmd.Run()
			f.mu.Lock()
			taken := f.cluster().UnlockKeyId
			f.mu.Unlock()
			if cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(errs.String(), "unlock key "+taken+" is lost") || strings.Contains(errs.String(), "WDNKEY") {
				t.Errorf("%s to %s: %v\n%s", args, out.Name(), err, errs.String())
			}
		}
	}
}
