package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"warden"
	"warden/ca"
	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/join"
	"warden/tokens"
)

// intruder joins a node with a key of its own and no daemon.
func intruder(t *testing.T, at *testcluster.Host, token string) thief.Member {
	t.Helper()
	tk, err := tokens.Parse(token)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ca.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	m, err := thief.Join("", at.Address, tk, join.Request{Key: key, Hostname: "intruder"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestFloodOfSessions: whoever has a worker's key opens sessions as fast as it can, and fills each with frames that no node
// sends. Others are still told what to run, and the manager keeps no more of it than of one node.
func TestFloodOfSessions(t *testing.T) {
	_, m, _ := newPair(t)
	flooder := intruder(t, m, m.Token("worker"))

	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00" // an HTTP/2 server's first frame
	floods := map[string]string{
		"nothing":  "",
		"garbage":  "GET / HTTP/1.1\r\n\r\n",
		"settings": strings.Repeat(settings, 1000),
		"pings":    settings + strings.Repeat("\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678", 1000),
		"headers":  settings + strings.Repeat("\x00\x40\x00\x01\x00\x00\x00\x00\x01"+strings.Repeat("\x00\x01a\x01b", 3276)+"\x00\x01a\x00", 8),
		"huge":     settings + "\xff\xff\xff\x00\x00\x00\x00\x00\x01" + strings.Repeat("x", 1<<16),
		"resets":   settings + strings.Repeat("\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08", 1000),
		"window":   settings + strings.Repeat("\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\xff\xff", 1000),
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var dialled [8]atomic.Int64
	var wg sync.WaitGroup
	kinds := slices.Sorted(maps.Keys(floods))
	for i := range 4 * len(kinds) {
		wg.Go(func() {
			kind := i % len(kinds)
			for ctx.Err() == nil {
				conn, err := flooder.Dial(ctx, "", m.Address, warden.DoorNode)
				if err != nil {
					continue
				}
				dialled[kind].Add(1)
				conn.SetDeadline(time.Now().Add(time.Second))
				for range 10 {
					if _, err := io.WriteString(conn, floods[kinds[kind]]); err != nil {
						break
					}
				}
				io.Copy(io.Discard, io.LimitReader(conn, 1<<16))
				conn.Close()
			}
		})
	}
	for n := range 3 {
		m.Ctl("service", "create", "--name", fmt.Sprint("app", n), "--constraint", "node.hostname==w1", "host", "sleep", "1000")
		testcluster.AwaitRunning(t, m, fmt.Sprint("app", n), 1)
	}
	testcluster.Await(t, 40*time.Second, func() error {
		for kind := range kinds {
			if n := dialled[kind].Load(); n < 20 {
				return fmt.Errorf("%d sessions of %s", n, kinds[kind])
			}
		}
		return nil
	})
	if out := m.Ctl("node", "ls", "--format", "{{.Hostname}} {{.Status}}"); !strings.Contains(out, "w1 Ready") {
		t.Errorf("node ls =\n%s", out)
	}
	cancel()
	wg.Wait()
	testcluster.Await(t, 40*time.Second, func() error {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.Pid()))
		if err != nil || len(fds) > 64 {
			return fmt.Errorf("the manager holds %d descriptors after the flood: %v", len(fds), err)
		}
		return nil
	})
	log, _ := os.ReadFile(m.LogPath)
	for _, bad := range []string{"panic", "goroutine "} {
		if strings.Contains(string(log), bad) {
			t.Errorf("the manager's log has %q", bad)
		}
	}
}

// TestFloodWithoutACertificate: from many addresses someone begins handshakes, and joins, and says no more. Meanwhile nodes
// join, and those that are there are told what to run.
func TestFloodWithoutACertificate(t *testing.T) {
	c, m, _ := newPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait() }()
	var begun, joining atomic.Int64
	for i := range 900 {
		from := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 200, byte(1+i/250), byte(1+i%250))}}
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := from.DialContext(ctx, "tcp", m.Address)
				if err != nil {
					continue
				}
				begun.Add(1)
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				if i%3 == 0 { // up to the request, of which it sends two bytes
					tc := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{warden.DoorJoin}})
					if tc.HandshakeContext(ctx) == nil {
						tc.Write([]byte{0, 0})
						joining.Add(1)
						io.Copy(io.Discard, tc)
					}
				} else {
					conn.Write([]byte("\x16\x03\x01\x02\x00")) // the head of a hello
					io.Copy(io.Discard, conn)
				}
				stop()
				conn.Close()
			}
		})
	}
	testcluster.Await(t, 40*time.Second, func() error {
		if begun.Load() < 900 || joining.Load() < 100 {
			return fmt.Errorf("%d connections, %d of them at the join door", begun.Load(), joining.Load())
		}
		return nil
	})
	for n := range 3 {
		c.Host(fmt.Sprint("late", n)).Join(m.Token("worker"), m) // asks again, as every joiner does, where its handshake made room for another
		m.Ctl("service", "create", "--name", fmt.Sprint("app", n), "--constraint", "node.hostname==w1", "host", "sleep", "1000")
		testcluster.AwaitRunning(t, m, fmt.Sprint("app", n), 1)
	}
	c.awaitReady(t, m, 5)
}
