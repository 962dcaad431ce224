package manager

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/join"
	"warden/store"
	"warden/tokens"
)

// token is what the join door asks for a token ID. A replica may be behind the leader that minted the token: a miss is
// looked up again after it has caught up.
func (m *Manager) token(id string) (key [32]byte, rule tokens.Rule, ok bool) {
	t := m.store.View().Token(id)
	if t == nil {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if m.catchUp(ctx) == nil {
			t = m.store.View().Token(id)
		}
	}
	if t == nil || len(t.Key) != len(key) {
		return key, rule, false
	}
	copy(key[:], t.Key)
	rule = tokens.Rule{
		Role: t.Role.Word(), Zone: t.Zone, Hostname: t.Hostname, CIDR: t.Cidr,
		ExpiresAt: time.Unix(0, t.ExpiresNs),
	} // not its uses: a repeated join takes none, so admit and the apply count them
	if t.RevokedNs != 0 {
		rule.RevokedAt = time.Unix(0, t.RevokedNs)
	}
	return key, rule, true
}

// joined returns the node that joined with this token and key, nil where none did.
func joined(v *store.View, tokenID string, keyHash [32]byte) *api.Node {
	for _, n := range v.NodesByKey(keyHash[:]) {
		if n.TokenId == tokenID && bytes.Equal(n.JoinKeyHash, keyHash[:]) {
			return n
		}
	}
	return nil
}

// admit creates the node that a valid token admits and issues its leaf, in one command with the token's use. Role and zone
// come from the token (I1). A repeat of a join gets the same node and leaf.
func (m *Manager) admit(ctx context.Context, a join.Admission) (*api.JoinGrant, error) {
	op := "admitting a node by token " + a.TokenID
	v := m.store.View() // one: the use that a repeat finds taken may be its own
	if n := joined(v, a.TokenID, a.KeyHash); n != nil {
		return m.grant(n)
	}
	if dead := v.TombstoneByKey(a.KeyHash[:]); dead != nil {
		return nil, warden.Hint(warden.Errorf(warden.CodeEvicted, op, "the key is that of node %s, which was removed", dead.Id),
			"a removed node stays out; its host may join as a new node, with a new key")
	}
	t := v.Token(a.TokenID)
	if t == nil {
		return nil, warden.Errorf(warden.CodeUnknownToken, op, "the token is gone")
	}
	if t.UsesMax > 0 && t.Uses >= t.UsesMax {
		return nil, warden.Hint(warden.Errorf(warden.CodeUsedUp, op, "all %d uses are taken", t.UsesMax),
			"mint another with `wardenctl swarm join-token "+t.Role.Word()+"`")
	}
	_, authority, err := m.authority.of(v.Cluster())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	n := &api.Node{
		Id: warden.NewID(), Hostname: a.Hostname, Role: t.Role, DesiredRole: t.Role, Zone: t.Zone, Ip: a.IP.String(),
		Availability: a.Availability, TokenId: t.Id, KeyHash: a.KeyHash[:], JoinKeyHash: a.KeyHash[:],
		LeafRole: t.Role, LeafGeneration: v.Cluster().IssuingGeneration,
	}
	if n.Zone == "" {
		n.Zone = warden.DefaultZone
	}
	n.LeafZone = n.Zone
	if n.Role == api.Role_ROLE_MANAGER {
		n.LeafDekGeneration = v.Cluster().DekGeneration
	}
	if n.Availability == api.Availability_AVAILABILITY_UNSPECIFIED {
		n.Availability = api.Availability_AVAILABILITY_ACTIVE
		if n.Role == api.Role_ROLE_MANAGER {
			n.Availability = api.Availability_AVAILABILITY_DRAIN
		}
	}
	if n.Role == api.Role_ROLE_MANAGER {
		n.Address = a.Advertise // the join door has checked and completed it
	}
	vetted, err := issueInto(authority, n, a.Parsed, time.Duration(v.Cluster().LeafTtlNs), now)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	notBefore, notAfter := vetted.Validity()
	n.LeafNotBeforeNs, n.LeafNotAfterNs = notBefore.UnixNano(), notAfter.UnixNano()
	res, err := m.propose(ctx, &api.Command{
		Actor:     &api.Actor{Kind: "node", Name: n.Id, Via: m.cfg.NodeID},
		RequestId: warden.NewID(), // a repeat that crosses this one is told by its key, which no two nodes share
		Operations: []*api.Operation{
			{Of: &api.Operation_UseToken{UseToken: &api.UseToken{TokenId: t.Id}}},
			store.Put(n, 0),
		},
	})
	code := warden.CodeOf(err)
	if err != nil && code != warden.CodeWrongKey && code != warden.CodeUsedUp {
		return nil, warden.Wrap(op, err)
	}
	// Whichever of several repeats was committed is the join.
	if serr := m.seen(ctx, res); serr != nil {
		return nil, warden.Wrap(op, serr)
	}
	first := joined(m.store.View(), a.TokenID, a.KeyHash)
	switch {
	case first != nil:
	case code == warden.CodeUsedUp:
		return nil, warden.Wrap(op, err)
	default:
		return nil, warden.Hint(warden.Errorf(warden.CodeWrongKey, op, "the key of the request belongs to another node"),
			"a node joins with a new key each time: run the join again")
	}
	return m.grant(first) // package join logs it, or the loss of the reply
}

func (m *Manager) grant(n *api.Node) (*api.JoinGrant, error) {
	v := m.store.View()
	_, authority, err := m.authority.of(v.Cluster())
	if err != nil {
		return nil, err
	}
	return &api.JoinGrant{
		ClusterId: m.cfg.ClusterID, NodeId: n.Id, Chain: authority.Chain(n.Leaf), Role: n.LeafRole, Zone: n.LeafZone,
		Lock: LockStateOf(v.Cluster()), Managers: m.Managers(),
	}, nil
}

// issueInto issues the leaf that n's record describes, and sets it there. Only the CSR's public key is used.
func issueInto(authority *ca.Authority, n *api.Node, csr *ca.CSR, ttl time.Duration, now time.Time) (*ca.Vetted, error) {
	vetted, err := authority.Vet(ca.Request{Parsed: csr, NodeID: n.Id, Role: n.LeafRole.Word(), Zone: n.LeafZone, TTL: ttl}, now)
	if err != nil {
		return nil, err
	}
	n.Leaf, err = authority.Issue(vetted)
	return vetted, err
}

// How often a node can have its renewal begun anew before the last is finished, at one manager: each makes a key and an entry in the log. A
// manager that is killed or cut off in the midst of one leaves one.
const (
	unfinishedBurst  = 8
	unfinishedPeriod = 30 * time.Second
)

// issue is the dispatcher's Config.Issue: commit the hash of the node's next key, then hand out the leaf for it. keyHash is
// the key that the session is authenticated by: it must be the recorded one, which ties a renewal to the key it replaces.
func (m *Manager) issue(ctx context.Context, nodeID string, keyHash [32]byte, csr []byte, reason string) (*api.InstallRequest, error) {
	op := "renewing the leaf of node " + nodeID
	parsed, err := ca.ParseCSR(csr)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if parsed.KeyHash == keyHash {
		return nil, warden.Errorf(warden.CodeInvalid, op, "the node offers the key that it is to replace")
	}
	for first := true; ; first = false {
		v := m.store.View()
		n := v.Node(nodeID)
		if n == nil || !bytes.Equal(n.KeyHash, keyHash[:]) {
			return nil, warden.Errorf(warden.CodeWrongKey, op, "the session's key is not the recorded one")
		}
		if len(n.NextKeyHash) > 0 && first {
			if ok, _ := m.unfinished.spend(nodeID, "", time.Now()); !ok {
				return nil, warden.Errorf(warden.CodeLimited, op, "it was begun %d times and never finished", unfinishedBurst)
			}
		}
		_, authority, err := m.authority.of(v.Cluster())
		if err != nil {
			return nil, err
		}
		next := api.Clone(n)
		next.NextKeyHash = parsed.KeyHash[:]
		next.LeafRole, next.LeafZone, next.LeafGeneration = n.EffectiveRole(), n.Zone, v.Cluster().IssuingGeneration
		if next.LeafDekGeneration = 0; next.LeafRole == api.Role_ROLE_MANAGER {
			next.LeafDekGeneration = v.Cluster().DekGeneration
		}
		if _, err := issueInto(authority, next, parsed, time.Duration(v.Cluster().LeafTtlNs), time.Now()); err != nil {
			return nil, warden.Wrap(op, err)
		}
		res, err := m.propose(ctx, m.systemCommand("renewal", store.Put(next, n.Meta.Version)))
		if warden.CodeOf(err) == warden.CodeConflict {
			if err := m.seen(ctx, res); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, warden.Wrap(op, err)
		}
		m.logger.Info("issued leaf", "node_id", nodeID, "reason", reason, "role", next.LeafRole.Word(), "zone", next.LeafZone)
		return &api.InstallRequest{
			Chain: authority.Chain(next.Leaf), Role: next.LeafRole, Zone: next.LeafZone, Lock: LockStateOf(v.Cluster()), Managers: m.Managers(),
		}, nil
	}
}

// promoteKey commits a node's next key as its current one, when a handshake has proved that the node has it.
func (m *Manager) promoteKey(ctx context.Context, id ca.Identity) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		n := m.store.View().Node(id.NodeID)
		if n == nil {
			return warden.Errorf(warden.CodeDenied, "committing the key of node "+id.NodeID, "no record")
		}
		if !bytes.Equal(n.NextKeyHash, id.KeyHash[:]) {
			return nil
		}
		next := api.Clone(n)
		next.KeyHash, next.NextKeyHash = n.NextKeyHash, nil
		next.LeafNotBeforeNs, next.LeafNotAfterNs = id.NotBefore.UnixNano(), id.NotAfter.UnixNano()
		res, err := m.propose(ctx, m.systemCommand("renewal", store.Put(next, n.Meta.Version)))
		if err != nil && warden.CodeOf(err) != warden.CodeConflict {
			return err
		}
		if serr := m.seen(ctx, res); serr != nil || err == nil {
			return serr
		}
	}
}

// seen waits until the view shows what the command came to, applied or refused: on the leader it does already. A result that
// the leader gave in an error only (nil) is in the view once it has caught up.
func (m *Manager) seen(ctx context.Context, res *api.Result) error {
	switch {
	case res == nil:
		return m.catchUp(ctx)
	case m.store.View().Index() >= res.Index:
		return nil
	}
	return m.store.WaitApplied(ctx, res.Index)
}

// command returns a command of the actor's, with a request ID of its own.
func command(actor *api.Actor, ops ...*api.Operation) *api.Command {
	return &api.Command{Actor: actor, RequestId: warden.NewID(), Operations: ops}
}

// system is the actor where a part of this manager acts by itself.
func (m *Manager) system(part string) *api.Actor {
	return &api.Actor{Kind: "system", Name: part, Via: m.cfg.NodeID}
}

func (m *Manager) systemCommand(part string, ops ...*api.Operation) *api.Command {
	return command(m.system(part), ops...)
}

// Address completes an advertised address: a host that is missing or unspecified becomes the address that the node was seen
// at, a port that is missing the default one. Errors: CodeInvalid.
func Address(advertise, seen string) (string, error) {
	host, port := advertise, fmt.Sprint(warden.DefaultPort)
	if h, p, err := net.SplitHostPort(advertise); err == nil {
		host, port = h, p
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = seen
	}
	if len(host) > warden.HostnameMax {
		return "", warden.Errorf(warden.CodeInvalid, "reading an advertised address", "the host is over %d characters", warden.HostnameMax)
	}
	if p, err := net.LookupPort("tcp", port); err != nil || p == 0 {
		return "", warden.Errorf(warden.CodeInvalid, "reading an advertised address", "%q is not a port", port)
	}
	return net.JoinHostPort(host, port), nil
}
