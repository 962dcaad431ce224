package dispatcher_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/dispatcher"
	"warden/internal/sensitive"
	"warden/store"
	"warden/store/storetest"
)

// node is a node that a test writes; what it leaves nil is answered as an honest idle node would.
type node struct {
	api.UnimplementedSessionServer
	describe func(context.Context) (*api.DescribeReply, error)
	assign   func(grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error
	watch    func(*reporter) error
	renew    func(*api.RenewRequest) ([]byte, error)
	evict    func(context.Context, *api.EvictRequest) error
}

func (n *node) Describe(ctx context.Context, _ *api.DescribeRequest) (*api.DescribeReply, error) {
	if n.describe != nil {
		return n.describe(ctx)
	}
	return &api.DescribeReply{TimeNs: time.Now().UnixNano(), Description: &api.NodeDescription{Hostname: "n"}}, nil
}

func (n *node) Assign(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
	if n.assign != nil {
		return n.assign(s)
	}
	for {
		set, err := s.Recv()
		if err != nil {
			return err
		}
		if err := s.Send(&api.AssignmentAck{Sequence: set.Sequence}); err != nil {
			return err
		}
	}
}

// reporter is the node's half of Watch for a test that reports states of tasks; heartbeats are answered beside it.
type reporter struct {
	grpc.BidiStreamingServer[api.WatchRequest, api.WatchReply]
	mu sync.Mutex // held over each message
}

func (r *reporter) send(reply *api.WatchReply) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.BidiStreamingServer.Send(reply)
}

func (r *reporter) Send(report *api.TaskReport) error {
	return r.send(&api.WatchReply{Reports: []*api.TaskReport{report}})
}

func (n *node) Watch(s grpc.BidiStreamingServer[api.WatchRequest, api.WatchReply]) error {
	r := &reporter{BidiStreamingServer: s}
	over := make(chan error, 2)
	if n.watch != nil {
		go func() { over <- n.watch(r) }()
	}
	go func() {
		for {
			req, err := s.Recv()
			if err != nil {
				over <- err
				return
			}
			if req.TimeNs == 0 {
				continue
			}
			reply, err := n.Describe(s.Context(), nil)
			if err == nil {
				err = r.send(&api.WatchReply{TimeNs: reply.TimeNs, Description: reply.Description})
			}
			if err != nil {
				over <- err
				return
			}
		}
	}()
	return <-over
}

func (n *node) Renew(_ context.Context, r *api.RenewRequest) (*api.RenewReply, error) {
	if n.renew == nil {
		return nil, errors.New("no renewal expected")
	}
	csr, err := n.renew(r)
	return &api.RenewReply{Csr: csr}, err
}

func (n *node) Install(context.Context, *api.InstallRequest) (*api.InstallReply, error) {
	return &api.InstallReply{}, nil // and stays
}

func (n *node) Evict(ctx context.Context, r *api.EvictRequest) (*api.EvictReply, error) {
	if n.evict == nil {
		return nil, errors.New("no evict expected")
	}
	return &api.EvictReply{}, n.evict(ctx, r)
}

// manager is a dispatcher over a real store with one node's record.
type manager struct {
	*dispatcher.Dispatcher
	t      *testing.T
	store  *store.Store
	nodeID string
	peer   dispatcher.Peer
	log    lines

	mu      sync.Mutex // guards the fields below
	reports []*api.NodeTaskReport
	refuse  int  // reports to refuse
	refused int  // what nodes said that was not theirs to say
	held    bool // without the lease
	opened  []sensitive.Bytes
	issued  []time.Time
}

// lines is a log that keeps messages.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(b))
	return len(b), nil
}

func (l *lines) count(part string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.all {
		if strings.Contains(s, part) {
			n++
		}
	}
	return n
}

func newManager(t *testing.T, objects ...*api.Object) *manager {
	m := &manager{t: t, nodeID: strings.Repeat("n", warden.IDLength)}
	now := time.Now()
	m.peer = dispatcher.Peer{NodeID: m.nodeID, Zone: "default", NotBefore: now, NotAfter: now.Add(warden.LeafTTLDefault)}
	m.store = storetest.New(t, append(objects,
		store.Wrap(&api.Node{Id: m.nodeID, Hostname: "n", Role: api.Role_ROLE_WORKER, DesiredRole: api.Role_ROLE_WORKER, LeafRole: api.Role_ROLE_WORKER,
			Zone: "default", LeafZone: "default", KeyHash: make([]byte, 32), Availability: api.Availability_AVAILABILITY_ACTIVE}),
		store.Wrap(&api.Cluster{Id: warden.NewID(), LeafTtlNs: int64(warden.LeafTTLDefault)}),
		store.Wrap(&api.Zone{Id: warden.NewID(), Name: "default"}))...)
	m.Dispatcher = dispatcher.New(dispatcher.Config{
		NodeID: warden.NewID(), Store: m.store, Logger: slog.New(slog.NewTextHandler(&m.log, nil)),
		Open: func(string, uint64) (sensitive.Bytes, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			b := sensitive.New([]byte("canary-value"))
			m.opened = append(m.opened, b)
			return b, nil
		},
		Issue: func(context.Context, string, [32]byte, []byte, string) (*api.InstallRequest, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.issued = append(m.issued, time.Now())
			return &api.InstallRequest{}, nil
		},
		Report: func(_ context.Context, r []*api.NodeTaskReport) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.refuse > 0 {
				m.refuse--
				return warden.Errorf(warden.CodeNoLeader, "", "election")
			}
			m.reports = append(m.reports, r...)
			return nil
		},
		MayPush:  func() bool { m.mu.Lock(); defer m.mu.Unlock(); return !m.held },
		Managers: func() *api.ManagerList { return &api.ManagerList{} },
		Refused:  func(string, error) { m.mu.Lock(); defer m.mu.Unlock(); m.refused++ },
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { m.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return m
}

func task(id byte, nodeID string, secretIDs ...string) *api.Task {
	t := &api.Task{Id: strings.Repeat(string(id), warden.IDLength), ServiceName: "web", NodeId: nodeID, DesiredState: api.TaskState_TASK_RUNNING,
		Status: &api.TaskStatus{State: api.TaskState_TASK_ASSIGNED}, Spec: &api.TaskSpec{Image: "host", Zone: "default"}}
	for _, s := range secretIDs {
		t.Spec.Secrets = append(t.Spec.Secrets, &api.SecretReference{SecretId: s, Version: 1, Target: "s"})
	}
	return t
}

// taken returns the reports that the leader took, once all is quiet.
func (m *manager) taken() []*api.NodeTaskReport {
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.reports)
}

// serve runs a session with the node and returns how it ended, and after how long.
func (m *manager) serve(ctx context.Context, n *node) (time.Duration, error) {
	near, far := net.Pipe()
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	api.RegisterSessionServer(server, n)
	lis := &oneConn{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	lis.conn <- near
	var wg sync.WaitGroup
	wg.Go(func() { server.Serve(lis) })
	start := time.Now()
	err := m.Serve(ctx, far, m.peer)
	took := time.Since(start)
	server.Stop()
	wg.Wait()
	return took, err
}

type oneConn struct {
	conn chan net.Conn
	done chan struct{}
	once sync.Once
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *oneConn) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// TestSilentNode: no answer to Describe for HeartbeatMissed, from the start or later, ends the session.
func TestSilentNode(t *testing.T) {
	for _, answers := range []int{0, 3} {
		synctest.Test(t, func(t *testing.T) {
			m, n, left := newManager(t), &node{}, answers
			n.describe = func(ctx context.Context) (*api.DescribeReply, error) {
				if left--; left >= 0 {
					return &api.DescribeReply{TimeNs: time.Now().UnixNano()}, nil
				}
				<-ctx.Done()
				return nil, ctx.Err()
			}
			took, err := m.serve(t.Context(), n)
			want := time.Duration(answers)*warden.HeartbeatPeriod + warden.HeartbeatMissed
			if early := want - took; warden.CodeOf(err) != warden.CodeTimeout || early < 0 || early >= 250*time.Millisecond { // heartbeats fall on a grid
				t.Errorf("after %d answers: Serve = %v after %v, want %s after %v, or a bit less", answers, err, took, warden.CodeTimeout, want)
			}
		})
	}
}

// TestNewerSession: the session of a node that dials again goes on until the next one is up, and ends then.
func TestNewerSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		start := time.Now()
		var err error
		var ended time.Duration
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err = m.serve(t.Context(), &node{})
			ended = time.Since(start)
		})
		synctest.Wait()
		first := m.Claims()
		var up atomic.Bool
		m.peer.Up = func() { up.Store(true) }
		ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
		defer cancel()
		wg.Go(func() {
			m.serve(ctx, &node{describe: func(context.Context) (*api.DescribeReply, error) {
				time.Sleep(5 * time.Second)
				return &api.DescribeReply{TimeNs: time.Now().UnixNano()}, nil
			}})
		})
		time.Sleep(4 * time.Second)
		if claims := m.Claims(); len(first) != 1 || len(claims) != 1 || claims[0].SessionId != first[0].SessionId || up.Load() {
			t.Errorf("claims %v before the next session is up, %v at first; up: %t", claims, first, up.Load())
		}
		time.Sleep(2 * time.Second)
		if claims := m.Claims(); len(claims) != 1 || claims[0].SessionId == first[0].SessionId || !up.Load() {
			t.Errorf("claims %v after; up: %t", claims, up.Load())
		}
		wg.Wait()
		if warden.CodeOf(err) != warden.CodeConflict || ended != 5*time.Second {
			t.Errorf("the first session: %v after %v, want %s after 5 s", err, ended, warden.CodeConflict)
		}
	})
}
