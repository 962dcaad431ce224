package store

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"warden"
	"warden/api"
)

// Key names one record.
type Key struct {
	Kind api.Kind
	ID   string
}

// Changes is what happened since the last Next: coalesced, so a key stands for any number of changes of its record, its
// creation and its removal. Keys are sorted by kind and ID. With Resync all may have changed and Keys is empty. Index is that of
// the newest change; Store.View is at least as new.
type Changes struct {
	Resync bool
	Keys   []Key
	Index  uint64
}

// Watcher collects changes from its making on. It holds at most warden.WatchKeysMax keys, then asks for a resync: a slow
// reader costs a bounded amount of memory and never holds up the apply.
type Watcher struct {
	hub    *hub
	kinds  map[api.Kind]bool // nil: all
	signal chan struct{}     // holds one token while something is pending
	closed chan struct{}

	pending map[Key]struct{} // guarded by hub.mu, as the two below
	resync  bool
	index   uint64
}

// Next waits for changes. One reader at a time. Errors: those of ctx; CodeUnavailable after Close of the watcher or store.
func (w *Watcher) Next(ctx context.Context) (Changes, error) {
	for {
		if c, ok := w.take(); ok {
			return c, nil
		}
		select {
		case <-w.signal:
		case <-w.closed:
			return Changes{}, warden.Errorf(warden.CodeUnavailable, "watching the state", "the watch is closed")
		case <-ctx.Done():
			return Changes{}, warden.Wrap("watching the state", ctx.Err())
		}
	}
}

// Close ends the watch. It may be called more than once.
func (w *Watcher) Close() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	w.hub.remove(w)
}

func (w *Watcher) take() (Changes, bool) {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	if !w.resync && len(w.pending) == 0 {
		return Changes{}, false
	}
	c := Changes{Resync: w.resync, Index: w.index}
	if !w.resync {
		c.Keys = sortedKeys(w.pending)
	}
	w.resync, w.pending = false, map[Key]struct{}{}
	return c, true
}

// hub hands changes to the watchers.
type hub struct {
	mu       sync.Mutex // guards all fields and the watchers' pending changes; held only to copy
	watchers map[*Watcher]struct{}
	tick     chan struct{} // closed and replaced by each publication
	closed   bool
}

func newHub() *hub { return &hub{watchers: map[*Watcher]struct{}{}, tick: make(chan struct{})} }

func (h *hub) watch(kinds []api.Kind) *Watcher {
	w := &Watcher{hub: h, signal: make(chan struct{}, 1), closed: make(chan struct{}), pending: map[Key]struct{}{}}
	if len(kinds) > 0 {
		w.kinds = map[api.Kind]bool{}
		for _, k := range kinds {
			w.kinds[k] = true
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		close(w.closed)
		return w
	}
	h.watchers[w] = struct{}{}
	return w
}

// publish tells the watchers what the command at index changed. resync: everything may have.
func (h *hub) publish(index uint64, keys []Key, resync bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.tick)
	h.tick = make(chan struct{})
	for w := range h.watchers {
		woken := false
		if resync {
			w.resync, woken = true, true
		}
		for _, k := range keys {
			if w.kinds == nil || w.kinds[k.Kind] {
				woken = true
				if !w.resync {
					w.pending[k] = struct{}{}
				}
			}
		}
		if len(w.pending) > warden.WatchKeysMax {
			w.resync = true
		}
		if w.resync {
			clear(w.pending)
		}
		if !woken {
			continue
		}
		w.index = index
		select {
		case w.signal <- struct{}{}:
		default:
		}
	}
}

// next returns a channel that the next publication closes.
func (h *hub) next() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tick
}

// close ends all watches.
func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for w := range h.watchers {
		h.remove(w)
	}
}

// remove ends one watch. h.mu is held.
func (h *hub) remove(w *Watcher) {
	if _, ok := h.watchers[w]; ok {
		delete(h.watchers, w)
		close(w.closed)
	}
}

func sortedKeys[V any](set map[Key]V) []Key {
	keys := make([]Key, 0, len(set))
	for k := range set {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b Key) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID)) })
	return keys
}
