package e2e

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/internal/testcluster"
	"warden/join"
	"warden/tokens"
)

// stolen is what an attacker takes from a node's disk.
type stolen struct {
	nodeID, clusterID string
	key               crypto.Signer
	cert              *tls.Certificate
	root              *x509.Certificate
}

// steal reads an unsealed key file, as root on the host can.
func steal(t testing.TB, h *testcluster.Host) stolen {
	t.Helper()
	kf, err := autolock.ReadKeyFile(filepath.Join(h.State, "identity", "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := kf.Identity()
	if err != nil {
		t.Fatal(err)
	}
	s := stolen{nodeID: id.NodeID, clusterID: id.ClusterID}
	if err := id.Key.Use(func(der []byte) (err error) { s.key, err = ca.ParseKey(der); return err }); err != nil {
		t.Fatal(err)
	}
	if s.root, err = x509.ParseCertificate(id.Chain[len(id.Chain)-1]); err != nil {
		t.Fatal(err)
	}
	s.cert = &tls.Certificate{Certificate: id.Chain, PrivateKey: s.key}
	return s
}

// dial does the handshake at a door, as far as the other side lets it, and reads the first byte: refusals show there. The
// returned error is nil where the connection stays open without a byte until the deadline.
func (s stolen) dial(address string, protocols ...string) (*tls.Conn, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: protocols, InsecureSkipVerify: true}
	if s.cert != nil {
		cfg.Certificates = []tls.Certificate{*s.cert}
	}
	return tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", address, cfg)
}

// refused reports the error that a door closes with, at the handshake or the first read.
func (s stolen) refused(address string, protocols ...string) error {
	conn, err := s.dial(address, protocols...)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(3 * time.Second))
	_, err = conn.Read(make([]byte, 1))
	if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
		return nil
	}
	return err
}

// agent is a hostile agent: it answers heartbeats, takes whatever it is sent, and ignores the order to wipe.
type hostileAgent struct {
	api.UnimplementedSessionServer
	mu      sync.Mutex
	sets    int
	secrets map[string]bool
	evicts  int
	order   []string // "set" or "evict", as they came
}

func (a *hostileAgent) Describe(context.Context, *api.DescribeRequest) (*api.DescribeReply, error) {
	return &api.DescribeReply{TimeNs: time.Now().UnixNano(), Description: &api.NodeDescription{Hostname: "victim", Os: "linux", Arch: "amd64", NanoCpus: 2e9, MemoryBytes: 1 << 30}}, nil
}

func (a *hostileAgent) Assign(stream grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
	for {
		set, err := stream.Recv()
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.sets++
		a.order = append(a.order, "set")
		for _, s := range set.PutSecrets {
			a.secrets[string(s.Data)] = true
		}
		a.mu.Unlock()
		if err := stream.Send(&api.AssignmentAck{Sequence: set.Sequence}); err != nil {
			return err
		}
	}
}

func (a *hostileAgent) Watch(stream grpc.BidiStreamingServer[api.WatchRequest, api.WatchReply]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if err := stream.Send(&api.WatchReply{TimeNs: time.Now().UnixNano()}); err != nil {
			return err
		}
	}
}

func (a *hostileAgent) Evict(context.Context, *api.EvictRequest) (*api.EvictReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.evicts++
	a.order = append(a.order, "evict")
	return nil, errors.New("no")
}

// serve runs a session over conn until it ends, and returns a channel that is closed then.
func (a *hostileAgent) serve(conn net.Conn) <-chan struct{} {
	done := make(chan struct{})
	l := &oneConn{conn: conn, done: done}
	s := grpc.NewServer()
	api.RegisterSessionServer(s, a)
	go s.Serve(l)
	return done
}

// oneConn is a listener of one connection.
type oneConn struct {
	conn net.Conn
	once sync.Once
	gave bool
	done chan struct{}
	mu   sync.Mutex
}

func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	if !l.gave {
		l.gave = true
		l.mu.Unlock()
		return &watched{Conn: l.conn, l: l}, nil
	}
	l.mu.Unlock()
	<-l.done
	return nil, io.EOF
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// watched tells when the other side has closed.
type watched struct {
	net.Conn
	l *oneConn
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err != nil {
		w.l.once.Do(func() { close(w.l.done) })
	}
	return n, err
}

// TestI4EvictionOfAHostileNode evicts a node whose key and agent are an attacker's: it keeps its connection and heartbeats,
// ignores the order, dials every other manager, and tries to join with its old key.
func TestI4EvictionOfAHostileNode(t *testing.T) {
	c := newThree(t)
	victim := c.Host("victim")
	m := c.m[0]
	victim.Join(m.Token("worker"), m)
	c.awaitReady(t, m, 4)
	m.CtlIn(canary, "secret", "create", "password", "-")
	m.CtlIn("another", "secret", "create", "elsewhere", "-")

	victim.Kill()
	s := steal(t, victim)
	agent := &hostileAgent{secrets: map[string]bool{}}
	conn, err := s.dial(c.m[1].Address, warden.DoorNode)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	closed := agent.serve(conn)
	c.awaitReady(t, m, 4)
	m.Ctl("service", "create", "--name", "app", "--secret", "password", "host", "sleep", "1000")
	testcluster.Await(t, 20*time.Second, func() error {
		agent.mu.Lock()
		defer agent.mu.Unlock()
		if !agent.secrets[canary] {
			return errors.New("the agent was not sent the secret of its task")
		}
		if agent.secrets["another"] {
			t.Fatal("the agent was sent a secret that no task of its needs") // I6
		}
		return nil
	})

	begin := time.Now()
	out := m.Ctl("node", "rm", "--force", "--compromised", "victim")
	if !strings.Contains(out, "password") || strings.Contains(out, "elsewhere") {
		t.Fatalf("node rm --compromised =\n%s\nwant the secret that it held and no other", out)
	}
	select {
	case <-closed:
		t.Logf("connection closed %s after the command began", time.Since(begin).Round(time.Millisecond))
	case <-time.After(10 * time.Second):
		t.Fatal("the connection of the evicted node lives on")
	}
	agent.mu.Lock()
	if agent.evicts != 1 || agent.order[len(agent.order)-1] != "evict" {
		t.Errorf("the agent got %v, want one order to wipe as the last message", agent.order)
	}
	agent.mu.Unlock()
	if out := m.Ctl("node", "ls", "-q"); strings.Contains(out, s.nodeID) {
		t.Errorf("node ls shows the evicted node:\n%s", out)
	}

	// Every manager: nothing but the same order again, and the connection ends.
	for i, h := range c.m {
		again := &hostileAgent{secrets: map[string]bool{}}
		conn, err := s.dial(h.Address, warden.DoorNode)
		if err != nil {
			t.Fatalf("manager %d: %v", i, err)
		}
		select {
		case <-again.serve(conn):
		case <-time.After(10 * time.Second):
			t.Fatalf("manager %d keeps the connection of an evicted node", i)
		}
		conn.Close()
		again.mu.Lock()
		if again.evicts != 1 || again.sets != 0 || len(again.secrets) != 0 {
			t.Errorf("manager %d sent %v to an evicted node", i, again.order)
		}
		again.mu.Unlock()
	}

	// Its old key joins nothing, whatever token comes with it.
	token2, err := tokens.Parse(m.Token("worker"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = join.Join(t.Context(), c.m[2].Address, token2, join.Request{Key: s.key, Hostname: "victim", Advertise: ":2377"},
		func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		})
	if warden.CodeOf(err) != warden.CodeEvicted {
		t.Errorf("joining with the key of an evicted node = %v, want [%s]", err, warden.CodeEvicted)
	}

	// The real daemon was off meanwhile. It comes back, learns it, and forgets.
	victim.Start()
	testcluster.Await(t, 20*time.Second, func() error {
		out, _, _ := victim.Try("status")
		if !strings.Contains(out, "evicted") {
			return fmt.Errorf("status: %s", out)
		}
		if _, err := os.Stat(filepath.Join(victim.State, "identity")); err == nil {
			return errors.New("its identity is still on disk")
		}
		return nil
	})
}

// TestDoors tries every door with every certificate that has no business there.
func TestDoors(t *testing.T) {
	testcluster.Root(t)
	c := &six{Cluster: testcluster.New(t)}
	m1, m2, w := c.Host("m1"), c.Host("m2"), c.Host("w1")
	m1.Ctl("swarm", "init")
	m2.Join(m1.Token("manager"), m1)
	w.Join(m1.Token("worker"), m1)
	c.awaitVoters(t, m1, 2)
	c.awaitReady(t, m1, 3)

	worker, nobody := steal(t, w), stolen{}
	manager := steal(t, m2)
	for _, door := range []string{warden.DoorRaft, warden.DoorPeer, warden.DoorControl} {
		if err := worker.refused(m1.Address, door); err == nil {
			t.Errorf("a worker's certificate stays at %s", door)
		}
		if err := nobody.refused(m1.Address, door); err == nil {
			t.Errorf("no certificate stays at %s", door)
		}
	}
	if err := manager.refused(m1.Address, warden.DoorControl); err == nil {
		t.Error("a manager's certificate stays at the control door")
	}
	if err := manager.refused(m1.Address, warden.DoorPeer); err != nil {
		t.Errorf("a manager's certificate at the peer door = %v", err)
	}
	for _, protocols := range [][]string{nil, {"warden-nothing/1"}, {warden.DoorJoin, warden.DoorNode}, {"http/1.1"}} {
		if err := worker.refused(m1.Address, protocols...); err == nil {
			t.Errorf("a client that offers %q stays", protocols)
		}
	}
	// Two managers: demoting one leaves a majority of one.
	c.m[0] = m1
	m1.Ctl("node", "demote", "m2")
	for _, door := range []string{warden.DoorRaft, warden.DoorPeer} {
		if err := manager.refused(m1.Address, door); err == nil {
			t.Errorf("the certificate of a demoted manager stays at %s", door)
		}
	}
	testcluster.Await(t, 40*time.Second, func() error {
		if _, err := os.Stat(filepath.Join(m2.State, "raft")); err == nil {
			return errors.New("the demoted manager still has the replicated state on its disk")
		}
		out, _, _ := m2.Try("status")
		if !strings.Contains(out, "worker") {
			return fmt.Errorf("status of the demoted manager: %s", out)
		}
		return nil
	})
	c.awaitReady(t, m1, 3)
	m1.Ctl("node", "promote", "m2")
	c.awaitVoters(t, m1, 2)
	if err := manager.refused(m1.Address, warden.DoorPeer); err == nil {
		t.Error("a key from before the demotion is good again after the promotion")
	}
	testcluster.Await(t, 10*time.Second, func() error { // and it raised an alarm
		if out, _, code := m1.Try("status"); code == 0 || !strings.Contains(out, "another key") {
			return fmt.Errorf("status says nothing of a stolen key: %s", out)
		}
		return nil
	})
}
