package powerloss_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"

	"warden"
	"warden/autolock"
	"warden/store/sealedlog"
)

// snapshotSteps are the indexes of snapshots, the newest of which must be there after each; 0 is a rotation of the DEK.
var snapshotSteps = []uint64{10, 20, 30, 40, 0, 50}

const snapshotsKept = 2

func openSnapshots(base string, s sealedlog.Sealer) (*sealedlog.Snapshots, error) {
	return sealedlog.OpenSnapshots(raftDir(base), cluster, node, s, snapshotsKept, slog.New(slog.DiscardHandler))
}

func snapshotBody(index uint64) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "state at %d ", index), 1000)
}

func takeSnapshot(sn *sealedlog.Snapshots, index uint64) error {
	servers := raft.Configuration{Servers: []raft.Server{{ID: node, Address: node}}}
	sink, err := sn.Create(raft.SnapshotVersionMax, index, 1, servers, 1, nil)
	if err != nil {
		return err
	}
	_, err = sink.Write(snapshotBody(index))
	return errors.Join(err, sink.Close())
}

// newest returns the index of the newest snapshot, 0 for none, and reads it.
func newest(sn *sealedlog.Snapshots) (uint64, error) {
	list, err := sn.List()
	if err != nil || len(list) == 0 {
		return 0, err
	}
	return list[0].Index, readSnapshot(sn, list[0].ID)
}

func readSnapshot(sn *sealedlog.Snapshots, id string) error {
	m, r, err := sn.Open(id)
	if err != nil {
		return err
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || !bytes.Equal(b, snapshotBody(m.Index)) {
		return fmt.Errorf("snapshot %s has another body, %w", id, err)
	}
	return nil
}

func init() {
	sequences["snapshots"] = func(base string, note func(string, ...any)) error {
		before, both, _, err := rings(base)
		if err != nil {
			return err
		}
		sealer := autolock.NewSealer(before)
		sn, err := openSnapshots(base, sealer)
		if warden.CodeOf(err) == warden.CodeCorrupt {
			sealer.Swap(both)
			sn, err = openSnapshots(base, sealer)
		}
		if err != nil {
			return err
		}
		has, err := newest(sn)
		if err != nil {
			return err
		}
		note("%d", has)
		for _, index := range snapshotSteps {
			switch {
			case index == 0 && has <= 40:
				sealer.Swap(both)
				if err := sn.Reseal(context.Background()); err != nil {
					return err
				}
				note("rotated")
			case index > has:
				if err := takeSnapshot(sn, index); err != nil {
					return err
				}
				note("%d", index)
			}
		}
		return nil
	}
}

// checkSnapshots wants the newest snapshot that was acknowledged, or the next one; all that are there whole; and snapshots that can be
// re-sealed and taken.
func checkSnapshots(base string, notes []string) error {
	_, both, fresh, err := rings(base)
	if err != nil {
		return err
	}
	acked, sealer := uint64(0), both
	for _, n := range notes {
		if n == "rotated" {
			sealer = fresh
		} else if _, err := fmt.Sscan(n, &acked); err != nil {
			return err
		}
	}
	if err := private(base); err != nil {
		return err
	}
	sn, err := openSnapshots(base, sealer)
	if err != nil {
		return err
	}
	found, err := newest(sn)
	if err != nil {
		return err
	}
	if found != acked && found != acked+10 {
		return fmt.Errorf("the snapshot at %d was acknowledged, the newest is at %d", acked, found)
	}
	dir := filepath.Join(raftDir(base), "snapshots")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := readSnapshot(sn, e.Name()); err != nil {
			return err
		}
	}
	if err := sn.Reseal(context.Background()); err != nil {
		return fmt.Errorf("re-sealing: %w", err)
	}
	if n, err := sn.Stale(); n != 0 || err != nil {
		return fmt.Errorf("%d snapshots are under the old key, %w", n, err)
	}
	if err := errors.Join(takeSnapshot(sn, 100), takeSnapshot(sn, 110)); err != nil {
		return err
	}
	if sn, err = openSnapshots(base, fresh); err != nil {
		return err
	}
	if found, err := newest(sn); err != nil || found != 110 {
		return fmt.Errorf("after two more the newest is at %d, %w", found, err)
	}
	if entries, err = os.ReadDir(dir); err != nil || len(entries) != snapshotsKept {
		return fmt.Errorf("left is %v, %w", entries, err)
	}
	return nil
}

// TestSnapshots: wherever the taking, keeping and re-sealing of snapshots is cut, the newest one that was acknowledged is there, and whole.
func TestSnapshots(t *testing.T) {
	attack{sequence: "snapshots", prepare: prepareKeyFile, check: checkSnapshots, kills: 20, losses: 100, again: "snapshots"}.run(t)
}
