//go:build wardentest

package warden

import "time"

// LeafTTLMin in the test build: short enough to see several renewals in one test.
const LeafTTLMin = 5 * time.Second

// PinStale in the test build.
const PinStale = 5 * time.Second

// Snapshots in the test build.
const (
	SnapshotInterval  = 2 * time.Second
	SnapshotThreshold = 64
	SnapshotTrailing  = 32
)
