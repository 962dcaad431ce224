package agent

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/executor"
	"warden/internal/sensitive"
)

// callsMax bounds the calls of a manager at once: more than the logs that it reads of one node (dispatcher), so that there is
// always room for the others.
const callsMax = 1024

// windowSize is how much a manager may send on a stream ahead of what is read: a set of assignments comes in a few round trips.
const windowSize = 1 << 20

// session is one connection to a manager, on which this node is the server. It is started and ended by Agent.serve.
type session struct {
	api.UnimplementedSessionServer
	a       *Agent
	manager string
	since   time.Time

	beats    chan struct{}          // capacity 1: a Describe came
	over     chan struct{}          // closed by finish: streams return, the connection closes, the node redials
	overOnce sync.Once              //
	renewed  chan struct{}          // closed when a new leaf is installed: the node dials the next session, and serves this one until then
	newLeaf  sync.Once              //
	done     chan struct{}          // closed when the session has ended
	evict    chan *api.EvictRequest // capacity 1: the first one
	evicted  chan struct{}          // closed when all tasks are gone after an Evict

	assigning chan struct{} // held by the one Assign stream that is served
	assigned  Assignment    // used by that stream alone
}

func newSession(a *Agent, manager string) *session {
	return &session{a: a, manager: manager, since: time.Now(), beats: make(chan struct{}, 1), assigning: make(chan struct{}, 1), over: make(chan struct{}),
		renewed: make(chan struct{}), done: make(chan struct{}), evict: make(chan *api.EvictRequest, 1), evicted: make(chan struct{}), assigned: Assignment{NodeID: a.cfg.NodeID, OwnZone: a.cfg.Zone()}}
}

// finish ends the session in good order.
func (s *session) finish() { s.overOnce.Do(func() { close(s.over) }) }

// endedWell reports whether the next session may be opened without back-off: this one was finished here, or lasted.
func (s *session) endedWell() bool {
	for _, c := range []chan struct{}{s.renewed, s.over} {
		select {
		case <-c:
			return true
		default:
		}
	}
	return time.Since(s.since) > dialBackoffMax
}

// enter makes s the session whose sets count, or, where there is one, its successor once it sends a set.
func (a *Agent) enter(s *session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.session == nil {
		a.session = s
	} else {
		a.next = s
	}
}

// leave is the inverse of enter.
func (a *Agent) leave(s *session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.session == s {
		a.session, a.next = a.next, nil
	} else if a.next == s {
		a.next = nil
	}
}

// serve serves the manager on conn, which it closes, until conn or ctx ends, the manager falls silent, or the session is
// finished. It returns the order where the node was removed, all tasks being gone then.
func (a *Agent) serve(ctx context.Context, s *session, conn net.Conn) (evict *api.EvictRequest) {
	lis := newOnce(conn)
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(warden.MessageMax), grpc.MaxSendMsgSize(warden.MessageMax), grpc.MaxHeaderListSize(8<<10),
		grpc.StaticStreamWindowSize(windowSize), grpc.StaticConnWindowSize(2*windowSize), // fixed: see dispatcher/links.go
		grpc.MaxConcurrentStreams(callsMax), grpc.ReadBufferSize(4<<10), grpc.ConnectionTimeout(warden.HandshakeTimeout),
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			reply, err := next(ctx, req)
			return reply, api.Error(err)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return api.Error(next(srv, stream))
		}))
	api.RegisterSessionServer(server, s)
	a.enter(s)
	served := make(chan struct{})
	go func() { // ends with the listener, which server.Stop closes
		defer close(served)
		server.Serve(lis)
	}()
	a.cfg.Logger.Info("opened session", "manager_id", s.manager)

	why := "the manager closed it"
	silence := time.NewTimer(silenceMax)
	defer silence.Stop()
	for open := true; open; {
		select {
		case <-s.beats:
			silence.Reset(silenceMax)
			continue
		case evict = <-s.evict:
			why = "this node was evicted"
			stopCtx, cancel := context.WithTimeout(ctx, evictTimeout)
			if err := a.StopAll(stopCtx); err != nil {
				a.cfg.Logger.Error("could not stop all tasks of the evicted node", "error", err)
			}
			cancel()
			close(s.evicted)
			s.finish()
			graceful(server)
		case <-s.over:
			why = "redialling"
			graceful(server)
		case <-silence.C:
			why = "the manager fell silent"
		case <-lis.conn.closed:
		case <-ctx.Done():
			why = "the daemon stops"
		}
		open = false
	}
	server.Stop()
	conn.Close()
	<-served
	a.leave(s)
	a.cfg.Logger.Info("closed session", "manager_id", s.manager, "reason", why)
	if evict != nil && ctx.Err() != nil && len(a.Tasks()) > 0 {
		evict = nil // the daemon stopped meanwhile; the next one is told again
	}
	return evict
}

// graceful lets the calls that run give their answers, for a second at most.
func graceful(server *grpc.Server) {
	timer := time.AfterFunc(time.Second, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
}

// Describe says what this node is.
func (s *session) Describe(context.Context, *api.DescribeRequest) (*api.DescribeReply, error) {
	s.heard()
	return &api.DescribeReply{TimeNs: time.Now().UnixNano(), Description: s.a.cfg.Describe()}, nil
}

// heard notes a heartbeat.
func (s *session) heard() {
	select {
	case s.beats <- struct{}{}:
	default:
	}
}

// Assign takes assignment sets, and ends at the first that breaks a rule. A session may have one stream after the other; the
// next waits for the end of the last.
func (s *session) Assign(stream grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
	select {
	case s.assigning <- struct{}{}:
		defer func() { <-s.assigning }()
	case <-stream.Context().Done():
		return stream.Context().Err()
	case <-s.over:
		return nil
	}
	sets, failed := make(chan *api.AssignmentSet), make(chan error, 1)
	go func() { // ends with the stream, which ends when Assign returns
		for {
			set, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case sets <- set:
			case <-stream.Context().Done():
				wipeSet(set)
				failed <- stream.Context().Err()
				return
			}
		}
	}()
	for {
		select {
		case set := <-sets:
			err := s.a.take(s, set)
			wipeSet(set)
			if err != nil {
				s.a.cfg.Logger.Error("refused assignment set", "manager_id", s.manager, "error", err)
				return err
			}
			if err := stream.Send(&api.AssignmentAck{Sequence: set.GetSequence()}); err != nil {
				return err
			}
		case err := <-failed:
			return err
		case <-s.over:
			return nil
		}
	}
}

// wipeSet zeroes the values in a set that was taken, or refused.
func wipeSet(set *api.AssignmentSet) {
	for _, m := range set.GetPutSecrets() {
		clear(m.GetData())
	}
}

// take checks the set and carries it out: it starts what is new and orders the end of what has to end.
func (a *Agent) take(s *session, set *api.AssignmentSet) error {
	if err := a.carryOut(s, set); err != nil {
		return err
	}
	if set.GetManagers() != nil {
		a.cfg.SetManagers(set.GetManagers())
	}
	return nil
}

func (a *Agent) carryOut(s *session, set *api.AssignmentSet) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s == a.next { // it takes over
		a.session.finish()
		a.session, a.next = s, nil
	}
	if a.closed || a.session != s {
		return warden.Errorf(warden.CodeUnavailable, "taking an assignment set", "this node takes no more tasks")
	}
	if err := s.assigned.Take(set); err != nil {
		return err
	}
	for _, m := range set.GetPutSecrets() {
		id := versionID(m.GetSecretId(), m.GetVersion())
		if old, held := a.secrets[id]; held { // from an earlier session
			old.Wipe()
		}
		a.secrets[id] = sensitive.New(slices.Clone(m.GetData()))
	}
	for _, record := range set.GetPutTasks() {
		a.put(record)
	}
	for _, id := range set.GetRemoveTasks() {
		if t := a.tasks[id]; t != nil {
			t.order(true)
		}
	}
	for _, id := range set.GetRemoveSecrets() {
		if value, held := a.secrets[id]; held {
			value.Wipe()
			delete(a.secrets, id)
		}
	}
	if set.GetComplete() {
		for id, t := range a.tasks {
			if s.assigned.Tasks[id] == nil {
				t.order(true)
			}
		}
		a.wipeSecrets(s.assigned.Secrets)
	}
	return nil
}

// put makes the node have the task. One that it knows is never started again, only ordered to end; its state is told again,
// since a manager that did not know the task yet has dropped what it was told before. Called with mu held.
func (a *Agent) put(record *api.Task) {
	t := a.tasks[record.GetId()]
	if t != nil && t.status != nil {
		a.tell(t)
	}
	if t == nil {
		t = newTask(record.GetId(), record)
		a.tasks[t.id] = t
		if record.GetStatus().GetState().Ended() { // named for its log, which is not here
			t.status = api.Clone(record.GetStatus())
		} else if record.GetDesiredState() == api.TaskState_TASK_RUNNING && record.GetStatus().GetState() >= api.TaskState_TASK_STARTING {
			// It may have run here before the machine or its executor lost it.
			t.status = &api.TaskStatus{State: api.TaskState_TASK_FAILED, Message: "lost", Error: "this node does not have the task any more",
				TimeNs: time.Now().UnixNano()}
			a.tell(t)
		}
	}
	if !t.dropping {
		t.record = record
		t.grace = graceOf(record)
	}
	if record.GetDesiredState() == api.TaskState_TASK_SHUTDOWN {
		t.order(false)
	}
	a.spawn(t)
}

func newTask(id string, record *api.Task) *task {
	return &task{id: id, record: record, stop: make(chan struct{}), drop: make(chan struct{}), grace: graceOf(record)}
}

// reportsBytesMax is how many bytes of reports one message carries, but for its last report: below what a manager takes.
const reportsBytesMax = 128 << 10

// Watch streams all states, then each change, and answers heartbeats. States that follow each other faster than the stream
// takes them are skipped, the newest never.
func (s *session) Watch(stream grpc.BidiStreamingServer[api.WatchRequest, api.WatchReply]) error {
	a := s.a
	w := &watcher{wake: make(chan struct{}, 1), pending: map[string]*api.TaskStatus{}}
	a.mu.Lock()
	a.watchers[w] = struct{}{}
	for _, t := range a.tasks {
		if t.status != nil {
			w.add(t)
		}
	}
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.watchers, w)
	}()
	asked, failed := make(chan struct{}, 1), make(chan error, 1)
	go func() { // ends with the stream, which ends when Watch returns
		for {
			req, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			if req.GetTimeNs() != 0 {
				select {
				case asked <- struct{}{}:
				default:
				}
			}
		}
	}()
	var said *api.NodeDescription
	for {
		if err := w.send(a, stream); err != nil {
			return err
		}
		select {
		case <-w.wake:
		case <-asked:
			s.heard()
			reply := &api.WatchReply{TimeNs: time.Now().UnixNano()}
			if now := a.cfg.Describe(); !proto.Equal(now, said) {
				reply.Description, said = now, now
			}
			if err := stream.Send(reply); err != nil {
				return err
			}
		case err := <-failed:
			return err
		case <-s.over:
			return nil
		}
	}
}

// send sends what is pending.
func (w *watcher) send(a *Agent, stream grpc.BidiStreamingServer[api.WatchRequest, api.WatchReply]) error {
	a.mu.Lock()
	if len(w.pending) == 0 {
		a.mu.Unlock()
		return nil
	}
	pending := w.pending
	w.pending = map[string]*api.TaskStatus{}
	a.mu.Unlock()
	reply, size := &api.WatchReply{}, 0
	for _, id := range slices.Sorted(maps.Keys(pending)) {
		report := &api.TaskReport{TaskId: id, Status: pending[id]}
		reply.Reports = append(reply.Reports, report)
		if size += proto.Size(report); size >= reportsBytesMax {
			if err := stream.Send(reply); err != nil {
				return err
			}
			reply, size = &api.WatchReply{}, 0
		}
	}
	if size == 0 {
		return nil
	}
	return stream.Send(reply)
}

// Renew makes a new key and returns its CSR; over a session that has brought a leaf it makes no other. A manager that missed the
// answer to Install would have the key of that leaf replaced in the node's record, and the node has no older one.
func (s *session) Renew(_ context.Context, req *api.RenewRequest) (*api.RenewReply, error) {
	select {
	case <-s.renewed:
		return nil, warden.Errorf(warden.CodeConflict, "making a key for the next leaf", "this session has brought a leaf: the next one shows it")
	default:
	}
	csr, err := s.a.cfg.Renew()
	if err != nil {
		return nil, warden.Wrap("making a key for the next leaf", err)
	}
	s.a.cfg.Logger.Info("made key for next leaf", "manager_id", s.manager, "reason", clip(req.GetReason()))
	return &api.RenewReply{Csr: csr}, nil
}

// Install stores the new leaf, answers, and has the next session opened, which uses it.
func (s *session) Install(_ context.Context, req *api.InstallRequest) (*api.InstallReply, error) {
	if err := s.a.cfg.Install(req); err != nil {
		return nil, warden.Wrap("installing the leaf", err)
	}
	s.newLeaf.Do(func() { close(s.renewed) })
	return &api.InstallReply{}, nil
}

// Logs streams the log of one task.
func (s *session) Logs(req *api.LogsRequest, stream grpc.ServerStreamingServer[api.LogChunk]) error {
	op := "reading the log of task " + clip(req.GetTaskId())
	if req.GetTail() > warden.TailLogMax {
		return warden.Errorf(warden.CodeTooLarge, op, "at most the last %d lines can be asked for", warden.TailLogMax)
	}
	s.a.mu.Lock()
	var exec executor.Task
	if t := s.a.tasks[req.GetTaskId()]; t != nil {
		exec = t.exec
	}
	s.a.mu.Unlock()
	if exec == nil {
		return warden.Errorf(warden.CodeNotFound, op, "the task has not been started on this node")
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() { // ends with ctx
		select {
		case <-s.over:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := exec.Logs(ctx, executor.LogOptions{Follow: req.GetFollow(), Tail: req.GetTail()}, func(l executor.Line) error {
		return stream.Send(&api.LogChunk{TaskId: req.GetTaskId(), NodeId: s.a.cfg.NodeID, TimeNs: l.Time.UnixNano(), Stderr: l.Stderr, Data: l.Data})
	})
	select {
	case <-s.over:
		if err != nil { // the log goes on, over the next session
			return warden.Errorf(warden.CodeUnavailable, op, "the session has ended")
		}
	default:
	}
	return err
}

// Evict stops and wipes all, answers if the manager still listens, and lets Run end.
func (s *session) Evict(ctx context.Context, req *api.EvictRequest) (*api.EvictReply, error) {
	if req.GetNodeId() != s.a.cfg.NodeID {
		s.a.cfg.Logger.Error("refused evict of another node", "manager_id", s.manager)
		return nil, warden.Errorf(warden.CodeForeign, "evicting", "it names another node")
	}
	select {
	case s.evict <- req:
	default:
	}
	select {
	case <-s.evicted:
		return &api.EvictReply{}, nil
	case <-s.over:
		return nil, warden.Errorf(warden.CodeUnavailable, "evicting", "the session has ended")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
