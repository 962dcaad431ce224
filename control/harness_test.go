package control_test

import (
	"bytes"
	"cmp"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/control"
	"warden/secrets"
	"warden/store"
	"warden/store/storetest"
)

// fake is a control.Cluster whose answers a test sets.
type fake struct {
	lost     chan struct{} // RoleLost
	mu       sync.Mutex    // guards all below
	calls    []string
	liveness map[string]api.Liveness // of nodes; else unknown
	message  map[string]string
	raft     map[string]string // a manager's part
	silent   []string
	stays    error                 // of CanRemoveManager
	goes     func(id string) error // instead of stays
	stepDown func() error
	rotate   func() (done, todo []string, err error)
	issuing  error            // of NextIssuing
	logs     map[string]error // by task ID; a missing one gives one line
	address  func() error     // runs in the midst of a promotion's plan
}

func (f *fake) called(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, what)
}

func (f *fake) NodeStates(ids []string) []*api.NodeState {
	var out []*api.NodeState
	for _, id := range ids {
		l := f.liveness[id]
		out = append(out, &api.NodeState{NodeId: id, Liveness: l, Reachable: l == api.Liveness_LIVENESS_READY, Message: f.message[id], Raft: f.raft[id]})
	}
	return out
}

func (f *fake) AwaitManagers(context.Context, uint64) []string { f.called("await"); return f.silent }

func (f *fake) CanRemoveManager(id string) error {
	if f.goes != nil {
		return f.goes(id)
	}
	return f.stays
}

func (f *fake) RoleLost() <-chan struct{} { return f.lost }

func (f *fake) StepDown(context.Context) error {
	f.called("step down")
	if f.stepDown != nil {
		return f.stepDown()
	}
	return nil
}

func (f *fake) RotateKeys(context.Context, *api.Actor, uint64) (done, todo []string, err error) {
	f.called("rotate")
	if f.rotate != nil {
		return f.rotate()
	}
	return []string{"rotated"}, []string{"root"}, nil
}

func (f *fake) NextIssuing(c *api.Cluster) error {
	f.called("issuing")
	c.IssuingGeneration++
	return cmp.Or(f.issuing, f.stays)
}

func (f *fake) Managers() *api.ManagerList {
	return &api.ManagerList{Managers: []*api.ManagerInfo{{NodeId: "m", Address: "127.0.0.1:2377"}}}
}

func (f *fake) RelayLogs(_ context.Context, nodeID string, r *api.LogsRequest, send func(*api.LogChunk) error) error {
	if err := f.logs[r.TaskId]; err != nil {
		return err
	}
	return send(&api.LogChunk{TaskId: r.TaskId, NodeId: nodeID, Data: []byte("line")})
}

// world is a leading manager's server over a store of its own.
type world struct {
	*control.Server
	store   *store.Store
	cluster *fake
	config  control.Config
	log     *lockedBuffer
	keyset  []byte
	self    string
}

type lockedBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// newWorld returns a world with the zones default and pci, and the records given.
func newWorld(t *testing.T, records ...store.Record) *world {
	t.Helper()
	clusterID, self := warden.NewID(), warden.NewID()
	c := storetest.Cluster(clusterID)
	ks, err := secrets.NewKeyset()
	if err != nil {
		t.Fatal(err)
	}
	if c.Keyset, err = ks.Bytes(); err != nil {
		t.Fatal(err)
	}
	all := append([]store.Record{c, storetest.Zone(warden.DefaultZone), storetest.Zone("pci"), storetest.Manager(self)}, records...)
	var objects []*api.Object
	for _, r := range all {
		objects = append(objects, store.Wrap(r))
	}
	w := &world{store: storetest.Open(t, clusterID, self, objects...), log: &lockedBuffer{}, keyset: c.Keyset, self: self}
	w.cluster = &fake{liveness: map[string]api.Liveness{self: api.Liveness_LIVENESS_READY}, message: map[string]string{}, logs: map[string]error{}}
	w.config = control.Config{
		NodeID: self, ClusterID: clusterID, Store: w.store, Cluster: w.cluster,
		Forward: func(context.Context, *api.ForwardRequest) (*api.ForwardReply, error) {
			return nil, warden.Errorf(warden.CodeInternal, "forwarding", "a leader forwards nothing")
		},
		Address: func(advertise, seen string) (string, error) {
			if w.cluster.address != nil {
				return "10.0.0.9:2377", w.cluster.address()
			}
			return "10.0.0.9:2377", nil
		},
		Logger: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	w.Server = control.New(w.config)
	return w
}

// follower returns the server of a manager that has the records and never leads; what it forwards goes to forward.
func follower(t *testing.T, forward func(context.Context, *api.ForwardRequest) (*api.ForwardReply, error), records ...store.Record) *control.Server {
	t.Helper()
	self := warden.NewID()
	_, transport := raft.NewInmemTransport(raft.ServerAddress(self))
	snapshots, logs := raft.NewInmemSnapshotStore(), raft.NewInmemStore()
	var servers []raft.Server
	for _, id := range []string{self, warden.NewID()} {
		servers = append(servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(id), Address: raft.ServerAddress(id)})
	}
	sink, err := snapshots.Create(raft.SnapshotVersionMax, 1, 1, raft.Configuration{Servers: servers}, 1, transport)
	if err != nil {
		t.Fatal(err)
	}
	var objects []*api.Object
	for _, r := range records {
		objects = append(objects, store.Wrap(r))
	}
	if err := store.WriteSnapshot(sink, objects...); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(store.Config{
		ClusterID: warden.NewID(), NodeID: self, Transport: transport, Stores: &store.Stores{Logs: logs, Stable: logs, Snapshots: snapshots},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Close(ctx)
	})
	return control.New(control.Config{
		NodeID: self, ClusterID: "c", Store: s, Cluster: &fake{}, Forward: forward, Logger: slog.New(slog.DiscardHandler),
		Address: func(string, string) (string, error) { return "", nil },
	})
}

// runOn is a Config.Forward to the world's server.
func (w *world) runOn(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
	reply, err := w.Run(ctx, f.Method, f.Request, f.Caller, f.RequestId)
	if err != nil {
		return nil, api.FromError(api.Error(err)) // as gRPC carries it
	}
	return &api.ForwardReply{Reply: reply}, nil
}

func asRoot(ctx context.Context) context.Context {
	return control.WithActor(ctx, &api.Actor{Kind: "uid", Name: "0", Via: "here"})
}

const service = "/warden.v1.Control/"

// call runs a method as the local socket does, by uid 0.
func call(ctx context.Context, s *control.Server, method string, req proto.Message) (any, error) {
	for _, m := range api.Control_ServiceDesc.Methods {
		if m.MethodName == method {
			reply, err := m.Handler(s, asRoot(ctx), func(into any) error { proto.Merge(into.(proto.Message), req); return nil }, s.Intercept)
			return reply, api.FromError(err)
		}
	}
	return nil, warden.Errorf(warden.CodeUnsupported, "calling", "no method %s", method)
}

// do calls and ends the test where that fails.
func do[R proto.Message](t *testing.T, s *control.Server, method string, req proto.Message) R {
	t.Helper()
	reply, err := call(t.Context(), s, method, req)
	if err != nil {
		t.Fatalf("%s(%v) = %v", method, req, err)
	}
	return reply.(R)
}

func wantError(t *testing.T, what string, err error, code warden.Code, texts ...string) {
	t.Helper()
	if warden.CodeOf(err) != code {
		t.Errorf("%s = %v [%s], want [%s]", what, err, warden.CodeOf(err), code)
		return
	}
	for _, s := range texts {
		if all := err.Error() + "\n" + warden.HintOf(err); !strings.Contains(all, s) {
			t.Errorf("%s = %q, want %q in it", what, all, s)
		}
	}
}

func worker(hostname string) *api.Node {
	return storetest.Node(hostname, storetest.Token(api.Role_ROLE_WORKER))
}

// stream is the server's side of a stream that keeps what is sent.
type stream[T any] struct {
	grpc.ServerStream
	ctx  context.Context
	send func(*T) error
}

func (s *stream[T]) Context() context.Context { return s.ctx }
func (s *stream[T]) Send(m *T) error          { return s.send(m) }
