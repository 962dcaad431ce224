package bed_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"warden/internal/testcluster"
	"warden/test/bed"
)

// TestFullDisk: a manager whose disk is full says so, loses nothing that it confirmed, and works again with room.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	m := b.Host("m1", bed.WithDisk(48<<20))
	m.Start()
	m.Ctl("swarm", "init")
	m.Ctl("zone", "create", "before")

	m.Fill()
	confirmed := []string{"before"}
	testcluster.Await(t, limit, func() error { // what was allocated before may take some more
		name := fmt.Sprintf("full-%d", len(confirmed))
		_, stderr, code := m.Try("zone", "create", name, "--timeout", "10s")
		if code == 0 {
			confirmed = append(confirmed, name)
			return errors.New("zones are created on a full disk")
		}
		t.Logf("zone create on a full disk: exit %d: %s", code, stderr)
		return nil
	})

	m.Free()
	testcluster.Await(t, limit, func() error {
		select {
		case <-m.Ended():
			m.Start()
		default:
		}
		if _, stderr, code := m.Try("zone", "create", "after", "--timeout", "10s"); code != 0 && !strings.Contains(stderr, "[exists]") {
			return errors.New(stderr)
		}
		return nil
	})
	m.Kill()
	m.Start()
	testcluster.Await(t, limit, func() error {
		out, stderr, _ := m.Try("zone", "ls")
		for _, name := range append(confirmed, "after") {
			if !strings.Contains(out, name) {
				return fmt.Errorf("zone %s, which was confirmed, is not in\n%s%s", name, out, stderr)
			}
		}
		return nil
	})
}

// TestFullDiskOfTheLeader: a cluster goes on though its leader's disk is full, and with room that one has it all.
func TestFullDiskOfTheLeader(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	m, _ := b.Cluster(3, 0, bed.WithDisk(48<<20))
	full := awaitLeader(t, m[0], m)
	rest := slices.DeleteFunc(slices.Clone(m), func(h *bed.Host) bool { return h == full })
	full.Fill()
	last := ""
	create := func() error {
		_, stderr, code := rest[0].Try("zone", "create", last, "--timeout", "10s")
		if code != 0 && !strings.Contains(stderr, "[exists]") {
			return errors.New(stderr)
		}
		return nil
	}
	n := 0
	testcluster.Await(t, limit, func() error { // what its files have room for takes some
		n++
		last = fmt.Sprintf("full-%d", n)
		err := create()
		log, lerr := os.ReadFile(full.Log)
		if !strings.Contains(string(log), "no space left") {
			return fmt.Errorf("after %d zones %s, whose disk is full, has not noticed: %v, %v", n, full.Name, err, lerr)
		}
		return nil
	})
	for range 3 {
		n++
		last = fmt.Sprintf("full-%d", n)
		testcluster.Await(t, limit, create)
	}
	log, err := os.ReadFile(full.Log)
	t.Logf("the manager whose disk is full led %d times: %v", strings.Count(string(log), "failed to commit logs"), err)
	full.Free()
	testcluster.Await(t, limit, func() error {
		select {
		case <-full.Ended():
			full.Start()
		default:
		}
		out, stderr, _ := full.Try("zone", "ls", "--local")
		if !strings.Contains(out, last) {
			return fmt.Errorf("zones at the manager whose disk was full:\n%s%s", out, stderr)
		}
		return nil
	})
	b.AwaitReady(full, 3)
}
