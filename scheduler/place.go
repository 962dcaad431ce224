package scheduler

import (
	"cmp"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"warden"
)

// Place gives as many tasks as it can a node, group after group, and for each other task the reason. Tasks are spread: of the
// nodes that fit, one with fewer tasks of the service comes first, then one with fewer tasks at all, then the lower ID; nodes
// with FailuresMax or more recent failures of the service come last. What it placed counts for what it places next; its
// arguments are not changed.
//
// Cost: for a group a 64th of the number of nodes in the zone for each constraint and each number of tasks that nodes hold; for a
// task little more, but where the service has tasks on all nodes that fit already: then one look at each and a logarithm of their
// number. Pure.
func Place(nodes []Node, groups []Group) (placed []Placement, unplaced []Unplaced) {
	p, all := newPlacer(nodes), 0
	for i := range groups {
		all += len(groups[i].TaskIDs)
	}
	placed = make([]Placement, 0, all)
	done := make([]int, len(groups))
	for i := range groups {
		done[i] = p.group(&groups[i], &placed)
	}
	var last *Group // whose reason it is
	var reason string
	for i := range groups { // now that all is placed: the reasons hold after the call
		g := &groups[i]
		if done[i] == len(g.TaskIDs) {
			continue
		}
		if last == nil || !sameNeeds(last, g) {
			last, reason = g, p.explain(g)
		}
		for _, id := range g.TaskIDs[done[i]:] {
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

// placer holds the nodes and what Place has decided so far. Sets of nodes are bits by index.
type placer struct {
	nodes    []host // by ID
	zones    map[string]set
	ready    set
	active   set
	levels   []set // by the number of tasks that a node holds; AssignTasksMax or more: the last. nil: none does
	lowest   int   // no level below has a node
	services map[string]*service
	values   map[string]map[string][]int32 // by the key of a constraint, then by value: which nodes have it
	addrs    []netip.Addr                  // of the nodes; nil until a constraint asks
	meet     map[Constraint]set            // the nodes that meet a constraint; at most meetMax

	fit    set    // scratch of group and explain
	known  set    // of the group at hand: nodes with tasks or many failures of its service. Empty between groups
	ranked []rank // scratch of group
}

// service is what the nodes have of one service.
type service struct {
	tasks    map[int32]int // how many tasks, by node
	failures map[int32]int // how many failures, FailuresMax or more
}

func newPlacer(nodes []Node) *placer {
	p := &placer{nodes: make([]host, len(nodes)), zones: make(map[string]set), services: make(map[string]*service), values: make(map[string]map[string][]int32), meet: make(map[Constraint]set),
		ready: newSet(len(nodes)), active: newSet(len(nodes)), fit: newSet(len(nodes)), known: newSet(len(nodes))}
	for i := range nodes {
		n := &nodes[i]
		p.nodes[i] = host{Node: n, cpu: max(0, n.NanoCPUs-n.UsedNanoCPUs), memory: max(0, n.MemoryBytes-n.UsedMemoryBytes), tasks: n.Tasks}
	}
	slices.SortFunc(p.nodes, func(a, b host) int { return cmp.Compare(a.ID, b.ID) })
	for i := range p.nodes {
		n := &p.nodes[i]
		if p.zones[n.Zone] == nil {
			p.zones[n.Zone] = newSet(len(nodes))
		}
		p.zones[n.Zone].add(i)
		if n.Ready {
			p.ready.add(i)
		}
		if n.Active {
			p.active.add(i)
		}
		p.level(n.tasks).add(i)
		for id, count := range n.ServiceTasks { // each entry is set once: the order does not matter
			if count > 0 {
				p.service(id).tasks[int32(i)] = count
			}
		}
		for id, count := range n.RecentFailures {
			if count >= FailuresMax {
				p.service(id).failures[int32(i)] = count
			}
		}
	}
	return p
}

func (p *placer) service(id string) *service {
	s := p.services[id]
	if s == nil {
		s = &service{tasks: make(map[int32]int), failures: make(map[int32]int)}
		p.services[id] = s
	}
	return s
}

// level returns the set of the nodes that hold so many tasks.
func (p *placer) level(tasks int) set {
	tasks = max(0, min(tasks, warden.AssignTasksMax))
	for len(p.levels) <= tasks {
		p.levels = append(p.levels, nil)
	}
	if p.levels[tasks] == nil {
		p.levels[tasks] = newSet(len(p.nodes))
	}
	return p.levels[tasks]
}

// group places tasks of g from its first on and returns how many found a node.
func (p *placer) group(g *Group, placed *[]Placement) int {
	if len(g.TaskIDs) == 0 || p.zones[g.Zone] == nil || !secretsMayEnter(g) {
		return 0
	}
	copy(p.fit, p.zones[g.Zone])
	p.fit.keep(p.ready)
	p.fit.keep(p.active)
	for i := range g.Constraints {
		p.restrict(p.fit, &g.Constraints[i])
	}
	s := p.service(g.ServiceID)
	for i := range s.tasks {
		p.known.add(int(i))
	}
	for i := range s.failures {
		p.known.add(int(i))
	}
	done := p.spread(g, s, placed)
	if done < len(g.TaskIDs) {
		done += p.stack(g, s, done, placed)
	}
	for i := range s.tasks {
		p.known.drop(int(i))
	}
	for i := range s.failures {
		p.known.drop(int(i))
	}
	return done
}

// spread gives one task each to nodes that have none of the service: those with fewest tasks first, then by ID. It returns how many
// it placed.
func (p *placer) spread(g *Group, s *service, placed *[]Placement) int {
	for p.lowest < len(p.levels) && p.levels[p.lowest].empty() {
		p.lowest++
	}
	done := 0
	for level := p.lowest; level < len(p.levels); level++ {
		for w, word := range p.levels[level] { // what is placed moves to the next level, and is known from here on
			for word &= p.fit[w] &^ p.known[w]; word != 0; word &= word - 1 {
				i := w<<6 | bits.TrailingZeros64(word)
				if p.nodes[i].room(g) != fits {
					continue
				}
				s.tasks[int32(i)] = 1
				p.known.add(i)
				p.take(i, g, g.TaskIDs[done], placed)
				if done++; done == len(g.TaskIDs) {
					return done
				}
			}
		}
	}
	return done
}

// stack gives the tasks from the first on to nodes that have some of the service already, or failed it. It returns how many it placed.
func (p *placer) stack(g *Group, s *service, first int, placed *[]Placement) int {
	p.ranked = p.ranked[:0]
	for w, word := range p.fit {
		for word &= p.known[w]; word != 0; word &= word - 1 {
			i := w<<6 | bits.TrailingZeros64(word)
			if n := &p.nodes[i]; n.room(g) == fits {
				p.ranked = append(p.ranked, rank{failures: s.failures[int32(i)], service: s.tasks[int32(i)], tasks: n.tasks, index: i})
			}
		}
	}
	r := p.ranked
	for i := len(r)/2 - 1; i >= 0; i-- {
		sink(r, i)
	}
	for at, id := range g.TaskIDs[first:] {
		if len(r) == 0 {
			return at
		}
		best := &r[0]
		p.take(best.index, g, id, placed)
		best.service++
		best.tasks++
		s.tasks[int32(best.index)] = best.service
		if p.nodes[best.index].room(g) != fits {
			r[0] = r[len(r)-1]
			r = r[:len(r)-1]
		}
		sink(r, 0)
	}
	return len(g.TaskIDs) - first
}

// take gives the node one task of the group.
func (p *placer) take(i int, g *Group, id string, placed *[]Placement) {
	n := &p.nodes[i]
	*placed = append(*placed, Placement{TaskID: id, NodeID: n.ID})
	n.cpu -= max(0, g.NanoCPUs)
	n.memory -= max(0, g.MemoryBytes)
	p.level(n.tasks).drop(i)
	n.tasks++
	p.level(n.tasks).add(i)
}

// restrict leaves the nodes in s that meet the constraint.
func (p *placer) restrict(s set, c *Constraint) {
	meet := p.meet[*c]
	if meet == nil {
		meet = p.meeting(c)
		if len(p.meet) < meetMax {
			p.meet[*c] = meet
		}
	}
	s.keep(meet)
}

// meetMax bounds the constraints whose nodes are remembered.
const meetMax = 4096

// meeting returns the nodes that meet the constraint.
func (p *placer) meeting(c *Constraint) set {
	s := newSet(len(p.nodes))
	switch c.key {
	case "":
		return s
	case ipKey:
		if p.addrs == nil {
			p.addrs = make([]netip.Addr, len(p.nodes))
			for i := range p.nodes {
				p.addrs[i] = address(p.nodes[i].Node)
			}
		}
		for i, a := range p.addrs {
			if c.prefix.Contains(a) {
				s.add(i)
			}
		}
	default:
		for _, i := range p.having(c.key)[c.value] {
			s.add(int(i))
		}
	}
	if c.not {
		for w := range s {
			s[w] = ^s[w] // bits behind the last node are in no zone
		}
	}
	return s
}

// having returns which nodes have which value under the key.
func (p *placer) having(key string) map[string][]int32 {
	all := p.values[key]
	if all == nil {
		all = make(map[string][]int32)
		p.values[key] = all
		for i := range p.nodes {
			if v, ok := value(p.nodes[i].Node, key); ok {
				all[v] = append(all[v], int32(i))
			}
		}
	}
	return all
}

// sameNeeds reports whether both groups ask the same of a node, so that they are refused for the same reason.
func sameNeeds(a, b *Group) bool {
	return a.Zone == b.Zone && a.NanoCPUs == b.NanoCPUs && a.MemoryBytes == b.MemoryBytes && slices.Equal(a.Constraints, b.Constraints) &&
		secretsMayEnter(a) == secretsMayEnter(b)
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

func (a *rank) less(b *rank) bool {
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

// sink brings the heap in order, the best node first, where only r[i] may stand too high.
func sink(r []rank, i int) {
	for {
		child := 2*i + 1
		if child >= len(r) {
			return
		}
		if child+1 < len(r) && r[child+1].less(&r[child]) {
			child++
		}
		if !r[child].less(&r[i]) {
			return
		}
		r[i], r[child] = r[child], r[i]
		i = child
	}
}

// set is a set of nodes: bits by index.
type set []uint64

func newSet(nodes int) set { return make(set, (nodes+63)/64) }

func (s set) add(i int)  { s[i>>6] |= 1 << (i & 63) }
func (s set) drop(i int) { s[i>>6] &^= 1 << (i & 63) }

// keep drops what is not in other.
func (s set) keep(other set) {
	for w := range s {
		s[w] &= other[w]
	}
}

func (s set) empty() bool {
	for _, word := range s {
		if word != 0 {
			return false
		}
	}
	return true
}

func (s set) size() int {
	n := 0
	for _, word := range s {
		n += bits.OnesCount64(word)
	}
	return n
}
