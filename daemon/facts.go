package daemon

import (
	"context"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/internal/tally"
	"warden/metrics"
)

// counts is what a daemon counts itself; its parts count the rest.
type counts struct {
	installs tally.Pairs // "" and result
}

func (c *counts) installed(err error) { c.installs.Add("", tally.Result(string(warden.CodeOf(err)))) }

// facts returns what this daemon counts and knows, in every state of it. Safe for concurrent use; no lock is held while its
// parts are asked.
func (d *Daemon) facts() *api.Facts {
	n := &api.NodeFacts{}
	f := &api.Facts{TimeNs: time.Now().UnixNano(), Version: d.cfg.Version, Node: n}
	d.mu.Lock()
	n.State = d.state
	locked, i, a, m := d.locked, d.identity, d.agent, d.manager
	d.mu.Unlock()
	switch {
	case locked != nil:
		n.Role, n.LockState, n.UnlockKeyId = ca.RoleManager, "locked", locked.KeyID
	case i != nil:
		id, leaf := i.now()
		n.Role, n.LeafNotBeforeNs, n.LeafNotAfterNs = id.Role, leaf.NotBefore.UnixNano(), leaf.NotAfter.UnixNano()
	}
	for _, p := range d.counts.installs.Read() {
		n.Installs = append(n.Installs, &api.RenewalCount{Result: p.B, Count: p.Count})
	}
	if a != nil {
		a.Facts(n)
	}
	if m != nil && i != nil {
		lock := d.lockStatus(i)
		n.LockState, n.UnlockKeyId, n.DekGeneration = lock.State, lock.KeyID, lock.DEKGeneration
		m.Facts(f)
	}
	return f
}

// showMetrics opens what Config.Metrics names, and shows metrics there until stop is called. Errors: CodeUsage, CodeUnavailable.
func (d *Daemon) showMetrics(ctx context.Context) (stop func(), err error) {
	if d.cfg.Metrics == "" {
		return func() {}, nil
	}
	l, err := metrics.Listen(d.cfg.Metrics, d.logger.With("part", "metrics"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { // ends with ctx
		defer close(done)
		if err := metrics.Serve(ctx, l, d.facts, d.logger.With("part", "metrics")); err != nil {
			d.logger.Error("stopped showing metrics", "error", err)
		}
	}()
	return func() { cancel(); <-done }, nil
}
