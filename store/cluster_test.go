package store_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// cluster is managers in one process. Their clock is synctest's, so that elections take no time.
type cluster struct {
	t        *testing.T
	id       string
	ids      []string
	configs  map[string]store.Config
	up       map[string]*store.Store
	networks map[string]*raft.InmemTransport
	between  func(id string, tr *raft.InmemTransport) store.Transport // nil: nothing is between a manager and its network
}

// newCluster bootstraps n managers with a vote each. change may alter each configuration.
func newCluster(t *testing.T, n int, change func(*store.Config)) *cluster {
	return newClusterOver(t, n, change, nil)
}

// newClusterOver is newCluster with something between managers and their network.
func newClusterOver(t *testing.T, n int, change func(*store.Config), between func(id string, tr *raft.InmemTransport) store.Transport) *cluster {
	c := &cluster{t: t, id: warden.NewID(), configs: map[string]store.Config{}, up: map[string]*store.Store{}, networks: map[string]*raft.InmemTransport{}, between: between}
	for range n {
		id := warden.NewID()
		cfg := store.Config{ClusterID: c.id, NodeID: id, Logger: slog.New(slog.DiscardHandler)}
		if change != nil {
			change(&cfg)
		}
		if cfg.Dir == "" {
			logs := raft.NewInmemStore()
			cfg.Stores = &store.Stores{Logs: logs, Stable: logs, Snapshots: raft.NewInmemSnapshotStore()}
		}
		c.configs[id] = cfg
		c.ids = append(c.ids, id)
	}
	t.Cleanup(func() {
		for _, s := range c.up {
			s.Close(context.Background())
		}
		time.Sleep(time.Minute) // raft does not wait for its calls to those that are gone
	})
	first := c.ids[0]
	s, err := store.Bootstrap(c.config(first), storetest.Command(storetest.Genesis(c.id, first)...))
	if err != nil {
		t.Fatal(err)
	}
	c.up[first] = s
	for _, id := range c.ids[1:] {
		c.start(id)
		c.must(s.AddNonvoter(t.Context(), id))
		c.must(c.up[id].WaitApplied(t.Context(), s.CommitIndex()))
		c.must(s.AddVoter(t.Context(), id))
	}
	return c
}

// config returns the configuration with a new transport, connected to those that are up.
func (c *cluster) config(id string) store.Config {
	cfg := c.configs[id]
	_, tr := raft.NewInmemTransportWithTimeout(raft.ServerAddress(id), 5*time.Second)
	c.networks[id] = tr
	cfg.Transport = tr
	if c.between != nil {
		cfg.Transport = c.between(id, tr)
	}
	c.connect(id)
	return cfg
}

func (c *cluster) connect(id string) {
	for other, tr := range c.networks {
		if other != id {
			tr.Connect(raft.ServerAddress(id), c.networks[id])
			c.networks[id].Connect(raft.ServerAddress(other), tr)
		}
	}
}

func (c *cluster) disconnect(id string) {
	c.networks[id].DisconnectAll()
	for other, tr := range c.networks {
		if other != id {
			tr.Disconnect(raft.ServerAddress(id))
		}
	}
}

func (c *cluster) start(id string) *store.Store {
	c.t.Helper()
	s, err := store.Open(c.config(id))
	if err != nil {
		c.t.Fatal(err)
	}
	c.up[id] = s
	return s
}

// kill stops a manager that is cut off first, so that it hands nothing over.
func (c *cluster) kill(id string) {
	c.disconnect(id)
	c.must(c.up[id].Close(c.t.Context()))
	delete(c.up, id)
	delete(c.networks, id)
}

// leader waits until one of those that are up leads, and returns it.
func (c *cluster) leader() *store.Store {
	for range 2000 {
		for _, s := range c.up {
			if s.IsLeader() && s.VerifyLeader(c.t.Context()) == nil && s.Barrier(c.t.Context()) == nil {
				return s
			}
		}
		time.Sleep(10 * time.Millisecond) // in synctest's time
	}
	c.t.Fatal("no leader")
	return nil
}

// same waits until all have applied what the leader has, and checks that their states are equal to the byte.
func (c *cluster) same() []byte {
	c.t.Helper()
	leader := c.leader()
	var want []byte
	for _, id := range c.ids {
		s := c.up[id]
		if s == nil {
			continue
		}
		c.must(s.WaitApplied(c.t.Context(), leader.CommitIndex()))
		var b bytes.Buffer
		c.must(s.View().Write(&b))
		if want == nil {
			want = b.Bytes()
		}
		if !bytes.Equal(want, b.Bytes()) {
			c.t.Fatalf("the state of %s differs", id)
		}
	}
	return want
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) idOf(s *store.Store) string {
	for id, up := range c.up {
		if up == s {
			return id
		}
	}
	return ""
}

// gcm seals with AES-GCM, in place of a manager's keyring.
type gcm struct{ cipher.AEAD }

func newSealer(t *testing.T) gcm {
	b, err := aes.NewCipher(storetest.Hash())
	if err != nil {
		t.Fatal(err)
	}
	a, err := cipher.NewGCMWithRandomNonce(b)
	if err != nil {
		t.Fatal(err)
	}
	return gcm{a}
}

func (g gcm) Seal(plaintext, aad []byte) ([]byte, error) {
	return g.AEAD.Seal(nil, nil, plaintext, aad), nil
}

func (g gcm) Open(sealed, aad []byte) ([]byte, error) { return g.AEAD.Open(nil, nil, sealed, aad) }

// onDisk makes the managers keep their state in sealed files.
func onDisk(t *testing.T) func(*store.Config) {
	dir := t.TempDir()
	return func(cfg *store.Config) {
		cfg.Dir, cfg.Sealer = filepath.Join(dir, cfg.NodeID), newSealer(t)
	}
}

func TestConcurrentJoinsTakeExactlyTheUses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		leader := c.leader()
		token := storetest.Token(api.Role_ROLE_WORKER)
		token.UsesMax = 20
		storetest.Propose(t, leader, store.Put(token, 0))
		var joined, usedUp atomic.Int64
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				_, err := leader.Propose(t.Context(), storetest.Command(storetest.Join(storetest.Node("w", token))...))
				switch warden.CodeOf(err) {
				case "":
					joined.Add(1)
				case warden.CodeUsedUp:
					usedUp.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if joined.Load() != 20 || usedUp.Load() != 44 {
			t.Fatalf("%d joined, %d found it used up; want 20 and 44", joined.Load(), usedUp.Load())
		}
		c.same()
		if got := len(leader.View().Nodes()); got != 21 {
			t.Fatalf("%d nodes, want 21", got)
		}
	})
}

func TestRestartOfAllWithoutSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, onDisk(t))
		leader := c.leader()
		for range 20 {
			storetest.Propose(t, leader, store.Put(storetest.Zone(warden.NewID()), 0))
		}
		before := c.same()
		for _, id := range c.ids {
			c.kill(id)
		}
		for _, id := range c.ids {
			c.start(id)
		}
		members, err := c.leader().Configuration()
		if err != nil || len(members) != 3 {
			t.Fatalf("Configuration = %v, %v", members, err)
		}
		if after := c.same(); !bytes.Equal(before, after) {
			t.Fatal("the state after the restart is another one")
		}
		storetest.Propose(t, c.leader(), store.Put(storetest.Zone("after"), 0))
	})
}

func TestRestartFromSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		change := onDisk(t)
		c := newCluster(t, 3, func(cfg *store.Config) { change(cfg); cfg.TrailingLogs = 1 })
		for range 20 {
			storetest.Propose(t, c.leader(), store.Put(storetest.Zone(warden.NewID()), 0))
		}
		before := c.same()
		for _, s := range c.up {
			c.must(s.Snapshot())
			c.must(s.Snapshot()) // nothing new
		}
		for _, id := range c.ids {
			c.kill(id)
		}
		for _, id := range c.ids {
			s := c.start(id)
			if got := len(s.View().Zones()); got != 21 {
				t.Fatalf("%d zones right after the start, want 21", got)
			}
		}
		if after := c.same(); !bytes.Equal(before, after) {
			t.Fatal("the state after the restart is another one")
		}
	})
}

func TestLeaderKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		old := c.leader()
		changes := c.up[c.ids[1]].LeaderChanges()
		cmd := storetest.Command(store.Put(storetest.Zone("a"), 0))
		first, err := old.Propose(t.Context(), cmd)
		c.must(err)
		c.kill(c.idOf(old))
		leader := c.leader()
		<-changes
		again, err := leader.Propose(t.Context(), cmd)
		if err != nil || again.Index != first.Index {
			t.Fatalf("the repeated request gave %v, %v; want the result of index %d", again, err, first.Index)
		}
		storetest.Propose(t, leader, store.Put(storetest.Zone("b"), 0))
		c.same()
	})
}

func TestLeaderCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		old := c.leader()
		c.disconnect(c.idOf(old))
		cmd := storetest.Command(store.Put(storetest.Zone("a"), 0))
		_, err := old.Propose(t.Context(), cmd)
		if code := warden.CodeOf(err); code != warden.CodeTimeout && code != warden.CodeNotLeader {
			t.Fatalf("Propose of a leader that is cut off: %v", err)
		}
		if err := old.VerifyLeader(t.Context()); warden.CodeOf(err) != warden.CodeNotLeader {
			t.Fatalf("VerifyLeader of a leader that is cut off: %v", err)
		}
		if old.View().Zone("a") != nil {
			t.Fatal("a command that was not committed is visible")
		}
		if r, err := c.leader().Propose(t.Context(), cmd); err != nil || r.Code != "" {
			t.Fatal(r, err)
		}
		c.connect(c.idOf(old))
		c.same()
	})
}

func TestLaggingFollowerCatchesUpBySnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, func(cfg *store.Config) { cfg.TrailingLogs = 1 })
		leader := c.leader()
		var behind string
		for id, s := range c.up {
			if s != leader {
				behind = id
			}
		}
		w := c.up[behind].Watch(api.Kind_KIND_ZONE)
		defer w.Close()
		c.disconnect(behind)
		for range 50 {
			storetest.Propose(t, leader, store.Put(storetest.Zone(warden.NewID()), 0))
		}
		c.must(leader.Snapshot())
		c.connect(behind)
		for {
			changes, err := w.Next(t.Context())
			c.must(err)
			if changes.Resync {
				break
			}
		}
		c.same()
		if got := len(c.up[behind].View().Zones()); got != 51 {
			t.Fatalf("%d zones, want 51", got)
		}
	})
}

func TestCloseHandsLeadershipOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		c.same()
		old := c.leader()
		id := c.idOf(old)
		start := time.Now()
		c.must(old.Close(t.Context()))
		c.must(old.Close(t.Context())) // again does nothing
		delete(c.up, id)
		delete(c.networks, id)
		c.leader()
		if took := time.Since(start); took > 400*time.Millisecond {
			t.Fatalf("the others led after %v, as if it took an election", took)
		}
		if _, err := old.Propose(t.Context(), storetest.Command()); err == nil {
			t.Fatal("a closed store proposes")
		}
		if err := old.WaitApplied(t.Context(), 1<<40); warden.CodeOf(err) != warden.CodeUnavailable {
			t.Fatalf("WaitApplied of a closed store: %v", err)
		}
	})
}

func TestFollowerRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		c.same()
		leader := c.leader()
		for id, s := range c.up {
			if s == leader {
				continue
			}
			_, err := s.Propose(t.Context(), storetest.Command())
			if warden.CodeOf(err) != warden.CodeNotLeader || s.Leader() != c.idOf(leader) {
				t.Errorf("%s: %v, leader %q", id, err, s.Leader())
			}
			for _, err := range []error{s.Barrier(t.Context()), s.VerifyLeader(t.Context()), s.AddVoter(t.Context(), id), s.TransferLeadership(t.Context())} {
				if warden.CodeOf(err) != warden.CodeNotLeader {
					t.Errorf("%s: %v", id, err)
				}
			}
		}
	})
}

func TestMembership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		leader := c.leader()
		removed := c.ids[2]
		if leader == c.up[removed] {
			c.must(leader.TransferLeadership(t.Context()))
			leader = c.leader()
		}
		c.must(leader.RemoveServer(t.Context(), removed))
		c.must(leader.AddNonvoter(t.Context(), removed))
		members, err := leader.Configuration()
		c.must(err)
		want := []store.Member{{ID: c.ids[0], Voter: true}, {ID: c.ids[1], Voter: true}, {ID: removed}}
		if len(members) != 3 || members[0] != want[0] || members[1] != want[1] || members[2] != want[2] {
			t.Fatalf("Configuration = %v, want %v", members, want)
		}
		c.same()
	})
}

func TestFollowersLearnOfACommitAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		c.same()
		leader := c.leader()
		time.Sleep(time.Second)
		r := storetest.Propose(t, leader, store.Put(storetest.Zone("a"), 0))
		start := time.Now()
		for _, s := range c.up {
			c.must(s.WaitApplied(t.Context(), r.Index))
		}
		if took := time.Since(start); took > 15*time.Millisecond {
			t.Fatalf("took %v of raft's time", took)
		}
	})
}

func TestAppliedReachesCommitWithoutCommands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, func(cfg *store.Config) { cfg.TrailingLogs = 1 })
		s := c.leader()
		for range 5 {
			c.must(s.Barrier(t.Context()))
		}
		applied := func(when string, s *store.Store) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := s.WaitApplied(ctx, s.CommitIndex()); err != nil {
				t.Fatalf("%s: applied %d of %d: %v", when, s.AppliedIndex(), s.CommitIndex(), err)
			}
		}
		applied("after barriers", s)
		if s.AppliedIndex() <= s.View().Index() {
			t.Fatalf("applied %d, the view is of %d", s.AppliedIndex(), s.View().Index())
		}
		c.must(s.Snapshot())
		c.kill(c.ids[0])
		s = c.start(c.ids[0])
		c.leader()
		applied("after a restart", s)
	})
}

// raft says that an entry is applied as soon as it has handed it over; a lease must not count that.
func TestAppliedNeverPrecedesTheView(t *testing.T) {
	s := storetest.New(t)
	web := storetest.Service("web", "default")
	r := storetest.Propose(t, s, store.Put(storetest.Zone(warden.DefaultZone), 0), store.Put(web, 0))
	var wg sync.WaitGroup
	done := make(chan struct{})
	for worker := range uint64(8) {
		wg.Go(func() {
			var ops []*api.Operation
			for i := range uint64(500) { // takes its time to apply
				ops = append(ops, store.Put(storetest.Task(web, 1+worker*500+i), 0))
			}
			if _, err := s.Propose(t.Context(), storetest.Command(ops...)); err != nil {
				t.Error(err)
			}
		})
	}
	defer wg.Wait()
	go func() { wg.Wait(); close(done) }()
	for {
		applied := s.AppliedIndex() // from r.Index on all entries are commands
		if seen := s.View().Index(); applied >= r.Index && seen < applied {
			t.Fatalf("applied is %d, the view is of %d", applied, seen)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

func TestClockBehindRefusesToPropose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var behind atomic.Int64
		c := newCluster(t, 1, func(cfg *store.Config) {
			cfg.Now = func() time.Time { return time.Now().Add(-time.Duration(behind.Load())) }
		})
		s := c.leader()
		before := s.View().Time()
		behind.Store(int64(warden.SkewMax - time.Second))
		storetest.Propose(t, s, store.Put(storetest.Zone("a"), 0))
		if got := s.View().Time(); got < before {
			t.Fatalf("time fell from %d to %d", before, got)
		}
		behind.Store(int64(2 * warden.SkewMax))
		if _, err := s.Propose(t.Context(), storetest.Command()); warden.CodeOf(err) != warden.CodeClock {
			t.Fatalf("Propose = %v, want [clock]", err)
		}
	})
}

func TestProposeRefusesWhatIsTooLarge(t *testing.T) {
	s := storetest.New(t)
	z := storetest.Zone("a")
	z.Name = string(bytes.Repeat([]byte("x"), warden.CommandBytes))
	if _, err := s.Propose(t.Context(), storetest.Command(store.Put(z, 0))); warden.CodeOf(err) != warden.CodeTooLarge {
		t.Fatal(err)
	}
	if _, err := s.Propose(t.Context(), &api.Command{}); warden.CodeOf(err) != warden.CodeInvalid {
		t.Fatal(err)
	}
}

func TestBootstrapTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, onDisk(t))
		id := c.ids[0]
		c.kill(id)
		_, err := store.Bootstrap(c.config(id), storetest.Command(storetest.Genesis(c.id, id)...))
		if warden.CodeOf(err) != warden.CodeInitialized {
			t.Fatalf("Bootstrap = %v, want [initialized]", err)
		}
		c.start(id)
		c.leader()
	})
}

func TestBootstrapOfABadCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := warden.NewID()
		_, tr := raft.NewInmemTransport(raft.ServerAddress(id))
		logs := raft.NewInmemStore()
		_, err := store.Bootstrap(store.Config{NodeID: id, Transport: tr,
			Stores: &store.Stores{Logs: logs, Stable: logs, Snapshots: raft.NewInmemSnapshotStore()}},
			storetest.Command(store.Put(storetest.Zone("NO"), 0)))
		if warden.CodeOf(err) != warden.CodeInvalid {
			t.Fatalf("Bootstrap = %v, want [invalid]", err)
		}
	})
}
