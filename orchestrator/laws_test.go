package orchestrator_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// Whatever happens to a cluster, in whatever order, the commands that come of it pass the rules, there is soon nothing more to
// do, and every service has what it wants: replicas tasks, fewer only by those that ended for good, each in its own slot and
// on a node that it may be on.
func TestReconcileLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBed(t)
		secret := storetest.Secret("card", "pci")
		b.apply(store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0))
		nodes, services := 0, 0
		for range rapid.IntRange(5, 40).Draw(t, "steps") {
			view := b.s.View()
			b.now = b.now.Add(rapid.SampledFrom([]time.Duration{0, time.Second, time.Minute, 5 * time.Minute}).Draw(t, "pause"))
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				nodes++
				b.node(fmt.Sprintf("n%d", nodes), rapid.SampledFrom([]*api.Token{b.token, b.pci}).Draw(t, "token"))
			case 1:
				services++
				b.service(fmt.Sprintf("s%d", services), rapid.Uint64Range(0, 4).Draw(t, "replicas"), func(s *api.Service) {
					s.Spec.Task.Restart = rapid.SampledFrom([]api.RestartCondition{1, 2, 3}).Draw(t, "condition")
					s.Spec.Task.RestartAttemptsMax = rapid.Uint32Range(0, 2).Draw(t, "attempts")
					s.Spec.Task.Resources.ReserveNanoCpus = rapid.Int64Range(0, 3).Draw(t, "cpus") * 1e9
					if rapid.Bool().Draw(t, "pci") {
						s.Spec.Task.Zone, s.Spec.Task.Secrets = "pci", []*api.SecretReference{storetest.Reference(secret)}
					}
					if rapid.Bool().Draw(t, "constrained") {
						s.Spec.Task.Constraints = []string{"node.labels.a!=b"}
					}
				})
			case 2:
				if s := pick(t, view.Services()); s != nil {
					b.changeService(s.Id, func(s *api.Service) { s.Spec.Replicas = rapid.Uint64Range(0, 5).Draw(t, "replicas") })
				}
			case 3:
				if s := pick(t, view.Services()); s != nil {
					b.changeService(s.Id, func(s *api.Service) { s.Spec.Task.Env = []string{fmt.Sprintf("A=%d", b.index)} })
				}
			case 4:
				if s := pick(t, view.Services()); s != nil && rapid.IntRange(0, 3).Draw(t, "remove") == 0 {
					b.apply(store.Delete(s))
				}
			case 5:
				if n := pick(t, workers(view)); n != nil {
					b.live[n.Id] = rapid.SampledFrom([]api.Liveness{0, 1, 2}).Draw(t, "liveness")
				}
			case 6:
				if n := pick(t, workers(view)); n != nil {
					b.changeNode(n.Id, func(n *api.Node) {
						n.Availability = rapid.SampledFrom([]api.Availability{1, 1, 2, 3}).Draw(t, "availability")
						n.Zone = rapid.SampledFrom([]string{"default", "pci"}).Draw(t, "zone")
						n.Labels = map[string]string{"a": rapid.SampledFrom([]string{"b", "c"}).Draw(t, "label")}
					})
				}
			case 7:
				if n := pick(t, workers(view)); n != nil && rapid.IntRange(0, 2).Draw(t, "evict") == 0 {
					b.evict(n.Id)
				}
			default:
				if x := pick(t, view.Tasks()); x.Holds() {
					b.report(x, rapid.SampledFrom([]api.TaskState{60, 70, 80, 90, 100, 110}).Draw(t, "state"))
				}
			}
			if rapid.Bool().Draw(t, "act") {
				b.settle()
				check(t, b)
			}
		}
		b.settle()
		check(t, b)
	})
}

func pick[T any](t *rapid.T, from []T) T {
	if len(from) == 0 {
		var none T
		return none
	}
	return from[rapid.IntRange(0, len(from)-1).Draw(t, "which")]
}

func workers(v *store.View) []*api.Node {
	return slices.DeleteFunc(v.Nodes(), func(n *api.Node) bool { return n.Role != api.Role_ROLE_WORKER })
}

func check(t *rapid.T, b *bed) {
	view := b.s.View()
	for _, s := range view.Services() {
		slots, done := map[uint64]bool{}, 0
		for _, x := range view.TasksByService(s.Id) {
			if x.DesiredState != api.TaskState_TASK_RUNNING {
				continue
			}
			if slots[x.Slot] {
				t.Fatalf("service %s: two tasks in slot %d", s.Spec.Name, x.Slot)
			}
			slots[x.Slot] = true
			if x.Status.State.Ended() {
				done++
			}
			if !x.Holds() {
				continue
			}
			n := view.Node(x.NodeId)
			if n == nil || n.Zone != x.Spec.Zone || n.Availability == api.Availability_AVAILABILITY_DRAIN || b.live[n.Id] == api.Liveness_LIVENESS_DOWN ||
				len(x.Spec.Constraints) > 0 && n.Labels["a"] == "b" {
				t.Fatalf("task %v may not be on %v", x, n)
			}
		}
		if len(slots) != int(s.Spec.Replicas) {
			t.Fatalf("service %s: %d slots in use (%d for good), want %d: %s", s.Spec.Name, len(slots), done, s.Spec.Replicas, b.picture(s.Id))
		}
	}
	for _, x := range view.Tasks() {
		if x.NodeId == "" && x.DesiredState != api.TaskState_TASK_RUNNING {
			t.Fatalf("nobody will ever end %v", x)
		}
		if view.Service(x.ServiceId) == nil && x.Status.State.Ended() {
			t.Fatalf("kept of a removed service: %v", x)
		}
	}
}
