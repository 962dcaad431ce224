package daemon

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"warden"
	"warden/api"
	"warden/internal/testcluster"
)

// scrape returns the daemon's page of metrics.
func (p *place) scrape() string {
	p.t.Helper()
	resp, err := http.Get("http://" + p.cfg.Metrics + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	return string(must[[]byte](p.t)(io.ReadAll(resp.Body)))
}

// Metrics are there in every state of the daemon, and say which; they say what Info and Status say.
func TestMetricsInEveryState(t *testing.T) {
	p := newPlace(t)
	l := must[net.Listener](t)(net.Listen("tcp", testcluster.Address(2378)))
	p.cfg.Metrics = l.Addr().String()
	if err := p.run(); warden.CodeOf(err) != warden.CodeUnavailable {
		t.Fatalf("a daemon whose metrics have no port = %v", err)
	}
	l.Close()
	p.start()
	wants := func(when string, lines ...string) {
		t.Helper()
		text := p.scrape()
		for _, want := range lines {
			not, absent := strings.CutPrefix(want, "!")
			if strings.Contains(text, "\n"+not) == absent {
				t.Errorf("%s: want %s in\n%s", when, want, text)
			}
		}
	}
	wants("before init", `warden_node_state{state="uninitialized"} 1`, `warden_build_info{version="test"} 1`, "go_goroutines ", "!warden_raft", "!warden_lock_state", "!warden_leaf")
	if i := p.info(); i.Facts != nil {
		t.Error("facts came unasked")
	}
	must[*api.InitReply](t)(p.local.Init(t.Context(), &api.InitRequest{Advertise: p.cfg.Listen}))
	wants("after init", `warden_node_state{state="running"} 1`, `warden_raft_leader 1`, `warden_cluster_nodes{role="manager"} 1`, `warden_lock_state{state="unlocked"} 1`, "warden_leaf_not_after_timestamp_seconds ",
		"warden_cluster_root_not_after_timestamp_seconds ", "warden_leader_nodes")
	i := must[*api.InfoReply](t)(p.local.Info(t.Context(), &api.InfoRequest{Facts: true}))
	st := must[*api.StatusReply](t)(p.ctl.Status(t.Context(), &api.StatusRequest{}))
	for what, f := range map[string]*api.Facts{"Info": i.Facts, "Status": st.Facts} {
		if f.GetNode().GetState() != StateRunning || f.GetManager().GetRaft().GetTerm() == 0 || f.GetCluster().GetManagers() != 1 || f.GetLeader() == nil || f.GetVersion() != "test" {
			t.Errorf("facts of %s = %v", what, f)
		}
	}
	wants("while it leads", fmt.Sprintf("warden_raft_term %d\n", st.Facts.Manager.Raft.Term))
	if _, err := p.local.Leave(t.Context(), &api.LeaveRequest{Force: true}); err != nil {
		t.Fatal(err)
	}
	wants("after the leave", `warden_node_state{state="uninitialized"} 1`, "!warden_raft", "!warden_leader", "!warden_lock_state")
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", p.cfg.Metrics); err == nil {
		c.Close()
		t.Error("the port is open after the daemon")
	}
}
