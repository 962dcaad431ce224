package join_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/join"
	"warden/tokens"
)

// pipe returns both ends of an established connection, the joiner's raw.
func pipe(t *testing.T, c *cluster) (joiner, manager *tls.Conn) {
	a, b := net.Pipe()
	joiner = tls.Client(a, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{warden.DoorJoin}})
	manager = tls.Server(b, serverConfig(c.manager(t)))
	done := make(chan error, 1)
	go func() { done <- joiner.Handshake() }()
	if err := manager.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return joiner, manager
}

func TestSlowJoiners(t *testing.T) {
	for _, tt := range []struct {
		name string
		send func(conn *tls.Conn, request []byte)
		end  time.Duration
	}{
		{"says nothing", func(*tls.Conn, []byte) {}, warden.HandshakeTimeout},
		{"stops after the length", func(conn *tls.Conn, b []byte) { conn.Write(b[:4]) }, warden.JoinTimeout - warden.HandshakeTimeout},
		{"a byte each second", func(conn *tls.Conn, b []byte) {
			for i := range b {
				if _, err := conn.Write(b[i : i+1]); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}, 3*time.Second + warden.JoinTimeout - warden.HandshakeTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t)
				joiner, manager := pipe(t, c)
				r := &raw{joiner, exporterOf(t, joiner)}
				request := frameOf(t, r.valid(t, c.mint(t, tokens.Rule{})))
				start, done := time.Now(), make(chan error, 1)
				go func() { done <- c.server.Serve(t.Context(), manager) }()
				var wg sync.WaitGroup
				wg.Go(func() { tt.send(joiner, request) })
				wg.Go(func() { io.Copy(io.Discard, joiner) })
				wantCode(t, tt.name, <-done, warden.CodeTimeout)
				if got := time.Since(start); got != tt.end {
					t.Errorf("Serve ended after %s, want %s", got, tt.end)
				}
				joiner.NetConn().Close()
				wg.Wait()
			})
		})
	}
}

// TestReplyThatNobodyReads: the whole exchange is over after JoinTimeout, even if the joiner reads nothing.
func TestReplyThatNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		joiner, manager := pipe(t, c)
		r := &raw{joiner, exporterOf(t, joiner)}
		request := frameOf(t, r.valid(t, c.mint(t, tokens.Rule{})))
		start, done := time.Now(), make(chan error, 1)
		go func() { done <- c.server.Serve(t.Context(), manager) }()
		joiner.Write(request)
		if err := <-done; err == nil || time.Since(start) > warden.JoinTimeout {
			t.Errorf("Serve = %v after %s", err, time.Since(start))
		}
		joiner.NetConn().Close()
	})
}

func TestServeEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		joiner, manager := pipe(t, c)
		ctx, cancel := context.WithCancel(t.Context())
		start, done := time.Now(), make(chan error, 1)
		go func() { done <- c.server.Serve(ctx, manager) }()
		synctest.Wait()
		cancel()
		if err := <-done; err == nil || time.Since(start) != 0 {
			t.Errorf("Serve = %v after %s", err, time.Since(start))
		}
		joiner.NetConn().Close()
	})
}

// TestSlowManager: the joiner waits for JoinTimeout and no longer, wherever the manager stops.
func TestSlowManager(t *testing.T) {
	for _, shakes := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t)
			cert := c.manager(t)
			a, b := net.Pipe()
			go func() {
				if shakes {
					io.Copy(io.Discard, tls.Server(b, serverConfig(cert)))
				} else {
					io.Copy(io.Discard, b)
				}
			}()
			start := time.Now()
			_, err := join.Join(t.Context(), "manager", c.mint(t, tokens.Rule{}), newRequest(t), func(context.Context, string) (net.Conn, error) { return a, nil })
			wantCode(t, "a manager that says nothing", err, warden.CodeTimeout)
			if got := time.Since(start); got != warden.JoinTimeout {
				t.Errorf("Join ended after %s", got)
			}
			b.Close()
		})
	}
}
