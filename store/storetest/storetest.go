// Package storetest gives other packages' tests a store of one manager that keeps everything in memory.
//
// Seeded objects bypass the rules of the apply; commands don't.
package storetest

import (
	"context"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/api"
	"warden/store"
)

// New returns a store of a one-manager cluster that leads and holds the objects as they are; objects without a meta get
// version 1. The test's end closes it. It takes some 50 ms.
func New(t testing.TB, objects ...*api.Object) *store.Store {
	t.Helper()
	return Open(t, warden.NewID(), warden.NewID(), objects...)
}

// Open is New with given cluster and node IDs.
func Open(t testing.TB, clusterID, nodeID string, objects ...*api.Object) *store.Store {
	t.Helper()
	_, transport := raft.NewInmemTransport(raft.ServerAddress(nodeID))
	snapshots, logs := raft.NewInmemSnapshotStore(), raft.NewInmemStore()
	servers := []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(nodeID), Address: raft.ServerAddress(nodeID)}}
	sink, err := snapshots.Create(raft.SnapshotVersionMax, 1, 1, raft.Configuration{Servers: servers}, 1, transport)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.WriteSnapshot(sink, objects...); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(store.Config{
		ClusterID: clusterID, NodeID: nodeID, Transport: transport, Heartbeat: 20 * time.Millisecond,
		Stores: &store.Stores{Logs: logs, Stable: logs, Snapshots: snapshots},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.WaitLeader(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

// Command returns a command of the system with a new request ID.
func Command(operations ...*api.Operation) *api.Command {
	return &api.Command{Actor: &api.Actor{Kind: "system", Name: "test"}, RequestId: warden.NewID(), Operations: operations}
}

// Propose commits the operations and ends the test where that fails.
func Propose(t testing.TB, s *store.Store, operations ...*api.Operation) *api.Result {
	t.Helper()
	r, err := s.Propose(t.Context(), Command(operations...))
	if err != nil {
		t.Fatal(err)
	}
	return r
}
