package store_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/store"
	"warden/store/storetest"
)

// TestCloseAnswersProposals: raft forgets those that are committed but not applied when it stops. Who waits for one is told that nobody
// knows, since the next start applies it.
func TestCloseAnswersProposals(t *testing.T) {
	s := storetest.New(t)
	release := sync.OnceFunc(store.HoldApply(s))
	defer release()
	const n = 20
	errs := make(chan error, n)
	for range n {
		before := store.Handed(s)
		go func() {
			_, err := s.Propose(context.Background(), storetest.Command(store.Put(storetest.Zone(warden.NewID()), 0)))
			errs <- err
		}()
		until(t, func() bool { return store.Handed(s) > before })
	}
	closed := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nothing is waited for
	go func() { closed <- s.Close(ctx) }()
	until(t, func() bool { return !s.IsLeader() })
	release()
	limit := time.After(20 * time.Second)
	for range n {
		select {
		case err := <-errs:
			if code := warden.CodeOf(err); err != nil && code != warden.CodeTimeout {
				t.Errorf("a command that the next start applies failed with %v", err)
			}
		case <-limit:
			t.Fatal("a proposal hangs after Close")
		}
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := s.Propose(t.Context(), storetest.Command()); warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("proposing to a closed store = %v", err)
	}
}

// TestCloseLeavesNothingBehind: no goroutine waits on, for what was asked of raft and given up before its answer.
func TestCloseLeavesNothingBehind(t *testing.T) {
	for range 30 {
		synctest.Test(t, func(t *testing.T) { // fails where a goroutine is left
			s := storetest.New(t)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for range 50 {
				wg.Go(func() { s.Propose(ctx, storetest.Command(store.Put(storetest.Zone(warden.NewID()), 0))) })
				wg.Go(func() { s.VerifyLeader(ctx) })
			}
			cancel()
			wg.Wait()
		})
	}
}

func until(t *testing.T, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(limit) {
			t.Fatal("waited 20 s")
		}
		<-time.After(time.Millisecond)
	}
}
