package fuzz_test

import (
	"slices"

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
