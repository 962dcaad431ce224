package storetest_test

import (
	"testing"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

func TestNew(t *testing.T) {
	seeded := &api.Service{Id: warden.NewID(), Spec: &api.ServiceSpec{Name: "web"}}
	s := storetest.New(t, store.Wrap(seeded))
	if got := s.View().ServiceByName("web"); got.GetId() != seeded.Id || got.GetMeta().GetVersion() != 1 {
		t.Fatalf("ServiceByName(web) = %v", got)
	}
	w := s.Watch(api.Kind_KIND_ZONE)
	defer w.Close()
	zone := &api.Zone{Id: warden.NewID(), Name: "pci"}
	r := storetest.Propose(t, s, store.Put(zone, 0))
	if len(r.Versions) != 1 || r.Versions[0] != 1 {
		t.Fatalf("versions = %v, want 1", r.Versions)
	}
	c, err := w.Next(t.Context())
	if err != nil || len(c.Keys) != 1 || c.Keys[0].ID != zone.Id || c.Index != r.Index || s.View().Index() < c.Index {
		t.Fatalf("Next = %+v, %v", c, err)
	}
	if s.View().Zone("pci") == nil || s.AppliedIndex() < r.Index || s.CommitIndex() < r.Index {
		t.Fatal("the zone is not visible")
	}
	if id, err := s.View().Resolve(api.Kind_KIND_ZONE, zone.Id[:8]); err != nil || id != zone.Id {
		t.Fatal(id, err)
	}
	if _, err := s.View().Resolve(api.Kind_KIND_ZONE, "zzz"); warden.CodeOf(err) != warden.CodeNotFound {
		t.Fatal(err)
	}
}
