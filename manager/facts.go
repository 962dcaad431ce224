package manager

import (
	"time"

	"warden"
	"warden/api"
	"warden/control"
	"warden/internal/tally"
	"warden/orchestrator"
)

// counts is what a manager counts for its facts, beside what its parts count themselves.
type counts struct {
	refusals tally.Pairs // door and code
	rounds   orchestrator.Counts
}

// doorWords are what doors are called in metrics.
var doorWords = map[string]string{
	warden.DoorJoin: "join", warden.DoorNode: "node", warden.DoorPeer: "peer", warden.DoorRaft: "raft", warden.DoorControl: "control",
}

// refusal counts a connection or a request that did not get through a door; a connection that had chosen none counts as "none".
func (c *counts) refusal(name string, err error) {
	word, known := doorWords[name]
	if !known {
		word = "none"
	}
	if code := warden.CodeOf(err); code != "" {
		c.refusals.Add(word, string(code))
	}
}

// Facts adds what this manager has, does and knows, and while it leads what only the leader knows. It costs a few milliseconds
// with 10,000 tasks, most of them outside of any lock.
func (m *Manager) Facts(f *api.Facts) {
	now, v := time.Now(), m.store.View()
	mf := &api.ManagerFacts{Ready: m.ready.Load(), Lease: m.mayPush(), Alarms: uint64(len(m.alarms.recent(now))), Raft: m.store.Facts()}
	for _, p := range m.counts.refusals.Read() {
		mf.Refusals = append(mf.Refusals, &api.RefusalCount{Door: p.A, Code: p.B, Count: p.Count})
	}
	if s := m.serving.Load(); s != nil {
		mf.Handshakes, mf.Connections = uint64(s.Handshakes()), uint64(s.Live())
	}
	m.dispatcher.Facts(mf)
	m.counts.rounds.Facts(mf)
	f.Manager = mf
	f.Cluster = control.ClusterFacts(v, now)
	if m.store.IsLeader() {
		f.Leader = m.leaderFacts(v.Nodes(), now)
	}
}

func (m *Manager) leaderFacts(nodes []*api.Node, now time.Time) *api.LeaderFacts {
	f := m.live.facts(nodes, now)
	var managers []string
	for _, n := range nodes {
		if n.EffectiveRole() == api.Role_ROLE_MANAGER {
			managers = append(managers, n.Id)
		}
	}
	for _, s := range m.NodeStates(managers) {
		if s.Reachable && s.Raft == "voter" {
			f.ManagersReachable++
		}
		f.Managers = append(f.Managers, &api.ManagerLock{NodeId: s.NodeId, LockState: s.LockState, UnlockKeyId: s.UnlockKeyId, DekGeneration: s.DekGeneration})
	}
	return f
}

// facts counts nodes by liveness, sessions and alarms. The lock is held for one pass over the nodes.
func (l *liveness) facts(nodes []*api.Node, now time.Time) *api.LeaderFacts {
	f := &api.LeaderFacts{}
	alarmed := map[string]bool{}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range nodes {
		s := l.at(n.Id, now)
		if s == api.Liveness_LIVENESS_DOWN && now.Sub(time.Unix(0, n.Meta.GetCreatedNs())) < warden.NodeDownAfter {
			s = api.Liveness_LIVENESS_UNKNOWN // as Manager.liveness
		}
		switch s {
		case api.Liveness_LIVENESS_READY:
			f.NodesReady++
			f.Sessions++
		case api.Liveness_LIVENESS_DOWN:
			f.NodesDown++
		default:
			f.NodesUnknown++
		}
	}
	for _, r := range l.managers {
		for _, a := range r.alarms {
			alarmed[a.NodeId] = true
		}
	}
	f.Alarms = uint64(len(alarmed))
	return f
}
