// Package collector sets Go's garbage collector for a daemon that holds a replicated state: seldom while the heap is small,
// where a manager that admits a fleet would spend a tenth of its CPU on collecting, and as usual when it is large, so that it does
// not take several times what lives.
//
// It changes a setting of the whole process, and so is for main programs. What an operator sets by GOGC holds. It deliberately sets
// no memory limit: near one, a burst of work does little else than collect.
// Reference: "A Guide to the Go Garbage Collector", https://go.dev/doc/gc-guide.
package collector

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

const (
	growth     = 64 << 20 // bytes that a small heap may grow by between two collections
	percentMin = 90       // of a large one
	percentMax = 400
)

// Tune sets the collector, and sets it anew after each collection until ctx ends. It does nothing where GOGC is set.
func Tune(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	set()
	arm(ctx, new(sentinel))
}

// sentinel is garbage: its finalizer runs after each collection. It has a pointer, so that it shares its memory with nothing.
type sentinel struct{ _ *byte }

func arm(ctx context.Context, s *sentinel) {
	runtime.SetFinalizer(s, func(s *sentinel) {
		if ctx.Err() != nil {
			return
		}
		set()
		arm(ctx, s)
	})
}

func set() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	debug.SetGCPercent(Percent(live[0].Value.Uint64()))
}

// Percent returns what GOGC is to be for a heap of which live bytes survived the last collection. Pure.
func Percent(live uint64) int {
	return int(min(percentMax, max(percentMin, growth*100/max(live, 1))))
}
