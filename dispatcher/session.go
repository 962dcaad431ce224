package dispatcher

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

// Times of a session that nothing else depends on.
const (
	ackTimeout     = 30 * time.Second       // from sending a set to its acknowledgement
	evictTimeout   = time.Second            // for the one Evict
	holdPeriod     = 250 * time.Millisecond // how often a session without the lease looks again
	repeatsMax     = 2 * warden.AssignTasksMax
	installTimeout = 30 * time.Second
	redialTimeout  = 10 * time.Second // how long an installed node may take to close the session
)

// session is one node's. Its loops are started by Serve and end with its context.
type session struct {
	d      *Dispatcher
	id     string
	peer   Peer
	client api.SessionClient
	end    context.CancelCauseFunc // ends the session with this error; the first counts

	assignKick, renewKick chan struct{} // capacity 1: something in the store has changed

	mu          sync.Mutex // guards the fields below; held for access only
	seen        time.Time  // last answer; zero before the first
	skew        time.Duration
	description *api.NodeDescription       // as last given and within bounds
	told        map[string]*api.TaskReport // the newest state taken of each task of the node
}

// Serve runs one session over conn, which it closes, until conn or ctx ends, a newer session of the node replaces it, or the
// node breaks the protocol; it returns why. Where the cause of ctx's end has the code CodeEvicted, the node is sent one
// Evict before the connection closes. Errors: the cause of ctx; CodeUnavailable where the node closed; CodeTimeout where it
// fell silent; CodeLimited, CodeInvalid, CodeTooLarge where it misbehaved; CodeConflict where it was replaced.
func (d *Dispatcher) Serve(ctx context.Context, conn net.Conn, p Peer) error {
	op := "serving node " + p.NodeID
	w := watch(conn)
	defer w.Close()
	cc, err := clientOver(w)
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	defer cc.Close()
	client := api.NewSessionClient(cc)
	if p.Tombstone != nil {
		err := d.evict(ctx, client, p)
		return warden.Recode(warden.CodeEvicted, op, cmpErr(err, errors.New("the node was removed")))
	}

	ctx, end := context.WithCancelCause(ctx)
	s := &session{d: d, id: warden.NewID(), peer: p, client: client, end: end,
		assignKick: make(chan struct{}, 1), renewKick: make(chan struct{}, 1), told: map[string]*api.TaskReport{}}
	d.register(s)
	defer d.unregister(s)
	d.cfg.Logger.Info("opened session", "node_id", p.NodeID, "session_id", s.id, "ip", p.IP, "renew_only", p.RenewOnly)

	var loops sync.WaitGroup
	loop := func(f func(context.Context) error) {
		loops.Go(func() {
			if err := f(ctx); err != nil {
				end(err)
			}
		})
	}
	described := make(chan struct{})
	loop(func(ctx context.Context) error { return s.heartbeat(ctx, described) })
	loop(func(ctx context.Context) error { return after(ctx, described, s.renew) })
	if !p.RenewOnly {
		loop(func(ctx context.Context) error { return after(ctx, described, s.assign) })
		loop(func(ctx context.Context) error { return after(ctx, described, s.watch) })
	}
	select {
	case <-ctx.Done():
	case <-w.closed:
		end(warden.Errorf(warden.CodeUnavailable, op, "the node closed the session"))
	}
	cause := context.Cause(ctx)
	if warden.CodeOf(cause) == warden.CodeEvicted {
		if err := d.evict(context.WithoutCancel(ctx), client, p); err != nil {
			d.cfg.Logger.Warn("did not reach evicted node", "node_id", p.NodeID, "error", err)
		}
	}
	cc.Close()
	loops.Wait()
	d.cfg.Logger.Info("closed session", "node_id", p.NodeID, "session_id", s.id, "error", cause)
	return warden.Wrap(op, cause)
}

// after runs f once ready is closed.
func after(ctx context.Context, ready <-chan struct{}, f func(context.Context) error) error {
	select {
	case <-ready:
		return f(ctx)
	case <-ctx.Done():
		return nil
	}
}

// evict sends the node its one Evict. The node may take longer than evictTimeout to do as told: its answer is not needed.
func (d *Dispatcher) evict(ctx context.Context, client api.SessionClient, p Peer) error {
	ctx, cancel := context.WithTimeout(ctx, evictTimeout)
	defer cancel()
	v := d.cfg.Store.View()
	tombstone := p.Tombstone
	if tombstone == nil {
		tombstone = v.Tombstone(p.NodeID)
	}
	req := &api.EvictRequest{NodeId: p.NodeID, Index: v.Index(), TimeNs: time.Now().UnixNano()}
	if tombstone != nil {
		req.Index, req.TimeNs = tombstone.GetMeta().GetIndex(), tombstone.GetRemovedNs()
	}
	// WaitForReady: where the connection is new, the call waits for the HTTP/2 handshake instead of failing.
	_, err := client.Evict(ctx, req, grpc.WaitForReady(true))
	if err == nil || ctx.Err() != nil {
		d.cfg.Logger.Info("sent evict", "node_id", p.NodeID, "index", req.GetIndex(), "answered", err == nil)
		return nil
	}
	return api.FromError(err)
}

// kick tells the loops that something in the store has changed. Never blocks.
func (s *session) kick() {
	for _, c := range []chan struct{}{s.assignKick, s.renewKick} {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// heartbeat asks the node what it is, now and every HeartbeatPeriod; it closes described after the first answer.
func (s *session) heartbeat(ctx context.Context, described chan struct{}) error {
	tick := time.NewTicker(warden.HeartbeatPeriod)
	defer tick.Stop()
	warned := warnings{}
	repeated := time.Now()
	for first := true; ; first = false {
		if err := s.describe(ctx, &warned); err != nil {
			return err
		}
		if first {
			close(described)
		}
		if time.Since(repeated) >= warden.HeartbeatMissed {
			s.repeat()
			repeated = time.Now()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// warnings are what a session warns of once.
type warnings struct{ skew, description bool }

func (s *session) describe(ctx context.Context, warned *warnings) error {
	ctx, cancel := context.WithTimeout(ctx, warden.HeartbeatMissed)
	defer cancel()
	before := time.Now()
	reply, err := s.client.Describe(ctx, &api.DescribeRequest{TimeNs: before.UnixNano()}, recvMax(describeMessageMax), grpc.WaitForReady(true))
	if err != nil {
		return warden.Wrap("asking the node what it is", api.FromError(err))
	}
	now := time.Now()
	skew := time.Unix(0, reply.GetTimeNs()).Sub(before.Add(now.Sub(before) / 2))
	description := reply.GetDescription()
	logger := s.d.cfg.Logger.With("node_id", s.peer.NodeID)
	if err := checkDescription(description); err != nil {
		if !warned.description {
			logger.Warn("ignored description of node", "error", err)
			warned.description = true
		}
		description = nil
	}
	if skew.Abs() > warden.SkewWarn && !warned.skew {
		logger.Warn("found clock of node out", "skew", skew)
		warned.skew = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen, s.skew = now, skew
	if description != nil {
		s.description = description
	}
	return nil
}

// claim returns the session as the leader is told of it; nil before the node's first answer, and where it can't take tasks.
func (s *session) claim() *api.SessionClaim {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen.IsZero() || s.peer.RenewOnly {
		return nil
	}
	return &api.SessionClaim{NodeId: s.peer.NodeID, SessionId: s.id, Description: s.description, Ip: s.peer.IP,
		SeenNs: s.seen.UnixNano(), SkewNs: int64(s.skew)}
}

// watch takes the states of the node's tasks. A node that keeps on repeating itself is cut off.
func (s *session) watch(ctx context.Context) error {
	stream, err := s.client.Watch(ctx, &api.WatchRequest{}, recvMax(reportMessageMax))
	if err != nil {
		return warden.Wrap("watching tasks", api.FromError(err))
	}
	repeats, since := 0, time.Now()
	for {
		report, err := stream.Recv()
		if done, err := ended(err); done {
			return warden.Wrap("watching tasks", cmpErr(err, warden.Errorf(warden.CodeUnavailable, "", "the node ended the stream")))
		}
		if report = s.news(report); report != nil {
			s.d.reports.add(s.peer.NodeID, report)
			continue
		}
		if now := time.Now(); now.Sub(since) > warden.HeartbeatMissed {
			repeats, since = 0, now
		}
		if repeats++; repeats > repeatsMax {
			return warden.Errorf(warden.CodeLimited, "watching tasks", "more than %d reports without news in %s", repeatsMax, warden.HeartbeatMissed)
		}
	}
}

// news returns the report within its bounds if it moves a task of this node forward, else nil. What it says of tasks that are
// another node's, or none, is not for this node to say.
func (s *session) news(report *api.TaskReport) *api.TaskReport {
	state := report.GetStatus().GetState()
	if s.d.cfg.Store.View().Task(report.GetTaskId()).GetNodeId() != s.peer.NodeID || !reportable(state) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if state <= s.told[report.GetTaskId()].GetStatus().GetState() {
		return nil
	}
	report = clipReport(report)
	s.told[report.GetTaskId()] = report
	return report
}

// repeat reports again what the store does not show: the leader that took a report may have failed before it committed it.
func (s *session) repeat() {
	v := s.d.cfg.Store.View()
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, report := range s.told {
		switch task := v.Task(id); {
		case task == nil, task.GetStatus().GetState().Ended():
			delete(s.told, id)
		case task.GetStatus().GetState() < report.GetStatus().GetState():
			s.d.reports.add(s.peer.NodeID, report)
		}
	}
}

// hold waits until this manager may push to nodes. Errors: nil where ctx ended; the caller looks.
func (s *session) hold(ctx context.Context) {
	for ctx.Err() == nil && !s.d.cfg.MayPush() {
		sleep(ctx, holdPeriod)
	}
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func cmpErr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}
