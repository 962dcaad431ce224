package manager

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"warden"
	"warden/store/rafttransport"
)

// clocks is what this manager knows of the others' clocks: a leader asks them.
type clocks struct {
	mu      sync.Mutex     // guards the rest; not held across I/O
	now     func() reading // in tests another
	heard   map[string]heard
	changed chan struct{} // closed by the next that is heard
}

// reading is one look at this manager's clocks.
type reading struct {
	wall int64         // ns since 1970
	mono time.Duration // since some moment; nobody sets it
}

// heard is what another manager's clock said.
type heard struct {
	wall int64
	at   reading
}

func newClocks() *clocks {
	start := time.Now()
	return &clocks{heard: map[string]heard{}, changed: make(chan struct{}), now: func() reading {
		now := time.Now()
		return reading{wall: now.UnixNano(), mono: now.Sub(start)}
	}}
}

// read returns what this manager's clocks say.
func (c *clocks) read() reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now()
}

// time is what other managers are told.
func (c *clocks) time() time.Time { return time.Unix(0, c.read().wall) }

// hear stores what a manager's clock said at some moment after asked, a reading of this manager's; half of what the call took is as far
// as this may be off. It reports whether the clock was known before.
func (c *clocks) hear(id string, wall int64, asked reading) (before bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.now()
	_, before = c.heard[id]
	half := (at.mono - asked.mono) / 2
	c.heard[id] = heard{wall: wall, at: reading{wall: at.wall - int64(half), mono: at.mono - half}}
	close(c.changed)
	c.changed = make(chan struct{})
	return before
}

// agreed returns the time where a majority of the voters has it, and a channel that is closed when that may have changed.
// Otherwise successor is a voter that a majority agrees with, "" for none. Errors: those of agreement.
func (c *clocks) agreed(self string, voters []string) (now time.Time, successor string, changed <-chan struct{}, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.now()
	successor, err = agreement(self, voters, c.heard, at)
	return time.Unix(0, at.wall), successor, c.changed, err
}

// skew returns how far a manager's clock is ahead of this one's; 0 where that is not known.
func (c *clocks) skew(id string) (d time.Duration, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h, ok := c.heard[id]; ok {
		if d, known = h.skew(c.now()); known {
			return d, true
		}
	}
	return 0, false
}

// near reports whether a manager's clock is known to agree with this one's.
func (c *clocks) near(id string) bool {
	skew, known := c.skew(id)
	return known && skew.Abs() <= warden.SkewMax
}

// skew returns how far a manager's clock is ahead of this one's, if it was heard within LeaseHold and this one was not set since.
func (h heard) skew(now reading) (d time.Duration, known bool) {
	since := now.mono - h.at.mono
	set := time.Duration(now.wall-h.at.wall) - since
	return time.Duration(h.wall-now.wall) + since, since < warden.LeaseHold && set.Abs() <= warden.SkewMax
}

// agreement says whether a majority of the voters, this manager among them, has the same time within SkewMax. Where it does not,
// successor is one of those, heard of within LeasePush, that agree among one another and are a majority without this manager. One
// voter agrees with itself. Errors: CodeClock; CodeUnavailable while too few have told their time. Pure.
func agreement(self string, voters []string, all map[string]heard, now reading) (successor string, err error) {
	const op = "comparing the clocks of the managers"
	skews := map[string]time.Duration{self: 0}
	agree, differ := 0, 0
	var other string // the first that differs
	for _, id := range voters {
		if h, ok := all[id]; ok && id != self {
			if skew, known := h.skew(now); known {
				skews[id] = skew
			}
		}
		skew, known := skews[id]
		switch {
		case known && skew.Abs() <= warden.SkewMax:
			agree++
		case known:
			if differ++; other == "" {
				other = id
			}
		}
	}
	most := func(n int) bool { return 2*n > len(voters) }
	if len(voters) < 2 || most(agree) {
		return "", nil
	}
	for _, id := range voters {
		skew, known := skews[id]
		if id == self || !known || skew.Abs() <= warden.SkewMax || now.mono-all[id].at.mono >= warden.LeasePush {
			continue
		}
		with := 0
		for _, b := range voters {
			if s, known := skews[b]; known && b != self && (s-skew).Abs() <= warden.SkewMax {
				with++
			}
		}
		if most(with) {
			successor = id
			break
		}
	}
	said := ""
	if other != "" {
		stamp := func(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339) }
		said = fmt.Sprintf(": this manager's says %s, that of %s %s", stamp(now.wall), other, stamp(now.wall+int64(skews[other])))
	}
	if most(len(voters) - differ) {
		return successor, warden.Hint(warden.Errorf(warden.CodeUnavailable, op, "of %d managers, the clocks of %d are known to agree and of %d to differ%s", len(voters), agree, differ, said),
			"a new leader knows in a moment; a majority of the managers must be up, reach it, and have the right time")
	}
	return successor, warden.Hint(warden.Errorf(warden.CodeClock, op, "of %d managers, the clocks of %d differ by more than %s%s", len(voters), differ, warden.SkewMax, said),
		"set the clocks right; where a majority agrees, one of it takes the leadership over by itself: try again in a few seconds")
}

// voters returns the IDs of raft's voters.
func (m *Manager) voters() (ids []string, err error) {
	members, err := m.store.Configuration()
	for _, member := range members {
		if member.Voter {
			ids = append(ids, member.ID)
		}
	}
	return ids, err
}

// commandTime is the store's Config.CommandTime. A leader that has just been elected, or whose clock was just set, waits for the others' answers.
func (m *Manager) commandTime(ctx context.Context) (time.Time, error) {
	var patience, look <-chan time.Time
	for {
		voters, err := m.voters()
		if err != nil {
			return time.Time{}, err
		}
		now, _, changed, err := m.clocks.agreed(m.cfg.NodeID, voters)
		if warden.CodeOf(err) != warden.CodeUnavailable || !m.store.IsLeader() {
			return now, err
		}
		if patience == nil {
			p, l := time.NewTimer(warden.LeasePush), time.NewTicker(warden.ReportPeriod/20)
			defer p.Stop()
			defer l.Stop()
			patience, look = p.C, l.C
		}
		select {
		case <-changed:
		case <-look: // leads no more, or with other voters
		case <-patience:
			return now, err
		case <-ctx.Done():
			return now, err
		}
	}
}

// askClocks asks all other members of raft for their time, each on a connection of its own, for as long as this manager leads.
func (m *Manager) askClocks(ctx context.Context) {
	asked := map[string]context.CancelFunc{}
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(warden.ReportPeriod / 10)
	defer tick.Stop()
	for {
		members, err := m.store.Configuration()
		if err == nil {
			gone := maps.Clone(asked)
			for _, member := range members {
				delete(gone, member.ID)
				if asked[member.ID] == nil && member.ID != m.cfg.NodeID {
					mctx, cancel := context.WithCancel(ctx)
					asked[member.ID] = cancel
					wg.Go(func() { m.askClock(mctx, member.ID) })
				}
			}
			for id, cancel := range gone {
				cancel()
				delete(asked, id)
			}
		}
		select {
		case <-ctx.Done():
			return // with all that it asks
		case <-tick.C:
		}
	}
}

// askClock asks one manager every ReportPeriod; where that fails soon again, then less often.
func (m *Manager) askClock(ctx context.Context, id string) {
	const soon = warden.ReportPeriod / 10
	retry := soon
	var clock *rafttransport.Clock
	defer func() {
		if clock != nil {
			clock.Close()
		}
	}()
	for ctx.Err() == nil {
		var err error
		if clock == nil {
			clock, err = m.transport.Clock(ctx, id)
		}
		var wall int64
		asked := m.clocks.read()
		if err == nil {
			wall, err = clock.Wall(ctx)
		}
		wait := warden.ReportPeriod
		if err != nil {
			m.logger.Debug("failed to ask a manager for its time", "node_id", id, "error", err)
			if clock != nil {
				clock.Close()
				clock = nil
			}
			wait, retry = retry, min(2*retry, warden.ReportPeriod)
		} else {
			retry = soon
			if !m.clocks.hear(id, wall, asked) {
				m.askReconcile() // it may get its vote now
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// yield hands leadership over, as long as this manager leads, where at two looks in a row a majority of the managers had another time: to
// one after the other, since who tells its time may still be unable to lead.
func (m *Manager) yield(ctx context.Context) {
	tick := time.NewTicker(warden.ReportPeriod)
	defer tick.Stop()
	before, failed := "", ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		voters, err := m.voters()
		if err != nil {
			continue
		}
		next := slices.Index(voters, failed) + 1
		_, to, _, err := m.clocks.agreed(m.cfg.NodeID, slices.Concat(voters[next:], voters[:next]))
		if to == "" || before == "" {
			before = to
			continue
		}
		before = ""
		m.logger.Warn("hands leadership over: most managers have another time", "to", to, "reason", err)
		tctx, cancel := context.WithTimeout(ctx, 2*warden.ReportPeriod)
		if err := m.store.TransferLeadershipTo(tctx, to); err != nil && ctx.Err() == nil {
			m.logger.Warn("failed to hand leadership over", "to", to, "error", err)
			failed = to
		}
		cancel()
	}
}
