package daemon

import (
	"context"
	"crypto"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/executor"
	"warden/internal/testcluster"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// idle is an executor without tasks.
type idle struct{}

func (idle) Name() string         { return "process" }
func (idle) SecretMounts() string { return "detached" }
func (idle) Start(context.Context, executor.Spec) (executor.Task, error) {
	return nil, warden.Errorf(warden.CodeUnsupported, "starting a task", "this test has none")
}
func (idle) Adopt(context.Context) ([]executor.Task, error) { return nil, nil }

// place is where a daemon runs; it may run or not.
type place struct {
	t     testing.TB
	cfg   Config
	local api.LocalClient
	ctl   api.ControlClient
	stop  func() error
}

func newPlace(t testing.TB) *place {
	t.Helper()
	dir := must[string](t)(os.MkdirTemp("", "wd")) // short: paths of sockets are bounded
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &place{t: t, cfg: Config{
		StateDir: filepath.Join(dir, "state"), Listen: testcluster.Address(2377), Socket: filepath.Join(dir, "sock"), Hostname: "h", Version: "test",
		Executor: idle{}, Logger: slog.New(slog.DiscardHandler),
	}}
	return p
}

// run starts the daemon and waits until it answers, or returns why it ended.
func (p *place) run() error {
	p.t.Helper()
	// A client of its own for each run: an earlier one may still hold a connection to the daemon before.
	cc := must[*grpc.ClientConn](p.t)(grpc.NewClient("unix:"+p.cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials())))
	p.t.Cleanup(func() { cc.Close() })
	p.local, p.ctl = api.NewLocalClient(cc), api.NewControlClient(cc)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, p.cfg) }()
	stopped := false
	p.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-ended
	}
	p.t.Cleanup(func() { p.stop() })
	answers := make(chan error, 1)
	local := p.local // p's own is the next run's, once this one has ended
	go func() {
		_, err := local.Info(ctx, &api.InfoRequest{}, grpc.WaitForReady(true))
		answers <- err
	}()
	select {
	case err := <-answers:
		return err
	case err := <-ended:
		stopped = true
		cancel()
		return err
	}
}

func (p *place) start() {
	p.t.Helper()
	if err := p.run(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) info() *api.InfoReply {
	p.t.Helper()
	return must[*api.InfoReply](p.t)(p.local.Info(p.t.Context(), &api.InfoRequest{}))
}

func (p *place) path(name string) string { return filepath.Join(p.cfg.StateDir, name) }

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// pki issues leaves of one cluster.
type pki struct {
	id        string
	authority *ca.Authority
}

func newPKI(t testing.TB, id string) *pki {
	t.Helper()
	root, rootKey, err := ca.NewRoot(id, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	issuing, key, err := ca.NewIssuing(root, rootKey, id, 1, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &pki{id: id, authority: must[*ca.Authority](t)(ca.New(id, root, issuing, key))}
}

func (p *pki) chain(t testing.TB, csr []byte, nodeID, role string) [][]byte {
	t.Helper()
	v := must[*ca.Vetted](t)(p.authority.Vet(ca.Request{CSR: csr, NodeID: nodeID, Role: role, Zone: warden.DefaultZone, TTL: time.Hour}, time.Now()))
	return p.authority.Chain(must[[]byte](t)(p.authority.Issue(v)))
}

// node returns a node's identity as its key file holds it.
func (p *pki) node(t testing.TB, nodeID, role string) autolock.Identity {
	t.Helper()
	key := must[crypto.Signer](t)(ca.NewKey())
	id := autolock.Identity{ClusterID: p.id, NodeID: nodeID, Role: role, Chain: p.chain(t, must[[]byte](t)(ca.NewCSR(key)), nodeID, role)}
	var err error
	if id.Key, err = keyBytes(key); err != nil {
		t.Fatal(err)
	}
	if role == ca.RoleManager {
		id.Keyring = must[*autolock.Keyring](t)(autolock.NewKeyring())
	}
	return id
}
