package manager

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// lease says how fresh this replica is. LastContact of raft does not: heartbeats carry no commit index.
type lease struct {
	mu    sync.Mutex // guards fresh
	fresh time.Time  // when the leader last told a commit index that this replica has applied by now
}

func (l *lease) renew(t time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.After(l.fresh) {
		l.fresh = t
	}
}

func (l *lease) age(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return now.Sub(l.fresh)
}

// CaughtUpSince reports whether, at some moment after t, this replica came to have all that the leader had committed at that moment. What View
// shows afterwards is at least as new as all that was committed before t.
func (m *Manager) CaughtUpSince(t time.Time) bool {
	m.lease.mu.Lock()
	defer m.lease.mu.Unlock()
	return m.ready.Load() && m.lease.fresh.After(t)
}

// mayPush reports whether this manager may send to nodes: within LeasePush it had all that the leader had committed.
func (m *Manager) mayPush() bool {
	return m.ready.Load() && m.lease.age(time.Now()) < warden.LeasePush
}

// reportGap is the least time between two reports that were asked for: each names every session.
const reportGap = 20 * time.Millisecond

// leaseLoop closes the sessions of nodes where this manager has had no lease for LeaseHold, at that moment, however long a report
// is under way: whoever waits for it to be cut off waits no longer. The nodes find another manager.
func (m *Manager) leaseLoop(ctx context.Context) error {
	held := true
	for {
		left := warden.LeaseHold - m.lease.age(time.Now())
		if left < 0 && held && m.ready.Load() {
			m.logger.Warn("closed all sessions: no word from a leader", "since", warden.LeaseHold)
			m.doors.CutDoor(warden.DoorNode, warden.Errorf(warden.CodeUnavailable, "holding sessions", "no word from a leader for %s", warden.LeaseHold))
		}
		if held = left >= 0; !held { // holds lets none in; whether there is a lease again can wait
			left = warden.ReportPeriod
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(left + time.Millisecond):
		}
	}
}

// reportLoop tells the leader what this manager sees, every ReportPeriod and whenever asked, and keeps the lease by its
// answers.
func (m *Manager) reportLoop(ctx context.Context) error {
	tick := time.NewTicker(warden.ReportPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-m.report:
		}
		rctx, cancel := context.WithTimeout(ctx, warden.LeasePush)
		err := m.sync(rctx)
		cancel()
		if err != nil {
			m.logger.Debug("failed to report to the leader", "error", err)
		}
		select { // what is asked for meanwhile shares the next report
		case <-ctx.Done():
		case <-time.After(reportGap):
		}
		if err == nil && !m.ready.Swap(true) {
			m.logger.Info("caught up with the leader", "index", m.store.AppliedIndex())
			m.doors.Rejudge("") // the raft door let in what the view did not know of
		}
	}
}

// sync reports to the leader and returns when this replica has applied what the leader had committed then.
func (m *Manager) sync(ctx context.Context) error {
	start, lock := time.Now(), m.cfg.Lock()
	req := &api.ReportRequest{
		AppliedIndex: m.store.AppliedIndex(), Claims: m.dispatcher.Claims(), TimeNs: start.UnixNano(), Alarms: m.alarms.recent(start),
		LockState: lock.State, UnlockKeyId: lock.KeyID, DekGeneration: lock.DEKGeneration,
	}
	reply, err := m.reportTo(ctx, req)
	if err != nil {
		return err
	}
	for _, id := range reply.CloseSessions {
		m.dispatcher.Close(id, "the node has a newer session with another manager")
	}
	if err := m.store.WaitApplied(ctx, reply.CommitIndex); err != nil {
		return err
	}
	m.lease.renew(start)
	return nil
}

// reportTo sends a report to the leader, which may be this manager.
func (m *Manager) reportTo(ctx context.Context, req *api.ReportRequest) (*api.ReportReply, error) {
	if m.store.IsLeader() {
		return m.takeReport(ctx, m.cfg.NodeID, req)
	}
	client, err := m.peers.leader()
	if err != nil {
		return nil, err
	}
	reply, err := client.Report(ctx, req)
	return reply, api.FromError(err)
}

// reportTasksMax bounds how long a leader may take for states of tasks. They are told again, and then perhaps another one.
const reportTasksMax = 10 * time.Second

// reportTasks is the dispatcher's Config.Report.
func (m *Manager) reportTasks(ctx context.Context, reports []*api.NodeTaskReport) error {
	ctx, cancel := context.WithTimeout(ctx, reportTasksMax)
	defer cancel()
	_, err := m.reportTo(ctx, &api.ReportRequest{AppliedIndex: m.store.AppliedIndex(), Tasks: reports, TimeNs: time.Now().UnixNano()})
	return err
}

// takeReport is the leader's side: claims into memory, descriptions and task states into the log.
func (m *Manager) takeReport(ctx context.Context, from string, req *api.ReportRequest) (*api.ReportReply, error) {
	start := time.Now()
	if err := m.store.Fresh(ctx); err != nil { // the reply extends a lease: it may not come from who was a leader
		return nil, warden.Wrap("taking a report", err)
	}
	lost := m.live.take(from, req, start)
	ops := m.describe(req.Claims, lost)
	for _, t := range req.Tasks {
		ops = append(ops, &api.Operation{Of: &api.Operation_ReportTask{ReportTask: &api.ReportTask{
			NodeId: t.NodeId, TaskId: t.GetReport().GetTaskId(), Status: t.GetReport().GetStatus(),
		}}})
	}
	pctx := ctx
	if len(req.Tasks) == 0 { // what nodes say of themselves comes again, and the lease of the manager that reports it does not wait for it
		var cancel context.CancelFunc
		pctx, cancel = context.WithTimeout(ctx, warden.ReportPeriod)
		defer cancel()
	}
	for left := batches(ops); len(left) > 0; left = left[1:] {
		if _, err := m.store.Propose(pctx, m.systemCommand("report", left[0]...)); err != nil {
			for _, op := range slices.Concat(left...) { // an honest node does not pay for a leader that can commit nothing
				if d := op.GetDescribeNode(); d != nil {
					m.described.refund(d.NodeId)
				}
			}
			refused := []warden.Code{warden.CodeClock, warden.CodeUnavailable, warden.CodeTimeout} // whatever the command is
			if len(req.Tasks) > 0 || !m.store.IsLeader() || !slices.Contains(refused, warden.CodeOf(err)) {
				return nil, err
			}
			m.logger.Debug("failed to store descriptions", "error", err)
			break
		}
	}
	if len(req.Tasks) == 0 { // what managers say of themselves
		m.askReconcile()
	}
	return &api.ReportReply{CommitIndex: m.store.CommitIndex(), CloseSessions: lost, TimeNs: time.Now().UnixNano(), LeaderId: m.cfg.NodeID}, nil
}

// batches cuts operations into commands that stay within warden.CommandBytes, however much nodes say of themselves.
func batches(ops []*api.Operation) (out [][]*api.Operation) {
	start, size := 0, 0
	for i, op := range ops {
		n := proto.Size(op) + 16
		if i > start && (i-start >= 500 || size+n > warden.CommandBytes/2) {
			out, start, size = append(out, ops[start:i]), i, 0
		}
		size += n
	}
	if start < len(ops) {
		out = append(out, ops[start:])
	}
	return out
}

// liveness is what the leader knows in memory: which manager holds which node's session, and which managers report.
type liveness struct {
	mu       sync.Mutex // guards all below
	since    time.Time  // when this manager began to lead; zero: never
	claims   map[string]claim
	lost     map[string]time.Time // session IDs that lost their claim, and when; a node may make one with each report
	managers map[string]managerReport
	last     map[string]api.Liveness // as of told last
	epoch    uint64
	change   chan struct{}
}

// lostKept is how long a session that lost its claim is known by that: a manager that still holds it is told so with its next report, or
// has closed it by itself after LeaseHold.
const lostKept = 2 * warden.LeaseHold

// claim is the one valid session of a node: the newest.
type claim struct {
	manager, session string
	epoch            uint64
	seen             time.Time // the leader's clock
	skew             time.Duration
}

type managerReport struct {
	at      time.Time
	applied uint64
	lock    LockStatus
	alarms  []*api.Alarm
	changed chan struct{} // closed by the next report
}

func newLiveness() *liveness {
	l := &liveness{change: make(chan struct{}, 1)}
	l.begin(time.Time{})
	return l
}

// begin forgets what an earlier term knew: every node is unknown until its session is claimed, or NodeDownAfter is over.
func (l *liveness) begin(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.since = now
	l.claims, l.lost, l.last = map[string]claim{}, map[string]time.Time{}, map[string]api.Liveness{}
	l.managers = map[string]managerReport{}
}

// take stores a manager's report and returns its sessions that lost their claim to a newer one.
func (l *liveness) take(from string, req *api.ReportRequest, now time.Time) (closes []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old, ok := l.managers[from]; ok && old.changed != nil {
		close(old.changed)
	}
	r := managerReport{at: now, applied: req.AppliedIndex, lock: lockOf(req), alarms: req.Alarms[:min(len(req.Alarms), alarmsMax)], changed: make(chan struct{})}
	if len(req.Tasks) > 0 && req.LockState == "" { // a report of tasks only
		r.lock, r.alarms = l.managers[from].lock, l.managers[from].alarms
	}
	l.managers[from] = r
	for _, c := range req.Claims {
		old, held := l.claims[c.NodeId]
		switch {
		case held && old.session == c.SessionId:
		case !l.lost[c.SessionId].IsZero():
			closes = append(closes, c.SessionId)
			continue
		default: // a new session: the newest wins
			if held {
				l.lost[old.session] = now
			}
			l.epoch++
			old = claim{manager: from, session: c.SessionId, epoch: l.epoch}
		}
		age := time.Duration(max(0, req.TimeNs-c.SeenNs))
		old.seen, old.skew = now.Add(-age), time.Duration(c.SkewNs)
		l.claims[c.NodeId] = old
		if s := l.state(old, now); l.last[c.NodeId] != s { // who falls silent is run's to notice
			l.last[c.NodeId] = s
			signal(l.change)
		}
	}
	maps.DeleteFunc(l.lost, func(_ string, at time.Time) bool { return now.Sub(at) > lostKept })
	return closes
}

// liveness is the orchestrator's Config.Liveness. A node that has only just joined is unknown, not down.
func (m *Manager) liveness(nodeID string) api.Liveness {
	now := time.Now()
	m.live.mu.Lock()
	s := m.live.at(nodeID, now)
	m.live.mu.Unlock()
	if s == api.Liveness_LIVENESS_DOWN {
		if n := m.store.View().Node(nodeID); n != nil && now.Sub(time.Unix(0, n.Meta.GetCreatedNs())) < warden.NodeDownAfter {
			return api.Liveness_LIVENESS_UNKNOWN
		}
	}
	return s
}

func (l *liveness) at(nodeID string, now time.Time) api.Liveness {
	return l.state(l.claims[nodeID], now)
}

// state is that of a node with this claim; the zero claim: with none.
func (l *liveness) state(c claim, now time.Time) api.Liveness {
	switch {
	case c.epoch != 0 && now.Sub(c.seen) < warden.NodeDownAfter:
		return api.Liveness_LIVENESS_READY
	case now.Sub(l.since) < warden.NodeDownAfter:
		return api.Liveness_LIVENESS_UNKNOWN
	}
	return api.Liveness_LIVENESS_DOWN
}

// notice signals where a node's liveness differs from what was told last. l.mu is held.
func (l *liveness) notice(now time.Time) {
	changed := false
	for id, c := range l.claims {
		if s := l.state(c, now); l.last[id] != s {
			l.last[id], changed = s, true
		}
	}
	if changed {
		signal(l.change)
	}
}

func (l *liveness) changed() <-chan struct{} { return l.change }

// run looks for nodes that fell silent, until ctx ends.
func (l *liveness) run(ctx context.Context) {
	tick := time.NewTicker(warden.ReportPeriod)
	defer tick.Stop()
	grace := time.NewTimer(warden.NodeDownAfter)
	defer grace.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-grace.C: // nodes that nobody ever claimed are down from here on
			signal(l.change)
		case now := <-tick.C:
			l.mu.Lock()
			l.notice(now)
			l.mu.Unlock()
		}
	}
}

func (l *liveness) claim(nodeID string) (claim, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, ok := l.claims[nodeID]
	return c, ok
}

// forget drops what a manager reported before: what it says from here on is proof that it runs now.
func (l *liveness) forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.managers, id)
}

// reported returns the last report of a manager, and a channel that is closed by the next one.
func (l *liveness) reported(id string) (managerReport, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.managers[id]
	return r, ok
}
