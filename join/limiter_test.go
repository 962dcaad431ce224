package join_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/api"
	"warden/join"
	"warden/tokens"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// exhaust fails from ip until the limiter refuses, and returns how often it could.
func exhaust(l *join.Limiter, ip netip.Addr, now time.Time) int {
	for n := range 100_000 {
		if l.Allow(ip, now) != nil {
			return n
		}
		l.Failed(ip, now)
	}
	return -1
}

func TestLimiterPerAddress(t *testing.T) {
	l, ip, other := join.NewLimiter(), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	if n := exhaust(l, ip, start); n != 128 {
		t.Errorf("%d failures from one address, want 128", n)
	}
	err := l.Allow(ip, start)
	wantCode(t, "exhausted", err, warden.CodeLimited)
	if warden.HintOf(err) == "" {
		t.Error("no hint")
	}
	wantCode(t, "the same address, mapped", l.Allow(netip.MustParseAddr("::ffff:192.0.2.1"), start), warden.CodeLimited)
	wantCode(t, "another address", l.Allow(other, start), "")
	wantCode(t, "a second later", l.Allow(ip, start.Add(time.Second)), "")
	if n := exhaust(l, ip, start.Add(10*time.Second)); n != 20 {
		t.Errorf("%d more failures after ten seconds, want 20", n)
	}
	wantCode(t, "a clock that went back", l.Allow(ip, start.Add(-time.Hour)), warden.CodeLimited)
}

func TestLimiterCountsIPv6ByItsNetwork(t *testing.T) {
	l := join.NewLimiter()
	exhaust(l, netip.MustParseAddr("2001:db8:0:1::1"), start)
	wantCode(t, "same /64", l.Allow(netip.MustParseAddr("2001:db8:0:1:ffff::9"), start), warden.CodeLimited)
	wantCode(t, "another /64", l.Allow(netip.MustParseAddr("2001:db8:0:2::1"), start), "")
	wantCode(t, "no address", l.Allow(netip.Addr{}, start), "")
}

// TestLimiterInTotal: many addresses together are limited, too, and recover together.
func TestLimiterInTotal(t *testing.T) {
	l := join.NewLimiter()
	n := 0
	for ; n < 5000; n++ {
		ip := netip.MustParseAddr(fmt.Sprintf("10.0.%d.%d", n/256, n%256))
		if l.Allow(ip, start) != nil {
			break
		}
		l.Failed(ip, start)
	}
	if n != 1024 {
		t.Errorf("%d failures in total, want 1024", n)
	}
	wantCode(t, "an address that never failed", l.Allow(netip.MustParseAddr("192.0.2.1"), start), warden.CodeLimited)
	wantCode(t, "a second later", l.Allow(netip.MustParseAddr("192.0.2.1"), start.Add(time.Second)), "")
}

// TestLimiterForgetsTheOldest: 4096 addresses are remembered; in 30 seconds each gets 60 attempts back, one forgotten all 128.
func TestLimiterForgetsTheOldest(t *testing.T) {
	l, ip := join.NewLimiter(), netip.MustParseAddr("192.0.2.1")
	exhaust(l, ip, start)
	for round, tt := range []struct{ others, want int }{{4000, 60}, {4095, 60}, {4096, 128}} {
		now := start.Add(time.Duration(round) * 30 * time.Second)
		for n := range tt.others {
			l.Failed(netip.MustParseAddr(fmt.Sprintf("10.%d.%d.%d", round, n/256, n%256)), now)
		}
		if n := exhaust(l, ip, now.Add(30*time.Second)); n != tt.want {
			t.Errorf("after %d other addresses: %d more attempts, want %d", tt.others, n, tt.want)
		}
	}
}

// TestServeCountsAttempts: unfinished ones while they last, failed ones afterwards, granted ones not at all.
func TestServeCountsAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.server.Limiter = join.NewLimiter()
		tok := c.mint(t, tokens.Rule{})
		none := netip.Addr{} // what a pipe comes from
		for range 200 {
			joiner, manager := pipe(t, c)
			r := &raw{joiner, exporterOf(t, joiner)}
			done := make(chan error, 1)
			go func() { done <- c.server.Serve(t.Context(), manager) }()
			r.Write(frameOf(t, r.valid(t, tok)))
			readReply(t, r)
			wantCode(t, "granted", <-done, "")
		}
		results := c.idle(t, "", 129)
		synctest.Wait()
		for n := range 4096 { // so many addresses that an idle one would be forgotten
			c.server.Limiter.Failed(netip.MustParseAddr(fmt.Sprintf("10.0.%d.%d", n/256, n%256)), time.Now())
		}
		time.Sleep(warden.HandshakeTimeout - time.Second) // the total recovers
		err := c.server.Limiter.Allow(none, time.Now())
		wantCode(t, "with 128 under way", err, warden.CodeLimited)
		wantCode(t, "another address", c.server.Limiter.Allow(netip.MustParseAddr("192.0.2.1"), time.Now()), "")
		time.Sleep(time.Second)
		if count := counted(results, 129); count[warden.CodeLimited] != 1 || count[warden.CodeTimeout] != 128 {
			t.Errorf("codes %v, want one limited, the rest timed out", count)
		}
		wantCode(t, "after 128 failed", c.server.Limiter.Allow(none, time.Now()), warden.CodeLimited)
		time.Sleep(time.Second)
		wantCode(t, "a second later", c.server.Limiter.Allow(none, time.Now()), "")
	})
}

// TestProvenAttemptsWaitTogether: a rack behind one address joins at once; what has proven its token counts for nobody's
// address.
func TestProvenAttemptsWaitTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.server.Limiter = join.NewLimiter()
		open := make(chan struct{})
		c.server.Admit = func(ctx context.Context, a join.Admission) (*api.JoinGrant, error) {
			<-open
			return c.admit(ctx, a)
		}
		cert := serverConfig(c.manager(t))
		tok, none := c.mint(t, tokens.Rule{}), netip.Addr{}
		joiners, results := make([]*raw, 200), make(chan error, 200)
		for n := range joiners {
			wantCode(t, "before the next one", c.server.Limiter.Allow(none, time.Now()), "")
			joiners[n] = pipeRaw(t, cert, func(conn *tls.Conn) { results <- c.server.Serve(t.Context(), conn) })
			joiners[n].Write(frameOf(t, joiners[n].valid(t, tok)))
			synctest.Wait()
		}
		close(open)
		for _, r := range joiners {
			if reply := readReply(t, r); reply.GetError() != nil {
				t.Fatalf("refused: %v", reply.Error)
			}
			wantCode(t, "granted", <-results, "")
		}
		if n := exhaust(c.server.Limiter, none, time.Now()); n != 128 {
			t.Errorf("%d failures after it, want 128: none of it was one", n)
		}
	})
}

// pipeRaw shakes hands in memory with a server that serve serves.
func pipeRaw(t *testing.T, cfg *tls.Config, serve func(*tls.Conn)) *raw {
	a, b := net.Pipe()
	go serve(tls.Server(b, cfg))
	conn := tls.Client(a, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{warden.DoorJoin}})
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	return &raw{conn, exporterOf(t, conn)}
}

// TestUnfinishedInTotal: many addresses together cannot hold more than 1024 attempts open.
func TestUnfinishedInTotal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.server.Limiter = join.NewLimiter()
		var all []chan error
		for n := range 8 {
			results := c.idle(t, fmt.Sprintf("192.0.2.%d:1", n), 128)
			all = append(all, results)
		}
		synctest.Wait()
		wantCode(t, "with 1024 under way", c.server.Limiter.Allow(netip.MustParseAddr("198.51.100.1"), time.Now()), warden.CodeLimited)
		for _, results := range all {
			if count := counted(results, 128); count[warden.CodeTimeout] != 128 {
				t.Errorf("codes %v, want all timed out", count)
			}
		}
	})
}

// from is a connection that comes from addr.
type from struct {
	net.Conn
	addr string
}

func (f from) RemoteAddr() net.Addr {
	if f.addr == "" {
		return f.Conn.RemoteAddr()
	}
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(f.addr))
}

// idle serves n connections from addr whose other ends say nothing, not even a hello.
func (c *cluster) idle(t *testing.T, addr string, n int) (results chan error) {
	cfg := serverConfig(c.manager(t))
	results = make(chan error, n)
	for range n {
		a, b := net.Pipe()
		go io.Copy(io.Discard, a)
		go func() { results <- c.server.Serve(t.Context(), tls.Server(from{b, addr}, cfg)) }()
	}
	return results
}

func counted(results chan error, n int) map[warden.Code]int {
	count := map[warden.Code]int{}
	for range n {
		count[warden.CodeOf(<-results)]++
	}
	return count
}
