// Package tally counts what happens, for the facts that a daemon gives of itself.
//
// It knows nothing of Prometheus and of where facts go. What counts must cost next to nothing where it counts: a Histogram
// takes no lock, Pairs takes one for a map access. Both are bounded in memory whatever is counted. The zero values are ready.
package tally

import (
	"cmp"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"warden/api"
)

// bounds of all histograms, in seconds: from what one append costs to what makes an operator look.
var bounds = [...]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// Histogram counts durations. Safe for concurrent use.
type Histogram struct {
	counts [len(bounds) + 1]atomic.Uint64 // the last: above all bounds
	sum    atomic.Int64                   // nanoseconds
}

// Observe counts d; a negative one, of two clocks that differ, counts as none at all. It takes some nanoseconds.
func (h *Histogram) Observe(d time.Duration) {
	d = max(d, 0)
	h.counts[sort.SearchFloat64s(bounds[:], d.Seconds())].Add(1)
	h.sum.Add(int64(d))
}

// Read returns what was counted. What is counted meanwhile is in it or not.
func (h *Histogram) Read() *api.Histogram {
	r := &api.Histogram{Bounds: slices.Clone(bounds[:]), Counts: make([]uint64, len(bounds)), SumSeconds: time.Duration(h.sum.Load()).Seconds()}
	for i := range h.counts {
		n := h.counts[i].Load()
		r.Count += n
		if i < len(bounds) {
			r.Counts[i] = n
		}
	}
	return r
}

// pairsMax bounds a Pairs: past it everything new counts under Other.
const pairsMax = 256

// Other is what is counted where there is no room.
const Other = "other"

// Pair is two words and how often they came together.
type Pair struct {
	A, B  string
	Count uint64
}

// Pairs counts pairs of words. Safe for concurrent use.
type Pairs struct {
	mu sync.Mutex // guards n; held for map access only
	n  map[[2]string]uint64
}

// Add counts one. The words must come from a closed set: they become labels.
func (p *Pairs) Add(a, b string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := [2]string{a, b}
	if _, known := p.n[key]; !known && len(p.n) >= pairsMax {
		key = [2]string{Other, Other}
	}
	if p.n == nil {
		p.n = map[[2]string]uint64{}
	}
	p.n[key]++
}

// Read returns all pairs, sorted.
func (p *Pairs) Read() []Pair {
	p.mu.Lock()
	out := make([]Pair, 0, len(p.n))
	for k, n := range p.n {
		out = append(out, Pair{k[0], k[1], n})
	}
	p.mu.Unlock()
	slices.SortFunc(out, func(a, b Pair) int { return cmp.Or(cmp.Compare(a.A, b.A), cmp.Compare(a.B, b.B)) })
	return out
}

// Tasks makes counts by state of a map, in the order in which tasks go through them.
func Tasks(n map[api.TaskState]uint64) []*api.TaskCount {
	states := make([]api.TaskState, 0, len(n))
	for s := range n {
		states = append(states, s)
	}
	slices.Sort(states)
	out := make([]*api.TaskCount, 0, len(states))
	for _, s := range states {
		out = append(out, &api.TaskCount{State: s.Word(), Count: n[s]})
	}
	return out
}

// Result is the word for how something went: "ok", or the code of its error.
func Result(code string) string { return cmp.Or(code, "ok") }
