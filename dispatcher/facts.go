package dispatcher

import (
	"slices"
	"strings"
	"time"

	"warden"
	"warden/api"
	"warden/internal/tally"
)

// counts is what a dispatcher counts for its facts.
type counts struct {
	renewals tally.Pairs // reason and result
	dispatch tally.Histogram
}

// renewed counts one renewal.
func (c *counts) renewed(reason string, err error) {
	code := warden.CodeOf(err)
	if err != nil && !slices.Contains(renewalCodes, code) {
		code = tally.Other
	}
	c.renewals.Add(ReasonClass(reason), tally.Result(string(code)))
}

// renewalCodes are the codes that renewals count under, besides "ok": a node's error has whatever code the node likes.
var renewalCodes = []warden.Code{
	warden.CodeInternal, warden.CodeInvalid, warden.CodeConflict, warden.CodeDenied, warden.CodeUnauthentic, warden.CodeExpired, warden.CodeClock,
	warden.CodeWrongRoot, warden.CodeWrongRole, warden.CodeWrongKey, warden.CodeLimited, warden.CodeTooLarge, warden.CodeLocked,
	warden.CodeNotLeader, warden.CodeNoLeader, warden.CodeUnavailable, warden.CodeTimeout, warden.CodeCorrupt, warden.CodeForeign,
	warden.CodeUnsupported,
}

// acknowledged counts how long the tasks that a node has just acknowledged have been assigned. A task that it knew before is
// accepted by now and does not count.
func (c *counts) acknowledged(tasks []*api.Task) {
	now := time.Now().UnixNano()
	for _, t := range tasks {
		if t.GetStatus().GetState() == api.TaskState_TASK_ASSIGNED && t.GetDesiredState() == api.TaskState_TASK_RUNNING {
			c.dispatch.Observe(time.Duration(now - t.GetMeta().GetUpdatedNs()))
		}
	}
}

// reasonClasses are the beginnings of RenewAt's reasons, and what each counts as.
var reasonClasses = []struct{ prefix, class string }{
	{"two thirds of its life", "age"},
	{"the leaf has expired", "expired"},
	{"the last renewal was not finished", "unfinished"},
	{"the role is now", "role"},
	{"the zone is now", "zone"},
	{"the issuing CA was rotated", "issuer"},
	{"the keys of managers", "dek"},
	{"the life that leaves are given", "ttl"},
}

// ReasonClass returns the word that a reason of RenewAt counts under; tally.Other where it is none. Pure.
func ReasonClass(reason string) string {
	for _, c := range reasonClasses {
		if strings.HasPrefix(reason, c.prefix) {
			return c.class
		}
	}
	return tally.Other
}

// Facts adds what this dispatcher has and has done. It holds no lock that a session needs for more than a copy.
func (d *Dispatcher) Facts(f *api.ManagerFacts) {
	d.mu.Lock()
	f.Sessions = uint64(len(d.sessions))
	d.mu.Unlock()
	for _, p := range d.counts.renewals.Read() {
		f.Renewals = append(f.Renewals, &api.RenewalCount{Reason: p.A, Result: p.B, Count: p.Count})
	}
	f.Dispatch = d.counts.dispatch.Read()
}
