package sealedlog_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"warden/store/sealedlog"
)

// heard keeps the durations that a log says.
type heard struct {
	slog.Handler
	mu   sync.Mutex // guards took
	took map[string]time.Duration
}

func (h *heard) Enabled(context.Context, slog.Level) bool { return true }
func (h *heard) Handle(_ context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.Attrs(func(a slog.Attr) bool {
		if a.Value.Kind() == slog.KindDuration {
			h.took[a.Key] = a.Value.Duration()
		}
		return true
	})
	return nil
}

func kib(i uint64) *raft.Log {
	return &raft.Log{Index: i, Term: 1, Type: raft.LogCommand, Data: bytes.Repeat([]byte{byte(i)}, 1024), AppendedAt: time.Unix(1_800_000_000, 0).UTC()}
}

// BenchmarkReseal re-seals a log of 16,384 entries of 1 KiB while one writer appends. exclusive-ms is how long nobody could read or
// write; append-ms the slowest append meanwhile.
func BenchmarkReseal(b *testing.B) {
	dir, h := b.TempDir(), newHolder(b)
	ear := &heard{took: map[string]time.Duration{}}
	l, err := sealedlog.Open(dir, cluster, node, h, slog.New(ear))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	next := uint64(1)
	for next <= 16384 {
		var es []*raft.Log
		for range 512 {
			es = append(es, kib(next))
			next++
		}
		if err := l.StoreLogs(es); err != nil {
			b.Fatal(err)
		}
	}
	var exclusive, slowest time.Duration
	for b.Loop() {
		h.rotate(b)
		done, written := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(written)
			for {
				select {
				case <-done:
					return
				default:
				}
				start := time.Now()
				if err := l.StoreLogs([]*raft.Log{kib(next)}); err != nil {
					b.Error(err)
					return
				}
				slowest = max(slowest, time.Since(start))
				next++
			}
		}()
		if err := l.Reseal(b.Context()); err != nil {
			b.Fatal(err)
		}
		close(done)
		<-written
		h.drop(b)
		exclusive = max(exclusive, ear.took["exclusive"])
	}
	b.ReportMetric(float64(exclusive.Microseconds())/1000, "exclusive-ms")
	b.ReportMetric(float64(slowest.Microseconds())/1000, "append-ms")
}

// BenchmarkStoreLogs appends entries of 1 KiB in batches as raft does.
func BenchmarkStoreLogs(b *testing.B) {
	for _, batch := range []uint64{1, 16, 128, 512} {
		b.Run(fmt.Sprintf("batch%d", batch), func(b *testing.B) {
			l := openLog(b, b.TempDir(), newHolder(b))
			next := uint64(1)
			for b.Loop() {
				var es []*raft.Log
				for range batch {
					es = append(es, kib(next))
					next++
				}
				if err := l.StoreLogs(es); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(next-1)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

// BenchmarkOpen opens a log of as many entries as a manager keeps at most, about 1 KiB each.
func BenchmarkOpen(b *testing.B) {
	dir, h := b.TempDir(), newHolder(b)
	l := openLog(b, dir, h)
	for next := uint64(1); next <= 18432; {
		var es []*raft.Log
		for range 512 {
			es = append(es, kib(next))
			next++
		}
		if err := l.StoreLogs(es); err != nil {
			b.Fatal(err)
		}
	}
	l.Close()
	b.Logf("%d bytes", len(readFile(b, filepath.Join(dir, "log.db"))))
	for b.Loop() {
		l, err := sealedlog.Open(dir, cluster, node, h, discard)
		if err != nil {
			b.Fatal(err)
		}
		l.Close()
	}
}
