package store

import "github.com/hashicorp/raft"

// RaftConfig is how a store sets raft up.
var RaftConfig = raftConfig

// Cached is how a store reads its log.
func Cached(logs raft.LogStore) raft.LogStore { return newLogCache(logs) }
