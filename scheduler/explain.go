package scheduler

import (
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"warden"
)

// refused is a number of nodes that do not fit for the same reason.
type refused struct {
	why   why
	at    int    // which constraint
	zone  string // of the nodes; otherZone and secretZone
	zones int    // over 1: so many zones were merged into this one
	nodes int
	free  int64 // the most that one of them has; noCPU and noMemory
	total int64 // the largest of them; 0: none of them has reported
}

// explain says why no node takes one more task of the group, as things stand now: each node counts under the first filter
// that it did not pass, in the order of the filters.
func (p *placer) explain(g *Group) string {
	var all []refused
	for _, zone := range slices.Sorted(maps.Keys(p.zones)) {
		if zone != g.Zone {
			all = append(all, refused{why: otherZone, zone: zone, nodes: p.zones[zone].size()})
		}
	}
	switch {
	case p.zones[g.Zone] == nil:
	case !secretsMayEnter(g):
		all = append(all, refused{why: secretZone, zone: g.Zone, nodes: p.zones[g.Zone].size()})
	default:
		all = p.refusals(g, all)
	}
	if len(all) == 0 {
		return "no suitable node (the cluster has no nodes)"
	}
	all = mergeZones(all)
	parts := make([]string, len(all))
	for i, r := range all {
		parts[i] = r.text(g)
	}
	return clip("no suitable node (" + strings.Join(parts, "; ") + ")")
}

// refusals adds why the nodes of the group's zone do not fit.
func (p *placer) refusals(g *Group, all []refused) []refused {
	left := p.fit
	copy(left, p.zones[g.Zone])
	before := left.size()
	count := func(why why, at int) {
		after := left.size()
		if after < before {
			all = append(all, refused{why: why, at: at, nodes: before - after})
		}
		before = after
	}
	left.keep(p.ready)
	count(down, 0)
	left.keep(p.active)
	count(inactive, 0)
	for i := range g.Constraints {
		p.restrict(left, &g.Constraints[i])
		count(constraint, i)
	}
	rooms := [...]refused{{why: full}, {why: noCPU}, {why: noMemory}}
	for w, word := range left {
		for ; word != 0; word &= word - 1 {
			n := &p.nodes[w<<6|bits.TrailingZeros64(word)]
			why := n.room(g)
			if why == fits {
				continue
			}
			r, free, total := &rooms[why-full], n.cpu, n.NanoCPUs
			if why == noMemory {
				free, total = n.memory, n.MemoryBytes
			}
			r.nodes++
			r.free, r.total = max(r.free, free), max(r.total, total)
		}
	}
	for _, r := range rooms {
		if r.nodes > 0 {
			all = append(all, r)
		}
	}
	return all
}

// mergeZones makes one line of the nodes in other zones where it would be more than zonesMax lines.
func mergeZones(all []refused) []refused {
	const zonesMax = 3
	n := 0
	for n < len(all) && all[n].why == otherZone {
		n++
	}
	if n <= zonesMax {
		return all
	}
	for i := range all[1:n] {
		all[0].nodes += all[1+i].nodes
	}
	all[0].zones = n
	return append(all[:1], all[n:]...)
}

// clip shortens s to ReasonMax bytes of whole characters.
func clip(s string) string {
	if len(s) <= ReasonMax {
		return s
	}
	return strings.ToValidUTF8(s[:ReasonMax-len("…")], "") + "…"
}

func (r refused) text(g *Group) string {
	nodes, most := "1 node", ""
	if r.nodes != 1 {
		nodes, most = strconv.Itoa(r.nodes)+" nodes", "at most "
	}
	switch r.why {
	case otherZone:
		if r.zones > 1 {
			return fmt.Sprintf("%s in %d other zones, not %q", nodes, r.zones, g.Zone)
		}
		return fmt.Sprintf("%s in zone %q, not %q", nodes, r.zone, g.Zone)
	case secretZone:
		return fmt.Sprintf("%s in zone %q, which a secret of the service may not enter", nodes, r.zone)
	case down:
		return nodes + " down"
	case inactive:
		return nodes + " paused or drained"
	case constraint:
		return fmt.Sprintf("%s without %s", nodes, g.Constraints[r.at])
	case full:
		return fmt.Sprintf("%s with %d tasks, the most there can be", nodes, warden.AssignTasksMax)
	case noCPU:
		if r.total <= 0 {
			return fmt.Sprintf("%s of unknown size: %s reserved", nodes, cpus(g.NanoCPUs))
		}
		return fmt.Sprintf("%s: %s reserved, %s%s free", nodes, cpus(g.NanoCPUs), most, cpus(r.free))
	default: // noMemory
		if r.total <= 0 {
			return fmt.Sprintf("%s of unknown size: %s reserved", nodes, size(g.MemoryBytes))
		}
		return fmt.Sprintf("%s: %s reserved, %s%s free", nodes, size(g.MemoryBytes), most, size(r.free))
	}
}

// cpus writes a billion as "1 CPU".
func cpus(nano int64) string {
	s := strconv.FormatFloat(float64(nano)/1e9, 'f', -1, 64)
	if s == "1" {
		return "1 CPU"
	}
	return s + " CPUs"
}

// size writes bytes in the largest binary unit that leaves at least 1, with one decimal where it is not whole.
func size(bytes int64) string {
	v, unit := float64(bytes), "B"
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + " " + unit
}
