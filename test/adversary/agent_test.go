package adversary

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"warden/api"
	"warden/ca"
	"warden/internal/testcluster"
)

// agent is a hostile one: it takes whatever it is sent, says what it likes, and ignores the order to wipe.
type agent struct {
	api.UnimplementedSessionServer
	says    *api.NodeDescription // of itself
	reports []*api.TaskReport    // that it repeats

	mu      sync.Mutex // guards all below
	tasks   map[string]bool
	secrets map[string]bool
	evicts  int
	next    crypto.Signer // of the last Renew
	leaf    *x509.Certificate
}

func newAgent() *agent {
	return &agent{tasks: map[string]bool{}, secrets: map[string]bool{},
		says: &api.NodeDescription{Hostname: "thief", Os: "linux", Arch: "amd64", NanoCpus: 2e9, MemoryBytes: 1 << 30}}
}

func (a *agent) Describe(context.Context, *api.DescribeRequest) (*api.DescribeReply, error) {
	return &api.DescribeReply{TimeNs: time.Now().UnixNano(), Description: a.says}, nil
}

func (a *agent) Assign(stream grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
	for {
		set, err := stream.Recv()
		if err != nil {
			return err
		}
		a.mu.Lock()
		for _, t := range set.PutTasks {
			a.tasks[t.Id] = true
		}
		for _, s := range set.PutSecrets {
			a.secrets[string(s.Data)] = true
		}
		a.mu.Unlock()
		if err := stream.Send(&api.AssignmentAck{Sequence: set.Sequence}); err != nil {
			return err
		}
	}
}

func (a *agent) Watch(stream grpc.BidiStreamingServer[api.WatchRequest, api.WatchReply]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if err := stream.Send(&api.WatchReply{TimeNs: time.Now().UnixNano(), Description: a.says, Reports: a.reports}); err != nil {
			return err
		}
	}
}

func (a *agent) Renew(context.Context, *api.RenewRequest) (*api.RenewReply, error) {
	key, err := ca.NewKey()
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.next = key
	a.mu.Unlock()
	csr, err := ca.NewCSR(key)
	return &api.RenewReply{Csr: csr}, err
}

func (a *agent) Install(_ context.Context, r *api.InstallRequest) (*api.InstallReply, error) {
	leaf, err := x509.ParseCertificate(r.Chain[0])
	a.mu.Lock()
	a.leaf = leaf
	a.mu.Unlock()
	return &api.InstallReply{}, err
}

func (a *agent) Evict(context.Context, *api.EvictRequest) (*api.EvictReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.evicts++
	return nil, errors.New("no")
}

// has reports whether the agent was given a secret's value.
func (a *agent) has(value string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.secrets[value]
}

// serve runs a session over conn, and returns a channel that is closed when the other side has closed it.
func (a *agent) serve(t testing.TB, conn net.Conn) <-chan struct{} {
	l := &oneConn{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	l.conn <- &watched{Conn: conn, l: l}
	s := grpc.NewServer()
	api.RegisterSessionServer(s, a)
	served := make(chan struct{})
	go func() { defer close(served); s.Serve(l) }()
	t.Cleanup(func() { conn.Close(); s.Stop(); l.end(); <-served })
	return l.done
}

// await waits until the manager has called the agent.
func (a *agent) await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	testcluster.Await(t, 30*time.Second, func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if !ok() {
			return fmt.Errorf("waited for the agent: %s", what)
		}
		return nil
	})
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
