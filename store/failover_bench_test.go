package store_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store"
	"warden/store/sealedlog"
	"warden/store/storetest"
)

// accepted tries at all that run until one takes a write, and returns it.
func (p *peers) accepted() *peer {
	for {
		for _, m := range p.all {
			if m.store == nil || !m.store.IsLeader() {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			_, err := m.store.Propose(ctx, storetest.Command(describe(m.id, warden.NewID())))
			cancel()
			if err == nil {
				return m
			}
		}
		<-time.After(time.Millisecond)
	}
}

// restarted starts a manager again, outside the measured time, and waits until it follows.
func (p *peers) restarted(m *peer) {
	p.start(m)
	index := p.leader().store.CommitIndex()
	p.must(m.store.WaitApplied(context.Background(), index))
}

// BenchmarkFailover kills the leader of three, as kill -9 does, and measures until another has committed a write.
func BenchmarkFailover(b *testing.B) {
	p := newPeers(b, 3)
	p.bootstrap(nil)
	var worst time.Duration
	for b.Loop() {
		leader := p.accepted()
		start := time.Now()
		killed := leader.cut()
		p.accepted()
		worst = max(worst, time.Since(start))
		b.StopTimer()
		killed()
		p.restarted(leader)
		b.StartTimer()
	}
	b.ReportMetric(float64(worst.Milliseconds()), "worst-ms")
}

// BenchmarkHandover stops the leader of three in order and measures until another has committed a write.
func BenchmarkHandover(b *testing.B) {
	p := newPeers(b, 3)
	p.bootstrap(nil)
	var worst time.Duration
	for b.Loop() {
		leader := p.accepted()
		s := leader.store
		leader.store = nil
		closed := make(chan error)
		start := time.Now()
		go func() { closed <- s.Close(context.Background()) }()
		p.accepted()
		worst = max(worst, time.Since(start))
		b.StopTimer()
		p.must(<-closed)
		p.restarted(leader)
		b.StartTimer()
	}
	b.ReportMetric(float64(worst.Microseconds())/1000, "worst-ms")
}

// BenchmarkRestart starts one of three managers again, which have 10,000 tasks, 1,000 nodes and 1,000 secrets in a snapshot and 10,000
// entries of a KiB in the log, and measures until it has applied all that the leader has. One that was stopped has a snapshot of nearly
// all; one that was killed applies again what came after its last. open-ms is the part before it has its snapshot and its log.
func BenchmarkRestart(b *testing.B) {
	for _, c := range []struct {
		name   string
		stop   bool
		replay int
	}{{"stopped", true, 8000}, {"killed/replay1000", false, 1000}, {"killed/replay8000", false, 8000}} {
		b.Run(c.name, func(b *testing.B) {
			p := newPeers(b, 3)
			p.seed(b, c.replay)
			var opened, spent time.Duration
			for b.Loop() {
				b.StopTimer()
				leader := p.leader()
				m := p.all[0]
				if m == leader {
					m = p.all[1]
				}
				if c.stop {
					p.must(m.stop())
				} else {
					m.kill()
				}
				index := leader.store.CommitIndex()
				cfg := p.config(m)
				b.StartTimer()
				start, from := time.Now(), cpu()
				s, err := store.Open(cfg)
				p.must(err)
				m.store = s
				opened += time.Since(start)
				p.must(s.WaitApplied(context.Background(), index))
				spent += cpu() - from
				if n := len(s.View().Tasks()); n != 10_000 {
					b.Fatal(n, "tasks")
				}
			}
			b.ReportMetric(float64(opened.Milliseconds())/float64(b.N), "open-ms")
			b.ReportMetric(float64(spent.Milliseconds())/float64(b.N), "cpu-ms")
		})
	}
}

// seed writes the files of managers that have run for long, and starts them.
func (p *peers) seed(b *testing.B, replay int) {
	b.Helper()
	w := newWorld10k()
	var members raft.Configuration
	for _, m := range p.all {
		members.Servers = append(members.Servers, raft.Server{ID: raft.ServerID(m.id), Address: raft.ServerAddress(m.id)})
	}
	state := w.state(b, true).View()
	for _, m := range p.all {
		snapshots, err := sealedlog.OpenSnapshots(m.dir, p.id, m.id, m.sealer, 2, p.config(m).Logger)
		p.must(err)
		sink, err := snapshots.Create(raft.SnapshotVersionMax, 1, 1, members, 1, nil)
		p.must(err)
		p.must(state.Write(sink))
		p.must(sink.Close())
		p.start(m)
	}
	leader := p.leader()
	commit := func(n int) {
		var turn atomic.Int64
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for i := turn.Add(1); i <= int64(n); i = turn.Add(1) {
					if _, err := leader.store.Propose(context.Background(), storetest.Command(describe(w.nodes[i%1000].Id, warden.NewID()))); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		for _, m := range p.all {
			p.must(m.store.WaitApplied(context.Background(), leader.store.CommitIndex()))
		}
	}
	commit(10_000 - replay)
	for _, m := range p.all {
		p.must(m.store.Snapshot())
	}
	commit(replay)
}

// BenchmarkLoad keeps three managers under full load, mixed of small commands and of large ones, for as long as -benchtime says, and fails
// where leadership changes: an election under load is a bug. Run it with -benchtime 10m.
func BenchmarkLoad(b *testing.B) {
	p := newPeers(b, 3)
	leader := p.bootstrap(nil)
	term := leader.store.Term()
	var failed atomic.Bool
	work := func() error {
		if leader.store.Term() != term || !leader.store.IsLeader() {
			return errors.New("there was an election")
		}
		_, err := leader.store.Propose(b.Context(), storetest.Command(describe(leader.id, warden.NewID())))
		return err
	}
	large := func() error {
		w := storetest.Service(warden.NewID(), warden.DefaultZone)
		w.Spec.Task.Env = []string{"A=" + string(bytes.Repeat([]byte("a"), 32000))}
		var ops = []func() error{
			func() error {
				_, err := leader.store.Propose(b.Context(), storetest.Command(store.Put(w, 0)))
				return err
			},
			func() error {
				_, err := leader.store.Propose(b.Context(), storetest.Command(store.Delete(leader.store.View().Service(w.Id))))
				return err
			},
		}
		for _, op := range ops {
			if err := op(); err != nil {
				return err
			}
		}
		return nil
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := large(); err != nil && !failed.Swap(true) {
					b.Error(err)
				}
			}
		})
	}
	wg.Go(func() { // compactions, as often as a test build has them
		tick := time.NewTicker(5 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				for _, m := range p.all {
					_ = m.store.Snapshot()
				}
			}
		}
	})
	benchClients(b, 128, "writes/s", work)
	close(stop)
	wg.Wait()
	if now := p.leader(); now != leader || leader.store.Term() != term {
		b.Errorf("term %d under %s, was %d under %s", now.store.Term(), now.id, term, leader.id)
	}
}
