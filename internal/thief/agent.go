package thief

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"warden/api"
	"warden/ca"
	"warden/internal/testcluster"
)

// Agent is a hostile one: it takes whatever it is sent, says what it likes, and ignores the order to wipe.
type Agent struct {
	api.UnimplementedSessionServer
	Says    *api.NodeDescription // of itself
	Reports []*api.TaskReport    // that it repeats

	mu  sync.Mutex // guards got
	got Got
}

// Got is what managers sent to an agent.
type Got struct {
	Tasks   map[string]bool // by ID
	Secrets map[string]bool // by value
	Calls   []string        // "assign" and "evict", as they came
	Next    crypto.Signer   // made for the last Renew
	Leaf    *x509.Certificate
}

// NewAgent returns an agent that says of itself what a small node would.
func NewAgent() *Agent {
	return &Agent{got: Got{Tasks: map[string]bool{}, Secrets: map[string]bool{}},
		Says: &api.NodeDescription{Hostname: "thief", Os: "linux", Arch: "amd64", NanoCpus: 2e9, MemoryBytes: 1 << 30}}
}

// Got returns what the agent was sent until now.
func (a *Agent) Got() Got {
	a.mu.Lock()
	defer a.mu.Unlock()
	got := a.got
	got.Tasks, got.Secrets, got.Calls = maps.Clone(got.Tasks), maps.Clone(got.Secrets), slices.Clone(got.Calls)
	return got
}

// Evictions counts the orders to wipe.
func (g Got) Evictions() (n int) {
	for _, c := range g.Calls {
		if c == "evict" {
			n++
		}
	}
	return n
}

// Await waits until what the agent was sent will do.
func (a *Agent) Await(t testing.TB, what string, ok func(Got) bool) {
	t.Helper()
	testcluster.Await(t, 30*time.Second, func() error {
		if !ok(a.Got()) {
			return fmt.Errorf("waited for the agent: %s", what)
		}
		return nil
	})
}

// Describe implements api.SessionServer.
func (a *Agent) Describe(context.Context, *api.DescribeRequest) (*api.DescribeReply, error) {
	return &api.DescribeReply{TimeNs: time.Now().UnixNano(), Description: a.Says}, nil
}

// Assign implements api.SessionServer.
func (a *Agent) Assign(stream grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
	for {
		set, err := stream.Recv()
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.got.Calls = append(a.got.Calls, "assign")
		for _, t := range set.PutTasks {
			a.got.Tasks[t.Id] = true
		}
		for _, s := range set.PutSecrets {
			a.got.Secrets[string(s.Data)] = true
		}
		a.mu.Unlock()
		if err := stream.Send(&api.AssignmentAck{Sequence: set.Sequence}); err != nil {
			return err
		}
	}
}

// Watch implements api.SessionServer.
func (a *Agent) Watch(stream grpc.BidiStreamingServer[api.WatchRequest, api.WatchReply]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if err := stream.Send(&api.WatchReply{TimeNs: time.Now().UnixNano(), Description: a.Says, Reports: a.Reports}); err != nil {
			return err
		}
	}
}

// Renew implements api.SessionServer.
func (a *Agent) Renew(context.Context, *api.RenewRequest) (*api.RenewReply, error) {
	key, err := ca.NewKey()
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.got.Next = key
	a.mu.Unlock()
	csr, err := ca.NewCSR(key)
	return &api.RenewReply{Csr: csr}, err
}

// Install implements api.SessionServer.
func (a *Agent) Install(_ context.Context, r *api.InstallRequest) (*api.InstallReply, error) {
	leaf, err := x509.ParseCertificate(r.Chain[0])
	a.mu.Lock()
	a.got.Leaf = leaf
	a.mu.Unlock()
	return &api.InstallReply{}, err
}

// Evict implements api.SessionServer.
func (a *Agent) Evict(context.Context, *api.EvictRequest) (*api.EvictReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.got.Calls = append(a.got.Calls, "evict")
	return nil, errors.New("no")
}

// Serve runs a session over conn until the test ends, and returns a channel that is closed when the other side has closed it.
func (a *Agent) Serve(t testing.TB, conn net.Conn) (closed <-chan struct{}) {
	l := &oneConn{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	l.conn <- &watched{Conn: conn, l: l}
	s := grpc.NewServer()
	api.RegisterSessionServer(s, a)
	served := make(chan struct{})
	go func() { defer close(served); s.Serve(l) }()
	t.Cleanup(func() { conn.Close(); s.Stop(); l.end(); <-served })
	return l.done
}

// oneConn is a listener of one connection.
type oneConn struct {
	conn chan net.Conn
	once sync.Once
	done chan struct{}
}

func (l *oneConn) end() { l.once.Do(func() { close(l.done) }) }

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	default:
	}
	<-l.done
	return nil, io.EOF
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{Name: "session"} }

// watched tells when the other side has closed.
type watched struct {
	net.Conn
	l *oneConn
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err != nil {
		w.l.end()
	}
	return n, err
}
