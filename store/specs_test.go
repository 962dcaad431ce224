package store_test

import (
	"bytes"
	"fmt"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// TestTasksOfAServiceShareOneSpec: those with an equal one do, after commands, reports and a restore; what another says is kept.
func TestTasksOfAServiceShareOneSpec(t *testing.T) {
	w := newWorld(t)
	other := storetest.Task(w.web, 9)
	other.Spec.Env = []string{"A=1"}
	w.ok(store.Put(other, 0))
	w.ok(storetest.Report(w.running, api.TaskState_TASK_RUNNING))
	late := storetest.Task(w.web, 10)
	w.ok(store.Put(late, 0), store.Put(storetest.Placed(late, w.worker.Id), 1))
	again := storetest.Task(w.web, 11)
	w.ok(store.Put(again, 0))
	check := func(what string, v *store.View) {
		t.Helper()
		if v.Task(late.Id).Spec != v.Task(again.Id).Spec {
			t.Errorf("%s: equal specs are two", what)
		}
		if a, b := v.Task(other.Id), v.Task(late.Id); a.Spec == b.Spec || !proto.Equal(a.Spec, other.Spec) || !proto.Equal(b.Spec, late.Spec) {
			t.Errorf("%s: specs are %v and %v", what, a.Spec, b.Spec)
		}
		if got := v.Task(w.running.Id); got.Status.State != api.TaskState_TASK_RUNNING || !proto.Equal(got.Spec, w.running.Spec) {
			t.Errorf("%s: a task that was reported is %v", what, got)
		}
	}
	before := w.s.View()
	check("state", before)
	back, err := store.ReadState(bytes.NewReader(w.snapshot()))
	if err != nil {
		t.Fatal(err)
	}
	check("restored", back.View())
	w.ok(put(w.s.View().Task(late.Id), func(t *api.Task) { t.DesiredState = api.TaskState_TASK_SHUTDOWN }))
	check("view of before", before)
}

// TestBoundsCountWhatIsThere: refused commands, removals and restores included.
func TestBoundsCountWhatIsThere(t *testing.T) {
	w := newWorld(t)
	var last *api.Zone
	for i := len(w.s.View().Zones()); i < warden.ZonesMax; i++ {
		if last != nil && i%50 == 0 { // a command that is refused as a whole counts for nothing
			if r := w.apply(store.Put(storetest.Zone("gone"), 0), store.Put(last, 0)); r.Code != string(warden.CodeExists) {
				t.Fatal(r)
			}
		}
		last = storetest.Zone(fmt.Sprintf("z%d", i))
		w.ok(store.Put(last, 0))
	}
	for what, s := range map[string]*store.State{"state": w.s, "restored": restored(t, w.s)} {
		w.s = s
		if r := w.apply(store.Put(storetest.Zone("more"), 0)); r.Code != string(warden.CodeTooLarge) {
			t.Errorf("%s: one zone beyond the bound = %v", what, r)
		}
		w.ok(store.Delete(w.s.View().Zone(last.Name)), store.Put(storetest.Zone("instead"), 0))
		if r := w.apply(store.Put(storetest.Zone("more"), 0)); r.Code != string(warden.CodeTooLarge) {
			t.Errorf("%s: one zone beyond the bound, after another was replaced = %v", what, r)
		}
	}
}

// TestLoadWithinOneCommand: what a command has placed and taken away counts for what it places next.
func TestLoadWithinOneCommand(t *testing.T) {
	w := newWorld(t)
	reserve := func(s *api.Service, slot uint64, cpus int64) *api.Task {
		task := storetest.Task(s, slot)
		task.Spec.Resources = &api.Resources{ReserveNanoCpus: cpus * 1e9}
		return task
	}
	a, b, c := reserve(w.web, 20, 3), reserve(w.web, 21, 1), reserve(w.web, 22, 1)
	place := func(t *api.Task) *api.Operation { return store.Put(storetest.Placed(t, w.worker.Id), 1) }
	w.ok(store.Put(a, 0), store.Put(b, 0), store.Put(c, 0))
	if r := w.apply(place(a), place(b), place(c)); r.Code != string(warden.CodeNoFit) {
		t.Fatalf("5 CPUs on a node of 4 in one command = %v", r)
	}
	w.ok(place(a), place(b))
	ended := storetest.Placed(b, w.worker.Id)
	if r := w.apply(place(c)); r.Code != string(warden.CodeNoFit) {
		t.Fatalf("a fifth CPU on a node of 4 = %v", r)
	}
	w.ok(storetest.Report(ended, api.TaskState_TASK_FAILED), place(c))
}

// TestRepeatedLargeCommands: the result comes again, without versions where there were many.
func TestRepeatedLargeCommands(t *testing.T) {
	w := newWorld(t)
	for _, n := range []int{16, 17} {
		var puts []*api.Operation
		for range n {
			puts = append(puts, store.Put(storetest.Zone(warden.NewID()), 0))
		}
		c := storetest.Command(puts...)
		first, again := w.command(c), w.command(c)
		kept := n
		if n > 16 {
			kept = 0
		}
		if first.Code != "" || len(first.Versions) != n || again.Code != "" || again.Index != first.Index || len(again.Versions) != kept {
			t.Errorf("%d operations = %v, then %v", n, first, again)
		}
	}
}

// TestReportsKeepNewerFields: while managers of two versions run, a field that this one does not know outlives the reports of nodes, else
// the replicas would differ once this one is upgraded.
func TestReportsKeepNewerFields(t *testing.T) {
	w := newWorld(t)
	newer := protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 7)
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.ProtoReflect().SetUnknown(newer) }))
	late := storetest.Task(w.web, 10)
	late.ProtoReflect().SetUnknown(newer)
	w.ok(store.Put(late, 0))
	late = storetest.Placed(late, w.worker.Id)
	w.ok(store.Put(late, 1))
	w.ok(storetest.Report(late, api.TaskState_TASK_RUNNING),
		&api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: w.worker.Id, Ip: "192.0.2.77"}}})
	task, node := w.s.View().Task(late.Id), w.s.View().Node(w.worker.Id)
	if task.Status.State != api.TaskState_TASK_RUNNING || !bytes.Equal(task.ProtoReflect().GetUnknown(), newer) {
		t.Errorf("the task is %v", task)
	}
	if node.Ip != "192.0.2.77" || !bytes.Equal(node.ProtoReflect().GetUnknown(), newer) {
		t.Errorf("the node is %v", node)
	}
}
