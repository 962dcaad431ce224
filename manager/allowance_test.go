package manager

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
)

// A node that opens one session after the other, at one manager and then another, each with something else to say of itself, makes a few
// entries in the log. The newest is stored when it may be, and what is stored costs nothing more.
func TestDescriptionsCostTheLogLittle(t *testing.T) {
	c := newCluster(t)
	worker, m := c.join(api.Role_ROLE_WORKER, "worker"), c.first.m
	says := func(session int, label string) *api.ReportRequest {
		now := time.Now().UnixNano()
		return &api.ReportRequest{TimeNs: now, LockState: "unlocked", Claims: []*api.SessionClaim{{NodeId: worker.id, SessionId: fmt.Sprint(session), SeenNs: now, Ip: "127.0.0.1",
			Description: &api.NodeDescription{Hostname: "worker", EngineLabels: map[string]string{"l": label}}}}}
	}
	report := func(from string, req *api.ReportRequest) {
		t.Helper()
		if _, err := m.takeReport(t.Context(), from, req); err != nil {
			t.Fatal(err)
		}
	}
	stored := func() string { return c.record(worker).GetDescription().GetEngineLabels()["l"] }

	for range 2 * describeBurst { // what is not proposed costs nothing
		if _, err := m.takeReport(t.Context(), "m1", says(0, strings.Repeat("x", warden.CommandBytes))); warden.CodeOf(err) != warden.CodeTooLarge {
			t.Fatalf("more than a command has room for = %v", err)
		}
	}
	const sessions = 100
	before := m.store.CommitIndex()
	for i := range sessions {
		for range 2 { // it is reported until the record shows it
			report([]string{"m1", "m2"}[i/10%2], says(i, fmt.Sprint("is ", i)))
		}
		if want := fmt.Sprint("is ", min(i, describeBurst-1)); stored() != want {
			t.Fatalf("after session %d the record says %q, want %q", i, stored(), want)
		}
	}
	if n := m.store.CommitIndex() - before; n > 3*describeBurst { // an entry, a nudge of the followers, and what else the cluster does
		t.Errorf("%d sessions made %d entries in the log", sessions, n)
	}
	held := uint64(0)
	for _, p := range m.counts.refusals.Read() {
		if p.A == "node" && p.B == string(warden.CodeLimited) {
			held = p.Count
		}
	}
	if held != sessions-describeBurst {
		t.Errorf("%d sessions count as held back, want %d", held, sessions-describeBurst)
	}

	m.described.mu.Lock() // as if the time were over
	n := m.described.nodes[worker.id]
	n.paid = n.paid.Add(-warden.DescribePeriod)
	m.described.nodes[worker.id] = n
	m.described.mu.Unlock()
	report("m1", says(0, "is 0")) // a session that lost its claim says so no more
	report("m2", says(sessions-1, "is last"))
	if stored() != "is last" {
		t.Errorf("the record says %q, want the newest", stored())
	}
	before = m.store.CommitIndex()
	for range sessions {
		report("m2", says(sessions-1, "is last"))
	}
	if n := m.store.CommitIndex() - before; n > describeBurst {
		t.Errorf("%d reports of what is stored made %d entries in the log", sessions, n)
	}
}

func TestAllowanceIsSteady(t *testing.T) {
	d := allowance{burst: describeBurst, period: warden.DescribePeriod}
	begun, stores := time.Now(), 0
	now, last := begun, begun
	for i := range 20 * 3600 { // an hour, 20 a second
		now = begun.Add(time.Duration(i) * time.Second / 20)
		if ok, _ := d.spend("n", fmt.Sprint(i), now); !ok {
			continue
		}
		if stores++; stores > describeBurst+1 && now.Sub(last) < warden.DescribePeriod {
			t.Fatalf("description %d is stored %s after the last", stores, now.Sub(last))
		}
		last = now
	}
	if want := describeBurst + int(time.Hour/warden.DescribePeriod) - 1; stores != want {
		t.Errorf("%d were stored in an hour, want %d", stores, want)
	}
	for i := range 2 * warden.NodesMax { // all at once, then as many once the first are forgotten
		if i == warden.NodesMax {
			now = now.Add(describeBurst * warden.DescribePeriod)
		}
		if ok, _ := d.spend(fmt.Sprint("node", i), "s", now); !ok {
			t.Fatalf("the first description of node %d has to wait", i)
		}
	}
	if len(d.nodes) > warden.NodesMax {
		t.Errorf("%d accounts are kept", len(d.nodes))
	}
}

// A node that lets one renewal after the other be begun, and finishes none, makes a few entries in the log.
func TestUnfinishedRenewalsCostTheLogLittle(t *testing.T) {
	c := newCluster(t)
	worker, m := c.join(api.Role_ROLE_WORKER, "worker"), c.first.m
	renew := func() ([]byte, error) {
		key := must[crypto.Signer](t)(ca.NewKey())
		r, err := m.issue(t.Context(), worker.id, worker.identity.KeyHash, must[[]byte](t)(ca.NewCSR(key)), "test")
		if err != nil {
			return nil, err
		}
		return r.Chain[0], nil
	}
	const most = 1 + unfinishedBurst // the first follows none
	before := m.store.CommitIndex()
	var last []byte
	for i := range 50 {
		leaf, err := renew()
		if i >= most {
			if warden.CodeOf(err) != warden.CodeLimited {
				t.Fatalf("renewal %d = %v, want [%s]", i, err, warden.CodeLimited)
			}
			continue
		}
		if err != nil {
			t.Fatalf("renewal %d: %v", i, err)
		}
		last = leaf
	}
	if n := m.store.CommitIndex() - before; n > 3*most {
		t.Errorf("50 renewals made %d entries in the log", n)
	}

	// The last one is still good, and who finishes is not held up.
	for i := range 2 * most {
		id := must[ca.Identity](t)(ca.Read(must[*x509.Certificate](t)(x509.ParseCertificate(last))))
		if err := m.promoteKey(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		worker.identity = id
		var err error
		if last, err = renew(); err != nil {
			t.Fatalf("renewal after %d that were finished: %v", i+1, err)
		}
	}
}
