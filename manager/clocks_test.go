package manager

import (
	"cmp"
	"context"
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
		c.hear("b", time.Now().UnixNano(), c.read())
		time.Sleep(warden.LeaseHold - time.Nanosecond)
		if now, _, _, err := c.agreed("a", []string{"a", "b"}); err != nil || !now.Equal(time.Now()) {
			t.Errorf("agreed = %s, %v", now, err)
		}
		_, _, changed, _ := c.agreed("a", []string{"a", "b"})
		time.Sleep(time.Nanosecond)
		if _, _, _, err := c.agreed("a", []string{"a", "b"}); warden.CodeOf(err) != warden.CodeUnavailable || c.near("b") {
			t.Errorf("after LeaseHold: %v", err)
		}
		c.hear("b", time.Now().UnixNano(), c.read())
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
		if off := time.Since(time.Unix(0, c.leader(hosts...).m.store.View().Time())); off.Abs() > time.Minute { // clocks are out by an hour or more
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
	leader, other := c.roles(c.first, b)
	other.skew(-time.Hour)
	await(t, "a change is refused where one of two differs", func() bool {
		c.leads(leader, other)
		_, err := zone(leader)
		return warden.CodeOf(err) == warden.CodeClock
	})
	var sessions map[string]time.Duration // that the other reports; a new term forgets them
	says := func(what string, at *host, id, want string) {
		t.Helper()
		var got string
		defer func() {
			if t.Failed() {
				t.Logf("%s: it is said of %s: %q, want %q", what, id, got, want)
			}
		}()
		await(t, what, func() bool {
			c.leads(at, other)
			for node, skew := range sessions {
				leader.m.live.take(other.id, &api.ReportRequest{Claims: []*api.SessionClaim{{NodeId: node, SessionId: node, SkewNs: int64(skew)}}}, time.Now())
			}
			got = at.m.NodeStates([]string{id})[0].Message
			return strings.Contains(got, want) && (want != "" || got == "")
		})
	}
	name := c.record(leader).Hostname
	says("one of two differs", leader, leader.id, "changes are refused: ")
	says("one of two differs", leader, other.id, "its clock is 1h0m0s behind that of manager "+name)
	sessions = map[string]time.Duration{"right": time.Hour, "wrong": time.Minute} // both have theirs with the one that is behind
	says("by a manager that is out", leader, "right", "")
	says("by a manager that is out", leader, "wrong", "its clock is 59m0s behind that of manager "+name)
	other.skew(0)
	change("two managers agree again", c.first, b)
	says("two managers agree again", leader, leader.id, "")

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

// TestLeadershipGoesToOneThatCanLead: a voter that tells its time and cannot take over does not keep a leader whose clock is out.
func TestLeadershipGoesToOneThatCanLead(t *testing.T) {
	c := newCluster(t)
	hosts := []*host{c.first, c.join(api.Role_ROLE_MANAGER, "b"), c.join(api.Role_ROLE_MANAGER, "d")}
	leader := c.leader(hosts...)
	rest := slices.DeleteFunc(slices.Clone(hosts), func(h *host) bool { return h == leader })
	mute, next := rest[0], rest[1] // in the order of raft's configuration
	mute.stop()
	leader.skew(time.Hour)
	await(t, "another leads", func() bool {
		leader.m.clocks.hear(mute.id, time.Now().UnixNano(), leader.m.clocks.read())
		return next.m.store.IsLeader()
	})
}

// TestVoteWaitsForTheClock: a manager whose clock is out follows without a vote, and it is said why; with its clock right it gets one.
func TestVoteWaitsForTheClock(t *testing.T) {
	c := newCluster(t)
	c.first.skew(time.Minute) // who is alone goes by its own clock
	b := c.admit(api.Role_ROLE_MANAGER, "b")
	state := func() *api.NodeState { return c.first.m.NodeStates([]string{b.id})[0] }
	await(t, "it is said why a manager has no vote", func() bool {
		s := state()
		return s.Raft == "nonvoter" && s.Message == "its clock is 1m0s behind that of manager first, and until they agree it gets no vote"
	})
	c.mint(api.Role_ROLE_WORKER, nil) // changes go on
	if s := state(); s.Raft != "nonvoter" {
		t.Errorf("a manager whose clock is out is a %s", s.Raft)
	}
	c.first.skew(0)
	await(t, "it gets its vote", func() bool { return state().Raft == "voter" })
}

// TestReportsWhileChangesAreRefused: a manager keeps its lease, and with it its sessions, where what a node says of itself cannot be stored.
func TestReportsWhileChangesAreRefused(t *testing.T) {
	c := newCluster(t)
	b := c.join(api.Role_ROLE_MANAGER, "b")
	leader, other := c.roles(c.first, b)
	report := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), warden.LeasePush)
		defer cancel()
		_, err := leader.m.takeReport(ctx, other.id, &api.ReportRequest{LockState: LockUnlocked, Claims: []*api.SessionClaim{
			{NodeId: other.id, SessionId: "s", Ip: "192.0.2.1", Description: &api.NodeDescription{Hostname: "renamed"}},
		}})
		return cmp.Or(err, ctx.Err()) // an answer after LeasePush is one that nobody waits for
	}
	other.skew(time.Hour)
	await(t, "changes are refused", func() bool {
		c.leads(leader, other)
		_, err := leader.m.commandTime(t.Context())
		return warden.CodeOf(err) == warden.CodeClock
	})
	await(t, "a report is answered while changes are refused", func() bool {
		c.leads(leader, other)
		return report() == nil
	})
	other.skew(0)
	await(t, "the description is stored", func() bool {
		c.leads(leader, other)
		return report() == nil && leader.m.store.View().Node(other.id).GetDescription().GetHostname() == "renamed"
	})
}

// TestSkewThroughSessions: a manager that refuses to tell its time, since the certificates of the others are not valid by it, has a session
// with one whose clock is known, and so is its own; and those of the nodes that have theirs with it are not taken for wrong.
func TestSkewThroughSessions(t *testing.T) {
	m := &Manager{cfg: Config{NodeID: "leader"}, clocks: newClocks(), live: newLiveness()}
	session := func(manager, node string, skew time.Duration) {
		m.live.take(manager, &api.ReportRequest{Claims: []*api.SessionClaim{{NodeId: node, SessionId: node, SkewNs: int64(skew)}}}, time.Now())
	}
	wants := func(node string, skew time.Duration, of string) {
		t.Helper()
		if got, by := m.ahead(node); (got-skew).Abs() > time.Second || by != of {
			t.Errorf("%s is %s ahead of %s, want %s of %s", node, got, by, skew, of)
		}
	}
	session("behind", "worker", 3*time.Hour)
	wants("worker", 3*time.Hour, "behind") // nothing is known of the manager
	session("good", "behind", -3*time.Hour)
	wants("worker", 0, "good")
	wants("behind", -3*time.Hour, "good")
	m.clocks.hear("good", m.clocks.read().wall+int64(time.Minute), m.clocks.read())
	wants("worker", time.Minute, "leader")
	wants("behind", time.Minute-3*time.Hour, "leader")
	session("behind", "good", 3*time.Hour) // managers with each other's sessions
	wants("worker", time.Minute, "leader")
	wants("nobody", 0, "nobody")
}
