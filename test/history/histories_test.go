package history

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"
)

// soakVar names the environment variable with the time for TestSoak.
const soakVar = "WARDEN_SOAK"

// TestHistories is a short run: the faults that found most, and two more that are drawn, in an order that is.
func TestHistories(t *testing.T) {
	r := newRun(t)
	r.whole(func(c *client) {
		all := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return f.long })
		c.rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		slices.SortStableFunc(all, func(a, b fault) int { return cmp.Compare(slices.Index(always, b.name), slices.Index(always, a.name)) })
		all = all[:len(always)+drawnFaults]
		c.rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, f := range all {
			c.suffer(f)
		}
	})
}

// TestSoak makes runs of soakRun, one after the other, for as long as soakVar says.
func TestSoak(t *testing.T) {
	if os.Getenv(soakVar) == "" {
		t.Skipf("%s is not set: `make soak` does", soakVar)
	}
	d, err := time.ParseDuration(os.Getenv(soakVar))
	if err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(d)
	for n := 1; time.Now().Before(end); n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			r := newRun(t)
			until := time.Now().Add(soakRun)
			r.whole(func(c *client) {
				for time.Now().Before(until) && !t.Failed() {
					c.suffer(faults[c.rand.IntN(len(faults))])
				}
			})
		})
		if t.Failed() {
			return
		}
	}
}

// always are the faults of each short run.
var always = []string{"pause the leader", "kill a majority", "isolate the leader", "evict a worker", "replace a manager"}

const (
	drawnFaults = 1 // of a short run, beside those
	soakRun     = 2 * time.Minute
)

// suffer does a fault, and lets the cluster alone for a moment.
func (c *client) suffer(f fault) {
	began := time.Now()
	c.t.Logf("%s %s", began.UTC().Format("15:04:05.000"), f.name)
	f.do(c)
	c.wantAlive()
	c.hold(c.while() / 3)
}

// whole is a run from the first call to the last byte.
func (r *run) whole(faults func(c *client)) {
	began := time.Now()
	stage := func(name string) {
		r.t.Logf("%6.1fs %s", time.Since(began).Seconds(), name)
	}
	r.under(faults)
	stage("faults are over")
	c := r.client(clients)
	c.settle()
	stage("settled")
	c.readEverything()
	r.wantSecretsOfTasks()
	stage("tasks have their secrets")
	c.wantLocked()
	c.settle()
	stage("killed, unlocked and settled again")
	c.wantNewLeaves()
	c.readEverything()
	c.wantGuestsServed()
	c.removeServices()
	c.removeZones()
	r.wantSameReplicas()
	stage("services are gone, replicas are the same")
	r.history.wantLinear(r.t, r.bed.Dir)
	stage("checked")
	for _, m := range r.members {
		m.Stop()
		m.isDown = true
	}
	for _, m := range r.managers {
		r.wantResults(m, r.wantAuthors(m))
	}
	r.wantNothingLeft()
	stage("searched")
	r.t.Logf("%d calls on %d objects:\n%s", r.history.total(), len(r.history.calls), r.history.summary())
}
