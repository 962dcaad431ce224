package powerloss_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"warden/api"
)

func init() {
	// forgotten makes a cluster of two managers, of which the one with the longer log does not have the other on its list, and starts both.
	sequences["forgotten"] = func(base string, _ func(string, ...any)) error {
		ctx := context.Background()
		list := filepath.Join(base, "manager", "identity", "managers.json")
		alone, err := os.ReadFile(list)
		if err != nil {
			return err
		}
		m, node, err := both(base)
		if err != nil {
			return err
		}
		var token *api.CreateTokenReply
		if err := await("the manager serves", func() error {
			token, err = m.ctl.CreateToken(ctx, &api.CreateTokenRequest{Role: api.Role_ROLE_MANAGER})
			return err
		}); err != nil {
			return err
		}
		if _, err := node.local.Join(ctx, &api.LocalJoinRequest{Token: token.Token, Addresses: []string{managerAddress}, Advertise: nodeAddress}); err != nil {
			return err
		}
		if err := await("both vote", func() error {
			r, err := m.ctl.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_NODE})
			if err != nil {
				return err
			}
			for _, n := range r.Nodes {
				if n.Raft != "voter" {
					return errors.New("not yet")
				}
			}
			return nil
		}); err != nil {
			return err
		}
		// What is asked for as the node stops gets into the manager's log, and no further.
		asking, enough := context.WithCancel(ctx)
		var asked sync.WaitGroup
		asked.Go(func() {
			for i := 0; asking.Err() == nil; i++ {
				asked.Go(func() { _, _ = m.ctl.CreateZone(asking, &api.CreateZoneRequest{Name: fmt.Sprintf("late%d", i)}) })
				<-time.After(2 * time.Millisecond)
			}
		})
		err = node.stop()
		enough()
		asked.Wait()
		if err := errors.Join(err, m.stop(), os.WriteFile(list, alone, 0o600)); err != nil {
			return err
		}
		if m, node, err = both(base); err != nil {
			return err
		}
		return errors.Join(await("there is a leader", func() error { return m.zone("again") }), node.stop(), m.stop())
	}
}

// TestManagersFindEachOther: power is lost in a cluster of two managers before the list of managers got to the one that has more in its log, as
// in the moment of a promotion or a demotion. They elect a leader all the same.
func TestManagersFindEachOther(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := &scene{t: t, dir: scratch(t)}
	base := s.folder()
	prepareBy("manager")(t, base)
	if err := live("forgotten", base, nil); err != nil {
		t.Error(fmt.Errorf("%w", err))
	}
}
