package tally_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"warden/internal/tally"
)

// Whatever is observed is in exactly one place, under the first bound that is not below it.
func TestHistogram(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h tally.Histogram
		var sum time.Duration
		want := make([]uint64, len(h.Read().Bounds)+1)
		for _, ns := range rapid.SliceOf(rapid.Int64Range(-1e9, 20e9)).Draw(t, "ns") {
			d := time.Duration(ns)
			h.Observe(d)
			sum += max(d, 0)
			i := slices.IndexFunc(h.Read().Bounds, func(b float64) bool { return max(d, 0).Seconds() <= b })
			if i < 0 {
				i = len(want) - 1
			}
			want[i]++
		}
		r := h.Read()
		var all uint64
		for _, n := range want {
			all += n
		}
		if !slices.Equal(r.Counts, want[:len(want)-1]) || r.Count != all || r.SumSeconds != sum.Seconds() {
			t.Fatalf("Read = %v of %d, sum %v, want %v of %d, sum %v", r.Counts, r.Count, r.SumSeconds, want, all, sum)
		}
	})
}

// Words without end take no memory without end.
func TestPairsAreBounded(t *testing.T) {
	var p tally.Pairs
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 1000 {
				p.Add(fmt.Sprint(g), fmt.Sprint(i))
			}
		})
	}
	wg.Wait()
	p.Add("0", "0")
	all := p.Read()
	var sum uint64
	for _, x := range all {
		sum += x.Count
	}
	if len(all) > 257 || sum != 4001 {
		t.Errorf("%d pairs that add up to %d, want at most 257 and 4001", len(all), sum)
	}
	if !slices.IsSortedFunc(all, func(a, b tally.Pair) int { return slices.Compare([]string{a.A, a.B}, []string{b.A, b.B}) }) {
		t.Error("not sorted")
	}
}

func BenchmarkObserve(b *testing.B) {
	var h tally.Histogram
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			h.Observe(3 * time.Millisecond)
		}
	})
}
