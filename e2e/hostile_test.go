package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/join"
	"warden/tokens"
)

// TestI4EvictionOfAHostileNode evicts a node whose key and agent are an attacker's: it keeps its connection and heartbeats,
// ignores the order, dials every other manager, and tries to join with its old key.
func TestI4EvictionOfAHostileNode(t *testing.T) {
	c := newThree(t)
	victim := c.Host("victim")
	m := c.m[0]
	victim.Join(m.Token("worker"), m)
	c.awaitReady(t, m, 4)
	m.CtlIn(canary, "secret", "create", "password", "-")
	m.CtlIn("another", "secret", "create", "elsewhere", "-")

	victim.Kill()
	s := thief.Steal(t, victim.State)
	agent := thief.NewAgent()
	conn, err := s.Dial(t.Context(), "", c.m[1].Address, warden.DoorNode)
	if err != nil {
		t.Fatal(err)
	}
	closed := agent.Serve(t, conn)
	c.awaitReady(t, m, 4)
	m.Ctl("service", "create", "--name", "app", "--secret", "password", "host", "sleep", "1000")
	agent.Await(t, "the secret of its task", func(got thief.Got) bool {
		if got.Secrets["another"] {
			t.Fatal("the agent was sent a secret that no task of its needs") // I6
		}
		return got.Secrets[canary]
	})

	begin := time.Now()
	out := m.Ctl("node", "rm", "--force", "--compromised", "victim")
	if !strings.Contains(out, "password") || strings.Contains(out, "elsewhere") {
		t.Fatalf("node rm --compromised =\n%s\nwant the secret that it held and no other", out)
	}
	select {
	case <-closed:
		t.Logf("connection closed %s after the command began", time.Since(begin).Round(time.Millisecond))
	case <-time.After(30 * time.Second):
		t.Fatal("the connection of the evicted node lives on")
	}
	if got := agent.Got(); got.Evictions() != 1 || got.Calls[len(got.Calls)-1] != "evict" {
		t.Errorf("the agent got %v, want one order to wipe as the last message", got.Calls)
	}
	if out := m.Ctl("node", "ls", "-q"); strings.Contains(out, s.NodeID) {
		t.Errorf("node ls shows the evicted node:\n%s", out)
	}

	for _, h := range c.m {
		orderedAgain(t, s, h)
	}

	// Its old key joins nothing, whatever token comes with it.
	token2, err := tokens.Parse(m.Token("worker"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = thief.Join("", c.m[2].Address, token2, join.Request{Key: s.Key, Hostname: "victim", Advertise: ":2377"})
	if warden.CodeOf(err) != warden.CodeEvicted {
		t.Errorf("joining with the key of an evicted node = %v, want [%s]", err, warden.CodeEvicted)
	}

	// The real daemon was off meanwhile. It comes back, learns it, and forgets.
	victim.Start()
	testcluster.Await(t, 40*time.Second, func() error {
		out, _, _ := victim.Try("status")
		if !strings.Contains(out, "evicted") {
			return fmt.Errorf("status: %s", out)
		}
		if _, err := os.Stat(filepath.Join(victim.State, "identity")); err == nil {
			return errors.New("its identity is still on disk")
		}
		return nil
	})
}

// orderedAgain wants a manager to give an evicted node that dials it nothing but the same order again, and to end the connection. A manager that
// lags behind the leader lets nobody in, and who does not answer its order in time is given none: then the node dials again.
func orderedAgain(t *testing.T, s thief.Member, h *testcluster.Host) {
	t.Helper()
	testcluster.Await(t, 40*time.Second, func() error {
		conn, err := s.Dial(t.Context(), "", h.Address, warden.DoorNode)
		if err != nil {
			return err
		}
		agent := thief.NewAgent()
		select {
		case <-agent.Serve(t, conn):
		case <-time.After(30 * time.Second):
			t.Fatalf("%s keeps the connection of an evicted node", h.Name)
		}
		got := agent.Got()
		if n := got.Evictions(); n > 1 || n != len(got.Calls) {
			t.Fatalf("%s sent %v to an evicted node", h.Name, got.Calls)
		} else if n == 0 {
			return fmt.Errorf("%s gave no order", h.Name)
		}
		return nil
	})
}

// TestDoors tries every door with every certificate that has no business there.
func TestDoors(t *testing.T) {
	testcluster.Root(t)
	c := &six{Cluster: testcluster.New(t)}
	m1, m2, w := c.Host("m1"), c.Host("m2"), c.Host("w1")
	m1.Ctl("swarm", "init")
	m2.Join(m1.Token("manager"), m1)
	w.Join(m1.Token("worker"), m1)
	c.awaitVoters(t, m1, 2)
	c.awaitReady(t, m1, 3)

	worker, nobody := thief.Steal(t, w.State), thief.Member{}
	manager := thief.Steal(t, m2.State)
	for _, door := range []string{warden.DoorRaft, warden.DoorPeer, warden.DoorControl} {
		if err := worker.Refused(m1.Address, door); err == nil {
			t.Errorf("a worker's certificate stays at %s", door)
		}
		if err := nobody.Refused(m1.Address, door); err == nil {
			t.Errorf("no certificate stays at %s", door)
		}
	}
	if err := manager.Refused(m1.Address, warden.DoorControl); err == nil {
		t.Error("a manager's certificate stays at the control door")
	}
	if err := manager.Refused(m1.Address, warden.DoorPeer); err != nil {
		t.Errorf("a manager's certificate at the peer door = %v", err)
	}
	for _, protocols := range [][]string{nil, {"warden-nothing/1"}, {warden.DoorJoin, warden.DoorNode}, {"http/1.1"}} {
		if err := worker.Refused(m1.Address, protocols...); err == nil {
			t.Errorf("a client that offers %q stays", protocols)
		}
	}
	// Two managers: demoting one leaves a majority of one.
	c.m[0] = m1
	m1.Ctl("node", "demote", "m2")
	for _, door := range []string{warden.DoorRaft, warden.DoorPeer} {
		if err := manager.Refused(m1.Address, door); err == nil {
			t.Errorf("the certificate of a demoted manager stays at %s", door)
		}
	}
	testcluster.Await(t, 40*time.Second, func() error {
		if _, err := os.Stat(filepath.Join(m2.State, "raft")); err == nil {
			return errors.New("the demoted manager still has the replicated state on its disk")
		}
		out, _, _ := m2.Try("status")
		if !strings.Contains(out, "worker") {
			return fmt.Errorf("status of the demoted manager: %s", out)
		}
		return nil
	})
	c.awaitReady(t, m1, 3)
	m1.Ctl("node", "promote", "m2")
	c.awaitVoters(t, m1, 2)
	if err := manager.Refused(m1.Address, warden.DoorPeer); err == nil {
		t.Error("a key from before the demotion is good again after the promotion")
	}
	testcluster.Await(t, 40*time.Second, func() error { // and it raised an alarm
		if out, _, code := m1.Try("status"); code == 0 || !strings.Contains(out, "another key") {
			return fmt.Errorf("status says nothing of a stolen key: %s", out)
		}
		return nil
	})
}
