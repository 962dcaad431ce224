package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// steps is a work of two contestants whose measurements are what next does.
func steps(next func(by string, k int) (float64, error)) []work {
	k := 0
	return []work{{name: "steps", by: []string{first, "swarmkit"}, rows: []row{{what: "step", unit: "s", against: "swarmkit"}},
		do: func(_ context.Context, by, _ string, add func(int, float64)) error {
			k++
			v, err := next(by, k)
			if err == nil {
				add(0, v)
			}
			return err
		}}}
}

// others returns a watch after which others took these shares, the last one again and again.
func others(shares ...float64) func() func() float64 {
	return func() func() float64 {
		share := shares[0]
		if len(shares) > 1 {
			shares = shares[1:]
		}
		return func() float64 { return share }
	}
}

// TestMeasureAgain: a measurement that others disturbed counts only where there are no tries left, and then is told.
func TestMeasureAgain(t *testing.T) {
	for _, c := range []struct {
		shares []float64
		again  int
		want   []float64 // of the first
		others float64
	}{
		{[]float64{0}, 2, []float64{1}, 0},
		{[]float64{0.9, 0.8, 0.01}, 2, []float64{3}, 0.01},
		{[]float64{0.9, 0.01}, 0, []float64{1}, 0.9},
		{[]float64{0.9, 0.8, 0.7, 0.01}, 2, []float64{3}, 0.7},
	} {
		var r report
		err := (options{log: t.Output(), watch: others(c.shares...), runs: 1, again: c.again, timeout: time.Minute}).measure(t.Context(), steps(func(_ string, k int) (float64, error) { return float64(k), nil }), &r)
		if got := r.results[0].values; err != nil || !slices.Equal(got[first], c.want) || r.others != c.others {
			t.Errorf("others %v, again %d: %v, %v, %v; want %v, %v", c.shares, c.again, got, r.others, err, c.want, c.others)
		}
	}
}

// TestMeasureTurns: each run has one value of each, and who was first is second the next time.
func TestMeasureTurns(t *testing.T) {
	var r report
	if err := (options{log: t.Output(), watch: others(0), runs: 2, timeout: time.Minute}).measure(t.Context(), steps(func(_ string, k int) (float64, error) { return float64(k), nil }), &r); err != nil {
		t.Fatal(err)
	}
	if got := r.results[0].values; r.runs != 2 || !slices.Equal(got[first], []float64{1, 4}) || !slices.Equal(got["swarmkit"], []float64{2, 3}) {
		t.Errorf("%d runs gave %v", r.runs, got)
	}
}

// TestMeasureFailureGoesOn: what fails is told and misses in its row, and nothing else does.
func TestMeasureFailureGoesOn(t *testing.T) {
	var r report
	err := (options{log: t.Output(), watch: others(0), runs: 3, timeout: time.Minute}).measure(t.Context(), steps(func(_ string, k int) (float64, error) {
		if k == 2 {
			return 0, errors.New("broken")
		}
		return float64(k), nil
	}), &r)
	if err == nil || !strings.Contains(err.Error(), "run 1: steps by SwarmKit: broken") {
		t.Errorf("measure() = %v", err)
	}
	if got := r.results[0].values; r.runs != 3 || len(got[first]) != 3 || len(got["swarmkit"]) != 2 {
		t.Errorf("%d runs gave %v", r.runs, got)
	}
	if table := r.table(); !strings.Contains(table, "1 of 3 failed") {
		t.Errorf("the failure is not told:\n%s", table)
	}
}

// TestMeasureInterrupted: a run that is not whole does not count.
func TestMeasureInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var r report
	err := (options{log: t.Output(), watch: others(0), runs: 3, timeout: time.Minute}).measure(ctx, steps(func(_ string, k int) (float64, error) {
		if k == 4 {
			cancel()
		}
		return float64(k), nil
	}), &r)
	if !errors.Is(err, errInterrupted) {
		t.Errorf("measure() = %v", err)
	}
	if got := r.results[0].values; r.runs != 1 || len(got[first]) != 1 || len(got["swarmkit"]) != 1 {
		t.Errorf("%d runs gave %v", r.runs, got)
	}
}

// TestMeasureWithin: no run begins that would not end in time.
func TestMeasureWithin(t *testing.T) {
	r := report{began: time.Now().Add(-time.Hour)}
	err := (options{log: t.Output(), watch: others(0), runs: 3, timeout: time.Minute, within: time.Minute}).measure(t.Context(), steps(func(_ string, k int) (float64, error) { return float64(k), nil }), &r)
	if err != nil || r.runs != 1 {
		t.Errorf("%d runs, %v; want 1: an hour is over", r.runs, err)
	}
}

// TestMeasureTimeout: a measurement that hangs fails.
func TestMeasureTimeout(t *testing.T) {
	hang := steps(nil)
	hang[0].do = func(ctx context.Context, _, _ string, _ func(int, float64)) error { <-ctx.Done(); return ctx.Err() }
	var r report
	if err := (options{log: t.Output(), watch: others(0), runs: 1, timeout: time.Millisecond}).measure(t.Context(), hang, &r); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("measure() = %v", err)
	}
	if table := r.table(); !strings.Contains(table, "failed") {
		t.Errorf("the failure is not told:\n%s", table)
	}
}
