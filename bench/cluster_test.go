package bench

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/join"
	"warden/manager"
	"warden/store"
	"warden/tokens"
)

// cluster is managers in this process, started as the daemon starts them.
type cluster struct {
	b        *testing.B
	id       string
	root     *x509.Certificate
	managers []*host
}

// host is one manager.
type host struct {
	id, address string
	cert        *tls.Certificate
	m           *manager.Manager
	stop        func()
}

func must[T any](b *testing.B) func(T, error) T {
	return func(v T, err error) T {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
		return v
	}
}

// freePort returns a loopback address that nobody listens at.
func freePort(b *testing.B) string {
	b.Helper()
	l := must[net.Listener](b)(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return l.Addr().String()
}

// newCluster makes a cluster of so many managers that serve. It ends with the benchmark, or by close.
func newCluster(b *testing.B, managers int) *cluster {
	b.Helper()
	c := &cluster{b: b, id: warden.NewID()}
	now := time.Now()
	record, authority, err := manager.NewClusterRecord(c.id, manager.Maker{Now: now, LeafTTL: warden.LeafTTLDefault})
	if err != nil {
		b.Fatal(err)
	}
	c.root = must[*x509.Certificate](b)(x509.ParseCertificate(record.RootCert))
	first := &host{id: warden.NewID(), address: freePort(b)}
	node := &api.Node{
		Id: first.id, Hostname: "m1", Role: api.Role_ROLE_MANAGER, DesiredRole: api.Role_ROLE_MANAGER, Zone: warden.DefaultZone,
		Availability: api.Availability_AVAILABILITY_DRAIN, Address: first.address, LeafRole: api.Role_ROLE_MANAGER, LeafZone: warden.DefaultZone, LeafGeneration: 1,
	}
	key := must[crypto.Signer](b)(ca.NewKey())
	csr := must[[]byte](b)(ca.NewCSR(key))
	vetted := must[*ca.Vetted](b)(authority.Vet(ca.Request{CSR: csr, NodeID: node.Id, Role: ca.RoleManager, Zone: node.Zone, TTL: warden.LeafTTLDefault}, now))
	node.Leaf = must[[]byte](b)(authority.Issue(vetted))
	hash := must[[32]byte](b)(ca.KeyHash(key.Public()))
	node.KeyHash, node.JoinKeyHash = hash[:], hash[:]
	first.cert = &tls.Certificate{Certificate: authority.Chain(node.Leaf), PrivateKey: key}
	cfg := c.config(first, nil)
	if err := manager.Bootstrap(b.Context(), cfg, command(store.Put(record, 0),
		store.Put(&api.Zone{Id: warden.NewID(), Name: warden.DefaultZone}, 0), store.Put(node, 0))); err != nil {
		b.Fatal(err)
	}
	c.start(first, cfg)
	for range managers - 1 {
		c.addManager()
	}
	return c
}

func (c *cluster) config(h *host, known *api.ManagerList) manager.Config {
	return manager.Config{
		ClusterID: c.id, NodeID: h.id, Dir: c.b.TempDir(), Listen: h.address, Root: c.root, Sealer: must[*autolock.Keyring](c.b)(autolock.NewKeyring()),
		Certificate: func() *tls.Certificate { return h.cert }, Known: func() *api.ManagerList { return known },
		Lock: func() manager.LockStatus { return manager.LockStatus{State: "unlocked"} }, Logger: slog.New(slog.DiscardHandler),
	}
}

func (c *cluster) start(h *host, cfg manager.Config) {
	c.b.Helper()
	h.m = must[*manager.Manager](c.b)(manager.Start(cfg))
	stopped := false
	h.stop = func() {
		if stopped {
			return
		}
		stopped = true
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := h.m.Stop(ctx); err != nil {
			c.b.Errorf("stopping manager %s: %v", h.id, err)
		}
	}
	c.b.Cleanup(h.stop)
	c.managers = append(c.managers, h)
	await(c.b, "the manager is ready", h.m.Ready)
}

// addManager has one more manager join, and waits until it is a voter.
func (c *cluster) addManager() {
	c.b.Helper()
	h := &host{address: freePort(c.b)}
	key := must[crypto.Signer](c.b)(ca.NewKey())
	grant := must[*api.JoinGrant](c.b)(join.Join(c.b.Context(), c.managers[0].address, c.mint(api.Role_ROLE_MANAGER),
		join.Request{Key: key, Hostname: "m" + strconv.Itoa(len(c.managers)+1), Advertise: h.address}, nil))
	h.id, h.cert = grant.NodeId, &tls.Certificate{Certificate: grant.Chain, PrivateKey: key}
	c.start(h, c.config(h, grant.Managers))
	await(c.b, "the manager is a voter", func() bool {
		members, _ := c.leader().m.Store().Configuration()
		for _, m := range members {
			if m.ID == h.id {
				return m.Voter
			}
		}
		return false
	})
}

// close stops all managers.
func (c *cluster) close() {
	for _, h := range c.managers {
		h.stop()
	}
}

func (c *cluster) leader() *host {
	c.b.Helper()
	var found *host
	await(c.b, "one manager leads", func() bool {
		for _, h := range c.managers {
			if h.m.Store().IsLeader() && h.m.Ready() {
				found = h
				return true
			}
		}
		return false
	})
	return found
}

// addresses returns where the managers listen.
func (c *cluster) addresses() (all []string) {
	for _, h := range c.managers {
		all = append(all, h.address)
	}
	return all
}

func command(ops ...*api.Operation) *api.Command {
	return &api.Command{Actor: &api.Actor{Kind: "system", Name: "bench"}, RequestId: warden.NewID(), Operations: ops}
}

func (c *cluster) propose(ops ...*api.Operation) {
	c.b.Helper()
	if _, err := c.leader().m.Store().Propose(c.b.Context(), command(ops...)); err != nil {
		c.b.Fatal(err)
	}
}

// mint commits a join token without a bound on its uses.
func (c *cluster) mint(role api.Role) tokens.Token {
	c.b.Helper()
	t := must[tokens.Token](c.b)(tokens.Mint(sha256.Sum256(c.root.Raw)))
	key := t.Key()
	c.propose(store.Put(&api.Token{Id: t.ID, Role: role, ExpiresNs: time.Now().Add(time.Hour).UnixNano(), Key: key[:], RootHash: t.RootHash[:]}, 0))
	return t
}

// call makes one call of the operator's API on the leader, as root on its local socket would.
func call[Reply any, P interface {
	*Reply
	proto.Message
}](c *cluster, method string, req proto.Message) P {
	c.b.Helper()
	raw := must[[]byte](c.b)(proto.Marshal(req))
	out := must[[]byte](c.b)(c.leader().m.Control().Run(c.b.Context(), method, raw, &api.Actor{Kind: "uid", Name: "0"}, warden.NewID()))
	reply := P(new(Reply))
	if err := proto.Unmarshal(out, reply); err != nil {
		c.b.Fatal(err)
	}
	return reply
}

// awaitReady waits until the leader knows of a live session of each node.
func (c *cluster) awaitReady(ids []string) {
	c.b.Helper()
	m := c.leader().m
	await(c.b, "all sessions are known to the leader", func() bool {
		for _, s := range m.NodeStates(ids) {
			if s.Liveness != api.Liveness_LIVENESS_READY {
				return false
			}
		}
		return true
	})
}

// awaitTasks waits until the predicate holds for the tasks of the service, which it follows by the store's watch: want of
// them are there, and all satisfy ok.
func (c *cluster) awaitTasks(serviceID string, want int, ok func(*api.Task) bool) {
	c.b.Helper()
	s := c.leader().m.Store()
	w := s.Watch(api.Kind_KIND_TASK)
	defer w.Close()
	good, have := map[string]bool{}, map[string]bool{}
	note := func(id string, t *api.Task) {
		delete(good, id)
		delete(have, id)
		if t != nil && t.GetServiceId() == serviceID && t.GetDesiredState() == api.TaskState_TASK_RUNNING {
			have[id] = true
			if ok(t) {
				good[id] = true
			}
		}
	}
	all := func() {
		clear(good)
		clear(have)
		for _, t := range s.View().TasksByService(serviceID) {
			note(t.GetId(), t)
		}
	}
	ctx, cancel := context.WithTimeout(c.b.Context(), 2*time.Minute)
	defer cancel()
	for all(); len(good) != want || len(have) != want; {
		changes, err := w.Next(ctx)
		if err != nil {
			c.b.Fatalf("waiting for tasks: %d of %d, of which %d are there: %v", len(good), want, len(have), err)
		}
		if changes.Resync {
			all()
			continue
		}
		v := s.View()
		for _, k := range changes.Keys {
			note(k.ID, v.Task(k.ID))
		}
	}
}

// awaitGone waits until there is no task.
func (c *cluster) awaitGone() {
	c.b.Helper()
	s := c.leader().m.Store()
	w := s.Watch(api.Kind_KIND_TASK)
	defer w.Close()
	for len(s.View().Tasks()) > 0 {
		if _, err := w.Next(c.b.Context()); err != nil {
			c.b.Fatal(err)
		}
	}
}

func await(b *testing.B, what string, ok func() bool) {
	b.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for stop := time.Now().Add(time.Minute); !ok(); <-tick.C {
		if time.Now().After(stop) {
			b.Fatalf("waited in vain: %s", what)
		}
	}
}

// cpu returns the CPU time that this process has used.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// rss returns this process's resident memory in bytes, now and at its peak since resetPeak.
func rss(b *testing.B) (now, peak float64) { return status(b, "VmRSS:"), status(b, "VmHWM:") }

// status returns a size in this process's status, in bytes.
func status(b *testing.B, name string) float64 {
	b.Helper()
	for line := range strings.Lines(string(must[[]byte](b)(os.ReadFile("/proc/self/status")))) {
		words := strings.Fields(line)
		if len(words) > 1 && words[0] == name {
			return must[float64](b)(strconv.ParseFloat(words[1], 64)) * 1024
		}
	}
	b.Fatal("this kernel does not say " + name)
	return 0
}

// resetPeak gives unused memory back and lets the peak of rss count from here on, where the kernel allows it.
func resetPeak() {
	debug.FreeOSMemory()
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
}

// inUse returns the bytes of heap and stacks in use after a collection.
func inUse() (heap, stack float64) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc), float64(m.StackInuse)
}

const mib = 1 << 20
