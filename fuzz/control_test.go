package fuzz_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/control"
	"warden/secrets"
	"warden/store"
	"warden/store/storetest"
	"warden/tokens"
)

// hidden begins every secret value and key of the cluster that the calls run on: nothing with it may come back.
const hidden = "never-shown-"

// controlled is a leading manager's control server over a store of its own, and what the calls so far say of it. The rest of a manager
// is played by the fuzzer: who is alive, what the orchestrator does, who joins.
type controlled struct {
	t        testing.TB
	in       *tape
	server   *control.Server
	store    *store.Store
	log      bytes.Buffer // calls run one after the other
	live     map[string]bool
	shown    []string          // texts of join tokens
	values   map[string]string // by secret version ID
	gone     map[store.Key]bool
	calls    []*call
	outcomes map[string]int // by method and code
	n        int
}

// call is one call of the API.
type call struct {
	method, id string
	req        proto.Message
	actor      *api.Actor
	forwarded  bool
	reply      proto.Message
	err        error
}

const (
	controlSteps = 24 // of one sequence, at most
	worldSteps   = 8  // kinds of what the rest of a manager does
)

// baseID returns the ID of what is there at the beginning; those of the workers, 5 and 6, have their first characters in common.
func baseID(n int) string { return fmt.Sprintf("%c%024d", "cmnyzww"[n], n) }

// controlBase is the cluster that each sequence begins with: two managers, two workers, a token and two zones. The same each time.
var controlBase = sync.OnceValue(func() (base struct {
	self, cluster string
	keyset        []byte
	objects       []*api.Object
}) {
	ks, err := secrets.NewKeyset()
	if err != nil {
		panic(err)
	}
	if base.keyset, err = ks.Bytes(); err != nil {
		panic(err)
	}
	base.cluster, base.self = baseID(0), baseID(1)
	c := storetest.Cluster(base.cluster)
	c.Keyset, c.SealedIssuingKey, c.SealedRootKey = base.keyset, []byte(hidden+"issuing"), []byte(hidden+"root")
	token := storetest.Token(api.Role_ROLE_WORKER)
	token.Id, token.Key = "000000000001", commandHash(100)
	records := []store.Record{c, token}
	for i, name := range []string{warden.DefaultZone, "pci"} {
		records = append(records, &api.Zone{Id: baseID(3 + i), Name: name})
		manager := storetest.Manager(baseID(1 + i))
		manager.Hostname, manager.WasManager = fmt.Sprint("m", i), true
		worker := storetest.Node(fmt.Sprint("w", i), token)
		worker.Id, worker.Zone = baseID(5+i), name
		records = append(records, manager, worker)
	}
	for _, r := range records {
		base.objects = append(base.objects, store.Wrap(r))
	}
	return base
})

// openLeader returns a store of one manager that will lead soon and holds the base.
func openLeader() (*store.Store, error) {
	base := controlBase()
	_, transport := raft.NewInmemTransport(raft.ServerAddress(base.self))
	snapshots, logs := raft.NewInmemSnapshotStore(), raft.NewInmemStore()
	servers := []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(base.self), Address: raft.ServerAddress(base.self)}}
	sink, err := snapshots.Create(raft.SnapshotVersionMax, 1, 1, raft.Configuration{Servers: servers}, 1, transport)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(store.WriteSnapshot(sink, base.objects...), sink.Close()); err != nil {
		return nil, err
	}
	return store.Open(store.Config{ClusterID: base.cluster, NodeID: base.self, Transport: transport, Heartbeat: 5 * time.Millisecond,
		Stores: &store.Stores{Logs: logs, Stable: logs, Snapshots: snapshots}})
}

// leaders has stores open ahead of their use: an election takes longer than a sequence of calls.
type leaders chan *store.Store

func newLeaders(t testing.TB) leaders {
	l := make(leaders, 4)
	t.Cleanup(func() {
		for range cap(l) {
			(<-l).Close(context.Background())
		}
	})
	for range cap(l) {
		l.open(t)
	}
	return l
}

func (l leaders) open(t testing.TB) {
	s, err := openLeader()
	if err != nil {
		t.Fatal(err)
	}
	l <- s
}

// next returns a store that leads, and opens another.
func (l leaders) next(t testing.TB) *store.Store {
	s := <-l
	l.open(t)
	t.Cleanup(func() { s.Close(context.Background()) })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.WaitLeader(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

// prologue makes a secret for any zone and one for a zone, a service that follows the first and one that pins the second.
func prologue() []*call {
	service := func(name, zone, secret string, version uint64) *call {
		return &call{method: "CreateService", req: &api.CreateServiceRequest{Spec: &api.ServiceSpec{Name: name, Replicas: 1, Task: &api.TaskSpec{
			Image: "host", Zone: zone, Secrets: []*api.SecretReference{{SecretName: secret, Version: version}}}}}}
	}
	return []*call{
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "a", Data: []byte(hidden + "a")}},
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "b", Data: []byte(hidden + "b"), Zones: []string{"pci"}}},
		service("a", "default", "a", 0),
		service("b", "pci", "b", 1),
	}
}

// runControl makes the calls that the data says, and counts what came of them.
func runControl(t testing.TB, s *store.Store, data []byte, outcomes map[string]int) {
	c := &controlled{t: t, in: &tape{data}, store: s, outcomes: outcomes,
		live: map[string]bool{}, values: map[string]string{}, gone: map[store.Key]bool{}}
	base := controlBase()
	c.live[base.self] = true
	c.server = control.New(control.Config{
		NodeID: base.self, ClusterID: base.cluster, Store: c.store, Cluster: c,
		Forward: func(context.Context, *api.ForwardRequest) (*api.ForwardReply, error) {
			return nil, warden.Errorf(warden.CodeInternal, "forwarding", "a leader forwards nothing")
		},
		Address: func(string, string) (string, error) { return "192.0.2.1:2377", nil },
		Logger:  slog.New(slog.NewTextHandler(&c.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	for i, k := range prologue() { // so that the first choices have something to meet
		k.id, k.actor = fmt.Sprint("p", i), &api.Actor{Kind: "uid", Name: "0"}
		if c.do(k); k.err != nil {
			t.Fatal(k.err)
		}
	}
	for c.n = 0; c.n < controlSteps && !c.in.done(); c.n++ {
		c.step()
	}
	c.finish()
}

// What follows is control.Cluster.

func (c *controlled) NodeStates(ids []string) []*api.NodeState {
	var out []*api.NodeState
	for _, id := range ids {
		l := api.Liveness_LIVENESS_DOWN
		if c.live[id] {
			l = api.Liveness_LIVENESS_READY
		}
		out = append(out, &api.NodeState{NodeId: id, Liveness: l, Reachable: c.live[id]})
	}
	return out
}

func (c *controlled) AwaitManagers(context.Context, uint64) []string { return nil }

func (c *controlled) CanRemoveManager(id string) error {
	for _, n := range c.store.View().Managers() {
		if n.Id != id && n.EffectiveRole() == api.Role_ROLE_MANAGER {
			return nil
		}
	}
	return warden.Errorf(warden.CodeNoQuorum, "removing a manager", "it is the last")
}

func (c *controlled) StepDown(context.Context) error {
	return warden.Errorf(warden.CodeNoQuorum, "stepping down", "no other manager takes over")
}

func (c *controlled) RoleLost() <-chan struct{} { return nil }

func (c *controlled) RotateKeys(context.Context, *api.Actor, uint64) (done, todo []string, err error) {
	return []string{"rotated keys"}, nil, nil
}

func (c *controlled) NextIssuing(cl *api.Cluster) error { cl.IssuingGeneration++; return nil }

func (c *controlled) Managers() *api.ManagerList { return &api.ManagerList{} }

func (c *controlled) RelayLogs(context.Context, string, *api.LogsRequest, func(*api.LogChunk) error) error {
	return nil
}

// step makes one call, makes an earlier one again, or does what another part of the manager would.
func (c *controlled) step() {
	what := c.in.pick(len(drawn) + 14)
	switch {
	case what < len(drawn):
		m := drawn[what]
		call := &call{method: m.name, req: m.request(c), id: fmt.Sprint("q", c.n), actor: &api.Actor{Kind: "uid", Name: "0"}}
		switch choice := c.in.pick(32); {
		case choice < 4: // an ID that others have, too
			call.id = fmt.Sprint("r", choice)
		case choice < 8:
			call.forwarded, call.actor.Via = true, baseID(1+choice%2)
		case choice == 8:
			call.actor = &api.Actor{Kind: "node", Name: baseID(5)}
		}
		c.do(call)
		c.calls = append(c.calls, call)
	case what < len(drawn)+2 && len(c.calls) > 0: // the last one at once
		last := c.calls[len(c.calls)-1]
		again := *last
		c.do(&again)
		c.wantSame(last, &again)
	case what < len(drawn)+4 && len(c.calls) > 0: // one of long ago
		again := *c.calls[c.in.pick(len(c.calls))]
		c.do(&again)
	default:
		c.world()
	}
}

// do makes a call and checks what must hold after every one.
func (c *controlled) do(k *call) {
	t := c.t
	before := c.store.View()
	was := records(before)
	old := before.Result(k.id)
	logged := c.log.Len()
	k.reply, k.err = c.send(k)
	after := c.store.View()
	is := records(after)
	code := warden.CodeOf(k.err)
	c.outcomes[k.method+" "+string(code)]++

	said := fmt.Sprintf("%v\n%s\n%s", k.err, warden.HintOf(k.err), c.log.Bytes()[logged:])
	switch code {
	case "":
		c.wantHidden(k, k.reply, before, after)
	case warden.CodeInternal, warden.CodeTimeout, warden.CodeUnavailable, warden.CodeNoLeader, warden.CodeNotLeader, warden.CodeCorrupt,
		warden.CodeClock: // this manager leads and is well
		t.Fatalf("%s(%v) = %v [%s]", k.method, k.req, k.err, code)
	default:
		if !codes()[code] || k.err.Error() == "" {
			t.Fatalf("%s(%v) = %v [%s], which is no code of ours, or says nothing", k.method, k.req, k.err, code)
		}
	}
	if strings.Contains(said, hidden) {
		t.Fatalf("%s says a secret: %s", k.method, said)
	}
	for _, text := range c.shown {
		if strings.Contains(said, text) {
			t.Fatalf("%s says a token: %s", k.method, said)
		}
	}

	changed := diff(was, is)
	if old != nil && old.Code == "" { // the ID has had its effect
		made, _ := k.reply.(*api.CreateTokenReply)
		for key := range changed {
			if key == (store.Key{Kind: api.Kind_KIND_TOKEN, ID: made.GetId()}) && was[key] != nil {
				continue // its text was lost, and a new one is in its place
			}
			t.Fatalf("%s(%v) with the request ID of a call that was done changed %v", k.method, k.req, key)
		}
	}
	if k.err != nil && len(changed) > 0 {
		t.Fatalf("%s(%v) = %v, and changed %v", k.method, k.req, k.err, changed)
	}
	if k.actor.Kind == "node" && code != warden.CodeDenied {
		t.Fatalf("%s by a node = %v, want [denied]", k.method, k.err)
	}
	c.follow(changed, was, is, after)
	if k.forwarded || k.actor.Kind == "node" || old != nil {
		return
	}
	for _, m := range methods {
		if m.name == k.method && m.check != nil {
			if k.err == nil {
				m.check(c, k, before, after)
			} else if want := m.may(before, k.req); want {
				t.Fatalf("%s(%v) = %v, and nothing forbids it", k.method, k.req, k.err)
			}
		}
	}
}

// send makes the call as the local socket does, or as a manager that forwards.
func (c *controlled) send(k *call) (proto.Message, error) {
	ctx := control.WithActor(metadata.NewIncomingContext(c.t.Context(), metadata.Pairs("warden-request-id", k.id)), k.actor)
	for _, m := range api.Control_ServiceDesc.Methods {
		if m.MethodName != k.method {
			continue
		}
		if k.forwarded {
			raw, err := proto.Marshal(k.req)
			if err != nil {
				c.t.Fatal(err)
			}
			out, err := c.server.Run(ctx, "/"+api.Control_ServiceDesc.ServiceName+"/"+k.method, raw, k.actor, k.id)
			if len(bytes.Trim(raw, "\x00")) > 0 {
				c.t.Fatalf("%s left the request in memory", k.method)
			}
			reply := replyOf(k.method)
			if err == nil {
				err = proto.Unmarshal(out, reply)
			}
			return reply, err
		}
		var seen proto.Message
		out, err := m.Handler(c.server, ctx, func(into any) error {
			seen = into.(proto.Message)
			proto.Merge(seen, k.req)
			return nil
		}, c.server.Intercept)
		if d, ok := seen.(interface{ GetData() []byte }); ok && len(bytes.Trim(d.GetData(), "\x00")) > 0 {
			c.t.Fatalf("%s left the value in memory", k.method)
		}
		if err != nil {
			return nil, api.FromError(err)
		}
		return out.(proto.Message), nil
	}
	panic(k.method)
}

func replyOf(method string) proto.Message {
	m, ok := reflect.TypeFor[api.ControlServer]().MethodByName(method)
	if !ok {
		panic(method)
	}
	return reflect.New(m.Type.Out(0).Elem()).Interface().(proto.Message)
}

// wantHidden wants nothing secret of before or after in a reply.
func (c *controlled) wantHidden(k *call, reply proto.Message, views ...*store.View) {
	if made, ok := reply.(*api.CreateTokenReply); ok { // the one reply that has a secret
		if made.Token == "" {
			c.t.Fatalf("%s(%v) shows no token", k.method, k.req)
		}
		c.shown = append(c.shown, made.Token)
		made.Token = ""
	}
	raw, err := proto.Marshal(reply)
	if err != nil {
		c.t.Fatal(err)
	}
	secret := [][]byte{[]byte(hidden), controlBase().keyset}
	for _, v := range views {
		for _, t := range v.Tokens() {
			secret = append(secret, t.Key)
		}
		for _, s := range v.Secrets() {
			for _, sv := range v.SecretVersions(s.Id) {
				secret = append(secret, sv.Ciphertext, sv.WrappedKey)
			}
		}
	}
	for _, text := range c.shown {
		secret = append(secret, []byte(text))
	}
	for _, b := range secret {
		if bytes.Contains(raw, b) {
			c.t.Fatalf("%s(%v) shows what is secret: %v", k.method, k.req, reply)
		}
	}
}

// wantSame wants of a call that was made again at once what it said before.
func (c *controlled) wantSame(first, again *call) {
	type indexed interface{ GetIndex() uint64 }
	type versioned interface{ GetVersion() uint64 }
	if first.err != nil || again.err != nil {
		if warden.CodeOf(first.err) != warden.CodeOf(again.err) {
			c.t.Fatalf("%s(%v) = %v, and made again = %v", first.method, first.req, first.err, again.err)
		}
		return
	}
	if a, ok := first.reply.(indexed); ok && first.method != "List" && a.GetIndex() != again.reply.(indexed).GetIndex() {
		c.t.Fatalf("%s(%v) = %v, and made again = %v", first.method, first.req, first.reply, again.reply)
	}
	if a, ok := first.reply.(versioned); ok && !strings.HasPrefix(first.method, "Remove") && a.GetVersion() != again.reply.(versioned).GetVersion() {
		c.t.Fatalf("%s(%v) = %v, and made again = %v", first.method, first.req, first.reply, again.reply)
	}
}

// follow checks what a change may be: versions only grow, what is gone stays gone, no secret gets out of its zones.
func (c *controlled) follow(changed map[store.Key]bool, was, is map[store.Key]store.Record, v *store.View) {
	t := c.t
	if len(changed) == 0 {
		return
	}
	for key := range changed {
		from, to := was[key], is[key]
		switch {
		case to == nil:
			c.gone[key] = true
			continue
		case c.gone[key] && key.Kind != api.Kind_KIND_EXPOSURE:
			t.Fatalf("%v is back", key)
		case from != nil && key.Kind != api.Kind_KIND_TOKEN && to.GetMeta().GetVersion() <= from.GetMeta().GetVersion():
			t.Fatalf("%v had version %d, and has %d", key, from.GetMeta().GetVersion(), to.GetMeta().GetVersion())
		}
		switch r := to.(type) {
		case *api.Secret:
			if s, ok := from.(*api.Secret); ok && (r.CurrentVersion < s.CurrentVersion || r.Name != s.Name || !slices.Equal(r.Zones, s.Zones)) {
				t.Fatalf("%v became %v", s, r)
			}
		case *api.Exposure:
			if s := v.Secret(r.SecretId); !mayEnter(s, v.Node(r.NodeId).GetZone()) {
				t.Fatalf("%v went to %v", s, v.Node(r.NodeId))
			}
		case *api.Service:
			if s, ok := from.(*api.Service); ok && r.SpecVersion < s.SpecVersion {
				t.Fatalf("%v became %v", s, r)
			}
		}
	}
	for _, s := range v.Services() {
		for _, r := range s.Spec.Task.Secrets {
			if !mayEnter(v.Secret(r.SecretId), s.Spec.Task.Zone) {
				t.Fatalf("service %v has secret %v", s, v.Secret(r.SecretId))
			}
		}
	}
	managers := 0
	for _, n := range v.Nodes() {
		if n.EffectiveRole() == api.Role_ROLE_MANAGER {
			managers++
		}
		if v.Tombstone(n.Id) != nil {
			t.Fatalf("node %s was removed, and is there", n.Id)
		}
	}
	if managers == 0 {
		t.Fatal("no manager is left")
	}
	storetest.CheckLaws(t, v)
}

// finish lists every kind, and opens every secret version: each has the value that it was made with.
func (c *controlled) finish() {
	for kind := range len(api.Kind_name) {
		c.do(&call{method: "List", req: &api.ListRequest{Kind: api.Kind(kind)}, id: fmt.Sprint("list", kind), actor: &api.Actor{Kind: "uid", Name: "0"}})
	}
	v := c.store.View()
	ks, err := secrets.ParseKeyset(v.Cluster().Keyset)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, s := range v.Secrets() {
		for _, sv := range v.SecretVersions(s.Id) {
			opened, err := secrets.OpenVersion(ks, v.Cluster().Id, s.Id, sv.Version, sv.Ciphertext, sv.WrappedKey)
			if err != nil {
				c.t.Fatal(err)
			}
			opened.Use(func(b []byte) error {
				if want, known := c.values[sv.Id]; known && string(b) != want {
					c.t.Fatalf("%s has another value than it was made with", sv.Id)
				}
				return nil
			})
		}
	}
	if s, err := store.ReadState(bytes.NewReader(viewBytes(c.t, v))); err != nil || !bytes.Equal(viewBytes(c.t, s.View()), viewBytes(c.t, v)) {
		c.t.Fatalf("the state is not what its snapshot restores: %v", err)
	}
}

// world does what is not the API's: tasks are made, placed and end, nodes come, go and change their role. The rules of the apply judge it.
func (c *controlled) world() {
	v := c.store.View()
	var ops []*api.Operation
	what := c.in.pick(worldSteps)
	if slices.ContainsFunc(v.Nodes(), func(n *api.Node) bool { return n.Role != n.DesiredRole }) && c.in.pick(2) == 1 {
		what = 7
	}
	switch what {
	case 0, 1: // a task
		if s := pickOf(c.in, v.Services()); s != nil {
			task := storetest.Task(s, uint64(1+c.in.pick(3)))
			task.Id = commandID(1000 + c.n)
			task.Spec = api.Resolve(s.Spec.Task, func(id string) uint64 { return v.Secret(id).GetCurrentVersion() })
			ops = append(ops, store.Put(task, 0))
		}
	case 2, 3: // on a node of its zone, or on any
		task, nodes := pickOf(c.in, v.Tasks()), v.Nodes()
		if what == 2 {
			nodes = slices.DeleteFunc(nodes, func(n *api.Node) bool {
				return n.Zone != task.GetSpec().GetZone() || n.Availability != api.Availability_AVAILABILITY_ACTIVE
			})
		}
		if node := pickOf(c.in, nodes); task != nil && node != nil {
			ops = append(ops, store.Put(storetest.Placed(task, node.Id), task.Meta.Version))
		}
	case 4:
		if task := pickOf(c.in, v.Tasks()); task != nil {
			ops = append(ops, storetest.Report(task, []api.TaskState{api.TaskState_TASK_RUNNING, api.TaskState_TASK_FAILED}[c.in.pick(2)]))
		}
	case 5:
		if n := pickOf(c.in, v.Nodes()); n != nil && n.Id != controlBase().self {
			c.live[n.Id] = !c.live[n.Id]
			c.outcomes["world 5 "]++
		}
	case 6:
		if token := pickOf(c.in, v.Tokens()); token != nil {
			n := storetest.Node(fmt.Sprint("n", c.in.pick(3)), token)
			n.Id = commandID(2000 + c.n)
			ops = storetest.Join(n)
		}
	case 7:
		for _, n := range v.Nodes() {
			if n.Role != n.DesiredRole {
				n = api.Clone(n)
				n.Role = n.DesiredRole
				ops = append(ops, store.Put(n, n.Meta.Version))
			}
		}
	}
	if len(ops) == 0 {
		return
	}
	was := records(v)
	_, err := c.store.Propose(c.t.Context(), &api.Command{Actor: &api.Actor{Kind: "system"}, RequestId: fmt.Sprint("world", c.n), Operations: ops})
	c.outcomes[fmt.Sprintf("world %d %s", what, warden.CodeOf(err))]++
	is := records(c.store.View())
	changed := diff(was, is)
	if err != nil && len(changed) > 0 {
		c.t.Fatalf("refused with %v, and changed %v", err, changed)
	}
	c.follow(changed, was, is, c.store.View())
}

func pickOf[T any](in *tape, list []T) (none T) {
	if len(list) == 0 {
		return none
	}
	return list[in.pick(len(list))]
}

func viewBytes(t testing.TB, v *store.View) []byte {
	var b bytes.Buffer
	if err := v.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tokenOf returns what the text of a token that was shown last says.
func (c *controlled) tokenOf() tokens.Token {
	token, err := tokens.Parse(c.shown[len(c.shown)-1])
	if err != nil {
		c.t.Fatal(err)
	}
	return token
}

// controlSeeds are sequences that reach every method: the same each time, whose bytes mean nothing by themselves.
func controlSeeds() (out [][]byte) {
	for i := range byte(48) {
		b := make([]byte, 300)
		rand.NewChaCha8([32]byte{i}).Read(b)
		out = append(out, b)
	}
	return out
}

// FuzzControl makes a sequence of calls of a leading manager's API, with tasks, joins and failures in between. Whatever they are: an
// error has a code of ours; no reply, error or line of the log says what is secret; what is refused changed nothing; a request ID has
// its effect once; names are unique, versions grow, what is gone stays gone; a version in use is there, and none gets out of its
// zones; what nothing forbids is done.
func FuzzControl(f *testing.F) {
	for _, b := range controlSeeds() {
		f.Add(b)
	}
	ready := newLeaders(f)
	f.Fuzz(func(t *testing.T, data []byte) { runControl(t, ready.next(t), data, map[string]int{}) })
}

// The sequences that FuzzControl begins with have every method done, and what the rest of a manager does; the same each time.
func TestControlSeedsReachEveryMethod(t *testing.T) {
	ready, outcomes := newLeaders(t), map[string]int{}
	for i, b := range controlSeeds() {
		one := map[string]int{}
		runControl(t, ready.next(t), b, one)
		for k, n := range one {
			outcomes[k] += n
		}
		if again := map[string]int{}; i < 8 {
			if runControl(t, ready.next(t), b, again); !maps.Equal(one, again) {
				t.Fatalf("the same bytes gave %v, then %v", one, again)
			}
		}
	}
	for _, m := range api.Control_ServiceDesc.Methods {
		if outcomes[m.MethodName+" "] == 0 {
			t.Errorf("%s was never done: %v", m.MethodName, outcomes)
		}
	}
	for i := range worldSteps {
		if outcomes[fmt.Sprintf("world %d ", i)] == 0 {
			t.Errorf("step %d of the world was never done: %v", i, outcomes)
		}
	}
}
