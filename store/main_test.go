package store_test

import (
	"testing"

	"warden/internal/leaktest"
)

func TestMain(m *testing.M) {
	// A store that is killed, which is Close with a context that is over, does not wait for raft's answers, and raft forgets some.
	leaktest.Main(m, "warden/store.(*Store).ask.func1")
}
