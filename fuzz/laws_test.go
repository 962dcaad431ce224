package fuzz_test

import (
	"slices"
	"testing"

	"warden"
	"warden/api"
	"warden/store"
)

// records returns all of the state. A record that did not change is the same pointer in a later view.
func records(v *store.View) map[store.Key]store.Record {
	out := map[store.Key]store.Record{}
	if c := v.Cluster(); c != nil {
		out[store.Key{Kind: api.Kind_KIND_CLUSTER, ID: c.Id}] = c
	}
	gather(out, api.Kind_KIND_NODE, v.Nodes())
	gather(out, api.Kind_KIND_TOMBSTONE, v.Tombstones())
	gather(out, api.Kind_KIND_ZONE, v.Zones())
	gather(out, api.Kind_KIND_TOKEN, v.Tokens())
	gather(out, api.Kind_KIND_SERVICE, v.Services())
	gather(out, api.Kind_KIND_TASK, v.Tasks())
	gather(out, api.Kind_KIND_SECRET, v.Secrets())
	gather(out, api.Kind_KIND_EXPOSURE, v.Exposures())
	for _, s := range v.Secrets() {
		gather(out, api.Kind_KIND_SECRET_VERSION, v.SecretVersions(s.Id))
	}
	return out
}

func gather[R store.Record](into map[store.Key]store.Record, kind api.Kind, list []R) {
	for _, r := range list {
		into[store.Key{Kind: kind, ID: r.GetId()}] = r
	}
}

// diff returns the keys of what is not the same before and after.
func diff(before, after map[store.Key]store.Record) map[store.Key]bool {
	out := map[store.Key]bool{}
	for k, r := range before {
		if after[k] != r {
			out[k] = true
		}
	}
	for k := range after {
		if before[k] == nil {
			out[k] = true
		}
	}
	return out
}

// checkLaws checks what holds of the state after any sequence of commands.
func checkLaws(t testing.TB, v *store.View) {
	names := map[string]bool{}
	unique := func(kind api.Kind, name string) {
		if key := kind.String() + name; names[key] || warden.CheckName(store.Noun(kind), name) != nil {
			t.Fatalf("a %s has the name %q, which is another's or no name", store.Noun(kind), name)
		} else {
			names[key] = true
		}
	}
	for _, z := range v.Zones() {
		unique(api.Kind_KIND_ZONE, z.Name)
	}
	keys := map[string]string{}
	for _, n := range v.Nodes() {
		if v.Zone(n.Zone) == nil {
			t.Fatalf("node %s is in zone %q, which is not there", n.Id, n.Zone)
		}
		for _, k := range [][]byte{n.KeyHash, n.NextKeyHash, n.JoinKeyHash} {
			if other := keys[string(k)]; len(k) > 0 && other != "" && other != n.Id {
				t.Fatalf("nodes %s and %s share a key", n.Id, other)
			}
			keys[string(k)] = n.Id
		}
	}
	for _, tomb := range v.Tombstones() {
		for _, k := range tomb.KeyHashes {
			if id := keys[string(k)]; id != "" && id != tomb.Id {
				t.Fatalf("node %s has a key of the removed %s", id, tomb.Id)
			}
		}
	}
	for _, token := range v.Tokens() {
		if token.UsesMax > 0 && token.Uses > token.UsesMax {
			t.Fatalf("token %s has %d uses of %d", token.Id, token.Uses, token.UsesMax)
		}
	}
	for _, s := range v.Secrets() {
		unique(api.Kind_KIND_SECRET, s.Name)
		if s.CurrentVersion != 0 && v.SecretVersion(s.Id, s.CurrentVersion) == nil {
			t.Fatalf("secret %s has no current version", s.Id)
		}
		for _, zone := range s.Zones {
			if v.Zone(zone) == nil {
				t.Fatalf("secret %s is for zone %q, which is not there", s.Id, zone)
			}
		}
		for _, sv := range v.SecretVersions(s.Id) {
			if sv.Version > s.CurrentVersion {
				t.Fatalf("secret version %s is newer than the current one, %d", sv.Id, s.CurrentVersion)
			}
		}
	}
	for _, s := range v.Services() {
		unique(api.Kind_KIND_SERVICE, s.Spec.Name)
		if v.Zone(s.Spec.Task.Zone) == nil {
			t.Fatalf("service %s is for zone %q, which is not there", s.Id, s.Spec.Task.Zone)
		}
		for _, r := range s.Spec.Task.Secrets {
			if v.Secret(r.SecretId) == nil || r.Version != 0 && v.SecretVersion(r.SecretId, r.Version) == nil {
				t.Fatalf("service %s uses %s@%d, which is not there", s.Id, r.SecretName, r.Version)
			}
		}
	}
	for _, e := range v.Exposures() {
		if v.Node(e.NodeId) == nil && v.SecretVersion(e.SecretId, e.Version) == nil {
			t.Fatalf("exposure %s has outlived both", e.Id)
		}
	}
	for _, task := range v.Tasks() {
		for _, r := range task.Spec.Secrets {
			if !task.Status.State.Ended() && v.SecretVersion(r.SecretId, r.Version) == nil {
				t.Fatalf("task %s is to have %s@%d, which is gone", task.Id, r.SecretName, r.Version)
			}
			if task.Holds() && v.Node(task.NodeId) != nil && v.Object(api.Kind_KIND_EXPOSURE, store.ExposureID(task.NodeId, r.SecretId, r.Version)) == nil {
				t.Fatalf("task %s is on %s with secret %s, and no exposure says so", task.Id, task.NodeId, r.SecretName)
			}
		}
	}
}

// mayEnter reports whether the secret's zones have this one.
func mayEnter(s *api.Secret, zone string) bool {
	return s != nil && (len(s.Zones) == 0 || slices.Contains(s.Zones, zone))
}

// tape is the fuzzer's input, read as choices. Beyond its end every choice is the first.
type tape struct{ b []byte }

// pick returns a number below n, which is at most 256.
func (p *tape) pick(n int) int {
	if len(p.b) == 0 {
		return 0
	}
	c := int(p.b[0]) % n
	p.b = p.b[1:]
	return c
}

// bytes returns the next n bytes, or what is left.
func (p *tape) bytes(n int) []byte {
	n = min(n, len(p.b))
	out := p.b[:n]
	p.b = p.b[n:]
	return out
}

func (p *tape) done() bool { return len(p.b) == 0 }
