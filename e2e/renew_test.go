package e2e

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"warden/internal/testcluster"
)

// leaf reads a node's certificate from its state directory, as any tool can.
func leaf(t testing.TB, h *testcluster.Host) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(h.State, "identity", "node.crt"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("%s: node.crt holds no PEM", h.Name)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRenewalUnderLoad lets every node renew several times within certificates that live for seconds, while the cluster is
// written to. No task is dropped, no node falls out.
func TestRenewalUnderLoad(t *testing.T) {
	c := newSix(t, "--cert-expiry", "12s")
	m := c.m[0]
	m.CtlIn(canary, "secret", "create", "s", "-")
	mark := fmt.Sprintf("renewal-%d", os.Getpid())
	m.Ctl("service", "create", "--name", "app", "--replicas", "4", "--secret", "s", "host", "sh", "-c", "while :; do sleep 1000; done", mark)
	testcluster.AwaitRunning(t, m, "app", 4)
	before := fmt.Sprint(taskPid(mark))

	// Load, until the end of the test.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var writes atomic.Int64
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			name := fmt.Sprintf("load-%d", i)
			if _, stderr, code := c.m[1+i%2].Try("zone", "create", name); code != 0 {
				t.Errorf("a write under load failed: %s", stderr)
				return
			}
			c.m[i%2].Try("zone", "rm", name)
			writes.Add(1)
		}
	})
	defer wg.Wait()
	defer sync.OnceFunc(func() { close(stop) })()

	serials := map[string]map[string]bool{}
	down := ""
	testcluster.Await(t, 90*time.Second, func() error {
		for _, h := range append(c.m[:], c.w[:]...) {
			if serials[h.Name] == nil {
				serials[h.Name] = map[string]bool{}
			}
			serials[h.Name][leaf(t, h).SerialNumber.String()] = true
		}
		if out, _, _ := m.Try("node", "ls", "--format", "{{.Hostname}} {{.Status}}"); strings.Contains(out, "Down") {
			down = out
		}
		for name, seen := range serials {
			if len(seen) < 4 { // the first, and three renewals
				return fmt.Errorf("%s has had %d certificates", name, len(seen))
			}
		}
		return nil
	})
	if down != "" {
		t.Errorf("a node was down meanwhile:\n%s", down)
	}
	if after := fmt.Sprint(taskPid(mark)); after != before {
		t.Errorf("the tasks' processes were %s before and %s after", before, after)
	}
	t.Logf("%d writes went through meanwhile", writes.Load())

	// A change of the policy reaches every node within a minute.
	begin := time.Now()
	m.Ctl("swarm", "update", "--cert-expiry", "2h")
	testcluster.Await(t, time.Minute, func() error {
		for _, h := range append(c.m[:], c.w[:]...) {
			if left := time.Until(leaf(t, h).NotAfter); left < time.Hour {
				return fmt.Errorf("the certificate of %s ends in %s", h.Name, left)
			}
		}
		return nil
	})
	t.Logf("the new expiry was everywhere after %s", time.Since(begin).Round(time.Second))
	c.awaitReady(t, m, 6)
}

// TestExpiredWhileOff turns everything off until all certificates have ended, and on again: nothing is lost.
func TestExpiredWhileOff(t *testing.T) {
	c := newSix(t, "--cert-expiry", "10s") // of which a third is left for a renewal, on a loaded machine
	c.m[0].Ctl("zone", "create", "kept")
	all := append(c.m[:], c.w[:]...)
	for _, h := range all {
		h.Kill()
	}
	testcluster.Await(t, 40*time.Second, func() error {
		for _, h := range all {
			if left := time.Until(leaf(t, h).NotAfter); left > 0 {
				return fmt.Errorf("the certificate of %s is good for %s", h.Name, left)
			}
		}
		return nil
	})
	for _, h := range all {
		h.Start()
	}
	c.awaitVoters(t, c.m[0], 3)
	c.awaitReady(t, c.m[0], 6)
	if out := c.m[2].Ctl("zone", "ls"); !strings.Contains(out, "kept") {
		t.Errorf("zone ls = %s, want what was there before", out)
	}
}

// TestLockedAtRest wants no key of a manager readable on its disk, from its first write on, for those that join or are
// promoted, too.
func TestLockedAtRest(t *testing.T) {
	c := newSix(t, "--autolock")
	c.m[0].Ctl("node", "promote", "w1")
	c.awaitVoters(t, c.m[0], 4)
	for _, h := range append(c.m[:], c.w[0]) {
		b, err := os.ReadFile(filepath.Join(h.State, "identity", "node.key"))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("PRIVATE KEY")) || !bytes.Contains(b, []byte("SEALED")) {
			t.Errorf("the key file of %s is not sealed:\n%s", h.Name, b)
		}
		h.Kill()
		h.Start()
		if out, _, _ := h.Try("status"); !strings.Contains(out, "locked") {
			t.Errorf("status of %s after a restart: %s", h.Name, out)
		}
		// A key of the right form that is not this cluster's.
		if _, stderr, code := h.TryIn("WDNKEY-1-aaaa\n", "swarm", "unlock"); code == 0 {
			t.Errorf("%s took a malformed key: %s", h.Name, stderr)
		}
	}
	key := filepath.Join(c.Dir, "unlock-key")
	if err := os.WriteFile(key, []byte(c.unlockKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, h := range append(c.m[:], c.w[0]) {
		h.Ctl("swarm", "unlock", "--key-file", key)
	}
	c.awaitVoters(t, c.m[0], 4)
	c.awaitReady(t, c.m[0], 6)
}

// TestForeignAndBrokenState wants a state directory that was tampered with to stop the start, with the name of the file and
// what can be done, and to be left as it is.
func TestForeignAndBrokenState(t *testing.T) {
	testcluster.Root(t)
	c := testcluster.New(t)
	a, b := c.Host("a"), c.Host("b")
	a.Ctl("swarm", "init")
	b.Ctl("swarm", "init")
	a.Stop()
	b.Stop()
	log := filepath.Join(a.State, "raft", "log.db")
	good, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(filepath.Join(b.State, "raft", "log.db"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, code string
		data       []byte
	}{{"foreign", "foreign", foreign}, {"truncated", "corrupt", good[:len(good)/3]}, {"empty", "corrupt", nil}} {
		if err := os.WriteFile(log, tt.data, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(filepath.Join(testcluster.Bin(t), "warden"), "run", "--state-dir", a.State, "--socket", a.Sock, "--listen", a.Address).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "log.db") || !strings.Contains(string(out), "["+tt.code+"]") || !strings.Contains(string(out), "hint:") {
			t.Errorf("starting on a %s log = %v, want [%s], the file and a hint:\n%s", tt.name, err, tt.code, out)
		}
		if now, _ := os.ReadFile(log); !bytes.Equal(now, tt.data) {
			t.Errorf("starting on a %s log changed it", tt.name)
		}
	}
	if err := os.WriteFile(log, good, 0o600); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(a.State, "identity", "node.key")
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(testcluster.Bin(t), "warden"), "run", "--state-dir", a.State, "--socket", a.Sock, "--listen", a.Address).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "[permissions]") {
		t.Errorf("starting with a key file that others can read = %v\n%s", err, out)
	}
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	a.Start()
	b.Start()
	testcluster.Await(t, 40*time.Second, func() error {
		if _, stderr, code := a.Try("node", "ls"); code != 0 {
			return errors.New(stderr)
		}
		return nil
	})
}
