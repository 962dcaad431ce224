package store

import "github.com/hashicorp/raft"

// RaftConfig is how a store sets raft up.
var RaftConfig = raftConfig

// Cached is how a store reads its log.
func Cached(logs raft.LogStore) raft.LogStore { return newLogCache(logs) }

// HoldApply holds the apply up, in the command that comes next, until release is called.
func HoldApply(s *Store) (release func()) {
	s.machine.hub.mu.Lock()
	return s.machine.hub.mu.Unlock
}

// Handed returns the index up to which raft has handed commands to the apply.
func Handed(s *Store) uint64 { return s.raft.AppliedIndex() }
