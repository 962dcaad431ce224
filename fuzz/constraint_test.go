package fuzz_test

import (
	"testing"

	"warden"
	"warden/scheduler"
)

// FuzzConstraint: what parses has one spelling, which parses to the same constraint and matches any node; what does not is
// CodeInvalid. On every node exactly one of == and != holds.
func FuzzConstraint(f *testing.F) {
	seeds := []string{
		"node.id==0123456789abcdefghijklmno", "node.hostname == db1", "node.role!=manager", "node.ip==10.0.0.0/8", "node.ip!=fe80::1",
		"node.platform.os==linux", "node.platform.arch==x86_64", "node.labels.disk==ssd", "engine.labels.a.b-c!=d e",
	}
	for _, s := range seeds {
		if _, err := scheduler.ParseConstraint(s); err != nil {
			f.Fatalf("seed %q: %v", s, err)
		}
		f.Add(s)
	}
	for _, s := range []string{"", "=", "!=", "node.role", "node.role===worker", "node.ip==10.0.0.1/8", "node.labels.a==\x00", "node.labels.==x"} {
		f.Add(s)
	}
	nodes := []scheduler.Node{{}, {ID: "0123456789abcdefghijklmno", Hostname: "db1", Role: "worker", IP: "10.1.2.3", OS: "linux", Arch: "amd64",
		Labels: map[string]string{"disk": "ssd"}, EngineLabels: map[string]string{"a.b-c": "d e"}}}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := scheduler.ParseConstraint(s)
		if err != nil {
			if warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" || c != (scheduler.Constraint{}) {
				t.Fatalf("ParseConstraint(%q) = %q, %v", s, c, err)
			}
			return
		}
		again, err := scheduler.ParseConstraint(c.String())
		if err != nil || again != c || len(c.String()) > warden.ConstraintMax {
			t.Fatalf("ParseConstraint(%q) = %q, again %q, %v", s, c, again, err)
		}
		at := len(c.String())
		for i := range c.String() {
			if c.String()[i] == '=' || c.String()[i] == '!' {
				at = i
				break
			}
		}
		other := map[byte]string{'=': "!=", '!': "=="}[c.String()[at]]
		o, err := scheduler.ParseConstraint(c.String()[:at] + other + c.String()[at+2:])
		if err != nil {
			t.Fatalf("the opposite of %q: %v", c, err)
		}
		for _, n := range nodes {
			if c.Matches(n) == o.Matches(n) {
				t.Fatalf("%q and %q both give %v", c, o, c.Matches(n))
			}
		}
	})
}
