package orchestrator

import (
	"fmt"

	"warden/api"
	"warden/scheduler"
)

// cluster is what an Input says of nodes and secrets, for both halves of the orchestrator.
type cluster struct {
	nodes   map[string]*host
	secrets map[string]*api.Secret
	groups  map[groupKey]*group
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
	c := &cluster{nodes: make(map[string]*host, len(in.Nodes)), secrets: make(map[string]*api.Secret, len(in.Secrets)), groups: make(map[groupKey]*group)}
	for _, s := range in.Secrets {
		c.secrets[s.GetId()] = s
	}
	for _, n := range in.Nodes {
		d, alive := n.GetDescription(), in.Liveness(n.GetId())
		c.nodes[n.GetId()] = &host{
			Node: scheduler.Node{
				ID: n.GetId(), Hostname: n.GetHostname(), Role: n.EffectiveRole().Word(), Zone: n.GetZone(), IP: n.GetIp(),
				OS: d.GetOs(), Arch: d.GetArch(), Labels: n.GetLabels(), EngineLabels: d.GetEngineLabels(),
				NanoCPUs: d.GetNanoCpus(), MemoryBytes: d.GetMemoryBytes(),
				Active: n.GetAvailability() == api.Availability_AVAILABILITY_ACTIVE, Ready: alive == api.Liveness_LIVENESS_READY,
			},
			down: alive == api.Liveness_LIVENESS_DOWN, drained: n.GetAvailability() == api.Availability_AVAILABILITY_DRAIN,
		}
	}
	return c
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
		s := c.secrets[ref.GetSecretId()]
		if s == nil {
			g.broken = fmt.Sprintf("secret %q is gone", ref.GetSecretName())
		}
		g.SecretZones = append(g.SecretZones, s.GetZones())
	}
	c.groups[key] = g
	return g
}

// lost says why nobody is left to stop the task; empty where its node may be.
func (c *cluster) lost(t *api.Task) string {
	switch n := c.nodes[t.GetNodeId()]; {
	case t.GetNodeId() == "":
		return ""
	case n == nil:
		return "its node was removed"
	case n.down:
		return "its node is down"
	}
	return ""
}

// moves says why a placed task that has not ended can't stay where it is; empty where it can.
func (c *cluster) moves(t *api.Task) string {
	if !t.Holds() {
		return ""
	}
	if lost := c.lost(t); lost != "" {
		return lost
	}
	n, g := c.nodes[t.GetNodeId()], c.group(t)
	if n.drained {
		return "its node is drained"
	}
	if g.broken != "" {
		return g.broken
	}
	if ok, reason := scheduler.Belongs(n.Node, g.Group); !ok {
		return "its node is " + reason
	}
	return ""
}
