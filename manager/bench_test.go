package manager

import (
	"bufio"
	"context"
	"crypto"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
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
	"warden/internal/leaktest"
	"warden/join"
	"warden/store"
	"warden/tokens"
)

// The clients of these benchmarks run in a process of their own: this test binary again, told so by benchChild, with its
// orders on standard input. So the processor time of this process is the manager's alone.
const benchChild = "WARDEN_BENCH_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(benchChild) != "" {
		if err := benchClients(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "clients:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	leaktest.Main(m)
}

// order is what the clients are to do; the answer is a report, when it is done.
type order struct {
	Do              string // "join" and leave, "sessions": join and stay, "renewed": wait until each session is a new one
	Address, Token  string
	Clients, Number int
}

type report struct {
	Error   string
	Seconds float64
	CPU     float64 // seconds
	Retries int64   // joins that were tried again
}

// clients drives the other process.
type clients struct {
	b   *testing.B
	in  *json.Encoder
	out *json.Decoder
	end func() // ends the process and waits
}

func newClients(b *testing.B) *clients {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), benchChild+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	end := sync.OnceFunc(func() {
		in.Close()
		cmd.Wait()
	})
	b.Cleanup(end)
	return &clients{b: b, in: json.NewEncoder(in), out: json.NewDecoder(bufio.NewReader(out)), end: end}
}

func (c *clients) do(o order) report {
	c.b.Helper()
	if err := c.in.Encode(o); err != nil {
		c.b.Fatal(err)
	}
	var r report
	if err := c.out.Decode(&r); err != nil {
		c.b.Fatal(err)
	}
	if r.Error != "" {
		c.b.Fatal(r.Error)
	}
	return r
}

// cpu returns the processor time that this process has used, in seconds.
func cpu() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func benchClients(in io.Reader, out io.Writer) error {
	orders, reports := json.NewDecoder(in), json.NewEncoder(out)
	var fleet fleet
	defer fleet.stop()
	for {
		var o order
		if err := orders.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		start, before := time.Now(), cpu()
		r := report{}
		var err error
		switch o.Do {
		case "join":
			r.Retries, err = fleet.join(o, nil)
		case "sessions":
			r.Retries, err = fleet.sessions(o)
		case "renewed":
			err = fleet.renewed(o.Number)
		default:
			err = errors.New("unknown order " + o.Do)
		}
		if err != nil {
			r.Error = err.Error()
		}
		r.Seconds, r.CPU = time.Since(start).Seconds(), cpu()-before
		if err := reports.Encode(r); err != nil {
			return err
		}
	}
}

// fleet is the nodes of the other process.
type fleet struct {
	ctx       context.Context
	cancel    context.CancelFunc
	wg        sync.WaitGroup
	described atomic.Int64 // sessions that the manager has asked what they are
	installed atomic.Int64 // leaves
	renewals  atomic.Int64 // sessions that were opened with a renewed leaf, and asked
}

func (f *fleet) stop() {
	if f.cancel != nil {
		f.cancel()
		f.wg.Wait()
	}
}

// join joins o.Number nodes, o.Clients at a time. A join that is refused for now is repeated with the same key, as a daemon does.
func (f *fleet) join(o order, then func(key crypto.Signer, grant *api.JoinGrant)) (retries int64, err error) {
	token, err := tokens.Parse(o.Token)
	if err != nil {
		return 0, err
	}
	var next, again atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range o.Clients {
		wg.Go(func() {
			for next.Add(1) <= int64(o.Number) && failed.Load() == nil {
				key, err := ca.NewKey()
				if err != nil {
					failed.Store(&err)
					return
				}
				for {
					grant, err := join.Join(context.Background(), o.Address, token, join.Request{Key: key, Hostname: "node", Version: "bench"}, nil)
					if err == nil {
						if then != nil {
							then(key, grant)
						}
						break
					}
					if !api.Transient(err) && warden.CodeOf(err) != warden.CodeLimited {
						failed.Store(&err)
						return
					}
					again.Add(1)
					time.Sleep(200 * time.Millisecond)
				}
			}
		})
	}
	wg.Wait()
	if e := failed.Load(); e != nil {
		err = *e
	}
	return again.Load(), err
}

// sessions joins the nodes and keeps an agent for each, and returns when the manager has asked each what it is.
func (f *fleet) sessions(o order) (retries int64, err error) {
	f.ctx, f.cancel = context.WithCancel(context.Background())
	retries, err = f.join(o, func(key crypto.Signer, grant *api.JoinGrant) {
		n := &benchNode{f: f, id: grant.NodeId, address: o.Address}
		if err := n.set(key, grant.Chain, grant.Managers); err != nil {
			panic(err) // the joiner has verified this chain
		}
		a := agent.New(agent.Config{
			NodeID: n.id, Zone: n.leafZone, Executor: idle{}, Describe: n.describe, Dial: n.dial,
			Renew: n.renew, Install: n.install, SetManagers: func(*api.ManagerList) {}, Evicted: func(*api.EvictRequest) {},
			Logger: slog.New(slog.DiscardHandler),
		})
		f.wg.Go(func() { a.Run(f.ctx) })
	})
	if err != nil {
		return retries, err
	}
	return retries, f.await(&f.described, o.Number)
}

func (f *fleet) renewed(number int) error { return f.await(&f.renewals, number) }

func (f *fleet) await(n *atomic.Int64, want int) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for stop := time.Now().Add(2 * time.Minute); n.Load() < int64(want); <-tick.C {
		if time.Now().After(stop) {
			return fmt.Errorf("%d of %d sessions after two minutes (%d leaves installed)", n.Load(), want, f.installed.Load())
		}
	}
	return nil
}

// benchNode is one node: an identity and an agent.
type benchNode struct {
	f       *fleet
	id      string
	address string
	expect  door.Expect // the manager; as the nodes of a daemon do, by ID and key

	mu      sync.Mutex // guards all below
	cert    *tls.Certificate
	zone    string
	pending crypto.Signer
	asked   bool // since the leaf was installed
	renewed bool
}

func (n *benchNode) set(key crypto.Signer, chain [][]byte, managers *api.ManagerList) error {
	certs, err := ca.ParseChain(chain)
	if err != nil {
		return err
	}
	id, err := ca.Read(certs[0])
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cert, n.zone, n.asked = &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: certs[0]}, id.Zone, false
	n.expect = Expect(certs[len(certs)-1], managers.Managers[0], managers.DistrustedIssuers, false)
	return nil
}

func (n *benchNode) leafZone() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.zone
}

func (n *benchNode) describe() *api.NodeDescription {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.asked {
		n.asked = true
		n.f.described.Add(1)
		if n.renewed {
			n.f.renewals.Add(1)
		}
	}
	return &api.NodeDescription{Hostname: "node", Os: "linux", Arch: "amd64", NanoCpus: 2e9, MemoryBytes: 4 << 30}
}

func (n *benchNode) dial(ctx context.Context) (net.Conn, string, error) {
	n.mu.Lock()
	cert, want := n.cert, n.expect
	n.mu.Unlock()
	conn, err := door.Dial(ctx, n.address, warden.DoorNode, cert, want)
	if err != nil {
		return nil, "", err
	}
	return conn, want.NodeID, nil
}

func (n *benchNode) renew() ([]byte, error) {
	key, err := ca.NewKey()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.pending = key
	n.mu.Unlock()
	return ca.NewCSR(key)
}

func (n *benchNode) install(r *api.InstallRequest) error {
	n.mu.Lock()
	key := n.pending
	n.renewed = true
	n.mu.Unlock()
	n.f.installed.Add(1)
	return n.set(key, r.Chain, r.Managers)
}

// idle runs nothing.
type idle struct{}

func (idle) Name() string         { return "idle" }
func (idle) SecretMounts() string { return "" }
func (idle) Start(context.Context, executor.Spec) (executor.Task, error) {
	return nil, errors.New("this node runs nothing")
}
func (idle) Adopt(context.Context) ([]executor.Task, error) { return nil, nil }

// benchToken mints a token for workers, as text for the clients' standard input.
func (c *cluster) benchToken() string {
	var text string
	c.mint(api.Role_ROLE_WORKER, nil).Text().Use(func(b []byte) error { text = string(b); return nil })
	return text
}

// moveAll moves all nodes that joined to a zone; what they say of themselves may be committed at the same time.
func (c *cluster) moveAll(zone string) {
	for {
		var ops []*api.Operation
		for _, n := range c.first.m.store.View().Nodes() {
			if n.TokenId != "" && n.Zone != zone {
				next := api.Clone(n)
				next.Zone = zone
				ops = append(ops, store.Put(next, n.Meta.Version))
			}
		}
		if len(ops) == 0 {
			return
		}
		for _, batch := range batches(ops) {
			_, err := c.first.m.propose(c.t.Context(), command(&api.Actor{Kind: "uid", Name: "0"}, batch...))
			if err != nil && warden.CodeOf(err) != warden.CodeConflict {
				c.t.Fatal(err)
			}
		}
	}
}

// benchFill is how many nodes a cluster of a benchmark has at most: the bound is warden.NodesMax.
const benchFill = 4000

// A join through the door of a real manager on loopback: handshake, request, commit to the sealed log on disk, grant.
//
// One join must pay, in primitives (S: P-256 signature, V: P-256 verification, E: X25519 key pair or secret, and ML-KEM-768):
//
//	manager  2 E + encapsulation + S (handshake) + V (CSR) + S + V (leaf, and crypto/x509's check of the signature) + its share of an fsync
//	joiner   a P-256 key + S + V (CSR, the same check) + 2 E + ML-KEM key pair and decapsulation + V (handshake) + V (manager's leaf) + V (own leaf)
//
// A joiner in a process of its own pays one V more, for the issuing CA, which this one fleet verifies once.
//
// On an AMD EPYC core S is 32 µs, V 71, E 45, ML-KEM-768 60 each: the manager's part is 360 µs and its share of an fsync, the
// joiner's 550. What the manager uses beyond that, per join at 128 clients: GC 100, DER and parsing of CSR and leaf 90,
// system calls 80, TLS records and key schedule 80, the apply 50, raft and bbolt 60, protobuf, MACs and look-ups 80.
func BenchmarkJoin(b *testing.B) {
	for _, n := range []int{1, 16, 128} {
		b.Run(fmt.Sprintf("%dclients", n), func(b *testing.B) {
			fleet := newClients(b)
			var wall, own, theirs float64
			var retries int64
			for left := b.N; left > 0; {
				b.StopTimer()
				c := newCluster(b)
				token := c.benchToken()
				batch := min(left, benchFill)
				before := cpu()
				b.StartTimer()
				r := fleet.do(order{Do: "join", Address: c.first.address, Token: token, Clients: n, Number: batch})
				b.StopTimer()
				own += cpu() - before
				wall, theirs, retries = wall+r.Seconds, theirs+r.CPU, retries+r.Retries
				left -= batch
				c.first.stop()
				b.StartTimer()
			}
			b.ReportMetric(float64(b.N)/wall, "joins/s")
			b.ReportMetric(own*1e6/float64(b.N), "manager-µs/join")
			b.ReportMetric(theirs*1e6/float64(b.N), "joiner-µs/join")
			b.ReportMetric(float64(retries)/float64(b.N), "retries/join")
		})
	}
}

// 1,000 nodes from the token to a session in which the manager has asked them what they are; then all their leaves renewed
// at once, since their zone changed, until each has a session with the new one.
func BenchmarkNodes(b *testing.B) {
	const nodes = 1000
	var joined, renewed, joinCPU, renewCPU float64
	var retries int64
	for b.Loop() {
		b.StopTimer()
		c, fleet := newCluster(b), newClients(b)
		c.propose(store.Put(&api.Zone{Id: warden.NewID(), Name: "other"}, 0))
		token := c.benchToken()
		b.StartTimer()

		before := cpu()
		r := fleet.do(order{Do: "sessions", Address: c.first.address, Token: token, Clients: nodes, Number: nodes})
		joined, joinCPU, retries = joined+r.Seconds, joinCPU+cpu()-before, retries+r.Retries

		before = cpu()
		start := time.Now()
		c.moveAll("other")
		fleet.do(order{Do: "renewed", Number: nodes})
		renewed, renewCPU = renewed+time.Since(start).Seconds(), renewCPU+cpu()-before

		b.StopTimer()
		fleet.end()
		c.first.stop()
		b.StartTimer()
	}
	n := float64(b.N)
	b.ReportMetric(joined/n, "s-to-sessions")
	b.ReportMetric(joinCPU*1e6/nodes/n, "manager-µs/node")
	b.ReportMetric(renewed/n, "s-to-renewed")
	b.ReportMetric(renewCPU*1e6/nodes/n, "manager-µs/renewal")
	b.ReportMetric(float64(retries)/nodes/n, "retries/node")
}
