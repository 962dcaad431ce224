package scheduler_test

import (
	"strings"
	"testing"

	"warden"
	"warden/scheduler"
)

// Every reason that Place gives has its class, the last filter's, whatever a constraint is called.
func TestClass(t *testing.T) {
	away := node("a", func(n *scheduler.Node) { n.Zone = "dmz" })
	for _, test := range []struct {
		want  string
		nodes []scheduler.Node
		group scheduler.Group
	}{
		{scheduler.ClassNoNodes, nil, scheduler.Group{}},
		{scheduler.ClassZone, []scheduler.Node{away}, scheduler.Group{}},
		{scheduler.ClassZone, []scheduler.Node{away, node("b", func(n *scheduler.Node) { n.Zone = "z2" }), node("c", func(n *scheduler.Node) { n.Zone = "z3" }),
			node("d", func(n *scheduler.Node) { n.Zone = "z4" })}, scheduler.Group{}},
		{scheduler.ClassSecretZone, []scheduler.Node{away, node("b")}, scheduler.Group{SecretZones: [][]string{{"pci"}}}},
		{scheduler.ClassDown, []scheduler.Node{away, node("b", func(n *scheduler.Node) { n.Ready = false })}, scheduler.Group{}},
		{scheduler.ClassInactive, []scheduler.Node{away, node("b", func(n *scheduler.Node) { n.Active = false })}, scheduler.Group{}},
		{scheduler.ClassConstraint, []scheduler.Node{away, node("b")}, scheduler.Group{Constraints: []scheduler.Constraint{must(t, "node.labels.cpu==down")}}},
		{scheduler.ClassFull, []scheduler.Node{away, node("b", func(n *scheduler.Node) { n.Tasks = warden.AssignTasksMax })}, scheduler.Group{}},
		{scheduler.ClassCPU, []scheduler.Node{away, node("b")}, scheduler.Group{NanoCPUs: 99e9}},
		{scheduler.ClassCPU, []scheduler.Node{node("b", func(n *scheduler.Node) { n.NanoCPUs = 0 })}, scheduler.Group{NanoCPUs: 1}},
		{scheduler.ClassMemory, []scheduler.Node{away, node("b"), node("c")}, scheduler.Group{MemoryBytes: 99 * gib}},
		{scheduler.ClassMemory, []scheduler.Node{node("b", func(n *scheduler.Node) { n.MemoryBytes = 0 })}, scheduler.Group{MemoryBytes: 1}},
	} {
		test.group.ServiceID, test.group.Zone, test.group.TaskIDs = "s", "default", []string{"t"}
		_, unplaced := scheduler.Place(test.nodes, []scheduler.Group{test.group})
		if len(unplaced) != 1 {
			t.Fatalf("%s: %v is not unplaced", test.want, test.group)
		}
		if got := scheduler.Class(unplaced[0].Reason); got != test.want {
			t.Errorf("Class(%q) = %q, want %q", unplaced[0].Reason, got, test.want)
		}
	}
	for message, want := range map[string]string{
		"":            "",
		"starting":    "",
		"1 node down": "",
		"pulling (x)": "",
		"no suitable node (its constraint \"x\" can't be read)":            scheduler.ClassOther,
		"no suitable node (" + strings.Repeat("x", 900) + "…":              "",
		"placement refused: placing a task: the node has no room [no-fit]": scheduler.ClassRefused,
	} {
		if got := scheduler.Class(message); got != want {
			t.Errorf("Class(%q) = %q, want %q", message, got, want)
		}
	}
}
