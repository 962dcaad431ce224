//go:build !wardentest

package warden

import "time"

// LeafTTLMin is the shortest life of a node leaf that an operator can set. The test build (tag wardentest) lowers it.
const LeafTTLMin = time.Hour

// PinStale is how long after the last contact with any manager a node still insists on the key hashes that it was told. The
// test build shortens it.
const PinStale = 10 * time.Minute
