package agent

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/executor"
	"warden/internal/sensitive"
)

// session is one connection to a manager, on which this node is the server. It is started and ended by Agent.serve.
type session struct {
	api.UnimplementedSessionServer
	a       *Agent
	manager string
	since   time.Time

	beats    chan struct{}          // capacity 1: a Describe came
	over     chan struct{}          // closed by finish: streams return, the connection closes, the node redials
	overOnce sync.Once              //
	evict    chan *api.EvictRequest // capacity 1: the first one
	evicted  chan struct{}          // closed when all tasks are gone after an Evict

	assigning atomic.Bool // an Assign stream has been opened; there is one in a session
	assigned  Assignment  // used by that stream alone
}

func newSession(a *Agent, manager string) *session {
	return &session{a: a, manager: manager, since: time.Now(), beats: make(chan struct{}, 1), over: make(chan struct{}),
		evict: make(chan *api.EvictRequest, 1), evicted: make(chan struct{}), assigned: Assignment{NodeID: a.cfg.NodeID, OwnZone: a.cfg.Zone()}}
}

// finish ends the session in good order.
func (s *session) finish() { s.overOnce.Do(func() { close(s.over) }) }

// serve serves the manager on conn, which it closes, until conn or ctx ends, the manager falls silent, or the session is
// finished. again says that the next session may be opened without back-off; evict is set where the node was removed, all
// tasks being gone then.
func (a *Agent) serve(ctx context.Context, conn net.Conn, manager string) (again bool, evict *api.EvictRequest) {
	s := newSession(a, manager)
	lis := newOnce(conn)
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(warden.MessageMax), grpc.MaxSendMsgSize(warden.MessageMax), grpc.MaxHeaderListSize(8<<10),
		grpc.MaxConcurrentStreams(128), grpc.ReadBufferSize(4<<10), grpc.ConnectionTimeout(warden.HandshakeTimeout),
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			reply, err := next(ctx, req)
			return reply, api.Error(err)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return api.Error(next(srv, stream))
		}))
	api.RegisterSessionServer(server, s)
	a.mu.Lock()
	a.session = s
	a.mu.Unlock()
	served := make(chan struct{})
	go func() { // ends with the listener, which server.Stop closes
		defer close(served)
		server.Serve(lis)
	}()
	a.cfg.Logger.Info("opened session", "manager_id", manager)

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
			why, again = "redialling", true
			graceful(server)
		case <-silence.C:
			why = "the manager fell silent"
		case <-lis.conn.closed:
		case <-ctx.Done():
			why = "the daemon stops"
		}
		open = false
	}
	s.finish()
	server.Stop()
	conn.Close()
	<-served
	a.mu.Lock()
	a.session = nil
	a.mu.Unlock()
	a.cfg.Logger.Info("closed session", "manager_id", manager, "reason", why)
	if evict != nil && ctx.Err() != nil && len(a.Tasks()) > 0 {
		evict = nil // the daemon stopped meanwhile; the next one is told again
	}
	return again || time.Since(s.since) > dialBackoffMax, evict
}

// graceful lets the calls that run give their answers, for a second at most.
func graceful(server *grpc.Server) {
	timer := time.AfterFunc(time.Second, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
}

// Describe answers the heartbeat.
func (s *session) Describe(context.Context, *api.DescribeRequest) (*api.DescribeReply, error) {
	select {
	case s.beats <- struct{}{}:
	default:
	}
	return &api.DescribeReply{TimeNs: time.Now().UnixNano(), Description: s.a.cfg.Describe()}, nil
}

// Assign takes assignment sets, and ends at the first that breaks a rule.
func (s *session) Assign(stream grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
	if !s.assigning.CompareAndSwap(false, true) {
		return warden.Errorf(warden.CodeInvalid, "assigning tasks", "a second stream in one session")
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

// Watch streams all states, then each change; states that follow each other faster than the stream takes them are skipped,
// the newest never.
func (s *session) Watch(_ *api.WatchRequest, stream grpc.ServerStreamingServer[api.TaskReport]) error {
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
	for {
		a.mu.Lock()
		pending := w.pending
		w.pending = map[string]*api.TaskStatus{}
		a.mu.Unlock()
		for _, id := range slices.Sorted(maps.Keys(pending)) {
			if err := stream.Send(&api.TaskReport{TaskId: id, Status: pending[id]}); err != nil {
				return err
			}
		}
		select {
		case <-w.wake:
		case <-s.over:
			return nil
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// Renew makes a new key and returns its CSR.
func (s *session) Renew(_ context.Context, req *api.RenewRequest) (*api.RenewReply, error) {
	csr, err := s.a.cfg.Renew()
	if err != nil {
		return nil, warden.Wrap("making a key for the next leaf", err)
	}
	s.a.cfg.Logger.Info("made key for next leaf", "manager_id", s.manager, "reason", clip(req.GetReason()))
	return &api.RenewReply{Csr: csr}, nil
}

// Install stores the new leaf, answers, and ends the session: the next one uses it.
func (s *session) Install(_ context.Context, req *api.InstallRequest) (*api.InstallReply, error) {
	if err := s.a.cfg.Install(req); err != nil {
		return nil, warden.Wrap("installing the leaf", err)
	}
	s.finish()
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
	return exec.Logs(ctx, executor.LogOptions{Follow: req.GetFollow(), Tail: req.GetTail()}, func(l executor.Line) error {
		return stream.Send(&api.LogChunk{TaskId: req.GetTaskId(), NodeId: s.a.cfg.NodeID, TimeNs: l.Time.UnixNano(), Stderr: l.Stderr, Data: l.Data})
	})
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
