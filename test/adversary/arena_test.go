package adversary

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/ca"
	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/join"
	"warden/tokens"
)

// arena is a cluster of real daemons that is attacked: three managers, of which m[0] is the one that is attacked, and leads unless a loaded
// machine made an election necessary, and two workers.
type arena struct {
	*testcluster.Cluster
	m       [3]*testcluster.Host
	w       [2]*testcluster.Host
	metrics map[*testcluster.Host]string // where each shows its metrics
	token   tokens.Token                 // a worker's, for honest joiners
	rounds  int
	quiet   work // what honest work takes without an attack
}

func newArena(t testing.TB) *arena {
	t.Helper()
	testcluster.Root(t)
	a := &arena{Cluster: testcluster.New(t), metrics: map[*testcluster.Host]string{}}
	host := func(name string) *testcluster.Host {
		at := testcluster.Address(2378)
		h := a.Host(name, "--metrics", at)
		a.metrics[h] = at
		return h
	}
	for i := range a.m {
		a.m[i] = host(fmt.Sprintf("m%d", i+1))
	}
	for i := range a.w {
		a.w[i] = host(fmt.Sprintf("w%d", i+1))
	}
	m := a.m[0]
	m.Ctl("swarm", "init")
	managers, workers := m.Token("manager"), m.Token("worker")
	a.m[1].Join(managers, m)
	a.m[2].Join(managers, m)
	for _, w := range a.w {
		w.Join(workers, m)
	}
	var err error
	if a.token, err = tokens.Parse(workers); err != nil {
		t.Fatal(err)
	}
	a.awaitVoters(t, 3)
	a.awaitReady(t, 5)
	a.quiet = a.honest(t, 3)
	return a
}

func (a *arena) awaitVoters(t testing.TB, n int) {
	t.Helper()
	testcluster.Await(t, 30*time.Second, func() error {
		if v := a.value(a.m[0], "warden_raft_voters"); v != float64(n) {
			return fmt.Errorf("%v managers have a vote", v)
		}
		return nil
	})
}

func (a *arena) awaitReady(t testing.TB, n int) {
	t.Helper()
	testcluster.Await(t, 30*time.Second, func() error {
		if v := a.value(a.leader(t), `warden_leader_nodes{liveness="ready"}`); v != float64(n) {
			return fmt.Errorf("%v nodes are ready", v)
		}
		return nil
	})
}

var plain = http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// leader returns the manager that leads.
func (a *arena) leader(t testing.TB) (leader *testcluster.Host) {
	t.Helper()
	testcluster.Await(t, 30*time.Second, func() error {
		for _, h := range a.m {
			if a.value(h, "warden_raft_leader") == 1 {
				leader = h
				return nil
			}
		}
		return errors.New("no manager leads")
	})
	return leader
}

// scrape returns a daemon's metrics.
func (a *arena) scrape(h *testcluster.Host) string {
	resp, err := plain.Get("http://" + a.metrics[h] + "/metrics")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return string(b)
}

// value returns a series' value, 0 where there is none.
func (a *arena) value(h *testcluster.Host, series string) float64 {
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(a.scrape(h))
	if m == nil {
		return 0
	}
	v, _ := strconv.ParseFloat(m[1], 64)
	return v
}

// refusals returns how much was refused at a manager's door, with a code.
func (a *arena) refusals(h *testcluster.Host, door string, code warden.Code) float64 {
	return a.value(h, fmt.Sprintf(`warden_door_refusals_total{code="%s",door="%s"}`, code, door))
}

// counted waits until at least n more were refused than before.
func (a *arena) counted(t testing.TB, h *testcluster.Host, door string, code warden.Code, before float64, n int) {
	t.Helper()
	testcluster.Await(t, 20*time.Second, func() error {
		if got := a.refusals(h, door, code) - before; got < float64(n) {
			return fmt.Errorf("%v counted at door %s with code %s, want %d at least", got, door, code, n)
		}
		return nil
	})
}

// memory returns a field of /proc/PID/status in MiB.
func memory(h *testcluster.Host, field string) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.Pid()))
	m := regexp.MustCompile(field + `:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		return -1
	}
	n, _ := strconv.Atoi(string(m[1]))
	return n >> 10
}

// descriptors returns how many the daemon has open.
func descriptors(h *testcluster.Host) int {
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.Pid()))
	return len(fds)
}

// work is how long honest work took, by what it was.
type work map[string][]time.Duration

func (w work) add(o work) {
	for what, d := range o {
		w[what] = append(w[what], d...)
	}
}

func (w work) median(what string) time.Duration {
	d := slices.Sorted(slices.Values(w[what]))
	return d[len(d)/2]
}

func (w work) String() string {
	var b strings.Builder
	for _, what := range []string{"secret", "list", "join", "task"} {
		if d := slices.Sorted(slices.Values(w[what])); len(d) > 0 {
			fmt.Fprintf(&b, " %s %s (most %s)", what, d[len(d)/2].Round(time.Millisecond), d[len(d)-1].Round(time.Millisecond))
		}
	}
	return b.String()
}

// honest does what honest people and nodes do, n times: a secret is made, nodes are listed, a node joins by way of the attacked
// manager, a task is started on w1. Any error fails the test, but while a loaded machine has the managers elect a leader: then it is
// asked again, which takes its time.
func (a *arena) honest(t testing.TB, n int) work {
	t.Helper()
	m, took := a.m[0], work{}
	term, again := a.value(m, "warden_raft_term"), error(nil)
	do := func(what string, f func() error) {
		t.Helper()
		start := time.Now()
		err := f()
		for ; err != nil && repeatable(err) && time.Since(start) < time.Minute; err = f() {
			again = err
		}
		if err != nil {
			t.Errorf("honest work: %s: %v", what, err)
		}
		took[what] = append(took[what], time.Since(start))
	}
	ctl := func(stdin string, args ...string) error {
		_, stderr, code := m.TryIn(stdin, args...)
		if code == 0 || again != nil && strings.Contains(stderr, "["+string(warden.CodeExists)+"]") {
			return nil
		}
		return fmt.Errorf("%s: %s", strings.Join(args, " "), stderr)
	}
	for range n {
		a.rounds++
		name := fmt.Sprint("honest", a.rounds)
		do("secret", func() error { return ctl(testcluster.Canary, "secret", "create", name, "-") })
		do("list", func() error { return ctl("", "node", "ls") })
		do("join", func() error {
			_, err := a.join(fmt.Sprintf("127.99.1.%d", 1+a.rounds%250), a.token, name)
			return err
		})
		do("task", func() error {
			if err := ctl("", "service", "create", "--name", name, "--secret", name, "--constraint", "node.hostname==w1", "host", "sleep", "1000"); err != nil {
				return err
			}
			testcluster.Await(t, 60*time.Second, func() error {
				if out, _, _ := m.Try("service", "ps", name, "--format", "{{.CurrentState}}"); !strings.Contains(out, "Running") {
					return errors.New(out)
				}
				return nil
			})
			return nil
		})
		do("removal", func() error { return ctl("", "service", "rm", name) })
	}
	if again != nil && a.value(m, "warden_raft_term") == term {
		t.Errorf("honest work had to be asked again, without an election: %v", again)
	}
	return took
}

// repeatable reports whether an error is one that an election makes.
func repeatable(err error) bool {
	for _, code := range []warden.Code{warden.CodeNoLeader, warden.CodeNotLeader, warden.CodeUnavailable, warden.CodeTimeout} {
		if warden.CodeOf(err) == code || strings.Contains(err.Error(), "["+string(code)+"]") {
			return true
		}
	}
	return false
}

// join joins a node with a key of its own and no daemon, from an address of its own.
func (a *arena) join(from string, token tokens.Token, hostname string) (thief.Member, error) {
	key, err := ca.NewKey()
	if err != nil {
		return thief.Member{}, err
	}
	return thief.Join(from, a.m[0].Address, token, join.Request{Key: key, Hostname: hostname})
}

// flood is one way to attack a port: intruder says what each is.
type flood struct {
	kind string
	n    int           // connections
	as   *thief.Member // nil: nobody
	// counted is how the attacked manager counts it: door and code, at least so often.
	door string
	code warden.Code
	want int
	late bool // it is counted when its connections end
}

// attack runs floods at once, each a process of its own that gives way to everybody else on this machine as if it were on another,
// beside honest work, and checks what must hold: no honest work fails, half of it takes no longer than without the attack, give or take what
// a loaded machine does to it, the manager's memory grows by no more than growthMax MiB, w1 keeps its session, no daemon dies, and each flood is counted.
func (a *arena) attack(t *testing.T, growthMax int, floods ...flood) {
	t.Helper()
	m := a.m[0]
	a.quiet.add(a.honest(t, 1))
	counts := make([]float64, len(floods))
	for i, f := range floods {
		counts[i] = a.refusals(m, f.door, f.code)
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", m.Pid()), []byte("5"), 0); err != nil { // forget the peak of before
		t.Fatal(err)
	}
	since, before, term := a.value(a.w[0], "warden_session_start_timestamp_seconds"), memory(m, "VmRSS"), a.value(m, "warden_raft_term")
	var running []*intruder
	for _, f := range floods {
		args := []string{"flood", f.kind, m.Address, fmt.Sprint(f.n)}
		if f.as != nil {
			args = append(args, keyFile(t, *f.as))
		}
		running = append(running, intrude(t, args...))
	}
	for i, in := range running {
		if line := in.line(t); line != "begun" {
			t.Fatalf("%s: %s", floods[i].kind, line)
		}
	}
	took := a.honest(t, 2)
	open, shaking := a.value(m, "warden_door_connections"), a.value(m, "warden_door_handshakes")
	counted := func(i int) {
		t.Helper()
		f := floods[i]
		testcluster.Await(t, 40*time.Second, func() error {
			got := a.refusals(m, f.door, f.code) - counts[i]
			if got < float64(f.want) {
				return fmt.Errorf("%s: %v counted at door %s with code %s, want %d at least", f.kind, got, f.door, f.code, f.want)
			}
			t.Logf("%s: counted at door %s with code %s: %v", f.kind, f.door, f.code, got)
			return nil
		})
	}
	for i, f := range floods {
		if !f.late {
			counted(i)
		}
	}
	for i, in := range running {
		t.Logf("%s: %s", floods[i].kind, in.end(t))
	}
	for i, f := range floods {
		if f.late {
			counted(i)
		}
	}
	peak := memory(m, "VmHWM")
	elections := a.value(m, "warden_raft_term") - term
	t.Logf("without:%s; under attack:%s; memory %d MiB before, %d at most; %v connections, %v handshakes; %v elections", a.quiet, took, before, peak, open, shaking, elections)
	if elections == 0 { // else it is the time of the election, of which an overloaded machine has enough
		a.compare(t, took)
	}
	if peak-before > growthMax {
		t.Errorf("the manager's memory grew from %d to %d MiB, by more than %d", before, peak, growthMax)
	}
	if now := a.value(a.w[0], "warden_session_start_timestamp_seconds"); now != since && elections == 0 {
		t.Errorf("w1 lost its session: since %f, was since %f", now, since)
	}
	a.alive(t)
	testcluster.Await(t, 30*time.Second, func() error {
		if n := descriptors(m); n > 100 {
			return fmt.Errorf("the manager holds %d descriptors after the attack", n)
		}
		return nil
	})
}

// compare wants honest work to have taken about what it takes without an attack. An attacker shares two cores here with the cluster and whatever
// else runs on the machine: what is out of all proportion fails, and what fails, or is not done within a time, has failed already.
func (a *arena) compare(t *testing.T, took work) {
	t.Helper()
	for what := range took {
		if quiet, now := a.quiet.median(what), took.median(what); now > 20*quiet+10*time.Second {
			t.Errorf("half of honest work (%s) took more than %s, %s without the attack", what, now, quiet)
		}
	}
}

// alive checks that no daemon has ended or panicked.
func (a *arena) alive(t *testing.T) {
	t.Helper()
	for _, h := range append(a.m[:], a.w[:]...) {
		log, _ := os.ReadFile(h.LogPath)
		for _, bad := range []string{"panic", "goroutine ", "fatal error"} {
			if strings.Contains(string(log), bad) {
				t.Errorf("the log of %s has %q", h.Name, bad)
			}
		}
	}
}

// keyFile writes a member's key and chain for an intruder.
func keyFile(t testing.TB, m thief.Member) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(m.Key)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"Chain": m.Cert.Certificate, "Key": der})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
