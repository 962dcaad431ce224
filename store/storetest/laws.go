package storetest

import (
	"warden"
	"warden/api"
	"warden/store"
)

// CheckLaws checks what holds of the state after any sequence of commands. t is a test's, or rapid's.
func CheckLaws(t interface {
	Fatalf(format string, args ...any)
}, v *store.View) {
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
