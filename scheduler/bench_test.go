package scheduler_test

import (
	"fmt"
	"testing"

	"warden/scheduler"
)

// cluster returns nodes that hold a few tasks each, all the same but for their labels.
func cluster(n int) []scheduler.Node {
	nodes := make([]scheduler.Node, n)
	for i := range nodes {
		nodes[i] = node(fmt.Sprintf("n%05d", i), func(n *scheduler.Node) {
			n.Labels, n.IP = map[string]string{"disk": "ssd", "rack": fmt.Sprint(i % 20)}, fmt.Sprintf("10.0.%d.%d", i/250, i%250)
			n.ServiceTasks, n.Tasks = map[string]int{"other": 3}, 3
		})
	}
	return nodes
}

// groups returns so many groups of so many tasks each.
func groups(n, tasks int, change func(i int, g *scheduler.Group)) []scheduler.Group {
	out := make([]scheduler.Group, n)
	for i := range out {
		out[i] = scheduler.Group{ServiceID: fmt.Sprint("s", i), Zone: "default", TaskIDs: ids(fmt.Sprint("t", i, "-"), tasks)}
		change(i, &out[i])
	}
	return out
}

// Tasks on nodes, by the number of services that they are of: plain, with reservations and constraints, and where there is room for
// half of them only, so that each service of the others is told why.
func BenchmarkPlace(b *testing.B) {
	constraints := func(texts ...string) (out []scheduler.Constraint) {
		for _, t := range texts {
			out = append(out, must(b, t))
		}
		return out
	}
	ssd := constraints("node.labels.disk==ssd", "node.labels.rack!=3", "node.platform.os==linux")
	net := constraints("node.ip==10.0.0.0/8")
	for _, size := range []struct{ tasks, nodes int }{{10_000, 1_000}, {100_000, 10_000}} {
		nodes := cluster(size.nodes)
		for _, kind := range []struct {
			name   string
			placed int
			change func(i int, g *scheduler.Group)
		}{
			{"plain", size.tasks, func(int, *scheduler.Group) {}},
			{"reserved", size.tasks, func(_ int, g *scheduler.Group) { g.NanoCPUs, g.MemoryBytes = 1e7, 1<<20 }},
			{"constrained", size.tasks, func(_ int, g *scheduler.Group) { g.Constraints = ssd }},
			{"by-address", size.tasks, func(_ int, g *scheduler.Group) { g.Constraints = net }},
			{"by-rack", size.tasks, func(i int, g *scheduler.Group) {
				g.Constraints = constraints(fmt.Sprintf("node.labels.rack==%d", i%20))
			}},
			{"half-full", size.tasks / 2, func(_ int, g *scheduler.Group) { g.NanoCPUs = 4e9 / 5 }},
		} {
			for _, n := range []int{1, 100, 10_000} {
				all := groups(n, size.tasks/n, kind.change)
				b.Run(fmt.Sprintf("%dx%d/%d/%s", size.tasks, size.nodes, n, kind.name), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						if placed, _ := scheduler.Place(nodes, all); len(placed) != kind.placed {
							b.Fatalf("placed %d", len(placed))
						}
					}
				})
			}
		}
	}
}
