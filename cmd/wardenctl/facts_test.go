package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	"warden/api"
)

// TestStatusJSON shows what programs rely on: the names and the shape of `status --json`.
func TestStatusJSON(t *testing.T) {
	facts := &api.Facts{
		TimeNs: testNow.UnixNano(), Version: "1.0.0",
		Node: &api.NodeFacts{State: "running", Role: "manager", LockState: "unlocked", UnlockKeyId: "key0000001", DekGeneration: 2, LeafNotAfterNs: testNow.Add(time.Hour).UnixNano(),
			Session: true, SessionSinceNs: before(time.Hour), Tasks: []*api.TaskCount{{State: "running", Count: 2}}, Installs: []*api.RenewalCount{{Result: "ok", Count: 1}}},
		Manager: &api.ManagerFacts{Ready: true, Refusals: []*api.RefusalCount{{Door: "join", Code: "unknown-token", Count: 3}},
			Dispatch: &api.Histogram{Bounds: []float64{.001, 1}, Counts: []uint64{4, 1}, Count: 6, SumSeconds: 2.5},
			Raft:     &api.RaftFacts{Term: 7, Leading: true, LastIndex: 1 << 60}},
		Cluster: &api.ClusterFacts{IssuingGeneration: 1, Unplaced: []*api.ReasonCount{{Reason: "down", Count: 9}}},
	}
	h := &health{info: &api.InfoReply{State: "running", Role: api.Role_ROLE_MANAGER, NodeId: "m1", Hostname: "m1", SessionManager: "m1"},
		cluster: &api.StatusReply{LeaderId: "m1", LeaderHostname: "m1", Managers: 1, ManagersReachable: 1, Unwell: []string{"web: 1 of 2 tasks running"}, Facts: facts}}
	var out bytes.Buffer
	if err := writeObject(&out, h.view(testNow)); err != nil {
		t.Fatal(err)
	}
	golden(t, "status.json", out.Bytes())

	var screen struct {
		State string
		Facts struct {
			Time    time.Time
			Node    struct{ Tasks []struct{ Count int } }
			Manager struct {
				Raft struct{ LastIndex uint64 }
			}
			Leader *struct{}
		}
	}
	if err := json.Unmarshal(out.Bytes(), &screen); err != nil || screen.Facts.Manager.Raft.LastIndex != 1<<60 || !screen.Facts.Time.Equal(testNow) || screen.Facts.Leader != nil {
		t.Errorf("what was printed reads as %+v, %v", screen, err)
	}
	// The facts of Info stand in where there is no manager to ask.
	h.info.Facts, h.cluster = facts, nil
	out.Reset()
	if err := writeObjects(&out, []object{h.view(testNow)}, "{{.Facts.Manager.Raft.Term}} {{(index .Facts.Manager.Refusals 0).Code}} {{.Facts.Leader}}"); err != nil || out.String() != "7 unknown-token <no value>\n" {
		t.Errorf("--format of facts = %q, %v", out.String(), err)
	}
}

// Every field of the facts is shown, under a name of its own.
func TestFactsView(t *testing.T) {
	check := func(d protoreflect.MessageDescriptor, o object) {
		seen := map[string]bool{}
		for _, m := range o {
			if seen[m.Key] || m.Key == "" || strings.ContainsAny(m.Key, "_ ") {
				t.Errorf("%s shows %q", d.Name(), m.Key)
			}
			seen[m.Key] = true
		}
		if len(o) != d.Fields().Len() {
			t.Errorf("%s shows %d of %d fields", d.Name(), len(o), d.Fields().Len())
		}
	}
	f := &api.Facts{Node: &api.NodeFacts{}, Manager: &api.ManagerFacts{Raft: &api.RaftFacts{}}, Cluster: &api.ClusterFacts{}, Leader: &api.LeaderFacts{}}
	for _, m := range []protoreflect.Message{f.ProtoReflect(), f.Node.ProtoReflect(), f.Manager.ProtoReflect(), f.Manager.Raft.ProtoReflect(), f.Cluster.ProtoReflect(), f.Leader.ProtoReflect(),
		(&api.Histogram{}).ProtoReflect(), (&api.ManagerLock{}).ProtoReflect()} {
		check(m.Descriptor(), messageView(m))
	}
	if factsView(nil) != nil {
		t.Error("no facts show as some")
	}
}
