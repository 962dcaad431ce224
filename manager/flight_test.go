package manager

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestFlight: who comes while a run is under way gets the next one, together with all others, and its error.
func TestFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fl flight
		runs, step := 0, make(chan error)
		f := func() error { runs++; return <-step }
		var wg sync.WaitGroup
		failed := errors.New("no leader")
		wg.Go(func() {
			if err := fl.join(t.Context(), f); err != nil {
				t.Errorf("the first: %v", err)
			}
		})
		synctest.Wait()
		for range 100 {
			wg.Go(func() {
				if err := fl.join(t.Context(), f); err != failed {
					t.Errorf("during the first: %v, want the second's error", err)
				}
			})
		}
		synctest.Wait()
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := fl.join(impatient, f); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("one that can't wait: %v", err)
		}
		step <- nil
		synctest.Wait()
		step <- failed
		wg.Wait()
		if runs != 2 {
			t.Errorf("%d runs for 101 callers, want 2", runs)
		}
		synctest.Wait()
		go func() { step <- nil }()
		if err := fl.join(t.Context(), f); err != nil || runs != 3 {
			t.Errorf("when it was idle: %v after %d runs", err, runs)
		}
	})
}
