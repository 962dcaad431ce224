package dispatcher

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

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

// session is one node's. Serve is its one lasting goroutine, which takes what the node says; its heartbeat is a timer, and
// what has to be sent, or renewed, has a goroutine for as long as that takes.
type session struct {
	d      *Dispatcher
	id     string
	peer   Peer
	link   *link
	client api.SessionClient
	end    context.CancelCauseFunc // ends the session with this error; the first counts
	ctx    context.Context         // until it ends; its calls go over link
	pusher *pusher                 // nil where RenewOnly; used by one goroutine at a time

	logs      atomic.Int64  // that are being read
	renewKick chan struct{} // capacity 1: something in the store has changed, for a renewal that is under way
	warned    warnings      // used by the goroutine that takes answers

	mu          sync.Mutex // guards the fields below; held for access only
	seen        time.Time  // last answer; zero before the first
	skew        time.Duration
	description *api.NodeDescription       // as last given and within bounds
	stored      bool                       // the node's record says so, and at which address it was seen
	told        map[string]*api.TaskReport // the newest state taken of each task of the node
	asked       time.Time                  // when the heartbeat went out that is not answered yet; zero: none
	over        bool                       // no more goroutines are started
	loops       sync.WaitGroup             // what runs beside Serve
	pushing     bool                       // a goroutine brings the assignment up to date
	again       bool                       // … and looks at the store once more before it ends
	renewing    bool                       // a goroutine renews the leaf, until the session's end
	due         *time.Timer                // looks whether the leaf is to be renewed; nil before the first look
}

// Serve runs one session over conn, which it closes, until conn or ctx ends, a newer session of the node replaces it, or the
// node breaks the protocol; it returns why. Where the cause of ctx's end has the code CodeEvicted, the node is sent one
// Evict before the connection closes. Errors: the cause of ctx; CodeUnavailable where the node closed; CodeTimeout where it
// fell silent; CodeLimited, CodeInvalid, CodeTooLarge where it misbehaved; CodeConflict where it was replaced.
func (d *Dispatcher) Serve(ctx context.Context, conn net.Conn, p Peer) error {
	op := "serving node " + p.NodeID
	outer := ctx
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	w := watch(conn, func() { end(warden.Errorf(warden.CodeUnavailable, op, "the node closed the session")) })
	defer w.Close()
	links, release, err := d.useLinks()
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	defer release()
	client := api.NewSessionClient(links.cc)
	patience := warden.HeartbeatMissed
	if p.Tombstone != nil {
		patience = evictTimeout
	}
	opening, cancel := context.WithTimeoutCause(ctx, patience, warden.Errorf(warden.CodeTimeout, op, "the node does not speak HTTP/2"))
	link, err := links.open(opening, w)
	cancel()
	if err != nil {
		return warden.Wrap(op, err)
	}
	defer link.close()
	ctx = link.with(ctx)
	if p.Tombstone != nil {
		err := d.evict(ctx, client, p)
		return warden.Recode(warden.CodeEvicted, op, cmpErr(err, errors.New("the node was removed")))
	}

	s := &session{d: d, id: warden.NewID(), peer: p, link: link, client: client, ctx: ctx, end: end, renewKick: make(chan struct{}, 1),
		told: map[string]*api.TaskReport{}}
	if !p.RenewOnly {
		s.pusher = newPusher(s)
	}
	defer d.unregister(s)
	d.cfg.Logger.Info("opened session", "node_id", p.NodeID, "session_id", s.id, "ip", p.IP, "renew_only", p.RenewOnly)

	if err := s.run(ctx); err != nil {
		end(err)
	}
	<-ctx.Done()
	s.stop() // first: an Evict is the last that the node gets
	cause := context.Cause(ctx)
	if warden.CodeOf(context.Cause(outer)) == warden.CodeEvicted { // not cause: a node's error has whatever code the node likes
		if err := d.evict(context.WithoutCancel(ctx), client, p); err != nil {
			d.cfg.Logger.Warn("did not reach evicted node", "node_id", p.NodeID, "error", err)
		}
	}
	w.Close()
	d.cfg.Logger.Info("closed session", "node_id", p.NodeID, "session_id", s.id, "error", cause)
	return warden.Wrap(op, cause)
}

// run asks the node what it is and then takes what it says, until the session ends.
func (s *session) run(ctx context.Context) error {
	if err := s.describe(ctx); err != nil {
		return err
	}
	s.d.register(s) // only now: the session that it replaces served the node until here
	if s.peer.Up != nil {
		s.peer.Up()
	}
	s.checkRecord()
	s.checkRenewal()
	if s.peer.RenewOnly {
		return s.describeOn(ctx)
	}
	s.push()
	return s.watch(ctx)
}

// spawn runs f beside Serve, unless the session is over; an error of f ends it. Called with mu held.
func (s *session) spawn(f func(context.Context) error) {
	if s.over {
		return
	}
	s.loops.Go(func() { // ends with the session's context at the latest
		if err := f(s.ctx); err != nil {
			s.end(err)
		}
	})
}

// stop waits for all that runs beside Serve. The session's context has ended.
func (s *session) stop() {
	s.mu.Lock()
	s.over = true
	if s.due != nil {
		s.due.Stop()
	}
	s.mu.Unlock()
	s.loops.Wait()
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
	_, err := client.Evict(ctx, req)
	if err == nil || ctx.Err() != nil {
		d.cfg.Logger.Info("sent evict", "node_id", p.NodeID, "index", req.GetIndex(), "answered", err == nil)
		return nil
	}
	return api.FromError(err)
}

// kick says that something in the store has changed which concerns the node's tasks, or, where record is set, its record or
// the cluster's. Never blocks.
func (s *session) kick(record bool) {
	s.push()
	if record {
		s.checkRecord()
		s.checkRenewal()
		select {
		case s.renewKick <- struct{}{}:
		default:
		}
	}
}

// push brings the node's assignment up to date with the store, in a goroutine of its own while there is something to do. Before
// the node has said what it is there is nothing to do.
func (s *session) push() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pusher == nil || s.seen.IsZero() {
		return
	}
	if s.pushing {
		s.again = true
		return
	}
	s.pushing = true
	s.spawn(func(ctx context.Context) error {
		for {
			if err := s.pusher.run(ctx); err != nil {
				return err
			}
			s.mu.Lock()
			if !s.again {
				s.pushing = false
				s.mu.Unlock()
				return nil
			}
			s.again = false
			s.mu.Unlock()
		}
	})
}

// checkRenewal starts the renewal of the leaf where it is due, and sees to it that it is looked at again when it will be.
func (s *session) checkRenewal() {
	v := s.d.cfg.Store.View()
	node, cluster := v.Node(s.peer.NodeID), v.Cluster()
	if node == nil || cluster == nil { // whoever judges connections closes this one
		return
	}
	now := time.Now()
	at, _ := RenewAt(node, cluster, s.peer, now)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.over || s.renewing || s.seen.IsZero():
	case !at.After(now):
		s.renewing = true
		s.spawn(s.renew)
	case s.due == nil:
		s.due = time.AfterFunc(at.Sub(now), s.checkRenewal)
	default:
		s.due.Reset(at.Sub(now))
	}
}

// warnings are what a session warns of once.
type warnings struct{ skew, description, report bool }

// describe asks the node what it is.
func (s *session) describe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, warden.HeartbeatMissed)
	defer cancel()
	before := time.Now()
	reply, err := s.client.Describe(ctx, &api.DescribeRequest{TimeNs: before.UnixNano()}, recvMax(describeMessageMax))
	if err != nil {
		return warden.Wrap("asking the node what it is", api.FromError(err))
	}
	description := reply.GetDescription()
	if description == nil {
		description = &api.NodeDescription{}
	}
	s.answered(before, reply.GetTimeNs(), description)
	return nil
}

// describeOn is the heartbeat of a node that is only to renew its leaf.
func (s *session) describeOn(ctx context.Context) error {
	tick := time.NewTicker(warden.HeartbeatPeriod)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if err := s.describe(ctx); err != nil {
			return err
		}
	}
}

// answered notes an answer to the heartbeat that went out at asked; nil says that the description is as before.
func (s *session) answered(asked time.Time, nodeNs int64, description *api.NodeDescription) {
	now := time.Now()
	skew := time.Unix(0, nodeNs).Sub(asked.Add(now.Sub(asked) / 2))
	if description != nil {
		if err := checkDescription(description); err != nil {
			if !s.warned.description {
				s.d.cfg.Logger.Warn("ignored description of node", "node_id", s.peer.NodeID, "error", err)
				s.warned.description = true
			}
			description = nil
		}
	}
	if skew.Abs() > warden.SkewWarn && !s.warned.skew {
		s.d.cfg.Logger.Warn("found clock of node out", "node_id", s.peer.NodeID, "skew", skew)
		s.warned.skew = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen, s.skew, s.asked = now, skew, time.Time{}
	if description != nil {
		s.description, s.stored = description, false
	}
}

// checkRecord notes whether the node's record shows its description by now: then the leader is not told of it any more.
func (s *session) checkRecord() {
	node := s.d.cfg.Store.View().Node(s.peer.NodeID)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stored = node != nil && s.description != nil && node.GetIp() == s.peer.IP && proto.Equal(node.GetDescription(), s.description)
}

// claim returns the session as the leader is told of it; nil before the node's first answer, and where it can't take tasks.
func (s *session) claim() *api.SessionClaim {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen.IsZero() || s.peer.RenewOnly {
		return nil
	}
	c := &api.SessionClaim{NodeId: s.peer.NodeID, SessionId: s.id, Ip: s.peer.IP, SkewNs: int64(s.skew)}
	c.SeenNs = time.Now().Add(-time.Since(s.seen)).UnixNano() // by the clock of now, which the report is of: it may have been set since
	if !s.stored {
		c.Description = s.description
	}
	return c
}

// watch takes the states of the node's tasks and its answers to the heartbeat. A node that keeps on repeating itself is cut
// off.
func (s *session) watch(ctx context.Context) error {
	const op = "watching tasks"
	stream, err := s.client.Watch(ctx, recvMax(reportMessageMax))
	if err != nil {
		return warden.Wrap(op, api.FromError(err))
	}
	if err := stream.Send(&api.WatchRequest{}); err != nil { // opens it; Recv says why it failed
		_, err = stream.Recv()
		return warden.Wrap(op, api.FromError(err))
	}
	defer s.beat(stream)()
	repeats, since := 0, time.Now()
	for {
		reply, err := stream.Recv()
		if done, err := ended(err); done {
			return warden.Wrap(op, cmpErr(err, warden.Errorf(warden.CodeUnavailable, "", "the node ended the stream")))
		}
		wasted := len(reply.GetReports()) - s.d.reports.addAll(s.peer.NodeID, s.news(reply.GetReports()))
		switch asked := s.waits(); {
		case reply.GetTimeNs() != 0 && !asked.IsZero():
			s.answered(asked, reply.GetTimeNs(), reply.GetDescription())
		case len(reply.GetReports()) == 0:
			wasted = 1
		}
		if wasted == 0 {
			continue
		}
		if now := time.Now(); now.Sub(since) > warden.HeartbeatMissed {
			repeats, since = 0, now
		}
		if repeats += wasted; repeats > repeatsMax {
			return warden.Errorf(warden.CodeLimited, op, "more than %d reports without news in %s", repeatsMax, warden.HeartbeatMissed)
		}
	}
}

// beatGrid is what heartbeats fall on, so that those of many sessions wake the manager together: 1,000 spread evenly cost twice
// as much.
const beatGrid = 250 * time.Millisecond

// nextBeat returns how long to wait for the next heartbeat, HeartbeatPeriod or a bit less.
func nextBeat(now time.Time) time.Duration {
	return now.Add(warden.HeartbeatPeriod).Truncate(beatGrid).Sub(now)
}

// waits returns when the heartbeat went out that is not answered yet; zero where there is none.
func (s *session) waits() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// beat sends the heartbeat every HeartbeatPeriod, one at a time, and ends the session where one stays without an answer for
// HeartbeatMissed. It returns what ends it. Send waits for no honest node: what is not answered is one heartbeat, which the stream
// has room for. One that answers what it never reads fills that up in hours, and its session ends, too.
func (s *session) beat(stream grpc.BidiStreamingClient[api.WatchRequest, api.WatchReply]) (stop func()) {
	var timer *time.Timer
	var mu sync.Mutex // held over one heartbeat, so that stop waits for it
	stopped := false
	repeated := time.Now()
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(nextBeat(time.Now()), func() {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		now := time.Now()
		s.mu.Lock()
		waits := s.asked
		if waits.IsZero() {
			s.asked = now
		}
		s.mu.Unlock()
		switch {
		case waits.IsZero():
			late := time.AfterFunc(warden.HeartbeatMissed, func() {
				s.end(warden.Errorf(warden.CodeTimeout, "watching tasks", "the node did not take a heartbeat for %s", warden.HeartbeatMissed))
			})
			err := stream.Send(&api.WatchRequest{TimeNs: now.UnixNano()})
			if late.Stop(); err != nil {
				return // Recv says why
			}
		case now.Sub(waits) >= warden.HeartbeatMissed:
			s.end(warden.Errorf(warden.CodeTimeout, "watching tasks", "the node did not answer for %s", warden.HeartbeatMissed))
			return
		}
		if now.Sub(repeated) >= warden.HeartbeatMissed {
			s.repeat()
			repeated = now
		}
		next := nextBeat(now)
		if !waits.IsZero() {
			next = min(next, waits.Add(warden.HeartbeatMissed).Sub(now))
		}
		timer.Reset(next)
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		timer.Stop()
	}
}

// news returns, within their bounds, those of the reports that move a task of this node forward, from what it told before and from what
// the store shows: what a node says anew with each session costs the log nothing. What they say of tasks that
// are another node's, or none, is not for this node to say.
func (s *session) news(reports []*api.TaskReport) (news []*api.TaskReport) {
	if len(reports) == 0 {
		return nil
	}
	v := s.d.cfg.Store.View()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range reports {
		state, task := r.GetStatus().GetState(), v.Task(r.GetTaskId())
		of := task.GetNodeId()
		if of != "" && of != s.peer.NodeID { // of a task that is gone an honest node may still speak
			err := warden.Errorf(warden.CodeDenied, "taking a report", "task %s is another node's", r.GetTaskId())
			s.d.cfg.Refused(s.peer.NodeID, err)
			if !s.warned.report {
				s.d.cfg.Logger.Warn("ignored report of node", "node_id", s.peer.NodeID, "error", err)
				s.warned.report = true
			}
			continue
		}
		if known := max(s.told[r.GetTaskId()].GetStatus().GetState(), task.GetStatus().GetState()); !reportable(state) || state <= known || of == "" {
			continue
		}
		r = clipReport(r)
		s.told[r.GetTaskId()] = r
		news = append(news, r)
	}
	return news
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
