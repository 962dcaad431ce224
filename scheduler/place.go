package scheduler

import (
	"cmp"
	"container/heap"
	"slices"
	"strings"

	"warden"
)

// Place gives as many tasks as it can a node, group after group, and for each other task the reason. Tasks are spread: of the
// nodes that fit, one with fewer tasks of the service comes first, then one with fewer tasks at all, then the lower ID; nodes
// with FailuresMax or more recent failures of the service come last. What it placed counts for what it places next; its
// arguments are not changed.
//
// Cost: one look at each node in the zone per group, and a logarithm of their number per task. Pure.
func Place(nodes []Node, groups []Group) (placed []Placement, unplaced []Unplaced) {
	p := newPlacer(nodes)
	for i := range groups {
		g := &groups[i]
		n := p.group(g, &placed)
		if n == len(g.TaskIDs) {
			continue
		}
		reason := p.explain(g)
		for _, id := range g.TaskIDs[n:] {
			unplaced = append(unplaced, Unplaced{TaskID: id, Reason: reason})
		}
	}
	return placed, unplaced
}

// Belongs reports whether the node may hold a task of the group for good: zone, zones of the secrets and constraints. Whether
// it is ready, active and has room does not matter here. If not, reason says why: `in zone "a", not "b"`. Pure.
func Belongs(n Node, g Group) (ok bool, reason string) {
	w, at := lasting(&n, &g)
	if w == fits {
		return true, ""
	}
	return false, strings.TrimPrefix(refused{why: w, at: at, zone: n.Zone, nodes: 1}.text(&g), "1 node ")
}

// host is a node and what is left of it.
type host struct {
	*Node
	cpu, memory int64 // free
	tasks       int
}

type placer struct {
	nodes    []host           // by ID
	zones    map[string][]int // indexes of nodes, ascending
	services map[string]map[int]int
	ranked   []rank // reused from group to group
}

func newPlacer(nodes []Node) *placer {
	p := &placer{nodes: make([]host, len(nodes)), zones: make(map[string][]int), services: make(map[string]map[int]int)}
	for i := range nodes {
		n := &nodes[i]
		p.nodes[i] = host{Node: n, cpu: max(0, n.NanoCPUs-n.UsedNanoCPUs), memory: max(0, n.MemoryBytes-n.UsedMemoryBytes), tasks: n.Tasks}
	}
	slices.SortFunc(p.nodes, func(a, b host) int { return cmp.Compare(a.ID, b.ID) })
	for i := range p.nodes {
		n := &p.nodes[i]
		p.zones[n.Zone] = append(p.zones[n.Zone], i)
		for service, count := range n.ServiceTasks { // each entry is set once: the order does not matter
			p.count(service)[i] = count
		}
	}
	return p
}

// count returns how many tasks of the service each node has, by index.
func (p *placer) count(service string) map[int]int {
	m := p.services[service]
	if m == nil {
		m = make(map[int]int)
		p.services[service] = m
	}
	return m
}

// group places tasks of g from its first on and returns how many found a node.
func (p *placer) group(g *Group, placed *[]Placement) int {
	if len(g.TaskIDs) == 0 || !secretsMayEnter(g) {
		return 0
	}
	count := p.count(g.ServiceID)
	p.ranked = p.ranked[:0]
	for _, i := range p.zones[g.Zone] {
		n := &p.nodes[i]
		if w, _ := n.refusal(g); w != fits {
			continue
		}
		r := rank{index: i, service: count[i], tasks: n.tasks}
		if f := n.RecentFailures[g.ServiceID]; f >= FailuresMax {
			r.failures = f
		}
		p.ranked = append(p.ranked, r)
	}
	h := (*ranking)(&p.ranked)
	heap.Init(h)
	for done, id := range g.TaskIDs {
		if len(p.ranked) == 0 {
			return done
		}
		best := &p.ranked[0]
		n := &p.nodes[best.index]
		*placed = append(*placed, Placement{TaskID: id, NodeID: n.ID})
		n.cpu -= max(0, g.NanoCPUs)
		n.memory -= max(0, g.MemoryBytes)
		n.tasks++
		best.service++
		best.tasks++
		count[best.index] = best.service
		if n.room(g) != fits {
			heap.Pop(h)
			continue
		}
		heap.Fix(h, 0)
	}
	return len(g.TaskIDs)
}

// secretsMayEnter reports whether each secret of the group may enter its zone.
func secretsMayEnter(g *Group) bool {
	for _, zones := range g.SecretZones {
		if len(zones) > 0 && !slices.Contains(zones, g.Zone) {
			return false
		}
	}
	return true
}

// why is the first filter that a node did not pass, in the order of the filters.
type why int

const (
	fits why = iota
	otherZone
	secretZone
	down
	inactive
	constraint
	full
	noCPU
	noMemory
)

// refusal returns the first filter that the node does not pass, and for constraint its index.
func (n *host) refusal(g *Group) (why, int) {
	w, at := lasting(n.Node, g)
	switch {
	case w != fits && w != constraint:
		return w, at
	case !n.Ready:
		return down, 0
	case !n.Active:
		return inactive, 0
	case w != fits:
		return w, at
	}
	return n.room(g), 0
}

// lasting goes through the filters that do not depend on the moment.
func lasting(n *Node, g *Group) (why, int) {
	switch {
	case n.Zone != g.Zone:
		return otherZone, 0
	case !secretsMayEnter(g):
		return secretZone, 0
	}
	for i := range g.Constraints {
		if !g.Constraints[i].matches(n) {
			return constraint, i
		}
	}
	return fits, 0
}

func (n *host) room(g *Group) why {
	switch {
	case n.tasks >= warden.AssignTasksMax:
		return full
	case g.NanoCPUs > 0 && n.cpu < g.NanoCPUs:
		return noCPU
	case g.MemoryBytes > 0 && n.memory < g.MemoryBytes:
		return noMemory
	}
	return fits
}

// rank is where a node stands for the tasks of one group.
type rank struct {
	failures int // 0 below FailuresMax
	service  int
	tasks    int
	index    int // ascending with the ID
}

// ranking is a heap with the best node first.
type ranking []rank

func (r ranking) Len() int { return len(r) }
func (r ranking) Less(i, j int) bool {
	a, b := &r[i], &r[j]
	switch {
	case a.failures != b.failures:
		return a.failures < b.failures
	case a.service != b.service:
		return a.service < b.service
	case a.tasks != b.tasks:
		return a.tasks < b.tasks
	}
	return a.index < b.index
}
func (r ranking) Swap(i, j int) { r[i], r[j] = r[j], r[i] }
func (r *ranking) Push(x any)   { *r = append(*r, x.(rank)) }
func (r *ranking) Pop() any {
	last := len(*r) - 1
	x := (*r)[last]
	*r = (*r)[:last]
	return x
}
