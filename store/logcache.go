package store

import (
	"sync"

	"github.com/hashicorp/raft"
)

// Bounds of the cache of the log. An entry may have warden.CommandBytes, so that a number alone would bound nothing.
const (
	logCacheEntries = 4096
	logCacheBytes   = 16 << 20 // of data; the newest entry is held whatever it has
)

// logCache holds the newest entries that were stored, for those who replicate and apply them a moment later. raft.LogCache bounds
// their number only, and drops all whenever raft compacts the log. Safe for concurrent use.
type logCache struct {
	raft.LogStore

	mu          sync.RWMutex // guards the rest; held for moments only
	ring        []*raft.Log  // the entry of index i is at i % len(ring)
	first, last uint64       // the indexes that are held; last 0: none
	bytes       int
}

var _ raft.MonotonicLogStore = (*logCache)(nil)

func newLogCache(below raft.LogStore) *logCache {
	return &logCache{LogStore: below, ring: make([]*raft.Log, logCacheEntries)}
}

// IsMonotonic implements raft.MonotonicLogStore for what is below.
func (c *logCache) IsMonotonic() bool {
	m, ok := c.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

// GetLog implements raft.LogStore. What it gives shares its bytes with the cache.
func (c *logCache) GetLog(index uint64, out *raft.Log) error {
	c.mu.RLock()
	var held *raft.Log
	if c.last > 0 && index >= c.first && index <= c.last {
		held = c.ring[index%uint64(len(c.ring))]
	}
	c.mu.RUnlock()
	if held != nil {
		*out = *held
		return nil
	}
	return c.LogStore.GetLog(index, out)
}

// StoreLog implements raft.LogStore.
func (c *logCache) StoreLog(l *raft.Log) error { return c.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. What it stores is held as it is, and must not be changed any more, as raft has it. After an
// error nothing at these indexes is held, since it may have been stored or not.
func (c *logCache) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	err := c.LogStore.StoreLogs(logs)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(logs[0].Index, ^uint64(0))
	if err != nil {
		return err
	}
	if c.last > 0 && c.last+1 != logs[0].Index { // a gap: the log below is empty but for these
		c.drop(0, ^uint64(0))
	}
	for _, l := range logs {
		if c.last-c.first+1 == uint64(len(c.ring)) && c.last > 0 {
			c.dropFirst()
		}
		if c.last == 0 {
			c.first = l.Index
		}
		c.last = l.Index
		c.ring[l.Index%uint64(len(c.ring))] = l
		c.bytes += size(l)
		for c.bytes > logCacheBytes && c.first < c.last {
			c.dropFirst()
		}
	}
	return nil
}

// DeleteRange implements raft.LogStore.
func (c *logCache) DeleteRange(low, high uint64) error {
	c.mu.Lock()
	c.drop(low, high)
	c.mu.Unlock()
	return c.LogStore.DeleteRange(low, high)
}

// drop lets go of the entries from low to high, and of more where they lie in the middle. mu is held.
func (c *logCache) drop(low, high uint64) {
	for c.last > 0 && low <= c.first && high >= c.first {
		c.dropFirst()
	}
	for c.last > 0 && low <= c.last && high >= c.first {
		i := c.last % uint64(len(c.ring))
		c.bytes -= size(c.ring[i])
		c.ring[i] = nil
		if c.last--; c.last < c.first {
			c.first, c.last = 0, 0
		}
	}
}

// dropFirst lets go of the oldest. There is one. mu is held.
func (c *logCache) dropFirst() {
	i := c.first % uint64(len(c.ring))
	c.bytes -= size(c.ring[i])
	c.ring[i] = nil
	if c.first++; c.first > c.last {
		c.first, c.last = 0, 0
	}
}

func size(l *raft.Log) int { return len(l.Data) + len(l.Extensions) }
