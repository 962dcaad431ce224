package powerloss_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/daemon"
)

// The stages of a node's life, each of which gives its key file another certificate, or takes it away.
var nodeStages = []string{"joined", "moved to a zone", "promoted", "demoted", "evicted"}

const managerAddress, nodeAddress = "127.0.0.2:2377", "127.0.0.3:2377"

var errNoNode = errors.New("the manager knows no other node")

// nodeRecord returns what the manager has of the other node. Errors: errNoNode; others say nothing of it.
func (m *manage) nodeRecord() (*api.Node, error) {
	r, err := m.ctl.List(context.Background(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
	if err != nil {
		return nil, err
	}
	for _, o := range r.Objects {
		if n := o.GetNode(); n.Hostname == "state" {
			return n, nil
		}
	}
	return nil, errNoNode
}

// nodeIs waits until the node has a leaf of this role and zone, and its manager knows it.
func nodeIs(m, node *manage, role api.Role, zone string) error {
	return await(fmt.Sprintf("the node is %v in %s", role, zone), func() error {
		info, err := node.local.Info(context.Background(), &api.InfoRequest{})
		if err != nil {
			return err
		}
		n, err := m.nodeRecord()
		if err != nil {
			return err
		}
		if info.Role != role || info.Zone != zone || info.SessionManager == "" || info.Message != "" || n.Role != role || n.LeafRole != role || n.LeafZone != zone || len(n.NextKeyHash) > 0 {
			return fmt.Errorf("%v, record %v", info, n)
		}
		return nil
	})
}

// update changes the node's record. It may have to wait until the manager finds the node ready.
func (m *manage) update(r *api.UpdateNodeRequest) error {
	return await("the node's record is changed", func() error {
		n, err := m.nodeRecord()
		if err == nil {
			r.Reference = n.Id
			_, err = m.ctl.UpdateNode(context.Background(), r)
		}
		return err
	})
}

// wiped waits until nothing of a cluster is left of the node.
func wiped(base string) error {
	return await("the node has wiped itself", func() error {
		for _, name := range []string{"identity", "raft", "unfinished"} {
			if _, err := os.Lstat(filepath.Join(state(base), name)); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s is there, %v", name, err)
			}
		}
		return nil
	})
}

func init() {
	sequences["manager"] = func(base string, _ func(string, ...any)) error {
		if err := loopback(); err != nil {
			return err
		}
		m, err := start(base, "manager", managerAddress)
		if err != nil {
			return err
		}
		if _, err := m.local.Init(context.Background(), &api.InitRequest{Advertise: managerAddress}); err != nil {
			return err
		}
		return errors.Join(m.zone("dmz"), m.stop())
	}
	sequences["node"] = func(base string, note func(string, ...any)) error {
		ctx := context.Background()
		m, node, err := both(base)
		if err != nil {
			return err
		}
		var token *api.CreateTokenReply
		if err := await("the manager serves", func() error {
			token, err = m.ctl.CreateToken(ctx, &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
			return err
		}); err != nil {
			return err
		}
		if _, err := node.local.Join(ctx, &api.LocalJoinRequest{Token: token.Token, Addresses: []string{managerAddress}, Advertise: nodeAddress}); err != nil {
			return err
		}
		note("%s", nodeStages[0])
		for i, stage := range []struct {
			ask  *api.UpdateNodeRequest
			role api.Role
			zone string
		}{
			{nil, api.Role_ROLE_WORKER, warden.DefaultZone},
			{&api.UpdateNodeRequest{Zone: "dmz"}, api.Role_ROLE_WORKER, "dmz"},
			{&api.UpdateNodeRequest{Role: api.Role_ROLE_MANAGER}, api.Role_ROLE_MANAGER, "dmz"},
			{&api.UpdateNodeRequest{Role: api.Role_ROLE_WORKER}, api.Role_ROLE_WORKER, "dmz"},
		} {
			if stage.ask != nil {
				if err := m.update(stage.ask); err != nil {
					return err
				}
			}
			if err := nodeIs(m, node, stage.role, stage.zone); err != nil {
				return err
			}
			if i > 0 {
				note("%s", nodeStages[i])
			}
		}
		if err := await("the node is removed", func() error {
			n, err := m.nodeRecord()
			if err == nil {
				_, err = m.ctl.RemoveNode(ctx, &api.RemoveNodeRequest{Reference: n.Id, Force: true})
			} else if errors.Is(err, errNoNode) { // by an attempt before
				err = nil
			}
			return err
		}); err != nil {
			return err
		}
		if err := wiped(base); err != nil {
			return err
		}
		note("%s", nodeStages[4])
		return errors.Join(node.stop(), m.stop())
	}
	// live node starts the manager and the node anew, and wants the node to end up as its record says. It was off for an hour: the manager may
	// have another key by now, which a node that was off for less than ten minutes would not take.
	sequences["live node"] = func(base string, _ func(string, ...any)) error {
		long := time.Now().Add(-time.Hour)
		if err := os.Chtimes(filepath.Join(state(base), "identity", "managers.json"), long, long); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		m, node, err := both(base)
		if err != nil {
			return err
		}
		return errors.Join(settles(base, m, node), node.stop(), m.stop())
	}
}

// both starts the manager and the node.
func both(base string) (m, node *manage, err error) {
	if err := loopback(); err != nil {
		return nil, nil, err
	}
	if m, err = start(base, "manager", managerAddress); err != nil {
		return nil, nil, err
	}
	node, err = start(base, "state", nodeAddress)
	return m, node, err
}

// settles wants the node to be what its record says; nobody where there is none, or where it did not learn that it had joined.
func settles(base string, m, node *manage) error {
	ctx := context.Background()
	var n *api.Node // nil: removed, or never there
	if err := await("the manager serves", func() (err error) {
		if n, err = m.nodeRecord(); errors.Is(err, errNoNode) {
			err = nil
		}
		return err
	}); err != nil {
		return err
	}
	info, err := node.local.Info(ctx, &api.InfoRequest{})
	if err != nil {
		return err
	}
	switch {
	case info.State == daemon.StateUninitialized:
		if err := wiped(base); err != nil {
			return err
		}
		token, err := m.ctl.CreateToken(ctx, &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
		if err != nil {
			return err
		}
		_, err = node.local.Join(ctx, &api.LocalJoinRequest{Token: token.Token, Addresses: []string{managerAddress}, Advertise: nodeAddress})
		return err
	case n == nil: // it is told, and goes
		return wiped(base)
	default:
		return nodeIs(m, node, n.DesiredRole, n.Zone)
	}
}

// checkNode opens what a node left: its key file is of the stage that was acknowledged or the next, knows where to dial, and opens the state
// of a manager.
func checkNode(base string, notes []string) error {
	if err := private(base); err != nil {
		return err
	}
	acked := 0
	if len(notes) > 0 {
		acked = slices.Index(nodeStages, notes[len(notes)-1]) + 1
	}
	kf, err := autolock.ReadKeyFile(filepath.Join(state(base), "identity", "node.key"))
	if errors.Is(err, fs.ErrNotExist) {
		if acked != 0 && acked < 4 {
			return fmt.Errorf("%s is acknowledged, and the key file is gone", nodeStages[acked-1])
		}
		return nil
	}
	if err != nil {
		return err
	}
	id, err := kf.Identity()
	if err != nil {
		return err
	}
	leaf, err := leafOf(id)
	if err != nil {
		return err
	}
	var may []int
	switch {
	case leaf.Role == ca.RoleManager:
		may = []int{3}
	case leaf.Zone == warden.DefaultZone:
		may = []int{1}
	default:
		may = []int{2, 4}
	}
	if !slices.Contains(may, acked) && !slices.Contains(may, acked+1) {
		return fmt.Errorf("stage %d is acknowledged, the key file is that of a %s in %s", acked, leaf.Role, leaf.Zone)
	}
	b, err := os.ReadFile(filepath.Join(state(base), "identity", "managers.json"))
	if err == nil {
		l := &api.ManagerList{}
		if err = protojson.Unmarshal(b, l); err == nil && len(l.Managers) == 0 {
			err = errors.New("it is empty")
		}
	}
	if err != nil {
		return fmt.Errorf("the list of managers: %w", err)
	}
	if id.Role == ca.RoleManager {
		if _, err := os.Lstat(filepath.Join(raftDir(base), "log.db")); err != nil && acked < 3 {
			return nil // it starts anew
		}
		_, err = zonesOnDisk(base, id)
	}
	return err
}

func leafOf(id autolock.Identity) (ca.Identity, error) {
	cert, err := x509.ParseCertificate(id.Chain[0])
	if err != nil {
		return ca.Identity{}, err
	}
	return ca.Read(cert)
}

// TestNode: wherever a node is cut, as it joins, gets other certificates, becomes a manager and a worker again, and is evicted, it comes back as
// what its record says.
func TestNode(t *testing.T) {
	needRoot(t)
	attack{sequence: "node", prepare: prepareBy("manager"), check: checkNode, live: liveBy("live node"), lives: 8, kills: 10, isOwnNetwork: true, beside: "manager"}.run(t)
}
