//go:build !wardentest

package warden

import "time"

// LeafTTLMin is the shortest life of a node leaf that an operator can set. The test build (tag wardentest) lowers it.
const LeafTTLMin = time.Hour

// PinStale is how long after the last contact with any manager a node still insists on the key hashes that it was told. The
// test build shortens it.
const PinStale = 10 * time.Minute

// Snapshots of the replicated state: how often it is looked whether one is due, after how many entries it is, and how many
// entries are kept behind it for followers that lag. The test build takes them early, so that tests meet them.
const (
	SnapshotInterval  = 30 * time.Second
	SnapshotThreshold = 2048
	SnapshotTrailing  = 10240
)
