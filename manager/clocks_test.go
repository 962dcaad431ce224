package manager

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// TestAgreement: a majority of the voters has the leader's time, or another, or too few have told theirs.
func TestAgreement(t *testing.T) {
	const ahead, behind, near = 3 * time.Hour, -3 * time.Hour, 9 * time.Second
	now := reading{wall: 1e18, mono: time.Hour}
	type others map[string]time.Duration
	for _, c := range []struct {
		what      string
		voters    string
		others    others        // how far their clocks are ahead
		ago       time.Duration // when they were heard
		set       time.Duration // this clock, since then
		code      warden.Code
		successor string
	}{
		{what: "alone", voters: "a"},
		{what: "alone, with another that has no vote", voters: "a", others: others{"b": ahead}},
		{what: "nobody heard", voters: "abc", code: warden.CodeUnavailable},
		{what: "two need both", voters: "ab", code: warden.CodeUnavailable},
		{what: "two need both to agree", voters: "ab", others: others{"b": ahead}, code: warden.CodeClock},
		{what: "two agree", voters: "ab", others: others{"b": -near}},
		{what: "who has no vote does not count", voters: "abc", others: others{"d": 0, "e": 0}, code: warden.CodeUnavailable},
		{what: "one of two", voters: "abc", others: others{"b": near}},
		{what: "one of two, the other is out", voters: "abc", others: others{"b": 0, "c": ahead}},
		{what: "one is out, the other silent", voters: "abc", others: others{"c": ahead}, code: warden.CodeUnavailable},
		{what: "both ahead", voters: "abc", others: others{"b": ahead, "c": ahead + near}, code: warden.CodeClock, successor: "b"},
		{what: "both behind", voters: "abc", others: others{"b": behind - near, "c": behind}, code: warden.CodeClock, successor: "b"},
		{what: "no two agree", voters: "abc", others: others{"b": ahead, "c": behind}, code: warden.CodeClock},
		{what: "two of four", voters: "abcd", others: others{"b": 0, "c": ahead, "d": ahead}, code: warden.CodeClock},
		{what: "three of five", voters: "abcde", others: others{"b": ahead, "c": ahead, "d": near, "e": -near}},
		{what: "three of five against one that is out too", voters: "abcde", others: others{"b": behind, "c": ahead, "d": ahead, "e": ahead}, code: warden.CodeClock, successor: "c"},
		{what: "two of five, none is a majority", voters: "abcde", others: others{"b": 0, "c": ahead, "d": ahead}, code: warden.CodeUnavailable},
		{what: "heard a while ago", voters: "abc", others: others{"b": 0}, ago: warden.LeaseHold - 1},
		{what: "heard too long ago", voters: "abc", others: others{"b": 0, "c": 0}, ago: warden.LeaseHold, code: warden.CodeUnavailable},
		{what: "none to hand over to lives", voters: "abc", others: others{"b": ahead, "c": ahead}, ago: warden.LeasePush, code: warden.CodeClock},
		{what: "set since, a bit", voters: "abc", others: others{"b": 0}, set: near},
		{what: "set since, and with that out", voters: "abc", others: others{"b": -near, "c": -near}, set: near, code: warden.CodeClock, successor: "b"},
		{what: "set since", voters: "abc", others: others{"b": 0, "c": 0}, set: ahead, code: warden.CodeUnavailable},
		{what: "set back since", voters: "abc", others: others{"b": ahead, "c": ahead}, set: behind, code: warden.CodeUnavailable},
	} {
		all := map[string]heard{}
		for id, by := range c.others {
			at := reading{wall: now.wall - int64(c.ago+c.set), mono: now.mono - c.ago}
			all[id] = heard{wall: at.wall + int64(by), at: at}
		}
		successor, err := agreement("a", strings.Split(c.voters, ""), all, now)
		if warden.CodeOf(err) != c.code || successor != c.successor {
			t.Errorf("%s: successor %q, %v, want %q and %q", c.what, successor, err, c.successor, c.code)
		}
		if c.code == warden.CodeClock && (!strings.Contains(err.Error(), "2001-09-09T01:46:40Z") || strings.Count(err.Error(), "Z") < 2) {
			t.Errorf("%s: %v, which does not name both times", c.what, err)
		}
	}
}

// TestClocksRunOn: what was heard once runs on with this manager's clock.
func TestClocksRunOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClocks()
		c.hear("b", time.Now().UnixNano())
		time.Sleep(warden.LeaseHold - time.Nanosecond)
		if now, _, _, err := c.agreed("a", []string{"a", "b"}); err != nil || !now.Equal(time.Now()) {
			t.Errorf("agreed = %s, %v", now, err)
		}
		_, _, changed, _ := c.agreed("a", []string{"a", "b"})
		time.Sleep(time.Nanosecond)
		if _, _, _, err := c.agreed("a", []string{"a", "b"}); warden.CodeOf(err) != warden.CodeUnavailable || c.near("b") {
			t.Errorf("after LeaseHold: %v", err)
		}
		c.hear("b", time.Now().UnixNano())
		<-changed
		if !c.near("b") || c.near("c") {
			t.Error("b is near, c was never heard")
		}
	})
}

// skew puts a manager's clock out.
func (h *host) skew(d time.Duration) {
	c, right := h.m.clocks, newClocks().now
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = func() reading {
		r := right()
		r.wall += int64(d)
		return r
	}
}

// TestClocksOfManagers: a leader whose clock differs from that of the others changes nothing and hands leadership over, and nobody refuses
// anything when it is right again; two managers both have to agree; one alone goes by its own clock.
func TestClocksOfManagers(t *testing.T) {
	c := newCluster(t)
	n := 0
	zone := func(h *host) (*api.Result, error) {
		n++
		return h.m.store.Propose(t.Context(), command(h.m.system("test"), store.Put(&api.Zone{Id: warden.NewID(), Name: fmt.Sprintf("zone-%d", n)}, 0)))
	}
	change := func(what string, hosts ...*host) {
		t.Helper()
		var last error
		defer func() {
			if t.Failed() {
				t.Logf("%s: last refused: %v", what, last)
			}
		}()
		await(t, what, func() bool {
			_, last = zone(c.leader(hosts...))
			return last == nil
		})
		if off := time.Since(time.Unix(0, c.leader(hosts...).m.store.View().Time())); off.Abs() > 5*time.Second {
			t.Fatalf("%s: the time of the change is %s off", what, off)
		}
	}

	c.first.skew(-warden.SkewMax / 2)
	if _, err := zone(c.first); err != nil {
		t.Errorf("a change by one manager alone: %v", err)
	}
	c.first.skew(0)
	b := c.join(api.Role_ROLE_MANAGER, "b")
	change("two managers", c.first, b)
	leader, other := c.first, b
	if c.leader(c.first, b) == b {
		leader, other = b, c.first
	}
	other.skew(-time.Hour)
	await(t, "a change is refused where one of two differs", func() bool {
		_, err := zone(leader)
		return warden.CodeOf(err) == warden.CodeClock
	})
	other.skew(0)
	change("two managers agree again", c.first, b)

	d := c.join(api.Role_ROLE_MANAGER, "d")
	for _, by := range []time.Duration{3 * time.Hour, -3 * time.Hour} {
		leader := c.leader(c.first, b, d)
		leader.skew(by)
		if _, err := zone(leader); err == nil {
			t.Errorf("a change by a leader that is %s off was made", by)
		}
		rest := []*host{c.first, b, d}
		rest = slices.DeleteFunc(rest, func(h *host) bool { return h == leader })
		change(fmt.Sprintf("another leads where the leader is %s off", by), rest...)
		leader.skew(0)
		change("the leader is right again", c.first, b, d)
	}
}
