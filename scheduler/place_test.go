package scheduler_test

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"warden"
	"warden/scheduler"
)

const gib = 1 << 30

func node(id string, change ...func(*scheduler.Node)) scheduler.Node {
	n := scheduler.Node{ID: id, Hostname: "host-" + id, Role: "worker", Zone: "default", OS: "linux", Arch: "amd64",
		Active: true, Ready: true, NanoCPUs: 4e9, MemoryBytes: 8 * gib}
	for _, f := range change {
		f(&n)
	}
	return n
}

func ids(prefix string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%s%d", prefix, i)
	}
	return out
}

func must(t testing.TB, s string) scheduler.Constraint {
	t.Helper()
	c, err := scheduler.ParseConstraint(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPlace(t *testing.T) {
	for _, test := range []struct {
		name   string
		nodes  []scheduler.Node
		groups []scheduler.Group
		want   string // TASK@NODE…, then TASK: REASON lines
	}{
		{"ties go to the lower ID",
			[]scheduler.Node{node("c"), node("a"), node("b")},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", TaskIDs: ids("t", 4)}},
			"t0@a t1@b t2@c t3@a"},
		{"fewest of the service, then fewest at all",
			[]scheduler.Node{
				node("a", func(n *scheduler.Node) { n.Tasks, n.ServiceTasks = 1, map[string]int{"s": 1} }),
				node("b", func(n *scheduler.Node) { n.Tasks = 5 }),
				node("c", func(n *scheduler.Node) { n.Tasks = 4 })},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", TaskIDs: ids("t", 3)}},
			"t0@c t1@b t2@a"},
		{"what one group took, the next sees",
			[]scheduler.Node{node("a"), node("b")},
			[]scheduler.Group{
				{ServiceID: "s", Zone: "default", NanoCPUs: 3e9, TaskIDs: ids("t", 1)},
				{ServiceID: "s", Zone: "default", NanoCPUs: 1e9, TaskIDs: ids("u", 1)},
				{ServiceID: "r", Zone: "default", NanoCPUs: 3e9, TaskIDs: ids("v", 2)}},
			"t0@a u0@b v0@b\n" +
				"v1: no suitable node (2 nodes: 3 CPUs reserved, at most 1 CPU free)"},
		{"a node where the service keeps failing comes last",
			[]scheduler.Node{
				node("a", func(n *scheduler.Node) { n.RecentFailures = map[string]int{"s": 5} }),
				node("b", func(n *scheduler.Node) { n.Tasks, n.RecentFailures = 9, map[string]int{"s": 4} })},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", TaskIDs: ids("t", 2)}, {ServiceID: "r", Zone: "default", TaskIDs: ids("u", 1)}},
			"t0@b t1@b u0@a"},
		{"a node where the service keeps failing is better than none",
			[]scheduler.Node{node("a", func(n *scheduler.Node) { n.RecentFailures = map[string]int{"s": 50} })},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", TaskIDs: ids("t", 1)}},
			"t0@a"},
		{"every filter says its own",
			[]scheduler.Node{
				node("a"), node("b"), node("c", func(n *scheduler.Node) { n.Zone = "dmz" }),
				node("d", func(n *scheduler.Node) { n.Zone, n.Ready, n.Active = "pci", false, false }),
				node("e", func(n *scheduler.Node) { n.Zone, n.Active = "pci", false }),
				node("f", func(n *scheduler.Node) { n.Zone = "pci" }),
				node("g", func(n *scheduler.Node) {
					n.Zone, n.Labels, n.UsedMemoryBytes = "pci", map[string]string{"disk": "ssd"}, 7*gib
				}),
				node("h", func(n *scheduler.Node) {
					n.Zone, n.Labels, n.UsedNanoCPUs = "pci", map[string]string{"disk": "ssd"}, 35e8
				}),
				node("i", func(n *scheduler.Node) {
					n.Zone, n.Labels, n.Tasks = "pci", map[string]string{"disk": "ssd"}, warden.AssignTasksMax
				})},
			[]scheduler.Group{{ServiceID: "s", Zone: "pci", NanoCPUs: 1e9, MemoryBytes: 4 * gib,
				Constraints: []scheduler.Constraint{must(t, "node.role==worker"), must(t, "node.labels.disk==ssd")}, TaskIDs: ids("t", 1)}},
			`t0: no suitable node (2 nodes in zone "default", not "pci"; 1 node in zone "dmz", not "pci"; 1 node down; 1 node paused or drained; ` +
				`1 node without node.labels.disk==ssd; 1 node with 4096 tasks, the most there can be; 1 node: 1 CPU reserved, 0.5 CPUs free; ` +
				`1 node: 4 GiB reserved, 1 GiB free)`},
		{"a secret that may not enter",
			[]scheduler.Node{node("a"), node("b")},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", SecretZones: [][]string{{}, {"default", "pci"}, {"pci"}}, TaskIDs: ids("t", 1)}},
			`t0: no suitable node (2 nodes in zone "default", which a secret of the service may not enter)`},
		{"secrets that may enter",
			[]scheduler.Node{node("a")},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", SecretZones: [][]string{nil, {"pci", "default"}}, TaskIDs: ids("t", 1)}},
			"t0@a"},
		{"unknown size takes only what reserves nothing",
			[]scheduler.Node{node("a", func(n *scheduler.Node) { n.NanoCPUs, n.MemoryBytes = 0, 0 })},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", MemoryBytes: 1, TaskIDs: ids("t", 1)}, {ServiceID: "s", Zone: "default", TaskIDs: ids("u", 1)}},
			"u0@a\nt0: no suitable node (1 node of unknown size: 1 B reserved)"},
		{"more used than there is", // the node shrank
			[]scheduler.Node{node("a", func(n *scheduler.Node) { n.UsedMemoryBytes = 1 << 62 })},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", MemoryBytes: 1536, TaskIDs: ids("t", 1)}},
			"t0: no suitable node (1 node: 1.5 KiB reserved, 0 B free)"},
		{"groups that ask for different things have reasons of their own",
			[]scheduler.Node{node("a"), node("b", func(n *scheduler.Node) { n.Zone = "pci" })},
			[]scheduler.Group{
				{ServiceID: "r", Zone: "default", NanoCPUs: 9e9, TaskIDs: ids("t", 1)}, {ServiceID: "s", Zone: "default", NanoCPUs: 9e9, TaskIDs: ids("u", 1)},
				{ServiceID: "s", Zone: "default", MemoryBytes: 9 * gib, TaskIDs: ids("v", 1)},
				{ServiceID: "s", Zone: "default", MemoryBytes: 9 * gib, Constraints: []scheduler.Constraint{must(t, "node.role==manager")}, TaskIDs: ids("w", 1)},
				{ServiceID: "s", Zone: "default", MemoryBytes: 9 * gib, SecretZones: [][]string{{"pci"}}, TaskIDs: ids("x", 1)},
				{ServiceID: "s", Zone: "pci", MemoryBytes: 9 * gib, TaskIDs: ids("y", 1)}},
			`t0: no suitable node (1 node in zone "pci", not "default"; 1 node: 9 CPUs reserved, 4 CPUs free)` + "\n" +
				`u0: no suitable node (1 node in zone "pci", not "default"; 1 node: 9 CPUs reserved, 4 CPUs free)` + "\n" +
				`v0: no suitable node (1 node in zone "pci", not "default"; 1 node: 9 GiB reserved, 8 GiB free)` + "\n" +
				`w0: no suitable node (1 node in zone "pci", not "default"; 1 node without node.role==manager)` + "\n" +
				`x0: no suitable node (1 node in zone "pci", not "default"; 1 node in zone "default", which a secret of the service may not enter)` + "\n" +
				`y0: no suitable node (1 node in zone "default", not "pci"; 1 node: 9 GiB reserved, 8 GiB free)`},
		{"no nodes", nil,
			[]scheduler.Group{{ServiceID: "s", Zone: "default", TaskIDs: ids("t", 1)}},
			"t0: no suitable node (the cluster has no nodes)"},
		{"many zones in one line",
			[]scheduler.Node{
				node("a", func(n *scheduler.Node) { n.Zone = "a" }), node("b", func(n *scheduler.Node) { n.Zone = "b" }),
				node("c", func(n *scheduler.Node) { n.Zone = "c" }), node("d", func(n *scheduler.Node) { n.Zone = "d" }),
				node("e", func(n *scheduler.Node) { n.Ready = false })},
			[]scheduler.Group{{ServiceID: "s", Zone: "default", TaskIDs: ids("t", 1)}},
			`t0: no suitable node (4 nodes in 4 other zones, not "default"; 1 node down)`},
	} {
		t.Run(test.name, func(t *testing.T) {
			placed, unplaced := scheduler.Place(test.nodes, test.groups)
			if got := text(placed, unplaced); got != test.want {
				t.Errorf("Place() =\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

func text(placed []scheduler.Placement, unplaced []scheduler.Unplaced) string {
	var p []string
	for _, x := range placed {
		p = append(p, x.TaskID+"@"+x.NodeID)
	}
	var lines []string
	if len(p) > 0 {
		lines = append(lines, strings.Join(p, " "))
	}
	for _, x := range unplaced {
		lines = append(lines, x.TaskID+": "+x.Reason)
	}
	return strings.Join(lines, "\n")
}

func TestReasonIsBounded(t *testing.T) {
	var nodes []scheduler.Node
	g := scheduler.Group{ServiceID: "s", Zone: "default", TaskIDs: []string{"t"}}
	for i := range warden.ConstraintsMax {
		g.Constraints = append(g.Constraints, must(t, fmt.Sprintf("node.labels.l%d!=%s", i, strings.Repeat("ü", 100))))
		nodes = append(nodes, node(fmt.Sprint(i), func(n *scheduler.Node) {
			n.Labels = map[string]string{fmt.Sprintf("l%d", i): strings.Repeat("ü", 100)}
		}))
	}
	_, unplaced := scheduler.Place(nodes, []scheduler.Group{g})
	if r := unplaced[0].Reason; len(r) > scheduler.ReasonMax || !strings.HasSuffix(r, "…") || strings.ToValidUTF8(r, "?") != r {
		t.Errorf("reason of %d bytes: %s", len(r), r)
	}
}

func TestBelongs(t *testing.T) {
	g := scheduler.Group{ServiceID: "s", Zone: "default", NanoCPUs: 99e9, Constraints: []scheduler.Constraint{must(t, "node.labels.a==b")}}
	for _, test := range []struct {
		node scheduler.Node
		want string
	}{
		{node("a", func(n *scheduler.Node) { n.Labels, n.Ready, n.Active = map[string]string{"a": "b"}, false, false }), ""},
		{node("a"), "without node.labels.a==b"},
		{node("a", func(n *scheduler.Node) { n.Zone = "pci" }), `in zone "pci", not "default"`},
	} {
		if ok, reason := scheduler.Belongs(test.node, g); ok != (test.want == "") || reason != test.want {
			t.Errorf("Belongs(%+v) = %v, %q, want %q", test.node, ok, reason, test.want)
		}
	}
}

// A drawn cluster: whatever it is, each task is answered once, the limits hold, no placement breaks a filter, the spread is
// as even as the filters allow, and the order of the nodes changes nothing.
func TestPlaceLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		zones := rapid.SampledFrom([]string{"default", "pci"})
		var nodes []scheduler.Node
		for i := range rapid.IntRange(0, 12).Draw(t, "nodes") {
			nodes = append(nodes, node(fmt.Sprintf("n%02d", i), func(n *scheduler.Node) {
				n.Zone = zones.Draw(t, "zone")
				n.Ready, n.Active = rapid.IntRange(0, 5).Draw(t, "ready") > 0, rapid.IntRange(0, 5).Draw(t, "active") > 0
				n.NanoCPUs, n.UsedNanoCPUs = rapid.Int64Range(0, 8).Draw(t, "cpus"), rapid.Int64Range(0, 4).Draw(t, "used")
				n.Labels = map[string]string{"a": rapid.SampledFrom([]string{"x", "y"}).Draw(t, "label")}
				n.Tasks = rapid.IntRange(0, 3).Draw(t, "tasks")
				n.ServiceTasks = map[string]int{"s0": min(n.Tasks, rapid.IntRange(0, 3).Draw(t, "service tasks"))}
				n.RecentFailures = map[string]int{"s1": rapid.IntRange(0, 7).Draw(t, "failures")}
			}))
		}
		var groups []scheduler.Group
		all := map[string]scheduler.Group{}
		for i := range rapid.IntRange(0, 4).Draw(t, "groups") {
			g := scheduler.Group{ServiceID: fmt.Sprintf("s%d", i%3), Zone: zones.Draw(t, "zone"), NanoCPUs: rapid.Int64Range(0, 3).Draw(t, "reserve"),
				TaskIDs: ids(fmt.Sprintf("t%d-", i), rapid.IntRange(0, 20).Draw(t, "count"))}
			if rapid.Bool().Draw(t, "constrained") {
				c, err := scheduler.ParseConstraint("node.labels.a==x")
				if err != nil {
					t.Fatal(err)
				}
				g.Constraints = []scheduler.Constraint{c}
			}
			if rapid.IntRange(0, 3).Draw(t, "secret") == 0 {
				g.SecretZones = [][]string{{"pci"}}
			}
			groups = append(groups, g)
			for _, id := range g.TaskIDs {
				all[id] = g
			}
		}
		placed, unplaced := scheduler.Place(nodes, groups)
		if len(placed)+len(unplaced) != len(all) {
			t.Fatalf("%d tasks, %d answers", len(all), len(placed)+len(unplaced))
		}
		byID := map[string]scheduler.Node{}
		for _, n := range nodes {
			byID[n.ID] = n
		}
		took, answered := map[string]int64{}, map[string]bool{}
		for _, p := range placed {
			g, n := all[p.TaskID], byID[p.NodeID]
			ok, reason := scheduler.Belongs(n, g)
			if answered[p.TaskID] || !ok || !n.Ready || !n.Active || n.Zone != g.Zone || g.SecretZones != nil && g.Zone != "pci" {
				t.Fatalf("%v on %+v: %s", g, n, reason)
			}
			answered[p.TaskID] = true
			took[n.ID] += g.NanoCPUs
			if g.NanoCPUs > 0 && n.UsedNanoCPUs+took[n.ID] > n.NanoCPUs {
				t.Fatalf("%s has %d CPUs, %d used, and got %d", n.ID, n.NanoCPUs, n.UsedNanoCPUs, took[n.ID])
			}
		}
		for _, u := range unplaced {
			if answered[u.TaskID] || !strings.HasPrefix(u.Reason, "no suitable node (") {
				t.Fatalf("%+v", u)
			}
			answered[u.TaskID] = true
		}
		slices.Reverse(nodes)
		if p, u := scheduler.Place(nodes, groups); !reflect.DeepEqual(p, placed) || !reflect.DeepEqual(u, unplaced) {
			t.Fatalf("the order of the nodes matters:\n%s\n%s", text(p, u), text(placed, unplaced))
		}
	})
}

// A drawn cluster, and what each task should get by the plainest reading of the rules: of the nodes that fit, the best.
func TestPlaceIsWhatTheRulesSay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		zones := rapid.SampledFrom([]string{"default", "pci"})
		var nodes []scheduler.Node
		for i := range rapid.IntRange(0, 150).Draw(t, "nodes") { // more than one word of bits
			nodes = append(nodes, node(fmt.Sprintf("n%03d", i), func(n *scheduler.Node) {
				bits := rapid.Uint32().Draw(t, "node")
				take := func(n uint32) int { v := bits % n; bits /= n; return int(v) }
				n.Zone = []string{"default", "default", "pci"}[take(3)]
				n.Ready, n.Active = take(8) > 0, take(8) > 0
				n.NanoCPUs, n.MemoryBytes = int64(take(8)), int64(take(8))
				n.UsedNanoCPUs = int64(take(4))
				n.Labels = map[string]string{"a": []string{"x", "y", "z"}[take(3)]}
				n.IP = []string{"10.0.0.1", "10.1.0.1", "", "192.0.2.1"}[take(4)]
				n.Tasks = []int{0, 1, 2, 3, warden.AssignTasksMax - 1}[take(5)]
				n.ServiceTasks = map[string]int{"s0": min(n.Tasks, take(3)), "s2": 0}
				n.RecentFailures = map[string]int{"s1": take(8)}
			}))
		}
		var groups []scheduler.Group
		for i := range rapid.IntRange(0, 6).Draw(t, "groups") {
			g := scheduler.Group{ServiceID: fmt.Sprintf("s%d", i%4), Zone: zones.Draw(t, "zone"), NanoCPUs: rapid.Int64Range(0, 2).Draw(t, "cpus"),
				MemoryBytes: rapid.Int64Range(0, 2).Draw(t, "memory"), TaskIDs: ids(fmt.Sprintf("t%d-", i), rapid.IntRange(0, 300).Draw(t, "count"))}
			for _, text := range []string{"node.labels.a==x", "node.labels.a!=y", "node.labels.b!=x", "node.ip==10.0.0.0/8", "node.ip!=10.0.0.1", "node.platform.arch==x86_64"} {
				if rapid.IntRange(0, 4).Draw(t, text) == 0 {
					c, err := scheduler.ParseConstraint(text)
					if err != nil {
						t.Fatal(err)
					}
					g.Constraints = append(g.Constraints, c)
				}
			}
			groups = append(groups, g)
		}
		placed, unplaced := scheduler.Place(nodes, groups)
		want, left := plainly(nodes, groups)
		if !reflect.DeepEqual(append([]scheduler.Placement{}, placed...), want) {
			t.Fatalf("Place() = %s\nwant %s", text(placed, nil), text(want, nil))
		}
		var not []string
		for _, u := range unplaced {
			not = append(not, u.TaskID)
		}
		if !reflect.DeepEqual(not, left) {
			t.Fatalf("not placed: %v, want %v", not, left)
		}
	})
}

// plainly places one task after the other by looking at every node.
func plainly(nodes []scheduler.Node, groups []scheduler.Group) (placed []scheduler.Placement, left []string) {
	placed = []scheduler.Placement{}
	nodes = slices.Clone(nodes)
	for i := range nodes {
		nodes[i].ServiceTasks = maps.Clone(nodes[i].ServiceTasks)
	}
	for _, g := range groups {
		for _, id := range g.TaskIDs {
			best := -1
			for i, n := range nodes {
				ok, _ := scheduler.Belongs(n, g)
				if !ok || !n.Ready || !n.Active || n.Tasks >= warden.AssignTasksMax || g.NanoCPUs > 0 && n.NanoCPUs-n.UsedNanoCPUs < g.NanoCPUs ||
					g.MemoryBytes > 0 && n.MemoryBytes-n.UsedMemoryBytes < g.MemoryBytes {
					continue
				}
				if best < 0 || slices.Compare(standing(n, g), standing(nodes[best], g)) < 0 {
					best = i
				}
			}
			if best < 0 {
				left = append(left, id)
				continue
			}
			n := &nodes[best]
			n.Tasks++
			n.ServiceTasks[g.ServiceID]++
			n.UsedNanoCPUs += g.NanoCPUs
			n.UsedMemoryBytes += g.MemoryBytes
			placed = append(placed, scheduler.Placement{TaskID: id, NodeID: n.ID})
		}
	}
	return placed, left
}

// standing orders nodes of ascending IDs.
func standing(n scheduler.Node, g scheduler.Group) []int {
	failures := n.RecentFailures[g.ServiceID]
	if failures < scheduler.FailuresMax {
		failures = 0
	}
	return []int{failures, n.ServiceTasks[g.ServiceID], n.Tasks}
}

func TestPlaceSpreadsEvenly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var nodes []scheduler.Node
		for i := range rapid.IntRange(1, 20).Draw(t, "nodes") {
			nodes = append(nodes, node(fmt.Sprintf("n%02d", i)))
		}
		placed, _ := scheduler.Place(nodes, []scheduler.Group{{ServiceID: "s", Zone: "default", TaskIDs: ids("t", rapid.IntRange(0, 100).Draw(t, "tasks"))}})
		count := map[string]int{}
		for _, p := range placed {
			count[p.NodeID]++
		}
		least, most := len(placed), 0
		for _, n := range nodes {
			least, most = min(least, count[n.ID]), max(most, count[n.ID])
		}
		if most-least > 1 {
			t.Fatalf("%d to %d tasks per node", least, most)
		}
	})
}
