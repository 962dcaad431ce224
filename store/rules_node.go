package store

import (
	"bytes"
	"encoding/hex"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

func (x *tx) ruleNode(old, next *api.Node) error {
	if err := checkNode(next); err != nil {
		return err
	}
	if x.find(api.Kind_KIND_TOMBSTONE, next.GetId()) != nil {
		return warden.Errorf(warden.CodeEvicted, "", "the node was removed and stays out")
	}
	if err := x.zoneExists(next.GetZone()); err != nil {
		return err
	}
	if err := x.freeKeys(next); err != nil {
		return err
	}
	if old == nil {
		if err := x.admitted(next); err != nil {
			return err
		}
	} else {
		switch {
		case old.GetHostname() != next.GetHostname() || old.GetTokenId() != next.GetTokenId() ||
			!bytes.Equal(old.GetJoinKeyHash(), next.GetJoinKeyHash()):
			return invalid("host name, token and first key of a node never change")
		case !bytes.Equal(next.GetKeyHash(), old.GetKeyHash()) && !bytes.Equal(next.GetKeyHash(), old.GetNextKeyHash()):
			return warden.Errorf(warden.CodeWrongKey, "", "its key can only become the one that was announced as the next")
		}
	}
	if isManager(next) && !isManager(old) {
		if n := len(idsOf(x.txn, api.Kind_KIND_NODE, byManager, yes)); n >= warden.ManagersMax {
			return warden.Errorf(warden.CodeTooLarge, "", "there are %d managers, which is the most", n)
		}
	}
	next.WasManager = isManager(next) || old.GetWasManager()
	if old.EffectiveRole() == api.Role_ROLE_MANAGER && next.EffectiveRole() != api.Role_ROLE_MANAGER {
		x.after = append(x.after, x.managersRemain)
	}
	return nil
}

// isManager reports whether the node is or is to become a manager.
func isManager(n *api.Node) bool {
	return n.GetRole() == api.Role_ROLE_MANAGER || n.GetDesiredRole() == api.Role_ROLE_MANAGER
}

// freeKeys refuses a node whose key a removed node had, or another node has.
func (x *tx) freeKeys(n *api.Node) error {
	for _, k := range nodeKeys(n) {
		if first[*api.Tombstone](x.txn, api.Kind_KIND_TOMBSTONE, byKey, k) != nil {
			return warden.Errorf(warden.CodeEvicted, "", "its key is that of a node that was removed")
		}
		for _, id := range idsOf(x.txn, api.Kind_KIND_NODE, byKey, k) {
			if id != n.GetId() {
				return warden.Errorf(warden.CodeWrongKey, "", "its key is that of node %s", id)
			}
		}
	}
	return nil
}

// admitted holds I1 against the leader itself: a new node takes a use of a token in the same command, and gets the role and
// zone that the token gives. Only the command that makes the cluster brings a node without one.
func (x *tx) admitted(n *api.Node) error {
	if err := x.room(api.Kind_KIND_NODE, warden.NodesMax); err != nil {
		return err
	}
	id := n.GetTokenId()
	if id == "" {
		if x.genesis {
			return nil
		}
		return warden.Errorf(warden.CodeDenied, "", "a node joins with a token")
	}
	token := as[*api.Token](x.find(api.Kind_KIND_TOKEN, id))
	if token == nil {
		return warden.Errorf(warden.CodeUnknownToken, "", "no token is %s", clip(id))
	}
	if x.uses[id] == 0 {
		return warden.Errorf(warden.CodeDenied, "", "the command takes no use of token %s for it", id)
	}
	x.uses[id]--
	zone := token.GetZone()
	if zone == "" {
		zone = warden.DefaultZone
	}
	switch {
	case n.GetDesiredRole() != token.GetRole() || n.GetRole() != token.GetRole():
		return warden.Errorf(warden.CodeWrongRole, "", "the token is for a %s", token.GetRole().Word())
	case n.GetZone() != zone:
		return warden.Errorf(warden.CodeWrongZone, "", "the token is for zone %s, not %s", zone, n.GetZone())
	case token.GetHostname() != "" && n.GetHostname() != token.GetHostname():
		return warden.Errorf(warden.CodeBinding, "", "the token is for host %s, not %s", token.GetHostname(), n.GetHostname())
	case len(n.GetJoinKeyHash()) == 0:
		return invalid("want the hash of the key that it joins with")
	}
	return nil
}

// managersRemain refuses a command that leaves no manager: nobody could undo it.
func (x *tx) managersRemain() error {
	for _, n := range list[*api.Node](x.txn, api.Kind_KIND_NODE, byManager, yes) {
		if n.EffectiveRole() == api.Role_ROLE_MANAGER && x.find(api.Kind_KIND_TOMBSTONE, n.GetId()) == nil {
			return nil
		}
	}
	return warden.Errorf(warden.CodeNoQuorum, "applying a command", "no manager would remain")
}

// ruleDeleteNode wants the tombstone, there already or in the same command.
func (x *tx) ruleDeleteNode(old *api.Node) error {
	x.after = append(x.after, func() error {
		if x.find(api.Kind_KIND_TOMBSTONE, old.GetId()) == nil {
			return warden.Errorf(warden.CodeDenied, "removing node "+old.GetId(), "it has no tombstone, which keeps it out")
		}
		x.forgetExposures(list[*api.Exposure](x.txn, api.Kind_KIND_EXPOSURE, byNode, old.GetId()))
		return nil
	})
	return nil
}

// ruleTombstone adds the hashes of all the keys that the node has at this moment, and that it was a manager, whatever the
// proposer knew of.
func (x *tx) ruleTombstone(old, next *api.Tombstone) error {
	if old != nil {
		if old.GetCompromised() && !next.GetCompromised() {
			return invalid("a compromised node stays compromised")
		}
		return frozen(old, next, func(c *api.Tombstone) { c.Compromised = old.GetCompromised() })
	}
	if err := checkTombstone(next); err != nil {
		return err
	}
	node := as[*api.Node](x.find(api.Kind_KIND_NODE, next.GetId()))
	if node == nil {
		return warden.Errorf(warden.CodeNotFound, "", "there is no such node")
	}
	hashes := hashStrings(append(next.GetKeyHashes(), node.GetKeyHash(), node.GetNextKeyHash(), node.GetJoinKeyHash())...)
	next.KeyHashes = nil
	for _, text := range hashes {
		h, err := hex.DecodeString(text)
		must(err)
		next.KeyHashes = append(next.KeyHashes, h)
	}
	next.RemovedNs, next.WasManager = x.now, isManager(node) || node.GetWasManager()
	if node.EffectiveRole() == api.Role_ROLE_MANAGER {
		x.after = append(x.after, x.managersRemain)
	}
	return nil
}

// describeNode stores what the node says of itself. One that is gone, or says what is out of bounds, is skipped, so that no
// node can spoil a batch with others' reports.
func (x *tx) describeNode(d *api.DescribeNode) {
	old := as[*api.Node](x.find(api.Kind_KIND_NODE, d.GetNodeId()))
	if old == nil || x.find(api.Kind_KIND_TOMBSTONE, d.GetNodeId()) != nil ||
		checkDescription(d.GetDescription()) != nil || checkText("", d.GetIp(), ipMax) != nil {
		return
	}
	next := shallow(old)
	if d.GetDescription() != nil {
		next.Description = d.GetDescription()
	}
	if d.GetIp() != "" {
		next.Ip = d.GetIp()
	}
	if !proto.Equal(old, next) {
		x.store(api.Kind_KIND_NODE, old, next)
	}
}
