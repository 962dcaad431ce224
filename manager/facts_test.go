package manager

import (
	"bytes"
	"log/slog"
	"net/http/httptest"
	"testing"

	"warden"
	"warden/api"
	"warden/metrics"
	"warden/store"
)

// BenchmarkScrape is a whole scrape of a manager that leads, with 10,000 tasks that find no node.
func BenchmarkScrape(b *testing.B) {
	c := newCluster(b)
	m := c.first.m
	c.propose(store.Put(&api.Service{Id: warden.NewID(), Spec: &api.ServiceSpec{Name: "web", Replicas: 10_000, Task: &api.TaskSpec{Image: "host", Command: []string{"true"}, Zone: warden.DefaultZone, Restart: api.RestartCondition_RESTART_ANY}}}, 0))
	await(b, "10,000 tasks that say why they wait", func() bool {
		f := &api.Facts{}
		m.Facts(f)
		return len(f.Cluster.Unplaced) == 1 && f.Cluster.Unplaced[0].Count == 10_000
	})
	h := metrics.Handler(func() *api.Facts { f := &api.Facts{}; m.Facts(f); return f }, slog.New(slog.DiscardHandler))
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		if !bytes.Contains(w.Body.Bytes(), []byte("\nwarden_cluster_wanted_tasks 10000\n")) {
			b.Fatalf("the page is\n%s", w.Body)
		}
	}
}

// Refusals count under the door's word, whatever the name; what is no refusal does not.
func TestRefusalsAreCounted(t *testing.T) {
	var c counts
	c.refusal(warden.DoorJoin, warden.Errorf(warden.CodeLimited, "", "too many"))
	c.refusal(warden.DoorJoin, warden.Errorf(warden.CodeLimited, "", "too many"))
	c.refusal(warden.DoorRaft, warden.Errorf(warden.CodeWrongKey, "", "another key"))
	c.refusal("http/1.1", warden.Errorf(warden.CodeInvalid, "", "no such door"))
	c.refusal(warden.DoorJoin, nil)
	want := map[[2]string]uint64{{"join", "limited"}: 2, {"raft", "wrong-key"}: 1, {"none", "invalid"}: 1}
	got := c.refusals.Read()
	for _, p := range got {
		if want[[2]string{p.A, p.B}] != p.Count {
			t.Errorf("%s %s counted %d times, want %d", p.A, p.B, p.Count, want[[2]string{p.A, p.B}])
		}
	}
	if len(got) != len(want) {
		t.Errorf("counted %v", got)
	}
	for _, name := range []string{warden.DoorJoin, warden.DoorNode, warden.DoorPeer, warden.DoorRaft, warden.DoorControl} {
		if doorWords[name] == "" {
			t.Errorf("the door %s has no word", name)
		}
	}
}
