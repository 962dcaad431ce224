package scheduler_test

import (
	"strings"
	"testing"

	"warden"
	"warden/scheduler"
)

const nodeID = "0123456789abcdefghijklmno"

func TestConstraintMatches(t *testing.T) {
	full := scheduler.Node{ID: nodeID, Hostname: "db1.example", Role: "worker", IP: "10.1.2.3", OS: "linux", Arch: "amd64",
		Labels: map[string]string{"disk": "SSD", "rack.row": "a b", "empty": ""}, EngineLabels: map[string]string{"disk": "hdd"}}
	for _, test := range []struct {
		in, spelled string // spelled as String does; empty: as in
		want        bool
	}{
		{"node.id==" + nodeID, "", true},
		{"node.id!=" + nodeID, "", false},
		{" node.hostname  ==  db1.example ", "node.hostname==db1.example", true},
		{"node.hostname==DB1.example", "", false},
		{"node.role==worker", "", true},
		{"node.role!=manager", "", true},
		{"node.ip==10.1.2.3", "", true},
		{"node.ip==10.1.2.4", "", false},
		{"node.ip!=10.1.2.4", "", true},
		{"node.ip==10.0.0.0/8", "", true},
		{"node.ip!=10.0.0.0/8", "", false},
		{"node.ip==::ffff:10.1.2.3", "node.ip==10.1.2.3", true},
		{"node.ip==FE80::/10", "node.ip==fe80::/10", false},
		{"node.platform.os==linux", "", true},
		{"node.platform.arch==x86_64", "node.platform.arch==amd64", true},
		{"node.platform.arch==aarch64", "node.platform.arch==arm64", false},
		{"node.labels.disk==SSD", "", true},
		{"node.labels.disk==ssd", "", false}, // values compare exactly
		{"node.labels.disk!=ssd", "", true},
		{"node.labels.Disk==SSD", "", false},
		{"node.labels.rack.row==a b", "", true},
		{"node.labels.missing==x", "", false},
		{"node.labels.missing!=x", "", true},
		{"node.labels.empty!=x", "", true},
		{"engine.labels.disk==hdd", "", true},
		{"engine.labels.disk!=SSD", "", true},
		{"node.labels.a==b==c", "", false},
		{"node.labels.a!=!b", "", true},
		{"node.labels.ä==ö", "", false},
	} {
		c, err := scheduler.ParseConstraint(test.in)
		if err != nil {
			t.Errorf("ParseConstraint(%q): %v", test.in, err)
			continue
		}
		want := test.spelled
		if want == "" {
			want = test.in
		}
		if c.String() != want {
			t.Errorf("ParseConstraint(%q).String() = %q, want %q", test.in, c, want)
		}
		if got := c.Matches(full); got != test.want {
			t.Errorf("%q matches = %v, want %v", test.in, got, test.want)
		}
		if again, err := scheduler.ParseConstraint(c.String()); err != nil || again != c {
			t.Errorf("ParseConstraint(%q) = %v, %v, want the same constraint", c, again, err)
		}
	}
	if (scheduler.Constraint{}).Matches(full) {
		t.Error("the zero constraint matches")
	}
	if !must(t, "node.ip==10.1.2.3").Matches(scheduler.Node{IP: "::ffff:10.1.2.3"}) || must(t, "node.ip==10.1.2.3").Matches(scheduler.Node{}) ||
		!must(t, "node.ip!=10.1.2.3").Matches(scheduler.Node{IP: "?"}) {
		t.Error("node.ip: a mapped address is the address, none is like a missing label")
	}
	if !must(t, "node.platform.arch==arm64").Matches(scheduler.Node{Arch: "aarch64"}) {
		t.Error("node.platform.arch: aarch64 is arm64")
	}
}

func TestConstraintRefused(t *testing.T) {
	for _, in := range []string{
		"", " ", "==", "!=", "node.role", "node.role=worker", "node.role=!worker", "node.role===worker", "node.role!==worker",
		"node.role<>worker", "node.role!worker", "node.role!", "node.role=", "node.role==", "node.role!= ", "==worker", "node.role ~= worker",
		"node.role==Manager", "node.role==leader", "Node.role==worker", "node.rolle==worker", "role==worker", "node.zone==pci",
		"node.labels==x", "node.labels.==x", "node.labels. ==x", "node.labels.a b==x", "engine.labels.==x", "labels.a==x",
		"node.labels." + strings.Repeat("k", warden.LabelKeyMax+1) + "==x", "node.labels.a==" + strings.Repeat("x", warden.ConstraintMax),
		"node.labels.a==b\n", "node.labels.a==b\tc", "node.labels.a==\x00", "node.labels.a==\xff", "node.labels.\xff==a", "node.labels.a==b\u00a0",
		"node.id==abc", "node.id==" + strings.ToUpper(nodeID),
		"node.ip==10.0.0", "node.ip==10.0.0.0/33", "node.ip==10.1.0.0/8", "node.ip==fe80::1%eth0", "node.ip==::ffff:10.0.0.0/104", "node.ip==host",
	} {
		c, err := scheduler.ParseConstraint(in)
		if warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" {
			t.Errorf("ParseConstraint(%q) = %q, %v, want CodeInvalid with a hint", in, c, err)
		}
		if c != (scheduler.Constraint{}) {
			t.Errorf("ParseConstraint(%q) gave %q beside the error", in, c)
		}
	}
}
