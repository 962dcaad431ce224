package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/internal/testcluster"
	"warden/internal/thief"
)

// page is one scrape.
type page string

// scrape gets the metrics at an address.
func scrape(t testing.TB, address string) page {
	t.Helper()
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET /metrics = %s, %v", resp.Status, err)
	}
	return page(b)
}

// value returns a series' value; false where there is no such series.
func (p page) value(series string) (float64, bool) {
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(string(p))
	if m == nil {
		return 0, false
	}
	v, err := strconv.ParseFloat(m[1], 64)
	return v, err == nil
}

// want fails where a series has another value.
func (p page) want(t testing.TB, series string, want float64) {
	t.Helper()
	if err := p.differs(map[string]float64{series: want}); err != nil {
		t.Error(err)
	}
}

// differs returns which series has another value.
func (p page) differs(want map[string]float64) error {
	for series, want := range want {
		if got, ok := p.value(series); !ok || got != want {
			return fmt.Errorf("%s = %v (there: %v), want %v", series, got, ok, want)
		}
	}
	return nil
}

// facts is what the test reads of `status --json`.
type facts struct {
	State, UnlockKeyID string
	Well               bool
	Facts              struct {
		Node struct {
			State, LockState, UnlockKeyID string
			LeafNotAfter                  string
		}
		Manager *struct {
			Refusals []struct {
				Door, Code string
				Count      float64
			}
			Raft struct{ Term, Voters float64 }
		}
		Cluster *struct{ Secrets, Services, IssuingGeneration float64 }
		Leader  *struct{ NodesReady float64 }
	}
}

func statusJSON(t testing.TB, h *testcluster.Host) (f facts, raw string, code int) {
	t.Helper()
	raw, stderr, code := h.Try("status", "--json")
	if err := json.Unmarshal([]byte(raw), &f); err != nil {
		t.Fatalf("status --json = %s%s: %v", raw, stderr, err)
	}
	return f, raw, code
}

// TestMetrics takes a manager and its nodes from before the cluster to refusals at its doors: what they show to Prometheus is what
// happened, what `status --json` says too, and nothing secret (I10).
func TestMetrics(t *testing.T) {
	testcluster.Root(t)
	c := &six{Cluster: testcluster.New(t)}
	atM1, atM2, atW := testcluster.Address(2378), testcluster.Address(2378), testcluster.Address(2378)
	m1, m2, w, late := c.Host("m1", "--metrics", atM1), c.Host("m2", "--metrics", atM2), c.Host("w1", "--metrics", atW), c.Host("late")
	scrape(t, atM1).want(t, `warden_node_state{state="uninitialized"}`, 1)

	m1.Ctl("swarm", "init")
	good := m1.Token("worker")
	w.Join(good, m1)
	c.awaitReady(t, m1, 2)
	m1.CtlIn(canary, "secret", "create", "hush-name", "-")
	m1.Ctl("service", "create", "--name", "hush-service", "--replicas", "2", "--secret", "hush-name", "host", "sh", "-c", "while :; do sleep 1000; done")
	testcluster.AwaitRunning(t, m1, "hush-service", 2)
	task := m1.Line("service", "ps", "-q", "hush-service")

	var all strings.Builder // every page and JSON
	var p page
	// What m1 counts itself, while nobody else could have led or have had the worker's session.
	testcluster.Await(t, 40*time.Second, func() error { // what nodes say of themselves takes a moment
		p = scrape(t, atM1)
		all.WriteString(string(p))
		return p.differs(map[string]float64{`warden_cluster_tasks{state="running"}`: 2, "warden_raft_leader": 1, "warden_orchestrator_placements_total": 2,
			"warden_manager_sessions": 2, "warden_dispatch_delay_seconds_count": 2})
	})
	for _, histogram := range []string{"warden_raft_append_seconds", "warden_raft_commit_seconds", "warden_orchestrator_round_seconds"} {
		if n, _ := p.value(histogram + "_count"); n == 0 {
			t.Errorf("%s counted nothing", histogram)
		}
	}

	m2.Join(m1.Token("manager"), m1)
	c.awaitVoters(t, m1, 2)
	c.awaitReady(t, m1, 3)
	ids := map[string]string{atM1: m1.ID(), atM2: m2.ID()}
	testcluster.Await(t, 40*time.Second, func() error {
		at, other := atM1, atM2 // a loaded machine may have made an election necessary
		if n, _ := scrape(t, atM2).value("warden_raft_leader"); n == 1 {
			at, other = atM2, atM1
		}
		p = scrape(t, at)
		all.WriteString(string(p))
		return p.differs(map[string]float64{"warden_raft_leader": 1, "warden_raft_voters": 2, `warden_cluster_nodes{role="manager"}`: 2, "warden_cluster_secrets": 1,
			"warden_cluster_wanted_tasks": 2, `warden_cluster_tasks{state="running"}`: 2, `warden_leader_nodes{liveness="ready"}`: 3, "warden_leader_reachable_managers": 2,
			`warden_lock_state{state="unlocked"}`: 1, fmt.Sprintf(`warden_leader_manager_lock_state{node_id="%s",state="unlocked"}`, ids[other]): 1})
	})

	var worker page
	testcluster.Await(t, 40*time.Second, func() error {
		worker = scrape(t, atW)
		all.WriteString(string(worker))
		return worker.differs(map[string]float64{"warden_session_open": 1, `warden_node_tasks{state="running"}`: 2})
	})
	worker.want(t, "warden_leaf_not_after_timestamp_seconds", float64(leaf(t, w).NotAfter.Unix()))
	for _, absent := range []string{"warden_raft", "warden_cluster", "warden_leader", "warden_door", "warden_lock_state"} {
		if strings.Contains(string(worker), "\n"+absent) {
			t.Errorf("a worker shows %s", absent)
		}
	}

	// Refusals: a token with a wrong secret, a worker at a manager's door, no door at all, a manager that was demoted.
	if _, stderr, code := late.Try("swarm", "join", "--token", withSecretOf(t, good, m1.Token("manager")), m1.Address); code == 0 {
		t.Fatalf("a wrong secret joined: %s", stderr)
	}
	stolen, manager := thief.Steal(t, w.State), thief.Steal(t, m2.State)
	if stolen.Refused(m1.Address, warden.DoorPeer) == nil || stolen.Refused(m1.Address, "http/1.1") == nil {
		t.Fatal("a worker's certificate stays")
	}
	m1.Ctl("node", "demote", "m2")
	if manager.Refused(m1.Address, warden.DoorRaft) == nil {
		t.Fatal("a demoted manager's certificate stays")
	}
	testcluster.Await(t, 40*time.Second, func() error { // who is refused may know it before it is counted
		p = scrape(t, atM1)
		for _, series := range []string{`{code="wrong-role",door="peer"}`, `{code="invalid",door="none"}`, `{code="wrong-role",door="raft"}`} {
			if n, _ := p.value("warden_door_refusals_total" + series); n < 1 {
				return fmt.Errorf("%s = %v, want at least 1, in\n%s", series, n, p)
			}
		}
		return p.differs(map[string]float64{`warden_door_refusals_total{code="unknown-token",door="join"}`: 1})
	})
	all.WriteString(string(p))

	// The same facts as JSON.
	c.awaitReady(t, m1, 3)
	var f facts
	testcluster.Await(t, 40*time.Second, func() error { // what changes between the two looks is looked at again
		var raw string
		p = scrape(t, atM1)
		f, raw, _ = statusJSON(t, m1)
		all.WriteString(raw)
		if f.Facts.Manager == nil || f.Facts.Cluster == nil || f.Facts.Leader == nil {
			return fmt.Errorf("parts are missing: %s", raw)
		}
		same := map[string]float64{"warden_raft_term": f.Facts.Manager.Raft.Term, "warden_raft_voters": f.Facts.Manager.Raft.Voters, "warden_cluster_secrets": f.Facts.Cluster.Secrets,
			"warden_cluster_services": f.Facts.Cluster.Services, `warden_cluster_generation{of="issuing"}`: f.Facts.Cluster.IssuingGeneration, `warden_leader_nodes{liveness="ready"}`: f.Facts.Leader.NodesReady}
		for _, r := range f.Facts.Manager.Refusals {
			same[fmt.Sprintf(`warden_door_refusals_total{code="%s",door="%s"}`, r.Code, r.Door)] = r.Count
		}
		for series, want := range same {
			if got, ok := p.value(series); !ok || got != want {
				return fmt.Errorf("%s = %v, the JSON says %v", series, got, want)
			}
		}
		return nil
	})
	if f.Facts.Node.State != "running" || f.Facts.Node.LockState != "unlocked" || f.Facts.Node.LeafNotAfter != leaf(t, m1).NotAfter.UTC().Format(time.RFC3339Nano) {
		t.Errorf("node facts = %+v", f.Facts.Node)
	}
	testcluster.Await(t, 40*time.Second, func() error { // its session may have been with the demoted one
		if f, raw, code := statusJSON(t, w); code != 0 || f.Facts.Manager != nil || f.Facts.Node.State != "running" {
			return fmt.Errorf("status --json of a worker = exit %d, %s", code, raw)
		}
		return nil
	})

	secrets := append(strings.Fields(task), canary, "hush-name", good, strings.Split(good, "-")[4])
	if len(secrets) < 6 {
		t.Errorf("the tasks are %q", task)
	}
	for i, s := range secrets {
		pages := all.String()
		if i < len(strings.Fields(task)) || s == "hush-name" { // status may name them; metrics must not
			pages = string(p) + string(worker)
		}
		if strings.Contains(pages, s) {
			t.Errorf("%q shows in what was scraped", s)
		}
	}
	if strings.Contains(string(p)+string(worker), "hush-service") || strings.Contains(string(p), w.Address[:strings.LastIndex(w.Address, ":")]) {
		t.Error("a service or an address shows in metrics")
	}
}

// TestMetricsOfALockedManager: a locked manager says that it is locked and which key it needs, to Prometheus and in status.
func TestMetricsOfALockedManager(t *testing.T) {
	testcluster.Root(t)
	c := &six{Cluster: testcluster.New(t)}
	at := testcluster.Address(2378)
	m := c.Host("m1", "--metrics", at)
	out := m.Ctl("swarm", "init", "--autolock")
	key := regexp.MustCompile(`WDNKEY-1-\S+`).FindString(out)
	m.Stop()
	m.Start()
	p := scrape(t, at)
	p.want(t, `warden_lock_state{state="locked"}`, 1)
	p.want(t, `warden_node_state{state="locked"}`, 1)
	f, raw, code := statusJSON(t, m)
	if code != 1 || f.Well || f.State != "locked" || f.Facts.Node.LockState != "locked" || f.Facts.Node.UnlockKeyID == "" || f.Facts.Node.UnlockKeyID != f.UnlockKeyID {
		t.Errorf("status --json of a locked manager = exit %d, %s", code, raw)
	}
	p.want(t, fmt.Sprintf(`warden_lock_key_info{key_id="%s"}`, f.UnlockKeyID), 1)
	if strings.Contains(string(p)+raw, key) || key == "" {
		t.Error("the unlock key shows")
	}
	file := filepath.Join(c.Dir, "unlock-key")
	if err := os.WriteFile(file, []byte(key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.Ctl("swarm", "unlock", "--key-file", file)
	testcluster.Await(t, 40*time.Second, func() error {
		p = scrape(t, at)
		for _, series := range []string{"warden_raft_leader", "warden_cluster_autolock"} { // it leads before it has applied its log
			if v, _ := p.value(series); v != 1 {
				return fmt.Errorf("%s of the unlocked manager = %v, want 1", series, v)
			}
		}
		return nil
	})
	p.want(t, `warden_lock_state{state="locked"}`, 0)
	p.want(t, `warden_lock_state{state="unlocked"}`, 1)
	p.want(t, fmt.Sprintf(`warden_cluster_unlock_key_info{key_id="%s"}`, f.UnlockKeyID), 1)
	if strings.Contains(string(p), strings.SplitN(key, "-", 4)[2]) {
		t.Error("the unlock key shows")
	}
}
