package store_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

func TestWatchCoalesces(t *testing.T) {
	s := storetest.New(t)
	all, zones, nodes := s.Watch(), s.Watch(api.Kind_KIND_ZONE), s.Watch(api.Kind_KIND_NODE)
	a, b := storetest.Zone("a"), storetest.Zone("b")
	token := storetest.Token(api.Role_ROLE_WORKER)
	storetest.Propose(t, s, store.Put(a, 0), store.Put(token, 0))
	storetest.Propose(t, s, store.Put(b, 0))
	last := storetest.Propose(t, s, store.Delete(s.View().Zone("a")))
	for _, w := range []*store.Watcher{all, zones} {
		want := map[string]bool{a.Id: true, b.Id: true}
		if w == all {
			want[token.Id] = true
		}
		c, err := w.Next(t.Context())
		if err != nil || c.Resync || c.Index != last.Index || len(c.Keys) != len(want) {
			t.Fatalf("Next = %+v, %v; want %d keys of index %d", c, err, len(want), last.Index)
		}
		for _, k := range c.Keys {
			if !want[k.ID] {
				t.Errorf("unexpected key %v", k)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := nodes.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Next of a watch of nodes = %v, want it cancelled", err)
	}
	nodes.Close()
	nodes.Close()
	if _, err := nodes.Next(t.Context()); warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("Next after Close = %v", err)
	}
}

func TestRefusedCommandsAreNotPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := storetest.New(t, store.Wrap(storetest.Zone("pci")))
		w := s.Watch()
		defer w.Close()
		s.Propose(t.Context(), storetest.Command(store.Put(storetest.Zone("pci"), 0)))
		r := storetest.Propose(t, s, store.Put(storetest.Zone("a"), 0))
		if c, err := w.Next(t.Context()); err != nil || len(c.Keys) != 1 || c.Index != r.Index {
			t.Fatalf("Next = %+v, %v", c, err)
		}
	})
}

func TestWatchOverflowResyncs(t *testing.T) {
	s := storetest.New(t)
	w := s.Watch(api.Kind_KIND_TOKEN, api.Kind_KIND_TASK)
	defer w.Close()
	web := storetest.Service("web", "default")
	storetest.Propose(t, s, store.Put(storetest.Zone(warden.DefaultZone), 0), store.Put(web, 0), store.Put(storetest.Task(web, 1), 0))
	slot := uint64(1)
	fill := func(n int) {
		for n > 0 {
			var ops []*api.Operation
			for range min(n, warden.CommandOpsMax) {
				slot++
				n--
				ops = append(ops, store.Put(storetest.Task(web, slot), 0))
			}
			storetest.Propose(t, s, ops...)
		}
	}
	fill(warden.WatchKeysMax - 1)
	if c, err := w.Next(t.Context()); err != nil || c.Resync || len(c.Keys) != warden.WatchKeysMax {
		t.Fatalf("at the bound: %d keys, resync %v, %v", len(c.Keys), c.Resync, err)
	}
	fill(warden.WatchKeysMax + 1)
	if c, err := w.Next(t.Context()); err != nil || !c.Resync || len(c.Keys) != 0 {
		t.Fatalf("beyond it: %d keys, resync %v, %v", len(c.Keys), c.Resync, err)
	}
	fill(1)
	if c, err := w.Next(t.Context()); err != nil || c.Resync || len(c.Keys) != 1 {
		t.Fatalf("after it: %d keys, resync %v, %v", len(c.Keys), c.Resync, err)
	}
}

func TestWatchEndsWithTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := storetest.New(t)
		w := s.Watch()
		done := make(chan error)
		go func() { _, err := w.Next(context.Background()); done <- err }()
		synctest.Wait()
		if err := s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-done; warden.CodeOf(err) != warden.CodeUnavailable {
			t.Fatalf("Next = %v", err)
		}
		if _, err := s.Watch().Next(t.Context()); warden.CodeOf(err) != warden.CodeUnavailable {
			t.Fatalf("Next of a later watch = %v", err)
		}
	})
}

// Whoever reads a view, watches, and re-reads what the watch names, misses nothing, whatever the interleaving.
func TestWatchMissesNothing(t *testing.T) {
	s := storetest.New(t)
	go func() {
		for i := range warden.ZonesMax {
			s.Propose(context.Background(), storetest.Command(store.Put(storetest.Zone(fmt.Sprintf("z%d", i)), 0)))
		}
	}()
	w := s.Watch(api.Kind_KIND_ZONE)
	defer w.Close()
	seen := map[string]bool{}
	for _, z := range s.View().Zones() {
		seen[z.Id] = true
	}
	for len(seen) < warden.ZonesMax {
		c, err := w.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		v := s.View()
		if v.Index() < c.Index {
			t.Fatalf("the view is of %d, the changes of %d", v.Index(), c.Index)
		}
		for _, k := range c.Keys {
			if v.Object(k.Kind, k.ID) == nil {
				t.Fatalf("%v is not visible", k)
			}
			seen[k.ID] = true
		}
	}
}
