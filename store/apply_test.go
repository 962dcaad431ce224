package store_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

func TestApplyIsAllOrNothing(t *testing.T) {
	w := newWorld(t)
	before := w.s.View()
	r := w.apply(store.Put(storetest.Zone("a"), 0), storetest.UseToken(w.workers.Id), store.Put(storetest.Zone("a"), 0))
	if r.Code != string(warden.CodeExists) {
		t.Fatalf("code = %q", r.Code)
	}
	after := w.s.View()
	if after.Zone("a") != nil || after.Token(w.workers.Id).Uses != before.Token(w.workers.Id).Uses {
		t.Fatal("a part of the refused command was applied")
	}
	if after.Index() != before.Index()+1 {
		t.Fatalf("index = %d, want %d", after.Index(), before.Index()+1)
	}
}

func TestMeta(t *testing.T) {
	w := newWorld(t)
	z := storetest.Zone("a")
	z.Meta = &api.Meta{Version: 77, Index: 77, CreatedNs: 77}
	r := w.ok(store.Put(z, 0))
	m := w.s.View().Zone("a").Meta
	if m.Version != 1 || m.Index != r.Index || m.CreatedNs != w.now || m.UpdatedNs != w.now || r.Versions[0] != 1 {
		t.Fatalf("meta = %v", m)
	}
	created := w.s.View().Node(w.worker.Id).Meta.CreatedNs
	r = w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.Labels = map[string]string{"a": "b"} }))
	if m := w.s.View().Node(w.worker.Id).Meta; m.Version != 2 || m.CreatedNs != created || m.UpdatedNs != w.now || r.Versions[0] != 2 {
		t.Fatalf("meta = %v", m)
	}
}

func TestTimeNeverFalls(t *testing.T) {
	w := newWorld(t)
	before := w.s.View().Time()
	c := storetest.Command(store.Put(storetest.Zone("a"), 0))
	c.TimeNs = before - int64(time.Hour)
	if r := w.command(c); r.Code != "" {
		t.Fatal(r.Text)
	}
	if w.s.View().Time() != before || w.s.View().Zone("a").Meta.CreatedNs != before {
		t.Fatalf("time = %d, want %d", w.s.View().Time(), before)
	}
}

func TestRepeatedRequest(t *testing.T) {
	w := newWorld(t)
	for _, c := range []*api.Command{
		storetest.Command(storetest.UseToken(w.workers.Id)),
		storetest.Command(store.Put(storetest.Zone("pci"), 0)), // refused, and stays refused
	} {
		first := w.command(api.Clone(c))
		uses := w.s.View().Token(w.workers.Id).Uses
		again := w.command(api.Clone(c))
		if !proto.Equal(first, again) {
			t.Errorf("a repeated request gave %v, then %v", first, again)
		}
		if got := w.s.View().Token(w.workers.Id).Uses; got != uses {
			t.Errorf("uses = %d, want %d", got, uses)
		}
	}
}

func TestRequestsAreForgottenInOrder(t *testing.T) {
	w := newWorld(t)
	commands := []*api.Command{storetest.Command(), storetest.Command()}
	for _, c := range commands {
		w.command(c)
	}
	for range warden.RequestsKept - 1 {
		w.command(storetest.Command())
	}
	index := w.index
	if r := w.command(commands[1]); r.Index > index {
		t.Error("the newer request is forgotten")
	}
	if r := w.command(commands[0]); r.Index <= index {
		t.Error("the oldest request is remembered beyond the bound")
	}

	// A state that was restored forgets the same.
	twin := *w
	twin.s = restored(t, w.s)
	more := storetest.Command()
	more.TimeNs = w.now
	w.command(more)
	twin.command(more)
	if !bytes.Equal(w.snapshot(), twin.snapshot()) {
		t.Error("a restored state forgets other requests")
	}
}

func TestI12EveryCommandHasAnAuthor(t *testing.T) {
	for name, change := range map[string]func(c *api.Command){
		"no actor":         func(c *api.Command) { c.Actor = nil },
		"unknown actor":    func(c *api.Command) { c.Actor.Kind = "somebody" },
		"no request ID":    func(c *api.Command) { c.RequestId = "" },
		"long request ID":  func(c *api.Command) { c.RequestId = strings.Repeat("x", warden.RequestIDMax+1) },
		"endless operator": func(c *api.Command) { c.Actor.Name = strings.Repeat("x", 300) },
	} {
		w := newWorld(t)
		c := storetest.Command(store.Put(storetest.Zone("a"), 0))
		change(c)
		if r := w.command(c); r.Code != string(warden.CodeInvalid) || w.s.View().Zone("a") != nil {
			t.Errorf("%s: code = %q", name, r.Code)
		}
	}
}

func TestBytesThatAreNoCommand(t *testing.T) {
	w := newWorld(t)
	if r, _ := w.s.Apply(w.index+1, []byte{0xff}); r.Code != string(warden.CodeCorrupt) {
		t.Errorf("code = %q", r.Code)
	}
	if r, _ := w.s.Apply(w.index+2, make([]byte, warden.CommandBytes+1)); r.Code != string(warden.CodeTooLarge) {
		t.Errorf("code = %q", r.Code)
	}
	c := storetest.Command()
	for range warden.CommandOpsMax + 1 {
		c.Operations = append(c.Operations, &api.Operation{})
	}
	if r := w.command(c); r.Code != string(warden.CodeTooLarge) {
		t.Errorf("code = %q", r.Code)
	}
}

func TestTombstoneTakesAllKeys(t *testing.T) {
	w := newWorld(t)
	next := storetest.Hash()
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.NextKeyHash = next }))
	w.ok(store.Put(&api.Tombstone{Id: w.worker.Id, Role: api.Role_ROLE_WORKER, KeyHashes: [][]byte{w.worker.KeyHash}}, 0))
	got := w.s.View().Tombstone(w.worker.Id)
	if len(got.KeyHashes) != 3 || !slices.ContainsFunc(got.KeyHashes, func(h []byte) bool { return bytes.Equal(h, next) }) || got.RemovedNs != w.now {
		t.Fatalf("tombstone = %v", got)
	}
}

func TestLeafTTLChangeIsDated(t *testing.T) {
	w := newWorld(t)
	if got := w.s.View().Cluster().LeafTtlChangedNs; got != 0 {
		t.Fatalf("at init: %d, want 0", got)
	}
	w.ok(put(w.s.View().Cluster(), func(c *api.Cluster) { c.LeafTtlNs = int64(24 * time.Hour) }))
	at := w.now
	w.ok(put(w.s.View().Cluster(), func(c *api.Cluster) { c.LeafTtlChangedNs = 1 }))
	if got := w.s.View().Cluster().LeafTtlChangedNs; got != at {
		t.Fatalf("changed at %d, want %d", got, at)
	}
}

func TestDEKChangeIsDated(t *testing.T) {
	w := newWorld(t)
	w.ok(put(w.s.View().Cluster(), func(c *api.Cluster) { c.DekGeneration++ }))
	at := w.now
	w.ok(put(w.s.View().Cluster(), func(c *api.Cluster) { c.DekChangedNs = 1 }))
	if got := w.s.View().Cluster().DekChangedNs; got != at {
		t.Fatalf("changed at %d, want %d", got, at)
	}
}

func TestSpecVersion(t *testing.T) {
	w := newWorld(t)
	w.ok(put(w.s.View().Service(w.web.Id), func(s *api.Service) { s.Spec.Replicas = 5 }))
	if got := w.s.View().Service(w.web.Id).SpecVersion; got != 1 {
		t.Errorf("after scaling: %d, want 1", got)
	}
	w.ok(put(w.s.View().Service(w.web.Id), func(s *api.Service) { s.Spec.Task.Command, s.SpecVersion = []string{"x"}, 99 }))
	if got := w.s.View().Service(w.web.Id).SpecVersion; got != 2 {
		t.Errorf("after a change of the task: %d, want 2", got)
	}
}

func TestPlacementCountsReservations(t *testing.T) {
	w := newWorld(t)
	s := storetest.Service("big", "default")
	s.Spec.Task.Resources = &api.Resources{ReserveNanoCpus: 3e9, ReserveMemoryBytes: 1 << 30}
	one, two := storetest.Task(s, 1), storetest.Task(s, 2)
	w.ok(store.Put(s, 0), store.Put(one, 0), store.Put(two, 0))
	r := w.apply(store.Put(storetest.Placed(one, w.worker.Id), 1), store.Put(storetest.Placed(two, w.worker.Id), 1))
	if r.Code != string(warden.CodeNoFit) || !strings.Contains(r.Text, "1000000000 of 4000000000 nano CPUs free") {
		t.Fatalf("both: %q [%s]", r.Text, r.Code)
	}
	one = storetest.Placed(one, w.worker.Id)
	w.ok(store.Put(one, 1))
	w.ok(storetest.Report(one, api.TaskState_TASK_COMPLETE))
	w.ok(store.Put(storetest.Placed(two, w.worker.Id), 1))

	// Within one command, too: what ends makes room, what is placed takes it.
	four, five := storetest.Task(s, 4), storetest.Task(s, 5)
	w.ok(store.Put(four, 0), store.Put(five, 0))
	two = storetest.Placed(two, w.worker.Id)
	end := storetest.Report(two, api.TaskState_TASK_COMPLETE)
	if r := w.apply(store.Put(storetest.Placed(four, w.worker.Id), 1), end); r.Code != string(warden.CodeNoFit) {
		t.Fatalf("before the end: [%s]", r.Code)
	}
	ended := storetest.Report(storetest.Placed(four, w.worker.Id), api.TaskState_TASK_FAILED)
	w.ok(end, store.Put(storetest.Placed(four, w.worker.Id), 1), ended, store.Put(storetest.Placed(five, w.worker.Id), 1))

	unknown := storetest.Node("w2", w.workers)
	unknown.Description = nil
	w.ok(storetest.Join(unknown)...)
	three := storetest.Task(s, 3)
	w.ok(store.Put(three, 0))
	if r := w.apply(store.Put(storetest.Placed(three, unknown.Id), 1)); r.Code != string(warden.CodeNoFit) {
		t.Fatalf("on a node that said nothing: [%s]", r.Code)
	}
}

func TestExposureIsDerived(t *testing.T) {
	w := newWorld(t)
	e := w.s.View().ExposuresByNode(w.worker.Id)
	if len(e) != 1 || e[0].SecretName != "open" || e[0].FirstTaskId != w.running.Id || e[0].FirstNs != w.now {
		t.Fatalf("exposures = %v", e)
	}
	firstSeen := w.now
	w.ok(store.Put(storetest.Placed(w.webTask, w.worker.Id), 1))
	e = w.s.View().ExposuresByNode(w.worker.Id)
	if len(e) != 1 || e[0].FirstNs != firstSeen || e[0].LastNs != w.now || e[0].FirstTaskId != w.running.Id || e[0].Meta.Version != 2 {
		t.Fatalf("exposures = %v", e)
	}

	// It outlives the node while the version lives, and the version while the node lives; not both.
	v := w.s.View()
	w.ok(store.Put(&api.Tombstone{Id: w.worker.Id, Role: api.Role_ROLE_WORKER}, 0), store.Delete(v.Node(w.worker.Id)))
	if len(w.s.View().Exposures()) != 1 {
		t.Fatal("the exposure is gone with its node")
	}
	w.ok(store.Delete(w.s.View().Service(w.web.Id)), store.Delete(w.s.View().Task(w.running.Id)), store.Delete(w.s.View().Task(w.webTask.Id)))
	w.ok(store.Delete(w.s.View().Secret(w.open.Id)))
	if v := w.s.View(); len(v.Exposures()) != 0 || len(v.SecretVersions(w.open.Id)) != 0 {
		t.Fatalf("left: %v %v", v.Exposures(), v.SecretVersions(w.open.Id))
	}
}

// The other way round: the version goes first, then the node.
func TestExposureOutlivesItsVersion(t *testing.T) {
	w := newWorld(t)
	w.ok(storetest.Report(w.running, api.TaskState_TASK_COMPLETE), store.Delete(w.s.View().Service(w.web.Id)), store.Delete(w.s.View().Task(w.webTask.Id)))
	w.ok(store.Delete(w.s.View().Secret(w.open.Id)))
	if len(w.s.View().ExposuresByNode(w.worker.Id)) != 1 {
		t.Fatal("the exposure is gone with its version")
	}
	w.ok(store.Put(&api.Tombstone{Id: w.worker.Id, Role: api.Role_ROLE_WORKER}, 0))
	w.ok(store.Delete(w.s.View().Node(w.worker.Id)))
	if len(w.s.View().Exposures()) != 0 {
		t.Fatal("the exposure has outlived both")
	}
}

func TestI6SecretStaysOutOfOtherZones(t *testing.T) {
	w := newWorld(t)
	w.ok(store.Put(storetest.Placed(w.vaultTask, w.pci.Id), 1)) // where it may
	if got := w.s.View().ExposuresByNode(w.pci.Id); len(got) != 1 || got[0].SecretId != w.card.Id {
		t.Fatalf("exposures = %v", got)
	}
	// A task whose spec claims another zone than the secret's is refused at the placement, whoever made it.
	forged := storetest.Task(w.web, 7)
	forged.Spec.Secrets = []*api.SecretReference{storetest.Reference(w.card)}
	w.ok(store.Put(forged, 0))
	if r := w.apply(store.Put(storetest.Placed(forged, w.worker.Id), 1)); r.Code != string(warden.CodeWrongZone) {
		t.Fatalf("placing it = %q [%s]", r.Text, r.Code)
	}
	for _, e := range w.s.View().ExposuresByNode(w.worker.Id) {
		if e.SecretId == w.card.Id {
			t.Fatal("the worker was exposed to the secret")
		}
	}
}

func TestReports(t *testing.T) {
	w := newWorld(t)
	state := func() api.TaskState { return w.s.View().Task(w.running.Id).Status.State }
	other := api.Clone(w.running)
	other.NodeId = w.pci.Id
	steps := []struct {
		name string
		op   *api.Operation
		want api.TaskState
	}{
		{"forward", storetest.Report(w.running, api.TaskState_TASK_RUNNING), api.TaskState_TASK_RUNNING},
		{"late", storetest.Report(w.running, api.TaskState_TASK_STARTING), api.TaskState_TASK_RUNNING},
		{"of another node", storetest.Report(other, api.TaskState_TASK_FAILED), api.TaskState_TASK_RUNNING},
		{"of a task that is gone", storetest.Report(&api.Task{Id: w0, NodeId: w.worker.Id}, api.TaskState_TASK_FAILED), api.TaskState_TASK_RUNNING},
		{"of a task that is not placed", storetest.Report(w.webTask, api.TaskState_TASK_FAILED), api.TaskState_TASK_RUNNING},
		{"unknown", storetest.Report(w.running, 77), api.TaskState_TASK_RUNNING},
		{"end", storetest.Report(w.running, api.TaskState_TASK_FAILED), api.TaskState_TASK_FAILED},
		{"after the end", storetest.Report(w.running, api.TaskState_TASK_ORPHANED), api.TaskState_TASK_FAILED},
	}
	for _, s := range steps {
		w.ok(s.op)
		if got := state(); got != s.want {
			t.Errorf("%s: state = %s, want %s", s.name, got.Word(), s.want.Word())
		}
	}
	if got := w.s.View().Task(w.webTask.Id).Status.State; got != api.TaskState_TASK_PENDING {
		t.Errorf("the task that is not placed is %s", got.Word())
	}
	fresh := storetest.Placed(w.webTask, w.worker.Id)
	w.ok(store.Put(fresh, 1), storetest.Report(fresh, api.TaskState_TASK_RUNNING))
	version := w.s.View().Task(fresh.Id).Meta.Version
	w.ok(storetest.Report(fresh, api.TaskState_TASK_RUNNING))
	if got := w.s.View().Task(fresh.Id).Meta.Version; got != version || len(w.lastKeys) != 0 {
		t.Errorf("a report without news made version %d of %d", got, version)
	}
}

func TestReportsAreClipped(t *testing.T) {
	w := newWorld(t)
	r := storetest.Report(w.running, api.TaskState_TASK_FAILED)
	r.GetReportTask().Status.Error = strings.Repeat("é", 4000)
	w.ok(r)
	if got := w.s.View().Task(w.running.Id).Status.Error; len(got) != 1024 || strings.Trim(got, "é") != "" {
		t.Fatalf("%d bytes", len(got))
	}
}

func TestEvictedNodeReportsNothing(t *testing.T) {
	w := newWorld(t)
	w.ok(store.Put(&api.Tombstone{Id: w.worker.Id, Role: api.Role_ROLE_WORKER}, 0))
	before := w.s.View().Node(w.worker.Id).Meta.Version
	w.ok(storetest.Report(w.running, api.TaskState_TASK_RUNNING),
		&api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: w.worker.Id, Ip: "10.0.0.9"}}})
	if v := w.s.View(); v.Task(w.running.Id).Status.State != api.TaskState_TASK_ASSIGNED || v.Node(w.worker.Id).Meta.Version != before {
		t.Fatal("the evicted node was heard")
	}
}

func TestDescribeNode(t *testing.T) {
	w := newWorld(t)
	describe := func(d *api.NodeDescription, ip string) {
		w.ok(&api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: w.worker.Id, Description: d, Ip: ip}}})
	}
	describe(&api.NodeDescription{Hostname: "w1", NanoCpus: 1e9}, "10.0.0.1")
	n := w.s.View().Node(w.worker.Id)
	if n.Description.NanoCpus != 1e9 || n.Ip != "10.0.0.1" || n.Meta.Version != 2 {
		t.Fatalf("node = %v", n)
	}
	describe(nil, "")
	describe(&api.NodeDescription{NanoCpus: -1}, "10.0.0.2")
	describe(&api.NodeDescription{Version: strings.Repeat("x", 1000)}, "10.0.0.2")
	if again := w.s.View().Node(w.worker.Id); !proto.Equal(again, n) {
		t.Fatalf("node = %v, want %v", again, n)
	}
}

func TestZoneInUseNamesItsUsers(t *testing.T) {
	w := newWorld(t)
	r := w.apply(store.Delete(w.s.View().Zone("pci")))
	for _, want := range []string{"node p1", "service vault", "secret card"} {
		if !strings.Contains(r.Text, want) {
			t.Errorf("text %q lacks %q", r.Text, want)
		}
	}
}

func TestResolve(t *testing.T) {
	w := newWorld(t)
	twin := storetest.Node("w1", w.workers)
	w.ok(storetest.Join(twin)...)
	v := w.s.View()
	for _, c := range []struct {
		kind api.Kind
		ref  string
		id   string
		want warden.Code
	}{
		{api.Kind_KIND_SERVICE, "web", w.web.Id, ""},
		{api.Kind_KIND_SERVICE, w.web.Id, w.web.Id, ""},
		{api.Kind_KIND_SERVICE, w.web.Id[:12], w.web.Id, ""},
		{api.Kind_KIND_SERVICE, w.web.Id[:warden.IDPrefixMin], w.web.Id, ""},
		{api.Kind_KIND_SERVICE, w.web.Id[:warden.IDPrefixMin-1], "", warden.CodeNotFound},
		{api.Kind_KIND_NODE, "p1", w.pci.Id, ""},
		{api.Kind_KIND_NODE, "w1", "", warden.CodeAmbiguous},
		{api.Kind_KIND_SECRET, "card", w.card.Id, ""},
		{api.Kind_KIND_SECRET, "car", "", warden.CodeNotFound},
		{api.Kind_KIND_TOKEN, w.workers.Id, w.workers.Id, ""},
		{api.Kind_KIND_SERVICE, "", "", warden.CodeInvalid},
		{api.Kind_KIND_UNSPECIFIED, "x", "", warden.CodeInvalid},
		{api.Kind_KIND_SERVICE, "web\x00", "", warden.CodeNotFound},
	} {
		id, err := v.Resolve(c.kind, c.ref)
		if id != c.id || warden.CodeOf(err) != c.want {
			t.Errorf("Resolve(%v, %q) = %q, %v; want %q [%s]", c.kind, c.ref, id, err, c.id, c.want)
		}
	}
}

func TestViewsAreSortedAndImmutable(t *testing.T) {
	w := newWorld(t)
	for i := range uint64(11) {
		w.rotate(w.open, storetest.SecretVersion(w.open, i+3))
	}
	v := w.s.View()
	for i, sv := range v.SecretVersions(w.open.Id) {
		if sv.Version != uint64(i+1) {
			t.Fatalf("version %d at %d", sv.Version, i)
		}
	}
	tasks := len(v.Tasks())
	w.ok(store.Delete(v.Task(w.webTask.Id)))
	if len(v.Tasks()) != tasks || v.Task(w.webTask.Id) == nil || w.s.View().Task(w.webTask.Id) != nil {
		t.Fatal("the old view changed, or the new one did not")
	}
	ids := func(tasks []*api.Task) (out []string) {
		for _, t := range tasks {
			out = append(out, t.Id)
		}
		return out
	}
	if got := ids(v.TasksByService(w.web.Id)); len(got) != 2 || !slices.IsSorted(got) {
		t.Fatalf("tasks by service = %v", got)
	}
	if got := ids(v.TasksByNode(w.worker.Id)); len(got) != 1 || got[0] != w.running.Id {
		t.Fatalf("tasks by node = %v", got)
	}
	if o := v.Object(api.Kind_KIND_TASK, w.webTask.Id); o.GetTask().GetId() != w.webTask.Id || v.Object(99, "x") != nil {
		t.Fatal("Object gives another one")
	}
}

func TestRestoreRefusesDamage(t *testing.T) {
	good := newWorld(t).snapshot()
	if _, err := store.ReadState(bytes.NewReader(good)); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(good); i += 7 {
		if _, err := store.ReadState(bytes.NewReader(good[:i])); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Fatalf("cut at %d of %d: %v", i, len(good), err)
		}
	}
	if _, err := store.ReadState(bytes.NewReader(append(slices.Clone(good), 0))); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Fatalf("with a byte more: %v", err)
	}
	zone := store.Wrap(storetest.Zone("z"))
	if err := store.WriteSnapshot(&bytes.Buffer{}, zone, zone); err == nil {
		t.Fatal("the same object twice is accepted")
	}
}

func TestNoun(t *testing.T) {
	if got := fmt.Sprint(store.Noun(api.Kind_KIND_SECRET_VERSION), "/", store.Noun(api.Kind_KIND_NODE)); got != "secret version/node" {
		t.Fatal(got)
	}
}

// What a manager sent before its eviction and the log has after it changes nothing.
func TestI4NothingViaAnEvictedManager(t *testing.T) {
	w := newWorld(t)
	token := storetest.Token(api.Role_ROLE_MANAGER)
	w.ok(store.Put(token, 0))
	n := storetest.Node("m2", token)
	w.ok(storetest.Join(n)...)
	via := func() *api.Command {
		c := storetest.Command(store.Put(storetest.Zone(warden.NewID()), 0))
		c.Actor = &api.Actor{Kind: "uid", Name: "0", Via: n.Id}
		return c
	}
	if r := w.command(via()); r.Code != "" {
		t.Fatalf("via a manager: %s", r.Text)
	}
	w.ok(store.Put(&api.Tombstone{Id: n.Id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone}, 0), store.Delete(w.s.View().Node(n.Id)))
	zones := len(w.s.View().Zones())
	if r := w.command(via()); r.Code != string(warden.CodeEvicted) || len(w.s.View().Zones()) != zones {
		t.Errorf("via an evicted manager: code %q, %d zones, want %q and %d", r.Code, len(w.s.View().Zones()), warden.CodeEvicted, zones)
	}
}
