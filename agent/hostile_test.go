package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"warden"
	"warden/agent"
	"warden/api"
)

var self = strings.Repeat("n", warden.IDLength)

// host is an agent whose manager is the test: each dial gives a client.
type host struct {
	*agent.Agent
	t       *testing.T
	exec    *fakeExecutor
	clients chan api.SessionClient
	refuse  bool // dials fail

	mu      sync.Mutex // guards the fields below
	dials   []time.Time
	evicted []*api.EvictRequest
}

// dialled returns when the agent has dialled.
func (h *host) dialled() []time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.dials)
}

func newHost(t *testing.T) *host {
	h := &host{t: t, exec: newFakeExecutor(), clients: make(chan api.SessionClient, 100)}
	h.Agent = agent.New(agent.Config{
		NodeID: self, Zone: func() string { return "default" }, Executor: h.exec, Logger: slog.New(slog.DiscardHandler),
		Describe: func() *api.NodeDescription { return &api.NodeDescription{Hostname: "h"} },
		Dial:     h.dial,
		Renew:    func() ([]byte, error) { return []byte("csr"), nil },
		Install: func(r *api.InstallRequest) error {
			if len(r.Chain) == 0 {
				return errors.New("bad chain")
			}
			return nil
		},
		SetManagers: func(*api.ManagerList) {},
		Evicted:     func(r *api.EvictRequest) { h.mu.Lock(); defer h.mu.Unlock(); h.evicted = append(h.evicted, r) },
	})
	return h
}

func (h *host) dial(context.Context) (net.Conn, string, error) {
	h.mu.Lock()
	h.dials = append(h.dials, time.Now())
	h.mu.Unlock()
	if h.refuse {
		return nil, "", errors.New("refused")
	}
	near, far := net.Pipe()
	once := make(chan net.Conn, 1)
	once <- far
	cc, err := grpc.NewClient("passthrough:///node", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("gone")
			}
		}))
	if err != nil {
		return nil, "", err
	}
	cc.Connect()
	h.t.Cleanup(func() { cc.Close() })
	h.clients <- api.NewSessionClient(cc)
	return near, "manager", nil
}

// start runs the agent until the test ends, or the function it returns is called.
func (h *host) start() (stop func() error) {
	ctx, cancel := context.WithCancel(h.t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	h.t.Cleanup(func() { stop() })
	return stop
}

func put(image string, id byte) *api.Task {
	return &api.Task{Id: strings.Repeat(string(id), warden.IDLength), NodeId: self, ServiceName: "web", DesiredState: api.TaskState_TASK_RUNNING,
		Spec: &api.TaskSpec{Image: image, Zone: "default"}}
}

// assign opens a stream and sends sets; it returns the error of the first that is not acknowledged.
func assign(t *testing.T, client api.SessionClient, sets ...*api.AssignmentSet) (grpc.BidiStreamingClient[api.AssignmentSet, api.AssignmentAck], error) {
	t.Helper()
	stream, err := client.Assign(t.Context(), grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return stream, push(stream, sets...)
}

func push(stream grpc.BidiStreamingClient[api.AssignmentSet, api.AssignmentAck], sets ...*api.AssignmentSet) error {
	for _, set := range sets {
		if set.Zone == "" {
			set.Zone = "default"
		}
		stream.Send(set)
		ack, err := stream.Recv()
		if err != nil {
			return api.FromError(err)
		}
		if ack.Sequence != set.Sequence {
			return errors.New("wrong acknowledgement")
		}
	}
	return nil
}

// TestSilentManager: without a Describe for 15 s the session is closed; with them it stays.
func TestSilentManager(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		client := <-h.clients
		for range 10 {
			if _, err := client.Describe(t.Context(), &api.DescribeRequest{}, grpc.WaitForReady(true)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(14 * time.Second)
		}
		if n := len(h.dialled()); n != 1 {
			t.Fatalf("%d dials while the manager was heard", n)
		}
		<-h.clients
		dials := h.dialled()
		if since := dials[1].Sub(dials[0]); since != 141*time.Second {
			t.Errorf("redialled after %v, want 141 s", since)
		}
	})
}

// TestBackoff: failing dials are spaced from 100 ms to 5 s, with jitter.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.refuse = true
		stop := h.start()
		time.Sleep(time.Minute)
		stop()
		dials := h.dialled()
		for i := 1; i < len(dials); i++ {
			want := min(100*time.Millisecond<<(i-1), 5*time.Second)
			if gap := dials[i].Sub(dials[i-1]); gap < want/2 || gap > want {
				t.Errorf("gap %d is %v, want %v to %v", i, gap, want/2, want)
			}
		}
		if n := len(dials); n < 15 || n > 35 {
			t.Errorf("%d dials in a minute", n)
		}
	})
}

// TestBadSets: each breaks one rule; nothing of it is applied and the stream ends with its code.
func TestBadSets(t *testing.T) {
	other, zone := put("host", 'b'), put("host", 'b')
	other.NodeId = strings.Repeat("o", warden.IDLength)
	zone.Spec.Zone = "pci"
	for _, c := range []struct {
		name string
		set  *api.AssignmentSet
		code warden.Code
	}{
		{"sequence", &api.AssignmentSet{Sequence: 3}, warden.CodeInvalid},
		{"again", &api.AssignmentSet{Sequence: 1}, warden.CodeInvalid},
		{"another node's", &api.AssignmentSet{Sequence: 2, PutTasks: []*api.Task{put("host", 'c'), other}}, warden.CodeForeign},
		{"zone", &api.AssignmentSet{Sequence: 2, PutTasks: []*api.Task{put("host", 'c'), zone}}, warden.CodeWrongZone},
		{"second complete", &api.AssignmentSet{Sequence: 2, Complete: true, PutTasks: []*api.Task{put("host", 'c')}}, warden.CodeInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				h.start()
				_, err := assign(t, <-h.clients, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{put("host", 'a')}}, c.set)
				if warden.CodeOf(err) != c.code {
					t.Errorf("the set gave %v, want %s", err, c.code)
				}
				synctest.Wait()
				if got := h.Tasks(); len(got) != 1 || got[0] != put("host", 'a').Id {
					t.Errorf("tasks = %v", got)
				}
			})
		})
	}
}

// TestStates: the way of each kind of task, as a Watch stream tells it, and that none is started twice.
func TestStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		client := <-h.clients
		watch, err := client.Watch(t.Context(), grpc.WaitForReady(true))
		if err == nil {
			err = watch.Send(&api.WatchRequest{TimeNs: 1})
		}
		if err != nil {
			t.Fatal(err)
		}
		beats := 0
		final := map[byte]*api.TaskStatus{}
		go func() {
			for {
				reply, err := watch.Recv()
				if err != nil {
					return
				}
				if reply.TimeNs != 0 {
					if beats++; (beats == 1) != (reply.Description.GetHostname() == "h") {
						t.Errorf("answer %d to a heartbeat describes the node as %v", beats, reply.Description)
					}
				}
				for _, r := range reply.Reports {
					id := r.TaskId[0]
					if r.Status.State < final[id].GetState() {
						t.Errorf("task %c went from %v back to %v", id, final[id].GetState(), r.Status.State)
					}
					final[id] = r.Status
				}
			}
		}()
		never, lost, secretless := put("host", 'f'), put("host", 'g'), put("host", 'h')
		never.DesiredState = api.TaskState_TASK_SHUTDOWN
		lost.Status = &api.TaskStatus{State: api.TaskState_TASK_RUNNING}
		secretless.Spec.Secrets = []*api.SecretReference{{SecretId: strings.Repeat("s", 25), Version: 1, Target: "x"}}
		all := []*api.Task{put("host", 'a'), put("exit0", 'b'), put("exit3", 'c'), put("invalid", 'd'), put("broken", 'e'), never, lost, secretless}
		stream, err := assign(t, client, &api.AssignmentSet{Sequence: 1, PutTasks: all[:4]}, &api.AssignmentSet{Sequence: 2, Complete: true, PutTasks: all[4:]},
			&api.AssignmentSet{Sequence: 3, PutTasks: all[:4]})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for id, want := range map[byte]api.TaskState{'a': api.TaskState_TASK_RUNNING, 'b': api.TaskState_TASK_COMPLETE, 'c': api.TaskState_TASK_FAILED,
			'd': api.TaskState_TASK_REJECTED, 'e': api.TaskState_TASK_FAILED, 'f': api.TaskState_TASK_SHUTDOWN, 'g': api.TaskState_TASK_FAILED, 'h': api.TaskState_TASK_REJECTED} {
			if got := final[id].GetState(); got != want {
				t.Errorf("task %c is %v (%s), want %v", id, got, final[id].GetError(), want)
			}
		}
		if final['c'].ExitCode != 3 || h.exec.starts() != 5 {
			t.Errorf("exit code %d, %d starts", final['c'].ExitCode, h.exec.starts())
		}
		watch.Send(&api.WatchRequest{TimeNs: 2})
		synctest.Wait()
		if beats != 2 {
			t.Errorf("%d of 2 heartbeats are answered", beats)
		}
		var ids []string
		for _, task := range all {
			ids = append(ids, task.Id)
		}
		if err := push(stream, &api.AssignmentSet{Sequence: 4, RemoveTasks: ids}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := h.Tasks(); len(got) != 0 || final['a'].State != api.TaskState_TASK_SHUTDOWN {
			t.Errorf("tasks %v are left, the running one is %v", got, final['a'].State)
		}
	})
}

// TestStopWhileStarting: an order to stop ends a start that hangs.
func TestStopWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		slow := put("slow", 'a')
		stopped := api.Clone(slow)
		stopped.DesiredState = api.TaskState_TASK_SHUTDOWN
		stream, err := assign(t, <-h.clients, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{slow}})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := push(stream, &api.AssignmentSet{Sequence: 2, PutTasks: []*api.Task{stopped}}, &api.AssignmentSet{Sequence: 3, RemoveTasks: []string{slow.Id}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(h.Tasks()) != 0 || h.exec.has(slow.Id) {
			t.Error("the task is still there")
		}
	})
}

// TestManyStarts: more tasks than may be started at once all start in the end.
func TestManyStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		var all []*api.Task
		for i := range 26 {
			all = append(all, put("slow", 'a'+byte(i)))
		}
		if _, err := assign(t, <-h.clients, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: all}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := h.exec.starts(); n != 8 {
			t.Errorf("%d tasks are being started at once, want 8", n)
		}
		close(h.exec.hold)
		synctest.Wait()
		if n := h.exec.starts(); n != 26 {
			t.Errorf("%d tasks were started, want 26", n)
		}
	})
}

// TestEvictOrders: another node's evict is refused; this node's stops even a stubborn task with a short grace, wipes it, and
// ends Run.
func TestEvictOrders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		stop := h.start()
		client := <-h.clients
		stubborn := put("stubborn", 'a')
		stubborn.Spec.StopGraceNs = int64(5 * time.Minute)
		if _, err := assign(t, client, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{stubborn}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := client.Evict(t.Context(), &api.EvictRequest{NodeId: strings.Repeat("o", 25)}); warden.CodeOf(api.FromError(err)) != warden.CodeForeign {
			t.Errorf("evict of another node = %v", err)
		}
		start := time.Now()
		if _, err := client.Evict(t.Context(), &api.EvictRequest{NodeId: self, Index: 7}); err != nil {
			t.Errorf("Evict = %v", err)
		}
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("it took %v, want 2 s", took)
		}
		if err := stop(); warden.CodeOf(err) != warden.CodeEvicted {
			t.Errorf("Run = %v", err)
		}
		if len(h.evicted) != 1 || h.evicted[0].Index != 7 || len(h.Tasks()) != 0 || h.exec.has(stubborn.Id) {
			t.Errorf("evicted %v, tasks %v", h.evicted, h.Tasks())
		}
	})
}

// TestEvictHurriesATaskThatStops with a long grace already.
func TestEvictHurriesATaskThatStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		client := <-h.clients
		stubborn := put("stubborn", 'a')
		stubborn.Spec.StopGraceNs, stubborn.DesiredState = int64(5*time.Minute), api.TaskState_TASK_RUNNING
		stopping := api.Clone(stubborn)
		stopping.DesiredState = api.TaskState_TASK_SHUTDOWN
		stream, err := assign(t, client, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{stubborn}})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := push(stream, &api.AssignmentSet{Sequence: 2, PutTasks: []*api.Task{stopping}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		start := time.Now()
		if err := h.StopAll(t.Context()); err != nil || time.Since(start) != 2*time.Second {
			t.Errorf("StopAll = %v after %v, want 2 s", err, time.Since(start))
		}
	})
}

// TestStopAllReports what is left when its context ends first.
func TestStopAllReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		if _, err := assign(t, <-h.clients, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{put("stubborn", 'a')}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := h.StopAll(ctx); warden.CodeOf(err) != warden.CodeTimeout || !strings.Contains(err.Error(), "1 tasks") {
			t.Errorf("StopAll = %v", err)
		}
	})
}

// TestInstall: a refused leaf leaves the session; an installed one is answered, and then the node redials at once. Until the
// next session has sent its first set the old one counts.
func TestInstall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		client := <-h.clients
		stream, err := assign(t, client, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{put("host", 'a')}})
		if err != nil {
			t.Fatal(err)
		}
		second, err := client.Assign(t.Context())
		if err == nil {
			err = second.Send(&api.AssignmentSet{Sequence: 2, Zone: "default"})
		}
		if err != nil {
			t.Fatal(err)
		}
		taken := make(chan error, 1)
		go func() {
			_, err := second.Recv()
			taken <- err
		}()
		synctest.Wait()
		if len(taken) != 0 {
			t.Errorf("a second stream beside the first: %v", <-taken)
		}
		stream.CloseSend()
		if err := <-taken; err != nil {
			t.Errorf("a second stream after the first: %v", err)
		}
		if reply, err := client.Renew(t.Context(), &api.RenewRequest{}); err != nil || string(reply.Csr) != "csr" {
			t.Errorf("Renew = %v, %v", reply, err)
		}
		if _, err := client.Install(t.Context(), &api.InstallRequest{}); err == nil {
			t.Error("a bad chain was installed")
		}
		if _, err := client.Install(t.Context(), &api.InstallRequest{Chain: [][]byte{{1}}}); err != nil {
			t.Errorf("Install = %v", err)
		}
		if _, err := client.Renew(t.Context(), &api.RenewRequest{}); warden.CodeOf(api.FromError(err)) != warden.CodeConflict {
			t.Errorf("Renew over the session that brought a leaf = %v, want %s", err, warden.CodeConflict)
		}
		start, next := time.Now(), <-h.clients
		if err := push(second, &api.AssignmentSet{Sequence: 3, PutTasks: []*api.Task{put("host", 'b')}}); err != nil {
			t.Errorf("the old session while the next one is opened: %v", err)
		}
		if _, err := assign(t, next, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{put("host", 'a')}}); err != nil {
			t.Errorf("the next session: %v", err)
		}
		if _, err := second.Recv(); err == nil || time.Since(start) > 0 {
			t.Errorf("the old session's stream: %v after %v", err, time.Since(start))
		}
		synctest.Wait()
		if dials := h.dialled(); len(dials) != 2 || dials[1] != dials[0] || !slices.Equal(h.Tasks(), []string{put("host", 'a').Id}) {
			t.Errorf("dials %v, tasks %v", dials, h.Tasks())
		}
	})
}

// TestAdoptFails: an agent that can't tell which tasks exist runs none.
func TestAdoptFails(t *testing.T) {
	h := newHost(t)
	h.exec.fail = warden.Errorf(warden.CodeCorrupt, "reading tasks", "no")
	if err := h.Run(t.Context()); warden.CodeOf(err) != warden.CodeCorrupt || len(h.dialled()) != 0 {
		t.Errorf("Run = %v after %d dials", err, len(h.dialled()))
	}
}

// TestLogs: of an unknown task, too many lines, and a followed log that ends with the session.
func TestLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.start()
		client := <-h.clients
		if _, err := assign(t, client, &api.AssignmentSet{Sequence: 1, Complete: true, PutTasks: []*api.Task{put("host", 'a')}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		read := func(r *api.LogsRequest) (n int, err error) {
			stream, err := client.Logs(t.Context(), r)
			for err == nil {
				if _, err = stream.Recv(); err == nil {
					n++
				}
			}
			return n, api.FromError(err)
		}
		if _, err := read(&api.LogsRequest{TaskId: "x"}); warden.CodeOf(err) != warden.CodeNotFound {
			t.Errorf("log of an unknown task: %v", err)
		}
		if _, err := read(&api.LogsRequest{TaskId: put("", 'a').Id, Tail: warden.TailLogMax + 1}); warden.CodeOf(err) != warden.CodeTooLarge {
			t.Errorf("too many lines: %v", err)
		}
		time.AfterFunc(time.Second, h.Redial)
		if n, err := read(&api.LogsRequest{TaskId: put("", 'a').Id, Follow: true}); n != 2 || warden.CodeOf(err) != warden.CodeUnavailable {
			t.Errorf("followed log: %d lines, %v", n, err)
		}
	})
}
