package orchestrator

import (
	"fmt"
	"maps"

	"warden/api"
	"warden/scheduler"
)

// cluster is what is known of nodes and secrets, for both halves of the orchestrator. Hosts are made when they are asked for.
type cluster struct {
	record func(nodeID string) *api.Node // nil: there is none, or it was evicted
	live   func(nodeID string) api.Liveness
	secret func(id string) *api.Secret
	hosts  map[string]*host
	groups map[groupKey]*group
}

type host struct {
	scheduler.Node
	down, drained bool
}

type groupKey struct {
	service string
	version uint64
}

// group is what the tasks of one specification ask of a node.
type group struct {
	scheduler.Group
	broken string // why no node will do, ever
}

func newCluster(in Input) *cluster {
	nodes, secrets := make(map[string]*api.Node, len(in.Nodes)), make(map[string]*api.Secret, len(in.Secrets))
	for _, n := range in.Nodes {
		nodes[n.GetId()] = n
	}
	for _, s := range in.Secrets {
		secrets[s.GetId()] = s
	}
	return &cluster{live: in.Liveness, record: func(id string) *api.Node { return nodes[id] }, secret: func(id string) *api.Secret { return secrets[id] }}
}

// host returns the node; nil where there is none.
func (c *cluster) host(id string) *host {
	if h := c.hosts[id]; h != nil || id == "" {
		return h
	}
	n := c.record(id)
	if n == nil {
		return nil
	}
	d, alive := n.GetDescription(), c.live(id)
	h := &host{
		Node: scheduler.Node{
			ID: n.GetId(), Hostname: n.GetHostname(), Role: n.EffectiveRole().Word(), Zone: n.GetZone(), IP: n.GetIp(),
			OS: d.GetOs(), Arch: d.GetArch(), Labels: n.GetLabels(), EngineLabels: d.GetEngineLabels(),
			NanoCPUs: d.GetNanoCpus(), MemoryBytes: d.GetMemoryBytes(),
			Active: n.GetAvailability() == api.Availability_AVAILABILITY_ACTIVE, Ready: alive == api.Liveness_LIVENESS_READY,
		},
		down: alive == api.Liveness_LIVENESS_DOWN, drained: n.GetAvailability() == api.Availability_AVAILABILITY_DRAIN,
	}
	if c.hosts == nil {
		c.hosts = make(map[string]*host)
	}
	c.hosts[id] = h
	return h
}

// sameNode reports whether all that host and Reconcile see of a node is the same in both; nil is a node that is not there.
func sameNode(a, b *api.Node) bool {
	if a == nil || b == nil {
		return a == b
	}
	d, e := a.GetDescription(), b.GetDescription()
	return a.GetHostname() == b.GetHostname() && a.EffectiveRole() == b.EffectiveRole() && a.GetZone() == b.GetZone() && a.GetIp() == b.GetIp() &&
		a.GetAvailability() == b.GetAvailability() && maps.Equal(a.GetLabels(), b.GetLabels()) &&
		d.GetOs() == e.GetOs() && d.GetArch() == e.GetArch() && maps.Equal(d.GetEngineLabels(), e.GetEngineLabels()) &&
		d.GetNanoCpus() == e.GetNanoCpus() && d.GetMemoryBytes() == e.GetMemoryBytes()
}

// group returns what the task asks of a node. What does not parse, or names a secret that is gone, fits nowhere.
func (c *cluster) group(t *api.Task) *group {
	key := groupKey{t.GetServiceId(), t.GetSpecVersion()}
	if g := c.groups[key]; g != nil {
		return g
	}
	spec := t.GetSpec()
	g := &group{Group: scheduler.Group{ServiceID: t.GetServiceId(), Zone: spec.GetZone(),
		NanoCPUs: spec.GetResources().GetReserveNanoCpus(), MemoryBytes: spec.GetResources().GetReserveMemoryBytes()}}
	for _, s := range spec.GetConstraints() {
		parsed, err := scheduler.ParseConstraint(s)
		if err != nil {
			g.broken = err.Error()
		}
		g.Constraints = append(g.Constraints, parsed)
	}
	for _, ref := range spec.GetSecrets() {
		s := c.secret(ref.GetSecretId())
		if s == nil {
			g.broken = fmt.Sprintf("secret %q is gone", ref.GetSecretName())
		}
		g.SecretZones = append(g.SecretZones, s.GetZones())
	}
	if c.groups == nil {
		c.groups = make(map[groupKey]*group)
	}
	c.groups[key] = g
	return g
}

// lost says why nobody is left to stop the task; empty where its node may be.
func (c *cluster) lost(t *api.Task) string {
	switch n := c.host(t.GetNodeId()); {
	case t.GetNodeId() == "":
		return ""
	case n == nil:
		return "its node was removed"
	case n.down:
		return "its node is down"
	}
	return ""
}

// moves says why a placed task that has not ended can't stay where it is; empty where it can. A node that does not meet the task's own
// constraints will do where it meets those that the service has now.
func (c *cluster) moves(w *want, t *api.Task) string {
	if !t.Holds() {
		return ""
	}
	if lost := c.lost(t); lost != "" {
		return lost
	}
	n, g := c.host(t.GetNodeId()), c.group(t)
	if n.drained {
		return "its node is drained"
	}
	if g.broken != "" {
		return g.broken
	}
	ok, reason := scheduler.Belongs(n.Node, g.Group)
	if ok {
		return ""
	}
	bare := g.Group
	bare.Constraints = nil
	if ok, _ := scheduler.Belongs(n.Node, bare); ok && w.meets(n) {
		return ""
	}
	return "its node is " + reason
}
