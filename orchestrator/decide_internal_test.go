package orchestrator

import (
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// A view may be ahead of the changes that were noted: a node that the loop has not heard of yet is not one that was removed.
func TestDecideOnNodesNotNotedYet(t *testing.T) {
	s := storetest.New(t)
	token := storetest.Token(api.Role_ROLE_WORKER)
	storetest.Propose(t, s, storetest.Genesis(warden.NewID(), warden.NewID())...)
	storetest.Propose(t, s, store.Put(token, 0))
	o := New(Config{Store: s, Liveness: func(string) api.Liveness { return api.Liveness_LIVENESS_READY }})
	o.reread(s.View())

	node, web := storetest.Node("late", token), storetest.Service("web", "default")
	web.Spec.Replicas = 1
	storetest.Propose(t, s, append(storetest.Join(node), store.Put(web, 0))...)
	task := storetest.Task(web, 1)
	task.Spec = web.Spec.Task
	storetest.Propose(t, s, store.Put(task, 0))
	storetest.Propose(t, s, store.Put(storetest.Placed(task, node.Id), 1))

	v, todo := s.View(), work{}
	todo.service(web.Id)
	if steps := o.decide(v, v.Time(), todo); len(steps) != 0 {
		t.Fatalf("decided %v", steps)
	}
	n := v.Node(node.Id)
	storetest.Propose(t, s, store.Put(&api.Tombstone{Id: n.Id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone, RemovedNs: time.Now().UnixNano()}, 0))
	v = s.View()
	steps := o.decide(v, v.Time(), todo)
	if len(steps) != 1 || steps[0][0].GetPut().GetObject().GetTask().GetStatus().GetState() != api.TaskState_TASK_ORPHANED {
		t.Fatalf("after the eviction: %v", steps)
	}
}
