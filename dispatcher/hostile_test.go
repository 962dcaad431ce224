package dispatcher_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// wantEnd checks how and when a session ended.
func wantEnd(t *testing.T, err error, took time.Duration, code warden.Code, after time.Duration) {
	t.Helper()
	if warden.CodeOf(err) != code || took != after {
		t.Errorf("Serve = %v [%s] after %v, want [%s] after %v", err, warden.CodeOf(err), took, code, after)
	}
}

// TestGarbage: a node that speaks no HTTP/2, or nothing at all.
func TestGarbage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		near, far := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			b := make([]byte, 1024)
			near.Read(b)
			near.Write([]byte(strings.Repeat("220 smtp ready\r\n", 20)))
			for err := error(nil); err == nil; {
				_, err = near.Read(b)
			}
		})
		start := time.Now()
		err := m.Serve(t.Context(), far, m.peer)
		wantEnd(t, err, time.Since(start), warden.CodeUnavailable, 0)
		wg.Wait()
	})
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		near, far := net.Pipe()
		defer near.Close()
		start := time.Now()
		err := m.Serve(t.Context(), far, m.peer)
		wantEnd(t, err, time.Since(start), warden.CodeTimeout, warden.HeartbeatMissed)
	})
}

// TestAcknowledgements: one that does not come, one of another set, and one of no set.
func TestAcknowledgements(t *testing.T) {
	stay := func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
		<-s.Context().Done()
		return nil
	}
	for _, c := range []struct {
		name   string
		assign func(grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error
		code   warden.Code
		after  time.Duration
	}{
		{"none", stay, warden.CodeTimeout, 30 * time.Second},
		{"wrong", func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
			s.Send(&api.AssignmentAck{Sequence: 7})
			return stay(s)
		}, warden.CodeInvalid, 0},
		{"unasked", func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
			s.Send(&api.AssignmentAck{Sequence: 1})
			s.Send(&api.AssignmentAck{Sequence: 1})
			return stay(s)
		}, warden.CodeInvalid, time.Second},
		{"too large", func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
			ack := &api.AssignmentAck{Sequence: 1}
			ack.ProtoReflect().SetUnknown(append([]byte{0x7a, 0x80, 0x40}, make([]byte, 8192)...))
			s.Send(ack)
			return stay(s)
		}, warden.CodeTooLarge, 0},
		{"refusal", func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
			return api.Error(warden.Errorf(warden.CodeWrongZone, "taking a set", "no"))
		}, warden.CodeWrongZone, 0},
		{"end", func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error { return nil }, warden.CodeUnavailable, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, store.Wrap(task('a', strings.Repeat("n", warden.IDLength))))
				time.AfterFunc(time.Second, func() { // another set is due
					stopping := api.Clone(m.store.View().Task(strings.Repeat("a", warden.IDLength)))
					stopping.DesiredState = api.TaskState_TASK_SHUTDOWN
					storetest.Propose(t, m.store, store.Put(stopping, stopping.Meta.Version))
				})
				took, err := m.serve(t.Context(), &node{assign: c.assign})
				wantEnd(t, err, took, c.code, c.after)
			})
		})
	}
}

// TestReportsOfOthers: a node reports on tasks of another, on none, in states that are not its to report, and backwards.
func TestReportsOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine, other := task('a', strings.Repeat("n", warden.IDLength)), task('b', strings.Repeat("o", warden.IDLength))
		m := newManager(t, store.Wrap(mine), store.Wrap(other))
		m.refuse = 3
		n := &node{watch: func(s *reporter) error {
			for _, r := range []struct {
				id    string
				state api.TaskState
			}{
				{other.Id, api.TaskState_TASK_FAILED}, {strings.Repeat("x", 25), api.TaskState_TASK_FAILED}, {"", api.TaskState_TASK_FAILED},
				{mine.Id, api.TaskState_TASK_ORPHANED}, {mine.Id, 75}, {mine.Id, api.TaskState_TASK_PENDING}, {mine.Id, -3},
				{mine.Id, api.TaskState_TASK_STARTING}, {mine.Id, api.TaskState_TASK_RUNNING}, {mine.Id, api.TaskState_TASK_ACCEPTED},
			} {
				s.Send(&api.TaskReport{TaskId: r.id, Status: &api.TaskStatus{State: r.state, Message: strings.Repeat("é", 4000)}})
			}
			<-s.Context().Done()
			return nil
		}}
		ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
		defer cancel()
		m.serve(ctx, n)
		reports := m.taken()
		for _, r := range reports {
			if r.NodeId != m.nodeID || r.Report.TaskId != mine.Id || len(r.Report.Status.Message) > 1024 {
				t.Errorf("reported %v", r)
			}
		}
		if len(reports) == 0 || reports[len(reports)-1].Report.Status.State != api.TaskState_TASK_RUNNING {
			t.Errorf("reports = %v, want running last", reports)
		}
		if m.refused != 1 || m.log.count("ignored report of node") != 1 {
			t.Errorf("%d reports were refused, want that of another's task", m.refused)
		}
	})
}

// TestReportsAreMadeAgain while the store does not show them: the leader may have lost one that it took.
func TestReportsAreMadeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine := task('a', strings.Repeat("n", warden.IDLength))
		m := newManager(t, store.Wrap(mine))
		n := &node{watch: func(s *reporter) error {
			s.Send(&api.TaskReport{TaskId: mine.Id, Status: &api.TaskStatus{State: api.TaskState_TASK_RUNNING}})
			<-s.Context().Done()
			return nil
		}}
		ctx, cancel := context.WithTimeout(t.Context(), 45*time.Second) // at heartbeats, 10 s apart or up to 3 s more
		defer cancel()
		m.serve(ctx, n)
		if n := len(m.taken()); n != 4 {
			t.Errorf("%d reports in 45 s, want 4", n)
		}
	})
}

// TestToldBefore: what the store shows already is not reported again with each session; what is new is.
func TestToldBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine := task('a', strings.Repeat("n", warden.IDLength))
		mine.Status.State = api.TaskState_TASK_RUNNING
		m := newManager(t, store.Wrap(mine))
		say := func(states ...api.TaskState) int {
			n := &node{watch: func(s *reporter) error {
				for _, state := range states {
					s.Send(&api.TaskReport{TaskId: mine.Id, Status: &api.TaskStatus{State: state, Message: "again"}})
				}
				<-s.Context().Done()
				return nil
			}}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			m.serve(ctx, n)
			return len(m.taken())
		}
		for range 3 {
			if n := say(api.TaskState_TASK_ACCEPTED, api.TaskState_TASK_STARTING, api.TaskState_TASK_RUNNING); n != 0 {
				t.Fatalf("%d reports of what the store shows", n)
			}
		}
		if n := say(api.TaskState_TASK_RUNNING, api.TaskState_TASK_FAILED); n != 1 {
			t.Errorf("%d reports of a task that failed, want 1", n)
		}
	})
}

// TestFlood: a node that never stops repeating itself is cut off.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine := task('a', strings.Repeat("n", warden.IDLength))
		m := newManager(t, store.Wrap(mine))
		n := &node{watch: func(s *reporter) error {
			for range 100_000 {
				if err := s.Send(&api.TaskReport{TaskId: mine.Id, Status: &api.TaskStatus{State: api.TaskState_TASK_RUNNING}}); err != nil {
					return err
				}
			}
			return nil
		}}
		took, err := m.serve(t.Context(), n)
		wantEnd(t, err, took, warden.CodeLimited, 0)
		if n := len(m.taken()); n != 1 {
			t.Errorf("%d reports, want 1", n)
		}
	})
}

// TestDescriptions: a clock that is out and a description out of bounds are each warned of once; the session goes on.
func TestDescriptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		n := &node{describe: func(context.Context) (*api.DescribeReply, error) {
			return &api.DescribeReply{TimeNs: time.Now().Add(-time.Minute).UnixNano(), Description: &api.NodeDescription{Hostname: "a\nb"}}, nil
		}}
		var claims []*api.SessionClaim
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Minute, func() {
			claims = m.Claims()
			cancel(errors.New("enough"))
		})
		m.serve(ctx, n)
		if len(claims) != 1 || claims[0].Description != nil || claims[0].SkewNs != int64(-time.Minute) {
			t.Errorf("Claims() = %v", claims)
		}
		if a, b := m.log.count("found clock of node out"), m.log.count("ignored description of node"); a != 1 || b != 1 {
			t.Errorf("%d warnings of the clock, %d of the description, want 1 each", a, b)
		}
		if claims := m.Claims(); len(claims) != 0 {
			t.Errorf("Claims() = %v after the end", claims)
		}
	})
}

// TestHugeDescription: an answer above its bound ends the session.
func TestHugeDescription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		took, err := m.serve(t.Context(), &node{describe: func(context.Context) (*api.DescribeReply, error) {
			return &api.DescribeReply{Description: &api.NodeDescription{Hostname: strings.Repeat("a", 1<<20)}}, nil
		}})
		wantEnd(t, err, took, warden.CodeTooLarge, 0)
	})
}

// TestEvictedNodeThatIgnoresIt: with a tombstone there is exactly one call, which may take evictTimeout; the same at the end
// of a live session.
func TestEvictedNodeThatIgnoresIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		var got []*api.EvictRequest
		calls := 0
		n := &node{
			describe: func(context.Context) (*api.DescribeReply, error) {
				calls++
				return &api.DescribeReply{TimeNs: time.Now().UnixNano()}, nil
			},
			evict: func(ctx context.Context, r *api.EvictRequest) error {
				got = append(got, r)
				<-ctx.Done()
				return nil
			}}
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(3*time.Second, func() { cancel(warden.Errorf(warden.CodeEvicted, "", "removed")) })
		took, err := m.serve(ctx, n)
		wantEnd(t, err, took, warden.CodeEvicted, 4*time.Second)
		calls = 0
		m.peer.Tombstone = &api.Tombstone{Id: m.nodeID, Meta: &api.Meta{Index: 9}, RemovedNs: 8}
		took, err = m.serve(t.Context(), n)
		wantEnd(t, err, took, warden.CodeEvicted, time.Second)
		if calls != 0 || len(got) != 2 || got[0].NodeId != m.nodeID || got[1].Index != 9 || got[1].TimeNs != 8 {
			t.Errorf("%d other calls, evicts %v", calls, got)
		}
	})
}

// TestRenewOnly: a node with an expired leaf is asked for a CSR and nothing else, again and again; one that installs and
// then stays is cut off.
func TestRenewOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, store.Wrap(task('a', strings.Repeat("n", warden.IDLength), "secret")))
		m.peer.RenewOnly = true
		var asked []time.Duration
		start := time.Now()
		n := &node{
			assign: func(grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
				t.Error("Assign was called")
				return nil
			},
			watch: func(*reporter) error {
				t.Error("Watch was called")
				return nil
			},
			renew: func(*api.RenewRequest) ([]byte, error) {
				asked = append(asked, time.Since(start))
				switch len(asked) {
				case 1:
					return nil, errors.New("no entropy")
				case 2:
					return make([]byte, warden.CSRBytesMax+1), nil
				case 3:
					return nil, nil
				}
				return []byte("csr"), nil
			}}
		took, err := m.serve(t.Context(), n)
		wantEnd(t, err, took, warden.CodeUnavailable, 3500*time.Millisecond+10*time.Second)
		if len(asked) != 4 || asked[1] != 500*time.Millisecond || asked[2] != 1500*time.Millisecond || len(m.issued) != 1 {
			t.Errorf("asked at %v, issued at %v", asked, m.issued)
		}
		if len(m.Claims()) != 0 {
			t.Error("a session that can't take tasks is claimed")
		}
	})
}

// TestI6NothingUnneeded: the node is sent the secret of its own task and neither that of another node's nor of its ended one; no value
// is logged.
func TestI6NothingUnneeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := func(c string) string { return strings.Repeat(c, warden.IDLength) }
		secret := func(c string) []*api.Object {
			return []*api.Object{store.Wrap(&api.Secret{Id: id(c), Name: c, CurrentVersion: 1}),
				store.Wrap(&api.SecretVersion{Id: id(c) + "@1", SecretId: id(c), Version: 1, SizeBytes: 10})}
		}
		mine, stopping, ended, others := task('a', id("n"), id("1")), task('b', id("n"), id("2")), task('c', id("n"), id("3")), task('d', id("o"), id("4"))
		stopping.DesiredState = api.TaskState_TASK_SHUTDOWN
		ended.Status.State = api.TaskState_TASK_FAILED
		objects := []*api.Object{store.Wrap(mine), store.Wrap(stopping), store.Wrap(ended), store.Wrap(others)}
		for _, c := range []string{"1", "2", "3", "4"} {
			objects = append(objects, secret(c)...)
		}
		m := newManager(t, objects...)
		var sets []*api.AssignmentSet
		n := &node{assign: func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
			for {
				set, err := s.Recv()
				if err != nil {
					return err
				}
				sets = append(sets, set)
				s.Send(&api.AssignmentAck{Sequence: set.Sequence})
			}
		}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		m.serve(ctx, n)
		if len(sets) != 1 || !sets[0].Complete || len(sets[0].PutTasks) != 3 || len(sets[0].PutSecrets) != 1 || sets[0].PutSecrets[0].SecretId != id("1") ||
			string(sets[0].PutSecrets[0].Data) != "canary-value" {
			t.Errorf("sets = %v", sets)
		}
		if m.log.count("canary") != 0 {
			t.Error("a value was logged")
		}
		if len(m.opened) != 1 || m.opened[0].Use(func([]byte) error { return nil }) == nil {
			t.Errorf("%d values were opened, want one, wiped", len(m.opened))
		}
	})
}

// TestLease: without it neither sets nor renewals are sent, the heartbeat goes on; with it they follow.
func TestLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, store.Wrap(task('a', strings.Repeat("n", warden.IDLength))))
		m.held = true
		m.peer.NotAfter = time.Now().Add(5 * time.Second)
		var set, renewed time.Duration
		start := time.Now()
		n := &node{
			assign: func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
				got, err := s.Recv()
				if err != nil {
					return err
				}
				set = time.Since(start)
				s.Send(&api.AssignmentAck{Sequence: got.Sequence})
				<-s.Context().Done()
				return nil
			},
			renew: func(*api.RenewRequest) ([]byte, error) {
				renewed = time.Since(start)
				return []byte("csr"), nil
			},
		}
		time.AfterFunc(time.Minute, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.held = false
		})
		m.serve(t.Context(), n)
		for _, got := range []time.Duration{set, renewed} {
			if got < time.Minute || got > time.Minute+time.Second {
				t.Errorf("set after %v, renewal after %v, want both when the lease came after a minute", set, renewed)
			}
		}
	})
}

// TestLogOfADyingSession: a log that is asked for when the node takes no more calls ends with the session, however long the
// caller would wait.
func TestLogOfADyingSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		var wg sync.WaitGroup
		defer wg.Wait()
		others, end := context.WithCancel(t.Context())
		defer end()
		wg.Go(func() { m.serve(others, &node{}) }) // another node's session: the gRPC client that they share goes on
		synctest.Wait()
		m.peer.NodeID = strings.Repeat("o", warden.IDLength)
		near, far := net.Pipe()
		server := grpc.NewServer()
		api.RegisterSessionServer(server, &node{})
		lis := &oneConn{conn: make(chan net.Conn, 1), done: make(chan struct{})}
		lis.conn <- near
		wg.Go(func() { server.Serve(lis) })
		wg.Go(func() { m.Serve(t.Context(), far, m.peer) })
		synctest.Wait()
		wg.Go(server.GracefulStop) // waits for the end of Watch
		synctest.Wait()

		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start, got := time.Now(), make(chan error, 1)
		go func() {
			got <- m.Logs(ctx, m.peer.NodeID, &api.LogsRequest{Follow: true}, func(*api.LogChunk) error { return nil })
		}()
		synctest.Wait()
		server.Stop()
		if err := <-got; warden.CodeOf(err) != warden.CodeUnavailable || time.Since(start) > time.Second {
			t.Errorf("Logs = %v [%s] after %s, want [%s] at once", err, warden.CodeOf(err), time.Since(start), warden.CodeUnavailable)
		}
	})
}

// TestCodesOfNodes: the codes of a node's errors decide nothing here, and are no labels of metrics.
func TestCodesOfNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t)
		m.peer.NotAfter = time.Now().Add(-time.Second) // a renewal is due
		evicts := 0
		took, err := m.serve(t.Context(), &node{
			renew: func(*api.RenewRequest) ([]byte, error) {
				return nil, api.Error(&warden.Error{Code: "x", Err: errors.New("no")})
			},
			evict: func(context.Context, *api.EvictRequest) error { evicts++; return nil },
			watch: func(*reporter) error {
				time.Sleep(time.Second)
				return api.Error(warden.Errorf(warden.CodeEvicted, "", "I was removed"))
			},
		})
		wantEnd(t, err, took, warden.CodeEvicted, time.Second)
		if evicts != 0 {
			t.Error("a node that says that it was evicted was told so")
		}
		var f api.ManagerFacts
		m.Facts(&f)
		if len(f.Renewals) != 1 || f.Renewals[0].Result != "other" {
			t.Errorf("renewals = %v, want %q", f.Renewals, "other")
		}
	})
}
