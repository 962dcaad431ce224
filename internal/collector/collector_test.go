package collector_test

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"warden/internal/collector"
)

func TestPercent(t *testing.T) {
	for live, want := range map[uint64]int{0: 400, 1 << 20: 400, 16 << 20: 400, 32 << 20: 200, 64 << 20: 100, 80 << 20: 90, 1 << 40: 90} {
		if got := collector.Percent(live); got != want {
			t.Errorf("Percent(%d) = %d, want %d", live, got, want)
		}
	}
}

// What the operator has set stays; what Tune sets follows the heap, and stops when it is told to.
func TestTune(t *testing.T) {
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	current := func() int {
		p := debug.SetGCPercent(100)
		debug.SetGCPercent(p)
		return p
	}
	t.Setenv("GOGC", "100")
	collector.Tune(t.Context())
	if got := current(); got != 100 {
		t.Errorf("with GOGC set, Tune sets %d", got)
	}
	os.Unsetenv("GOGC")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	collector.Tune(ctx)
	if got := current(); got != 400 {
		t.Errorf("Tune of a small heap sets %d, want 400", got)
	}
	large := make([]byte, 100<<20)
	await := func(want int) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for current() != want {
			runtime.GC() // its finalizers run some time after
			select {
			case <-deadline:
				t.Fatalf("GOGC = %d, want %d", current(), want)
			default:
			}
		}
	}
	await(90)
	runtime.KeepAlive(large)
	await(400)
	stop()
	runtime.GC()
	runtime.GC()
	debug.SetGCPercent(123)
	for range 3 {
		runtime.GC()
	}
	if got := current(); got != 123 {
		t.Errorf("after its end Tune sets %d", got)
	}
}
