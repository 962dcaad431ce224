package policy_test

import (
	"slices"
	"testing"

	"google.golang.org/grpc"
	"pgregory.net/rapid"

	"warden"
	"warden/api"
	"warden/policy"
)

const create = "/warden.v1.Control/CreateSecret"

// TestTableIsComplete: each method of the two services that a person calls has a row, and no row is for anything else.
func TestTableIsComplete(t *testing.T) {
	var want []string
	for _, d := range []grpc.ServiceDesc{api.Control_ServiceDesc, api.Local_ServiceDesc} {
		for _, m := range d.Methods {
			want = append(want, "/"+d.ServiceName+"/"+m.MethodName)
		}
		for _, s := range d.Streams {
			want = append(want, "/"+d.ServiceName+"/"+s.StreamName)
		}
	}
	slices.Sort(want)
	if got := policy.Actions(); !slices.Equal(got, want) {
		t.Errorf("Actions() = %q, want %q", got, want)
	}
}

func TestDecide(t *testing.T) {
	node := policy.Subject{Kind: policy.KindNode, Name: warden.NewID()}
	for _, tt := range []struct {
		name   string
		s      policy.Subject
		action string
		want   bool
	}{
		{"root", policy.Subject{Kind: "uid", Name: "0"}, create, true},
		{"another uid", policy.Subject{Kind: "uid", Name: "1000"}, create, true},
		{"no uid", policy.Subject{Kind: "uid"}, create, false},
		{"uid that is no number", policy.Subject{Kind: "uid", Name: "root"}, create, false},
		{"uid -1", policy.Subject{Kind: "uid", Name: "-1"}, create, false},
		{"uid 00", policy.Subject{Kind: "uid", Name: "00"}, create, false},
		{"node", node, create, false},
		{"node that lists", node, "/warden.v1.Control/List", false},
		{"operator", policy.Subject{Kind: "operator", Name: "ann"}, create, false},
		{"nobody", policy.Subject{}, create, false},
		{"kind in capitals", policy.Subject{Kind: "UID", Name: "0"}, create, false},
		{"unknown action", policy.Subject{Kind: "uid", Name: "0"}, "/warden.v1.Control/Destroy", false},
		{"action in capitals", policy.Subject{Kind: "uid", Name: "0"}, "/warden.v1.control/CreateSecret", false},
		{"no action", policy.Subject{Kind: "uid", Name: "0"}, "", false},
	} {
		d := policy.Decide(tt.s, tt.action, "x")
		if d.Allow != tt.want || d.Reason == "" {
			t.Errorf("%s: Decide = %+v, want %v with a reason", tt.name, d, tt.want)
		}
		if code := warden.CodeOf(d.Err("asking")); (code == "") != tt.want || code != "" && code != warden.CodeDenied {
			t.Errorf("%s: Err has code %q", tt.name, code)
		}
	}
}

// TestI5NodesHaveNothingToCall, whatever the action.
func TestI5NodesHaveNothingToCall(t *testing.T) {
	for _, a := range policy.Actions() {
		if d := policy.Decide(policy.Subject{Kind: policy.KindNode, Name: warden.NewID()}, a, ""); d.Allow {
			t.Errorf("a node may %s", a)
		}
	}
}

func known(zone string) bool { return slices.Contains([]string{"default", "pci", "lab"}, zone) }

// TestI6SecretMayEnter: only declared zones, and only those that the secret names.
func TestI6SecretMayEnter(t *testing.T) {
	for _, tt := range []struct {
		name  string
		zones []string
		node  string
		known func(string) bool
		want  bool
	}{
		{"any zone", nil, "pci", known, true},
		{"its zone", []string{"pci"}, "pci", known, true},
		{"one of its zones", []string{"lab", "pci"}, "pci", known, true},
		{"another zone", []string{"pci"}, "default", known, false},
		{"none of its zones", []string{"pci", "lab"}, "default", known, false},
		{"case differs", []string{"pci"}, "PCI", known, false},
		{"unknown node zone", nil, "mars", known, false},
		{"no node zone", nil, "", known, false},
		{"unknown secret zone", []string{"mars"}, "pci", known, false},
		{"one unknown secret zone", []string{"pci", "mars"}, "pci", known, false},
		{"the same unknown zone", []string{"mars"}, "mars", known, false},
		{"empty secret zone", []string{""}, "pci", known, false},
		{"zones not known", nil, "pci", nil, false},
	} {
		if d := policy.SecretMayEnter(tt.zones, tt.node, tt.known); d.Allow != tt.want || d.Reason == "" {
			t.Errorf("%s: SecretMayEnter = %+v, want %v with a reason", tt.name, d, tt.want)
		}
	}
}

func TestI11TaskMayRunOnlyInItsDeclaredZone(t *testing.T) {
	zones := rapid.SampledFrom([]string{"", "default", "pci", "lab", "mars", "PCI"})
	rapid.Check(t, func(t *rapid.T) {
		task, node := zones.Draw(t, "task"), zones.Draw(t, "node")
		d := policy.TaskMayRun(task, node, known)
		if want := task == node && known(task); d.Allow != want || d.Reason == "" {
			t.Fatalf("TaskMayRun(%q, %q) = %+v, want %v with a reason", task, node, d, want)
		}
		if policy.TaskMayRun(task, node, nil).Allow {
			t.Fatal("allowed without knowing the zones")
		}
	})
}
