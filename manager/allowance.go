package manager

import (
	"maps"
	"sync"
	"time"

	"warden"
)

// allowance bounds what each node can have this manager write to the log: burst times at once, then once each period. Safe for concurrent use.
type allowance struct {
	burst  int
	period time.Duration

	mu    sync.Mutex // guards nodes; held for map access only
	nodes map[string]account
}

// account is one node's.
type account struct {
	paid   time.Time // until when what it had is paid for, each by a period
	denied string    // the session that was denied something last; empty: none since it was given something
}

// spend takes the node's next one, if it has one left. Where it has not, news says that it is the first of the session that is denied.
func (a *allowance) spend(nodeID, sessionID string, now time.Time) (ok, news bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.nodes[nodeID]
	if n.paid.Before(now) {
		n.paid = now
	}
	if n.paid.Sub(now) > time.Duration(a.burst-1)*a.period {
		news = n.denied != sessionID
		n.denied = sessionID
		a.nodes[nodeID] = n
		return false, news
	}
	if a.nodes == nil {
		a.nodes = map[string]account{}
	}
	if len(a.nodes) >= warden.NodesMax {
		maps.DeleteFunc(a.nodes, func(_ string, n account) bool { return !n.paid.After(now) })
	}
	a.nodes[nodeID] = account{paid: n.paid.Add(a.period)}
	return true, false
}

// refund gives one back.
func (a *allowance) refund(nodeID string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n, known := a.nodes[nodeID]; known {
		n.paid = n.paid.Add(-a.period)
		a.nodes[nodeID] = n
	}
}
