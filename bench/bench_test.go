package bench

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// BenchmarkJoin has nodes join one manager, with 1, 16 and 128 clients: TCP, TLS handshake, proof, CSR, leaf, commit, reply.
// joins/s is with both ends on this machine's cores; ms/join-manager-cpu is what of it the manager's process used. Limit:
// per join the manager makes two signatures (its own in the handshake and the leaf), verifies one, does a key exchange and
// waits for the share of an fsync that it has to itself; with one client the latency of fsync and handshake is the limit.
func BenchmarkJoin(b *testing.B) {
	const batch = 500
	for _, clients := range []int{1, 16, 128} {
		b.Run(fmt.Sprint("clients=", clients), func(b *testing.B) {
			f := newFleet(b)
			c := newCluster(b, 1)
			f.join(c, 50, clients, false) // warm
			joined := 50
			var took, used time.Duration
			n := 0
			for b.Loop() {
				if joined+batch > warden.NodesMax-10 {
					b.StopTimer()
					c.close()
					c, joined = newCluster(b, 1), 0
					b.StartTimer()
				}
				before := cpu(b)
				took += f.join(c, batch, clients, false)
				used += cpu(b) - before
				joined, n = joined+batch, n+batch
			}
			b.ReportMetric(float64(n)/took.Seconds(), "joins/s")
			b.ReportMetric(used.Seconds()*1e3/float64(n), "ms/join-manager-cpu")
		})
	}
}

// BenchmarkJoinToSession takes 1,000 nodes from the token to a live session that the leader knows of, 128 at a time, with one
// manager. Limit: two handshakes of four signatures each per node, on these cores.
func BenchmarkJoinToSession(b *testing.B) {
	const nodes = 1000
	for b.Loop() {
		b.StopTimer()
		f := newFleet(b)
		c := newCluster(b, 1)
		b.StartTimer()
		f.join(c, nodes, 128, true)
		f.open()
		c.awaitReady(f.ids)
		b.StopTimer()
		f.client.Close()
		c.close()
		b.StartTimer()
	}
	b.ReportMetric(float64(nodes)/(b.Elapsed().Seconds()/float64(b.N)), "nodes/s")
}

// service returns a spec of tasks that run until they are stopped.
func service(name string, replicas int, image string, refs ...*api.SecretReference) *api.CreateServiceRequest {
	return &api.CreateServiceRequest{Spec: &api.ServiceSpec{Name: name, Replicas: uint64(replicas), Update: &api.UpdatePolicy{},
		Task: &api.TaskSpec{Image: image, Command: []string{"/bin/sleep", "1000"}, Env: []string{"A=b"}, Zone: warden.DefaultZone, Secrets: refs}}}
}

func running(t *api.Task) bool { return t.GetStatus().GetState() == api.TaskState_TASK_RUNNING }

// BenchmarkCreate creates a service of 10,000 tasks and waits until the store shows all of them running, over 100 and over
// 1,000 nodes, with one manager. MiB-rss is the manager's resident memory then, MiB-peak the most it was on the way. What both
// ends use of CPU, shared by the cores, is how fast it could be where nothing else runs. Limit: each task is committed twice (made
// with its placement, and running), so two sealed log entries of 10,000 records, and sent and acknowledged once.
func BenchmarkCreate(b *testing.B) {
	const tasks = 10_000
	for _, nodes := range []int{100, 1000} {
		b.Run(fmt.Sprintf("tasks=%d/nodes=%d", tasks, nodes), func(b *testing.B) {
			resetPeak()
			f := newFleet(b)
			c := newCluster(b, 1)
			f.join(c, nodes, 64, true)
			f.open()
			c.awaitReady(f.ids)
			resetPeak()
			var now, peak, used, nodesUsed float64
			i := 0
			for b.Loop() {
				i++
				before, nodesBefore := cpu(b), f.cpu()
				reply := call[api.ChangeReply](c, api.Control_CreateService_FullMethodName, service(fmt.Sprint("s", i), tasks, "host"))
				c.awaitTasks(reply.GetId(), tasks, running)
				b.StopTimer()
				used += (cpu(b) - before).Seconds()
				nodesUsed += (f.cpu() - nodesBefore).Seconds()
				n, p := rss(b)
				now, peak = max(now, n), max(peak, p)
				call[api.ChangeReply](c, api.Control_RemoveService_FullMethodName, &api.ReferenceRequest{Reference: fmt.Sprint("s", i)})
				c.awaitGone()
				b.StartTimer()
			}
			b.ReportMetric(used/float64(i), "s-manager-cpu/op")
			b.ReportMetric(nodesUsed/float64(i), "s-nodes-cpu/op")
			b.ReportMetric(now/mib, "MiB-rss")
			b.ReportMetric(peak/mib, "MiB-peak")
		})
	}
}

// BenchmarkSecretRotate rotates a secret that a task on each of 1,000 nodes has; all tasks are replaced at once. ms/everywhere is
// from the call until the last node's new task has the new version, s/op until the store shows all new tasks running; with one
// manager. Limit: per node one set that stops a task, its report, a new task's placement, one set with the value, and its report;
// each slot is committed three times or four on the way.
func BenchmarkSecretRotate(b *testing.B) {
	const nodes = 1000
	f := newFleet(b)
	c := newCluster(b, 1)
	f.join(c, nodes, 64, true)
	f.open()
	c.awaitReady(f.ids)
	value := func(i int) []byte { return fmt.Appendf(nil, "value %d", i) }
	call[api.ChangeReply](c, api.Control_CreateSecret_FullMethodName, &api.CreateSecretRequest{Name: "key", Data: value(0)})
	reply := call[api.ChangeReply](c, api.Control_CreateService_FullMethodName,
		service("s", nodes, "host", &api.SecretReference{SecretName: "key", Target: "key", Mode: 0o400}))
	has := func(version uint64) func(*api.Task) bool {
		return func(t *api.Task) bool { return running(t) && t.GetSpec().GetSecrets()[0].GetVersion() == version }
	}
	c.awaitTasks(reply.GetId(), nodes, has(1))
	var times []float64
	i := 0
	used, nodesUsed := cpu(b), f.cpu()
	for b.Loop() {
		i++
		sum := sha256.Sum256(value(i))
		start := time.Now()
		call[api.RotateSecretReply](c, api.Control_RotateSecret_FullMethodName, &api.RotateSecretRequest{Reference: "key", Data: value(i)})
		var at int64
		f.call("Have", HaveArgs{Sum: hex.EncodeToString(sum[:]), Nodes: nodes}, &at)
		times = append(times, float64(at-start.UnixNano())/1e6)
		c.awaitTasks(reply.GetId(), nodes, has(uint64(i+1)))
	}
	b.ReportMetric(median(times), "ms/everywhere")
	b.ReportMetric((cpu(b)-used).Seconds()/float64(i), "s-manager-cpu/op")
	b.ReportMetric((f.cpu()-nodesUsed).Seconds()/float64(i), "s-nodes-cpu/op")
}

// BenchmarkDispatch places one task on one of 1,000 nodes at a time. ms/start is from the commit of the placement to the
// executor's start on the node; ms/running until the store shows it running. Limit: one set, one acknowledgement and two
// switches of process for the first; one commit with its fsync more for the second.
func BenchmarkDispatch(b *testing.B) {
	f := newFleet(b)
	c := newCluster(b, 1)
	f.join(c, 1000, 64, true)
	f.open()
	c.awaitReady(f.ids)
	reply := call[api.ChangeReply](c, api.Control_CreateService_FullMethodName, service("d", 0, watchedImage))
	s := c.leader().m.Store()
	spec := s.View().Service(reply.GetId())
	var starts, runs []float64
	slot := uint64(0)
	for b.Loop() {
		slot++
		scaled := api.Clone(s.View().Service(spec.GetId()))
		scaled.Spec.Replicas = slot
		t := &api.Task{Id: warden.NewID(), ServiceId: spec.GetId(), ServiceName: "d", Slot: slot, NodeId: f.ids[int(slot)%len(f.ids)],
			DesiredState: api.TaskState_TASK_RUNNING, Status: &api.TaskStatus{State: api.TaskState_TASK_ASSIGNED, TimeNs: 1},
			Spec: spec.GetSpec().GetTask(), SpecVersion: spec.GetSpecVersion()}
		c.propose(store.Put(scaled, scaled.GetMeta().GetVersion()), store.Put(t, 0))
		committed := time.Now()
		c.awaitTasks(spec.GetId(), int(slot), running)
		runs = append(runs, time.Since(committed).Seconds()*1e3)
		var at int64
		f.call("Started", [2]string{t.GetNodeId(), t.GetId()}, &at)
		starts = append(starts, float64(at-committed.UnixNano())/1e6)
	}
	b.ReportMetric(median(starts), "ms/start")
	b.ReportMetric(median(runs), "ms/running")
}

// BenchmarkEvict removes one of 1,000 nodes with sessions over 3 managers at a time. ms/frame is from the commit on the leader
// to the last byte that the node gets, which is of the Evict frame; ms/call counts from before the proposal. Limit: a
// follower learns of the commit by the next append, and the frame crosses one connection.
func BenchmarkEvict(b *testing.B) {
	f := newFleet(b)
	c := newCluster(b, 3)
	f.join(c, 1000, 64, true)
	f.open()
	c.awaitReady(f.ids)
	var frames, calls []float64
	i := 0
	for b.Loop() {
		if i == len(f.ids) {
			b.Fatal("all nodes are gone: use a smaller -benchtime")
		}
		leader := c.leader().m.Store()
		n := leader.View().Node(f.ids[i])
		i++
		start := time.Now()
		c.propose(store.Put(&api.Tombstone{Id: n.Id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone}, 0), store.Delete(n))
		committed := time.Now()
		var at int64
		f.call("Evicted", n.Id, &at)
		frames = append(frames, float64(at-committed.UnixNano())/1e6)
		calls = append(calls, float64(at-start.UnixNano())/1e6)
	}
	b.ReportMetric(median(frames), "ms/frame")
	b.ReportMetric(slices.Max(frames), "ms/frame-max")
	b.ReportMetric(median(calls), "ms/call")
}

// BenchmarkIdleSession opens 1,000 sessions, of nodes whose records are complete, and leaves them alone. KiB/session is what the manager's resident memory grew by, its program's own pages apart,
// KiB/session-inuse what its heap and stacks did after a collection; %core is the CPU that it uses then, less what it used
// without sessions. Limit: a TLS connection and an HTTP/2 client each, and a heartbeat every 3 s: the system calls of one message each way.
func BenchmarkIdleSession(b *testing.B) {
	const nodes, span = 1000, 10 * time.Second
	for b.Loop() {
		f := newFleet(b)
		c := newCluster(b, 1)
		f.join(c, nodes, 64, false)
		var ops []*api.Operation // what a session has its node's record say is not the session's
		for _, id := range f.ids {
			ops = append(ops, &api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: id, Description: description(), Ip: "127.0.0.1"}}})
		}
		c.propose(ops...)
		idle := func() float64 {
			before := cpu(b)
			<-time.After(span)
			return (cpu(b) - before).Seconds() / span.Seconds() * 100
		}
		base := idle()
		heap0, stack0 := inUse()
		resetPeak()
		anon0 := status(b, "RssAnon:")
		f.open()
		c.awaitReady(f.ids)
		<-time.After(3 * warden.HeartbeatPeriod)
		used := idle() - base
		heap1, stack1 := inUse()
		resetPeak()
		anon1 := status(b, "RssAnon:")
		b.ReportMetric((anon1-anon0)/1024/nodes, "KiB/session")
		b.ReportMetric((heap1-heap0)/1024/nodes, "KiB/session-heap")
		b.ReportMetric((stack1-stack0)/1024/nodes, "KiB/session-stack")
		b.ReportMetric(used, "%core")
		f.client.Close()
		c.close()
	}
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}
