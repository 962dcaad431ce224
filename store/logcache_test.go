package store_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"

	"warden/store"
)

// failing is a log that fails now and then, having stored or not.
type failing struct {
	*raft.InmemStore
	fail, applied bool
	reads         int
}

func (f *failing) StoreLogs(l []*raft.Log) error {
	if !f.fail || f.applied {
		if err := f.InmemStore.StoreLogs(l); err != nil {
			return err
		}
	}
	if f.fail {
		return errors.New("the disk is full")
	}
	return nil
}

func (f *failing) GetLog(i uint64, l *raft.Log) error {
	f.reads++
	return f.InmemStore.GetLog(i, l)
}

// TestTheCacheShowsTheLog: whatever raft does with it, what comes out of the cache is what is in the log below.
func TestTheCacheShowsTheLog(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		below := &failing{InmemStore: raft.NewInmemStore()}
		c := store.Cached(below)
		next := uint64(1)
		put := func(n int, size int) error {
			var es []*raft.Log
			for i := range uint64(n) {
				es = append(es, &raft.Log{Index: next + i, Term: rapid.Uint64().Draw(t, "term"), Data: bytes.Repeat([]byte("x"), size)})
			}
			return c.StoreLogs(es)
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0, 1:
				n := rapid.IntRange(1, 3000).Draw(t, "entries")
				if err := put(n, rapid.SampledFrom([]int{0, 10, 9000}).Draw(t, "size")); err != nil {
					t.Fatal(err)
				}
				next += uint64(n)
			case 2: // another leader's entries replace ours
				back := min(next-1, uint64(rapid.IntRange(1, 50).Draw(t, "back")))
				if back == 0 {
					continue
				}
				if err := c.DeleteRange(next-back, next-1); err != nil {
					t.Fatal(err)
				}
				next -= back
			case 3: // compaction
				first, _ := below.FirstIndex()
				if upTo := uint64(rapid.IntRange(0, 5000).Draw(t, "up to")); first > 0 && first+upTo < next {
					if err := c.DeleteRange(first, first+upTo); err != nil {
						t.Fatal(err)
					}
				}
			case 4:
				below.fail, below.applied = true, rapid.Bool().Draw(t, "applied")
				if put(2, 5) == nil {
					t.Fatal("no error")
				}
				below.fail = false
				if below.applied { // raft stores over it
					if err := below.DeleteRange(next, next+1); err != nil {
						t.Fatal(err)
					}
				}
			case 5: // a snapshot that a leader sent
				first, _ := below.FirstIndex()
				if err := c.DeleteRange(first, next); err != nil {
					t.Fatal(err)
				}
				next += 100
			}
			first, _ := below.FirstIndex()
			for _, i := range []uint64{0, first - 1, first, first + 1, next - 5000, next - 4097, next - 4096, next - 2000, next - 2, next - 1, next, next + 1} {
				var got, want raft.Log
				gerr, werr := c.GetLog(i, &got), below.InmemStore.GetLog(i, &want)
				if gerr != werr || got.Index != want.Index || got.Term != want.Term || len(got.Data) != len(want.Data) {
					t.Fatalf("GetLog(%d) = %d of term %d, %v; below is %d of term %d, %v", i, got.Index, got.Term, gerr, want.Index, want.Term, werr)
				}
			}
		}
	})
}

// TestTheCacheIsBounded: in entries and in bytes, and serves what it holds itself.
func TestTheCacheIsBounded(t *testing.T) {
	for _, c := range []struct{ size, held int }{{10, 4096}, {1 << 20, 16}, {17 << 20, 1}} {
		below := &failing{InmemStore: raft.NewInmemStore()}
		cache := store.Cached(below)
		n := c.held + 3
		for i := range n {
			if err := cache.StoreLogs([]*raft.Log{{Index: uint64(i + 1), Data: make([]byte, c.size)}}); err != nil {
				t.Fatal(err)
			}
		}
		for i := range n {
			if err := cache.GetLog(uint64(i+1), &raft.Log{}); err != nil {
				t.Fatal(err)
			}
		}
		if below.reads != n-c.held {
			t.Errorf("entries of %d bytes: %d of %d were read from below, want %d", c.size, below.reads, n, n-c.held)
		}
	}
}
