package manager

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/door"
)

// says is a report of one session, last answered ago.
func says(session string, ago time.Duration) *api.ReportRequest {
	now := time.Now()
	return &api.ReportRequest{TimeNs: now.UnixNano(), LockState: "unlocked",
		Claims: []*api.SessionClaim{{NodeId: "n", SessionId: session, SeenNs: now.Add(-ago).UnixNano()}}}
}

// The newest session of a node wins; the older one is told to close, and never comes back.
func TestNewestSessionWins(t *testing.T) {
	l := newLiveness()
	now := time.Now()
	l.begin(now)
	take := func(from, session string, closes ...string) {
		t.Helper()
		if got := l.take(from, says(session, 0), now); !slices.Equal(got, closes) {
			t.Errorf("%s says %s: close %v, want %v", from, session, got, closes)
		}
	}
	take("a", "s1")
	take("a", "s1")
	take("b", "s2")
	take("a", "s1", "s1")
	take("a", "s1", "s1")
	if c, ok := l.claim("n"); !ok || c.manager != "b" || c.session != "s2" {
		t.Errorf("claim = %+v", c)
	}
	first, _ := l.claim("n")
	take("a", "s3")
	if c, _ := l.claim("n"); c.manager != "a" || c.epoch <= first.epoch {
		t.Errorf("claim = %+v after %+v", c, first)
	}
	take("b", "s2", "s2")
	l.begin(now)
	if _, ok := l.claim("n"); ok {
		t.Error("a claim outlived the term")
	}
}

// A node that opens one session after the other makes the leader hold few of them.
func TestSessionsThatLostAreForgotten(t *testing.T) {
	l := newLiveness()
	now := time.Now()
	l.begin(now)
	for i := range 10_000 { // 50 a second, as fast as a manager reports
		now = now.Add(reportGap)
		l.take("a", says(fmt.Sprint(i), 0), now)
	}
	if most := int(lostKept/reportGap) + 1; len(l.lost) > most {
		t.Errorf("%d sessions that lost their claim are known, want at most %d", len(l.lost), most)
	}
	if closes := l.take("b", says("9998", 0), now); !slices.Equal(closes, []string{"9998"}) { // a report that was overtaken
		t.Errorf("a session that has just lost its claim: close %v", closes)
	}
}

func TestNodeIsDownWithoutASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLiveness()
		l.begin(time.Now())
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.run(ctx)
		state := func(node string, want api.Liveness) {
			t.Helper()
			l.mu.Lock()
			defer l.mu.Unlock()
			if got := l.at(node, time.Now()); got != want {
				t.Errorf("after %s: %v, want %v", time.Since(l.since), got, want)
			}
		}
		state("n", api.Liveness_LIVENESS_UNKNOWN)
		state("other", api.Liveness_LIVENESS_UNKNOWN)
		l.take("a", says("s", time.Second), time.Now()) // last answered a second ago
		<-l.changed()
		state("n", api.Liveness_LIVENESS_READY)
		time.Sleep(warden.NodeDownAfter - time.Second - time.Nanosecond)
		state("n", api.Liveness_LIVENESS_READY)
		state("other", api.Liveness_LIVENESS_UNKNOWN) // the grace of a new leader
		time.Sleep(time.Nanosecond)
		state("n", api.Liveness_LIVENESS_UNKNOWN) // the leader is too new to say more
		time.Sleep(time.Second)
		state("n", api.Liveness_LIVENESS_DOWN)
		state("other", api.Liveness_LIVENESS_DOWN)
		<-l.changed()
		l.take("a", says("s", 0), time.Now())
		state("n", api.Liveness_LIVENESS_READY)
		time.Sleep(2 * warden.NodeDownAfter)
		state("n", api.Liveness_LIVENESS_DOWN)
	})
}

// A claim that an answer from the future supports is as fresh as now, not more.
func TestClaimFromTheFuture(t *testing.T) {
	l := newLiveness()
	now := time.Now()
	l.begin(now.Add(-time.Hour))
	l.take("a", says("s", -time.Hour), now)
	if c, _ := l.claim("n"); c.seen.After(now) {
		t.Errorf("seen %s ahead", c.seen.Sub(now))
	}
}

func TestLease(t *testing.T) {
	var l lease
	now := time.Now()
	if l.age(now) < warden.LeaseHold {
		t.Error("a manager that heard nothing has a lease")
	}
	l.renew(now)
	l.renew(now.Add(-time.Minute)) // an answer that was overtaken
	if d := l.age(now.Add(time.Second)); d != time.Second {
		t.Errorf("age = %s", d)
	}
}

// fired is a log that notes when its only line came.
type fired struct{ at atomic.Pointer[time.Time] }

func (f *fired) Write(b []byte) (int, error) {
	now := time.Now()
	f.at.Store(&now)
	return len(b), nil
}

// Sessions end when the lease does: not when a report that a dead leader leaves unanswered does.
func TestSessionsEndWithTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log fired
		m := &Manager{logger: slog.New(slog.NewTextHandler(&log, nil)), doors: door.New(door.Config{})}
		m.ready.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		wg.Go(func() { m.leaseLoop(ctx) }) // there is no lease yet, and nothing to close
		synctest.Wait()
		log.at.Store(nil)
		for range 2 { // it is lost, and lost again
			time.Sleep(time.Minute)
			begun := time.Now()
			m.lease.renew(begun)
			time.Sleep(warden.LeaseHold)
			synctest.Wait()
			if at := log.at.Swap(nil); at != nil {
				t.Fatalf("closed %s after the last word", at.Sub(begun))
			}
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
			if log.at.Swap(nil) == nil {
				t.Errorf("open %s after the last word", time.Since(begun))
			}
		}
	})
}

func TestReportedIsSignalledAndForgotten(t *testing.T) {
	l := newLiveness()
	l.take("a", says("s", 0), time.Now())
	r, ok := l.reported("a")
	if !ok || r.lock.State != LockUnlocked {
		t.Fatalf("reported = %+v, %t", r, ok)
	}
	l.take("a", &api.ReportRequest{AppliedIndex: 7, Tasks: []*api.NodeTaskReport{{}}}, time.Now())
	<-r.changed
	if r, _ := l.reported("a"); r.applied != 7 || r.lock.State != LockUnlocked {
		t.Errorf("after a report of tasks: %+v", r)
	}
	l.forget("a")
	if _, ok := l.reported("a"); ok {
		t.Error("not forgotten")
	}
}

// However much nodes say of themselves, every command stays within its bound, and nothing is left out.
func TestBatchesFitACommand(t *testing.T) {
	long := strings.Repeat("x", 40<<10)
	var ops []*api.Operation
	for i := range 1200 {
		d := &api.NodeDescription{Hostname: "n"}
		if i%10 == 0 {
			d.EngineLabels = map[string]string{"l": long}
		}
		ops = append(ops, &api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: "n", Description: d}}})
	}
	var got []*api.Operation
	for _, b := range batches(ops) {
		got = append(got, b...)
		if n := proto.Size(&api.Command{Operations: b}); n > warden.CommandBytes || len(b) > 500 {
			t.Errorf("a command of %d operations and %d bytes", len(b), n)
		}
	}
	if !slices.Equal(got, ops) {
		t.Errorf("%d of %d operations in the batches", len(got), len(ops))
	}
}

// TestI4AlarmReachesTheLeader: what one manager saw shows for the node, the newest of several, until it is old.
func TestI4AlarmReachesTheLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen alarms
		l := newLiveness()
		l.begin(time.Now())
		report := func() {
			l.take("m2", &api.ReportRequest{LockState: "unlocked", Alarms: seen.recent(time.Now())}, time.Now())
		}
		seen.raise(ca.Identity{NodeID: "n"}, netip.MustParseAddr("192.0.2.1"), time.Now())
		time.Sleep(time.Second)
		seen.raise(ca.Identity{NodeID: "n"}, netip.MustParseAddr("192.0.2.2"), time.Now())
		report()
		if got := l.alarm("n"); !strings.Contains(got, "192.0.2.2") || l.alarm("other") != "" {
			t.Errorf("alarm = %q", got)
		}
		l.take("m2", &api.ReportRequest{Tasks: []*api.NodeTaskReport{{}}}, time.Now())
		if l.alarm("n") == "" {
			t.Error("a report of tasks forgot the alarm")
		}
		time.Sleep(alarmKept + time.Second)
		report()
		if got := l.alarm("n"); got != "" {
			t.Errorf("alarm after %s = %q", alarmKept, got)
		}
		for i := range 2 * alarmsMax {
			seen.raise(ca.Identity{NodeID: fmt.Sprint(i)}, netip.Addr{}, time.Now())
		}
		if n := len(seen.recent(time.Now())); n != alarmsMax {
			t.Errorf("%d alarms are kept, want %d", n, alarmsMax)
		}
	})
}
