package store_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store"
	"warden/store/rafttransport"
	"warden/store/storetest"
)

// The transport that managers really use, over pipes in place of authenticated connections.
func TestManagersOverTheirTransport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logger := slog.New(slog.DiscardHandler)
		ids := []string{warden.NewID(), warden.NewID(), warden.NewID()}
		transports := map[string]*rafttransport.Transport{}
		for _, id := range ids {
			transports[id] = rafttransport.New(id, func(_ context.Context, to string) (net.Conn, error) {
				here, there := net.Pipe()
				go transports[to].Serve(there, id)
				return here, nil
			}, logger)
		}
		config := func(id string) store.Config {
			logs := raft.NewInmemStore()
			return store.Config{ClusterID: ids[0], NodeID: id, Transport: transports[id], Logger: logger,
				Stores: &store.Stores{Logs: logs, Stable: logs, Snapshots: raft.NewInmemSnapshotStore()}}
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		leader, err := store.Bootstrap(config(ids[0]), storetest.Command(storetest.Genesis(ids[0], ids[0])...))
		must(err)
		up := []*store.Store{leader}
		for range 100 {
			storetest.Propose(t, leader, store.Put(storetest.Zone(warden.NewID()), 0))
		}
		must(leader.Snapshot())
		for _, id := range ids[1:] {
			s, err := store.Open(config(id))
			must(err)
			up = append(up, s)
			must(leader.AddNonvoter(t.Context(), id))
			must(s.WaitApplied(t.Context(), leader.CommitIndex()))
			must(leader.AddVoter(t.Context(), id))
		}
		r := storetest.Propose(t, leader, store.Put(storetest.Zone("last"), 0))
		var want, got bytes.Buffer
		must(leader.View().Write(&want))
		for _, s := range up[1:] {
			must(s.WaitApplied(t.Context(), r.Index))
			got.Reset()
			must(s.View().Write(&got))
			if !bytes.Equal(want.Bytes(), got.Bytes()) {
				t.Fatal("the states differ")
			}
		}
		start := time.Now()
		must(leader.Close(t.Context()))
		for up[1].Leader() == ids[0] || up[1].Leader() == "" {
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(start); took > 400*time.Millisecond {
			t.Fatalf("the next leader came after %v, as if it took an election", took)
		}
		for _, s := range up[1:] {
			must(s.Close(t.Context()))
		}
		time.Sleep(time.Minute) // raft does not wait for its calls to those that are gone
	})
}
