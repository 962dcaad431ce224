package bench

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"warden"
	"warden/agent"
	"warden/api"
	"warden/ca"
	"warden/door"
	"warden/executor"
	"warden/internal/collector"
	"warden/internal/leaktest"
	"warden/join"
	"warden/manager"
	"warden/tokens"
)

// childEnv is set in the process that runs the nodes.
const childEnv = "WARDEN_BENCH_NODES"

func TestMain(m *testing.M) {
	collector.Tune(context.Background()) // as the daemon does
	if os.Getenv(childEnv) != "" {
		serveNodes(struct {
			io.Reader
			io.WriteCloser
		}{os.Stdin, os.Stdout})
		return
	}
	leaktest.Main(m)
}

// fleet is the process that runs the nodes, as the benchmark sees it.
type fleet struct {
	b      *testing.B
	client *rpc.Client
	ids    []string // of the nodes that joined
}

// newFleet starts the process. It ends with the benchmark.
func newFleet(b *testing.B) *fleet {
	b.Helper()
	cmd := exec.Command(must[string](b)(os.Executable()))
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr
	in, out := must[io.WriteCloser](b)(cmd.StdinPipe()), must[io.ReadCloser](b)(cmd.StdoutPipe())
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	f := &fleet{b: b, client: rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})}
	b.Cleanup(func() {
		f.client.Close() // the child ends when its standard input does
		cmd.Wait()
	})
	return f
}

func (f *fleet) call(method string, args, reply any) {
	f.b.Helper()
	if err := f.client.Call("Nodes."+method, args, reply); err != nil {
		f.b.Fatalf("%s: %v", method, err)
	}
}

// join has so many more nodes join, by so many clients at once, and returns how long it took. open: each opens its session
// once it has joined.
func (f *fleet) join(c *cluster, nodes, clients int, open bool) time.Duration {
	f.b.Helper()
	token := c.mint(api.Role_ROLE_WORKER)
	args := JoinArgs{Addresses: c.addresses(), Nodes: nodes, Clients: clients, Open: open}
	token.Text().Use(func(b []byte) error { args.Token = string(b); return nil })
	var reply JoinReply
	f.call("Join", args, &reply)
	f.ids = append(f.ids, reply.IDs...)
	return reply.Took
}

// open opens the sessions of all nodes that have none and waits until each has its first assignment.
func (f *fleet) open() {
	f.b.Helper()
	f.call("Open", 0, new(int))
}

// cpu returns the CPU time that all nodes have used together.
func (f *fleet) cpu() (used time.Duration) {
	f.b.Helper()
	f.call("CPU", 0, &used)
	return used
}

// Nodes is the service of the child process.
type Nodes struct {
	mu      sync.Mutex // guards all
	all     []*node
	byID    map[string]*node
	changed chan struct{} // closed and replaced by each change of what the waits below ask for
}

// JoinArgs says who joins.
type JoinArgs struct {
	Addresses      []string
	Token          string
	Nodes, Clients int
	Open           bool
}

// JoinReply says who joined.
type JoinReply struct {
	IDs  []string
	Took time.Duration
}

// serveNodes is the child's main.
func serveNodes(conn io.ReadWriteCloser) {
	s := rpc.NewServer()
	s.RegisterName("Nodes", &Nodes{byID: map[string]*node{}, changed: make(chan struct{})})
	s.ServeConn(conn)
}

// node is one simulated node: a real agent over a real connection, with an executor that runs nothing.
type node struct {
	nodes    *Nodes
	id       string
	cert     *tls.Certificate
	root     *x509.Certificate
	zone     string
	managers atomic.Pointer[api.ManagerList]
	agent    *agent.Agent
	opened   atomic.Bool
	conn     atomic.Pointer[stamped]
	evicted  atomic.Int64 // when the order came, as read from the connection

	mu      sync.Mutex // guards the rest
	tasks   map[string]*task
	started map[string]int64 // task ID: when, Unix nanoseconds
	secrets map[string]bool  // SHA-256 sums of the values that tasks got
}

// Join lets nodes join.
func (n *Nodes) Join(args JoinArgs, reply *JoinReply) error {
	token, err := tokens.Parse(args.Token)
	if err != nil {
		return err
	}
	first := len(n.all)
	todo := make(chan int, args.Nodes)
	for i := range args.Nodes {
		todo <- first + i
	}
	close(todo)
	made := make([]*node, args.Nodes)
	errs := make(chan error, args.Clients)
	start := time.Now()
	var wg sync.WaitGroup
	for client := range args.Clients {
		wg.Go(func() {
			for i := range todo {
				x, err := joinOne(args.Addresses[i%len(args.Addresses)], token, i, client)
				if err != nil {
					errs <- err
					return
				}
				x.nodes = n
				made[i-first] = x
				if args.Open {
					x.open()
				}
			}
		})
	}
	wg.Wait()
	reply.Took = time.Since(start)
	select {
	case err := <-errs:
		return err
	default:
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, x := range made {
		n.all = append(n.all, x)
		n.byID[x.id] = x
		reply.IDs = append(reply.IDs, x.id)
	}
	return nil
}

// joinOne joins from a loopback address of the client's own, since a manager bounds what it does for one address.
func joinOne(address string, token tokens.Token, number, client int) (*node, error) {
	key, err := ca.NewKey()
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 80, byte(client/250), byte(client%250+1))}}
	grant, err := join.Join(context.Background(), address, token, join.Request{Key: key, Hostname: fmt.Sprint("w", number)},
		func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) })
	if err != nil {
		return nil, err
	}
	root, err := x509.ParseCertificate(grant.Chain[len(grant.Chain)-1])
	if err != nil {
		return nil, err
	}
	x := &node{id: grant.NodeId, cert: &tls.Certificate{Certificate: grant.Chain, PrivateKey: crypto.Signer(key)}, root: root, zone: grant.Zone,
		tasks: map[string]*task{}, started: map[string]int64{}, secrets: map[string]bool{}}
	x.managers.Store(grant.Managers)
	return x, nil
}

// dials bounds the handshakes at once: all nodes dial from one address here, and a manager takes 128 of one.
var dials = make(chan struct{}, 64)

// open starts the agent. It runs until the process ends.
func (x *node) open() {
	x.agent = agent.New(agent.Config{
		NodeID: x.id, Zone: func() string { return x.zone }, Executor: (*noop)(x), Describe: x.describe, Dial: x.dial,
		Renew:       func() ([]byte, error) { return nil, errors.New("a benchmark renews nothing") },
		Install:     func(*api.InstallRequest) error { return errors.New("a benchmark renews nothing") },
		SetManagers: func(l *api.ManagerList) { x.managers.Store(l); x.opened.Store(true); x.nodes.tell() },
		Evicted: func(*api.EvictRequest) {
			x.evicted.Store(x.conn.Load().last.Load())
			x.nodes.tell()
		},
		Logger: slog.New(slog.DiscardHandler),
	})
	go x.agent.Run(context.Background())
}

func (x *node) describe() *api.NodeDescription { return description() }

func description() *api.NodeDescription {
	return &api.NodeDescription{Hostname: "w", Os: "linux", Arch: "amd64", NanoCpus: 1000e9, MemoryBytes: 1 << 40, Version: "bench", Executor: "noop", SecretMounts: "detached"}
}

func (x *node) dial(ctx context.Context) (net.Conn, string, error) {
	dials <- struct{}{}
	defer func() { <-dials }()
	l := x.managers.Load()
	info := l.Managers[rand.IntN(len(l.Managers))]
	conn, err := door.Dial(ctx, info.Address, warden.DoorNode, x.cert, manager.Expect(x.root, info, l.DistrustedIssuers, false))
	if err != nil {
		return nil, "", err
	}
	s := &stamped{Conn: conn}
	x.conn.Store(s)
	return s, info.NodeId, nil
}

// stamped is a connection that knows when its last byte was read.
type stamped struct {
	net.Conn
	last atomic.Int64 // Unix nanoseconds
}

func (s *stamped) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if n > 0 {
		s.last.Store(time.Now().UnixNano())
	}
	return n, err
}

// tell wakes all waits.
func (n *Nodes) tell() {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.changed)
	n.changed = make(chan struct{})
}

// until waits until ok, which runs under no lock, and returns when it was seen.
func (n *Nodes) until(ok func() bool) (int64, error) {
	late := time.After(2 * time.Minute)
	for {
		n.mu.Lock()
		changed := n.changed
		n.mu.Unlock()
		if ok() {
			return time.Now().UnixNano(), nil
		}
		select {
		case <-changed:
		case <-late:
			return 0, errors.New("waited in vain")
		}
	}
}

// Open opens the sessions that are not yet, and waits until all have their first assignment.
func (n *Nodes) Open(_ int, _ *int) error {
	for _, x := range n.all {
		if x.agent == nil {
			x.open()
		}
	}
	_, err := n.until(func() bool {
		for _, x := range n.all {
			if !x.opened.Load() {
				return false
			}
		}
		return true
	})
	return err
}

// CPU returns the CPU time that the process of the nodes has used.
func (n *Nodes) CPU(_ int, used *time.Duration) error {
	var r syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &r)
	*used = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	return err
}

// Evicted waits until the node was evicted and returns when the last byte that it got was read.
func (n *Nodes) Evicted(id string, at *int64) error {
	x := n.byID[id]
	_, err := n.until(func() bool { return x.evicted.Load() != 0 })
	*at = x.evicted.Load()
	return err
}

// Started waits until the executor of the node was told to start the task and returns when that was.
func (n *Nodes) Started(args [2]string, at *int64) error {
	x := n.byID[args[0]]
	_, err := n.until(func() bool {
		x.mu.Lock()
		defer x.mu.Unlock()
		*at = x.started[args[1]]
		return *at != 0
	})
	return err
}

// Have waits until tasks of so many nodes got a secret's value with this SHA-256 and returns when that was.
func (n *Nodes) Have(args HaveArgs, at *int64) (err error) {
	left := map[*node]bool{}
	for _, x := range n.all {
		left[x] = true
	}
	*at, err = n.until(func() bool {
		for x := range left {
			x.mu.Lock()
			if x.secrets[args.Sum] {
				delete(left, x)
			}
			x.mu.Unlock()
		}
		return len(n.all)-len(left) >= args.Nodes
	})
	return err
}

// HaveArgs are of Have.
type HaveArgs struct {
	Sum   string
	Nodes int
}

// noop is the node as an executor: a task "runs" from its start until it is stopped.
type noop node

func (e *noop) Name() string         { return "noop" }
func (e *noop) SecretMounts() string { return "detached" }

func (e *noop) Start(_ context.Context, s executor.Spec) (executor.Task, error) {
	t := &task{e: e, id: s.TaskID, ended: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, f := range s.Secrets {
		f.Data.Use(func(b []byte) error {
			sum := sha256.Sum256(bytes.TrimSpace(b))
			e.secrets[hex.EncodeToString(sum[:])] = true
			return nil
		})
	}
	e.tasks[t.id], e.started[t.id] = t, time.Now().UnixNano()
	if len(s.Secrets) > 0 || s.Image == watchedImage {
		go e.nodes.tell()
	}
	return t, nil
}

// watchedImage is that of tasks whose start is waited for.
const watchedImage = "watched"

func (e *noop) Adopt(context.Context) ([]executor.Task, error) { return nil, nil }

type task struct {
	e     *noop
	id    string
	once  sync.Once
	ended chan struct{}
}

func (t *task) ID() string { return t.id }

func (t *task) Wait(ctx context.Context) (executor.Exit, error) {
	select {
	case <-t.ended:
		return executor.Exit{Code: 143, Signal: "SIGTERM"}, nil
	case <-ctx.Done():
		return executor.Exit{}, ctx.Err()
	}
}

func (t *task) Stop(context.Context, time.Duration) error {
	t.once.Do(func() { close(t.ended) })
	return nil
}

func (t *task) Logs(context.Context, executor.LogOptions, func(executor.Line) error) error {
	return nil
}

func (t *task) Remove(ctx context.Context) error {
	t.Stop(ctx, 0)
	t.e.mu.Lock()
	defer t.e.mu.Unlock()
	delete(t.e.tasks, t.id)
	delete(t.e.started, t.id)
	return nil
}
