package metrics_test

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"google.golang.org/protobuf/reflect/protoreflect"

	"warden/api"
	"warden/metrics"
)

var update = flag.Bool("update", false, "write the golden file")

// fill sets every field of m, each number to another value, so that no two can be mixed up unseen.
func fill(m protoreflect.Message, n *int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		*n++
		one := func() protoreflect.Value {
			switch f.Kind() {
			case protoreflect.BoolKind:
				return protoreflect.ValueOfBool(true)
			case protoreflect.StringKind:
				return protoreflect.ValueOfString(fmt.Sprintf("%s-%d", f.Name(), *n))
			case protoreflect.Int64Kind:
				return protoreflect.ValueOfInt64(int64(*n) * 1e9)
			case protoreflect.DoubleKind:
				return protoreflect.ValueOfFloat64(float64(*n))
			default:
				return protoreflect.ValueOfUint64(uint64(*n))
			}
		}
		switch {
		case f.Message() != nil && string(f.Message().Name()) == "Histogram":
			h := &api.Histogram{Bounds: []float64{.001, .1, 10}, Counts: []uint64{1, uint64(*n), 3}, Count: uint64(*n) + 9, SumSeconds: float64(*n) / 8}
			m.Set(f, protoreflect.ValueOfMessage(h.ProtoReflect()))
		case f.IsList() && f.Message() != nil:
			list := m.Mutable(f).List()
			for range 2 {
				fill(list.AppendMutable().Message(), n)
			}
		case f.Message() != nil:
			fill(m.Mutable(f).Message(), n)
		default:
			m.Set(f, one())
		}
	}
}

func full() *api.Facts {
	f, n := &api.Facts{}, 0
	fill(f.ProtoReflect(), &n)
	f.Node.State, f.Node.Role, f.Node.LockState = "running", "manager", "resealing"
	f.Leader.Managers[0].LockState, f.Leader.Managers[1].LockState = "unlocked", "old-key"
	return f
}

func gather(t testing.TB, f *api.Facts) string {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(metrics.NewCollector(func() *api.Facts { return f }))
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, family := range families {
		if _, err := expfmt.MetricFamilyToText(&b, family); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// Names, help, types and labels are relied on: a change of the golden file is a change that users see.
func TestGolden(t *testing.T) {
	got := gather(t, full())
	const path = "testdata/metrics.txt"
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("metrics are\n%s\nnot what %s has", got, path)
	}
}

// Every number of the facts shows: no fact is only in the JSON of status.
func TestEveryFactShows(t *testing.T) {
	text := gather(t, full())
	shown := func(pattern string) bool { return regexp.MustCompile(pattern).MatchString(text) }
	n := 0
	var walk func(m protoreflect.Message, path string)
	walk = func(m protoreflect.Message, path string) {
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			at := path + "." + string(f.Name())
			switch {
			case f.IsList() && f.Message() != nil:
				for i := range v.List().Len() {
					walk(v.List().Get(i).Message(), fmt.Sprintf("%s[%d]", at, i))
				}
			case f.Message() != nil && string(f.Message().Name()) == "Histogram":
				n++
				h := v.Message().Interface().(*api.Histogram)
				if !shown(fmt.Sprintf(`(?m)_seconds_count %d$`, h.Count)) || !shown(fmt.Sprintf(`(?m)_seconds_bucket\{le="0.1"\} %d$`, h.Counts[0]+h.Counts[1])) {
					t.Errorf("%s does not show", at)
				}
			case f.Message() != nil:
				walk(v.Message(), at)
			case f.Kind() == protoreflect.StringKind:
				if s := v.String(); strings.Contains(s, "-") && s != "old-key" && at != ".node.installs[0].reason" && at != ".node.installs[1].reason" && !strings.Contains(text, s) {
					t.Errorf("%s does not show", at)
				}
			case f.Kind() == protoreflect.Uint64Kind:
				n++
				if !shown(fmt.Sprintf(`(?m) %d$`, v.Uint())) {
					t.Errorf("%s does not show", at)
				}
			case f.Kind() == protoreflect.Int64Kind && at != ".time_ns":
				n++
				if !shown(fmt.Sprintf(`(?m)_timestamp_seconds %d$`, v.Int()/1e9)) {
					t.Errorf("%s does not show", at)
				}
			}
			return true
		})
	}
	walk(full().ProtoReflect(), "")
	if n < 50 {
		t.Errorf("only %d numbers in the facts", n)
	}
}

// Names keep to Prometheus' conventions.
func TestLint(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(metrics.NewCollector(full))
	problems, err := testutil.GatherAndLint(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// A daemon that is locked or belongs to no cluster says so, and nothing of a cluster.
func TestStates(t *testing.T) {
	locked := gather(t, &api.Facts{Node: &api.NodeFacts{State: "locked", Role: "manager", LockState: "locked", UnlockKeyId: "k1"}})
	for _, want := range []string{`warden_node_state{state="locked"} 1`, `warden_node_state{state="running"} 0`, `warden_lock_state{state="locked"} 1`,
		`warden_lock_state{state="unlocked"} 0`, `warden_lock_key_info{key_id="k1"} 1`, `warden_session_open 0`} {
		if !strings.Contains(locked, want+"\n") {
			t.Errorf("a locked manager shows\n%s\nwithout %s", locked, want)
		}
	}
	for _, f := range []*api.Facts{nil, {}, {Node: &api.NodeFacts{State: "uninitialized"}}} {
		text := gather(t, f)
		for _, bad := range []string{"warden_cluster", "warden_raft", "warden_leader", "warden_door", "warden_lock_state"} {
			if strings.Contains(text, bad) {
				t.Errorf("%v shows %s:\n%s", f, bad, text)
			}
		}
	}
	odd := gather(t, &api.Facts{Version: "\xff" + strings.Repeat("v", 1000), Node: &api.NodeFacts{State: "melting"}})
	if !strings.Contains(odd, `warden_node_state{state="melting"} 1`) || strings.Contains(odd, strings.Repeat("v", 200)) {
		t.Errorf("odd facts show as\n%s", odd)
	}
}

// Only GET /metrics is answered.
func TestHandler(t *testing.T) {
	s := httptest.NewServer(metrics.Handler(full, slog.New(slog.DiscardHandler)))
	defer s.Close()
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/metrics", 200}, {"HEAD", "/metrics", 200}, {"POST", "/metrics", 405}, {"GET", "/", 404}, {"GET", "/metrics/", 404},
		{"GET", "/debug/pprof/", 404}, {"GET", "/debug/vars", 404}, {"GET", "/../metrics/x", 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, s.URL+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.want {
			t.Errorf("%s %s = %d, want %d", c.method, c.path, resp.StatusCode, c.want)
		}
		if c.want == 200 && c.method == "GET" {
			for _, want := range []string{"warden_raft_term ", "go_goroutines ", "process_open_fds "} {
				if !bytes.Contains(body, []byte("\n"+want)) {
					t.Errorf("no %q in\n%s", want, body)
				}
			}
		}
	}
}

var row = regexp.MustCompile("(?m)^\\| `(warden_[a-z_]+)`(?:\\{([a-z_, ]+)\\})? \\|")

// docs/metrics.md has a row for each metric, with its labels, and no other.
func TestDocumented(t *testing.T) {
	b, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]string{}
	for _, m := range row.FindAllStringSubmatch(string(b), -1) {
		shown[m[1]] = m[2]
	}
	descs := make(chan *prometheus.Desc, 200)
	metrics.NewCollector(full).Describe(descs)
	close(descs)
	for d := range descs {
		m := regexp.MustCompile(`fqName: "([^"]*)".*variableLabels: \{([^}]*)\}`).FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("cannot read %s", d)
		}
		labels, ok := shown[m[1]]
		if want := strings.ReplaceAll(m[2], ",", ", "); !ok || labels != want {
			t.Errorf("docs/metrics.md has {%s} for %s (row there: %v), want {%s}", labels, m[1], ok, want)
		}
		delete(shown, m[1])
	}
	for name := range shown {
		t.Errorf("docs/metrics.md has a row for %s, which does not exist", name)
	}
}

func BenchmarkScrape(b *testing.B) {
	f := full()
	h := metrics.Handler(func() *api.Facts { return f }, slog.New(slog.DiscardHandler))
	for b.Loop() {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/metrics", nil))
	}
}
