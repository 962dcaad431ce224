package powerloss_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/autolock"
	"warden/store"
	"warden/store/storetest"
)

// pair is a follower whose state is in base/state, and a leader that keeps its own in memory. The follower has no vote, so that the
// leader stays one however busy the machine is.
type pair struct {
	base     string
	ids      []string // cluster, follower, leader
	networks map[string]*raft.InmemTransport
	up       map[string]*store.Store
}

func (c *pair) config(id string) (store.Config, error) {
	_, transport := raft.NewInmemTransportWithTimeout(raft.ServerAddress(id), 5*time.Second)
	for other, tr := range c.networks {
		if other != id {
			tr.Connect(raft.ServerAddress(id), transport)
			transport.Connect(raft.ServerAddress(other), tr)
		}
	}
	c.networks[id] = transport
	cfg := store.Config{ClusterID: c.ids[0], NodeID: id, Transport: transport, Heartbeat: 200 * time.Millisecond, TrailingLogs: 4, Logger: slog.New(slog.DiscardHandler)}
	if id != c.ids[1] {
		logs := raft.NewInmemStore()
		cfg.Stores = &store.Stores{Logs: logs, Stable: logs, Snapshots: raft.NewInmemSnapshotStore()}
		return cfg, nil
	}
	ring, _, _, err := rings(c.base)
	cfg.Dir, cfg.Sealer = raftDir(c.base), ring
	return cfg, err
}

func (c *pair) open(id string) error {
	cfg, err := c.config(id)
	if err == nil {
		c.up[id], err = store.Open(cfg)
	}
	return err
}

// newPair starts both.
func newPair(base string) (*pair, error) {
	c := &pair{base: base, networks: map[string]*raft.InmemTransport{}, up: map[string]*store.Store{}}
	var err error
	if c.ids, err = readIDs(base); err != nil {
		return nil, err
	}
	cfg, err := c.config(c.ids[2])
	if err != nil {
		return nil, err
	}
	leader, err := store.Bootstrap(cfg, storetest.Command(storetest.Genesis(c.ids[0], c.ids[2])...))
	if err != nil {
		return nil, err
	}
	c.up[c.ids[2]] = leader
	return c, errors.Join(c.open(c.ids[1]), leader.AddNonvoter(context.Background(), c.ids[1]))
}

func (c *pair) leader() *store.Store   { return c.up[c.ids[2]] }
func (c *pair) follower() *store.Store { return c.up[c.ids[1]] }

// zones has the cluster make zones from one number to another.
func (c *pair) zones(from, to int) error {
	for i := from; i <= to; i++ {
		if _, err := c.leader().Propose(context.Background(), storetest.Command(store.Put(storetest.Zone(fmt.Sprintf("z%d", i)), 0))); err != nil {
			return err
		}
	}
	return nil
}

// caughtUp waits for the follower, and notes the zones: it has told the leader that it has them.
func (c *pair) caughtUp(note func(string, ...any), from, to int) error {
	if err := c.follower().WaitApplied(context.Background(), c.leader().CommitIndex()); err != nil {
		return err
	}
	for i := from; i <= to; i++ {
		note("zone z%d", i)
	}
	return nil
}

func readIDs(base string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(base, "ids"))
	return strings.Fields(string(b)), err
}

func init() {
	sequences["follower"] = func(base string, note func(string, ...any)) error {
		c, err := newPair(base)
		if err != nil {
			return err
		}
		made := func(from, to int) error {
			for i := from; i <= to; i++ {
				if err := errors.Join(c.zones(i, i), c.caughtUp(note, i, i)); err != nil {
					return err
				}
			}
			return nil
		}
		if err := errors.Join(made(1, 6), c.follower().Snapshot(), made(7, 10)); err != nil {
			return err
		}
		gone, cancel := context.WithCancel(context.Background())
		cancel()
		if err := c.follower().Close(gone); err != nil {
			return err
		}
		if err := errors.Join(c.zones(11, 24), c.leader().Snapshot(), c.open(c.ids[1]), c.caughtUp(note, 11, 24)); err != nil {
			return err
		}
		note("installed")
		return errors.Join(made(25, 27), c.follower().Snapshot(), made(28, 29), c.follower().Close(gone))
	}
}

// checkFollower wants all that the follower had told the leader it has, and raft to start on it.
func checkFollower(base string, notes []string) error {
	if err := private(base); err != nil {
		return err
	}
	c := &pair{base: base, networks: map[string]*raft.InmemTransport{}, up: map[string]*store.Store{}}
	var err error
	if c.ids, err = readIDs(base); err != nil {
		return err
	}
	ring, _, _, err := rings(base)
	if err != nil {
		return err
	}
	zones, err := zonesOnDisk(base, autolock.Identity{ClusterID: c.ids[0], NodeID: c.ids[1], Keyring: ring})
	if err != nil {
		return err
	}
	for _, z := range zonesOf(notes) {
		if !slices.Contains(zones, z) {
			return fmt.Errorf("zone %s was acknowledged, found are %q", z, zones)
		}
	}
	if err := c.open(c.ids[1]); err != nil {
		return err
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	return c.follower().Close(gone)
}

// TestFollower: wherever a follower is cut, as it appends, compacts its log and installs a snapshot from the leader, it has what it said it has.
func TestFollower(t *testing.T) {
	attack{sequence: "follower", prepare: func(t *testing.T, base string) {
		prepareKeyFile(t, base)
		ids := fmt.Sprintln(warden.NewID(), warden.NewID(), warden.NewID())
		if err := os.WriteFile(filepath.Join(base, "ids"), []byte(ids), 0o600); err != nil {
			t.Fatal(err)
		}
	}, check: checkFollower, kills: 10, losses: 100}.run(t)
}
