package store_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"warden/store"
	"warden/store/sealedlog"
	"warden/store/storetest"
)

// benchClients has that many callers make b.N calls together, each waiting for its own, and reports unit.
func benchClients(b *testing.B, clients int, unit string, call func() error) {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	start := time.Now()
	for range clients {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := call(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), unit)
}

// BenchmarkWrites commits commands of 1 KiB on three managers with real files and TLS over loopback, all in this process. store is all of it;
// sealed is raft on the sealed log, bare is raft on bbolt without sealing, each with a state machine that does nothing.
func BenchmarkWrites(b *testing.B) {
	clients := []int{1, 16, 128, 1024}
	for _, n := range clients {
		b.Run(fmt.Sprintf("store/%dclients", n), func(b *testing.B) {
			leader := newPeers(b, 3).bootstrap(nil)
			var turn atomic.Int64
			benchClients(b, n, "writes/s", func() error {
				_, err := leader.store.Propose(b.Context(), storetest.Command(describe(leader.id, fmt.Sprint(turn.Add(1)))))
				return err
			})
		})
	}
	for _, sealed := range []bool{true, false} {
		for _, n := range clients {
			b.Run(fmt.Sprintf("%s/%dclients", map[bool]string{true: "sealed", false: "bare"}[sealed], n), func(b *testing.B) {
				leader := newRafts(b, sealed)
				data := bytes.Repeat([]byte("1"), 1024)
				benchClients(b, n, "writes/s", func() error { return leader.Apply(data, 0).Error() })
			})
		}
	}
}

// BenchmarkReads asks a majority for the right to read, on three managers as BenchmarkWrites has them; idle, or beside 16 clients that write.
func BenchmarkReads(b *testing.B) {
	for _, beside := range []string{"idle", "writes"} {
		for _, n := range []int{1, 16, 128} {
			b.Run(fmt.Sprintf("%s/%dclients", beside, n), func(b *testing.B) {
				leader := newPeers(b, 3).bootstrap(nil)
				ctx, cancel := context.WithCancel(b.Context())
				var writers sync.WaitGroup
				defer writers.Wait()
				defer cancel()
				for w := range 16 {
					if beside == "writes" {
						writers.Go(func() {
							for i := 0; ctx.Err() == nil; i++ {
								leader.store.Propose(ctx, storetest.Command(describe(leader.id, fmt.Sprint(w, i))))
							}
						})
					}
				}
				benchClients(b, n, "reads/s", func() error { return leader.store.Fresh(b.Context()) })
			})
		}
	}
}

// newRafts starts three managers' raft without the store and returns the leader's.
func newRafts(b *testing.B, sealed bool) *raft.Raft {
	b.Helper()
	p := newPeers(b, 3)
	var all []*raft.Raft
	var members raft.Configuration
	for _, m := range p.all {
		members.Servers = append(members.Servers, raft.Server{ID: raft.ServerID(m.id), Address: raft.ServerAddress(m.id)})
	}
	discard := slog.New(slog.DiscardHandler)
	for _, m := range p.all {
		cfg := p.config(m)
		var logs raft.LogStore
		var stable raft.StableStore
		if sealed {
			l, err := sealedlog.Open(m.dir, p.id, m.id, m.sealer, discard)
			p.must(err)
			b.Cleanup(func() { l.Close() })
			logs, stable = l, l
		} else {
			l := openBare(b, m.dir)
			logs, stable = l, l
		}
		snapshots, err := sealedlog.OpenSnapshots(m.dir, p.id, m.id, m.sealer, 2, discard)
		p.must(err)
		p.must(raft.BootstrapCluster(store.RaftConfig(cfg), logs, stable, snapshots, cfg.Transport, members))
		r, err := raft.NewRaft(store.RaftConfig(cfg), nothing{}, store.Cached(logs), stable, snapshots, cfg.Transport)
		p.must(err)
		b.Cleanup(func() { r.Shutdown().Error() })
		all = append(all, r)
	}
	for {
		for _, r := range all {
			if r.State() == raft.Leader && r.Barrier(0).Error() == nil {
				return r
			}
		}
		<-time.After(5 * time.Millisecond)
	}
}
