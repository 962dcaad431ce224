package manager

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"warden/api"
	"warden/ca"
)

// Bounds of alarms.
const (
	alarmsMax = 64               // that a manager remembers and reports, one per node
	alarmKept = 15 * time.Minute // since it was last raised
)

// alarms remembers where a valid leaf of a live node came with another key than the recorded one (I4): somebody else has, or
// had, a key of that node. They go to the leader with each report and show in status until they are alarmKept old.
type alarms struct {
	mu  sync.Mutex // guards all
	all []*api.Alarm
}

// raise notes one, in place of an older one of the same node.
func (a *alarms) raise(id ca.Identity, remote netip.Addr, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = slices.DeleteFunc(a.all, func(o *api.Alarm) bool { return o.NodeId == id.NodeID })
	if len(a.all) >= alarmsMax {
		a.all = a.all[1:]
	}
	a.all = append(a.all, &api.Alarm{
		NodeId: id.NodeID, TimeNs: now.UnixNano(),
		What: fmt.Sprintf("a certificate of it with another key than the recorded one came from %s", remote),
	})
}

// recent returns those that still count.
func (a *alarms) recent(now time.Time) []*api.Alarm {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = slices.DeleteFunc(a.all, func(o *api.Alarm) bool { return now.Sub(time.Unix(0, o.TimeNs)) > alarmKept })
	return slices.Clone(a.all)
}

// alarm returns what was raised about a node, by whichever manager, in words; "" where nothing was.
func (l *liveness) alarm(nodeID string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var newest *api.Alarm
	for _, r := range l.managers {
		for _, a := range r.alarms {
			if a.NodeId == nodeID && a.TimeNs > newest.GetTimeNs() {
				newest = a
			}
		}
	}
	if newest == nil {
		return ""
	}
	return fmt.Sprintf("ALARM: %s at %s", newest.What, time.Unix(0, newest.TimeNs).UTC().Format(time.RFC3339))
}
