package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"warden/api"
)

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

// families are all metrics of our own. docs/metrics.md has a row for each.
var families = []family{
	{name: "warden_build_info", help: "Version of the daemon, always 1.", kind: gauge, labels: []string{"version"},
		read: func(f *api.Facts, set func(float64, ...string)) { set(1, f.GetVersion()) }},

	// The daemon, in every state.
	{name: "warden_node_state", help: "State of the daemon: 1 for the present one.", kind: gauge, labels: []string{"state"},
		read: func(f *api.Facts, set func(float64, ...string)) { oneOf(nodeStates, f.GetNode().GetState(), set) }},
	{name: "warden_node_manager", help: "Whether this node has the key and leaf of a manager.", kind: gauge, read: node(func(n *api.NodeFacts) float64 { return truth(n.Role == "manager") })},
	{name: "warden_lock_state", help: "How this manager's own keys are: 1 for the present state.", kind: gauge, labels: []string{"state"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			if s := f.GetNode().GetLockState(); s != "" {
				oneOf(lockStates, s, set)
			}
		}},
	{name: "warden_lock_key_info", help: "ID of the unlock key that this manager's key file is sealed under, always 1; no series where it is in clear.", kind: gauge, labels: []string{"key_id"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			if id := f.GetNode().GetUnlockKeyId(); id != "" {
				set(1, id)
			}
		}},
	{name: "warden_lock_dek_generation", help: "Generation of the DEK that this manager's state is sealed under; 0 where it is not known, as while locked.", kind: gauge,
		read: func(f *api.Facts, set func(float64, ...string)) {
			if f.GetNode().GetLockState() != "" {
				set(float64(f.GetNode().GetDekGeneration()))
			}
		}},
	{name: "warden_leaf_not_before_timestamp_seconds", help: "When the validity of this node's certificate began.", kind: gauge, read: at(func(f *api.Facts) int64 { return f.GetNode().GetLeafNotBeforeNs() })},
	{name: "warden_leaf_not_after_timestamp_seconds", help: "When the validity of this node's certificate ends.", kind: gauge, read: at(func(f *api.Facts) int64 { return f.GetNode().GetLeafNotAfterNs() })},
	{name: "warden_leaf_installs_total", help: "Leaves that this node was given, by result: ok, or the code of what refused them.", kind: counter, labels: []string{"result"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, r := range f.GetNode().GetInstalls() {
				set(float64(r.Count), r.Result)
			}
		}},
	{name: "warden_session_open", help: "Whether this node has a session with a manager.", kind: gauge, read: node(func(n *api.NodeFacts) float64 { return truth(n.Session) })},
	{name: "warden_session_start_timestamp_seconds", help: "Since when this node has its session.", kind: gauge, read: at(func(f *api.Facts) int64 { return f.GetNode().GetSessionSinceNs() })},
	{name: "warden_node_tasks", help: "Tasks on this node, by state.", kind: gauge, labels: []string{"state"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, t := range f.GetNode().GetTasks() {
				set(float64(t.Count), t.State)
			}
		}},

	// What a manager does.
	{name: "warden_manager_ready", help: "Whether this manager has caught up with a leader since its start; before, its doors are shut.", kind: gauge, read: manager(func(m *api.ManagerFacts) float64 { return truth(m.Ready) })},
	{name: "warden_manager_lease", help: "Whether this manager is so close to the leader that it may send to nodes.", kind: gauge, read: manager(func(m *api.ManagerFacts) float64 { return truth(m.Lease) })},
	{name: "warden_manager_sessions", help: "Sessions of nodes that this manager holds.", kind: gauge, read: manager(func(m *api.ManagerFacts) float64 { return float64(m.Sessions) })},
	{name: "warden_manager_alarms", help: "Nodes of which this manager saw a certificate with another key than the recorded one in the last 15 minutes.", kind: gauge, read: manager(func(m *api.ManagerFacts) float64 { return float64(m.Alarms) })},
	{name: "warden_door_refusals_total", help: "Connections, and what came over them, that were refused, by door and code; door none is before one was chosen.", kind: counter, labels: []string{"door", "code"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, r := range f.GetManager().GetRefusals() {
				set(float64(r.Count), r.Door, r.Code)
			}
		}},
	{name: "warden_door_handshakes", help: "TLS handshakes under way.", kind: gauge, read: manager(func(m *api.ManagerFacts) float64 { return float64(m.Handshakes) })},
	{name: "warden_door_connections", help: "Live authenticated connections.", kind: gauge, read: manager(func(m *api.ManagerFacts) float64 { return float64(m.Connections) })},
	{name: "warden_leaf_renewals_total", help: "Renewals of nodes' leaves that this manager began, by reason and result.", kind: counter, labels: []string{"reason", "result"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, r := range f.GetManager().GetRenewals() {
				set(float64(r.Count), r.Reason, r.Result)
			}
		}},
	{name: "warden_dispatch_delay_seconds", help: "Time from the commit of a task's placement to its node's acknowledgement.", histogram: func(f *api.Facts) *api.Histogram { return f.GetManager().GetDispatch() }},
	{name: "warden_orchestrator_round_seconds", help: "Time that one pass over services and tasks took, with its commits, while this manager led.", histogram: func(f *api.Facts) *api.Histogram { return f.GetManager().GetRounds() }},
	{name: "warden_orchestrator_placements_total", help: "Tasks that were given a node.", kind: counter, read: manager(func(m *api.ManagerFacts) float64 { return float64(m.TasksPlaced) })},
	{name: "warden_orchestrator_refused_placements_total", help: "Placements that the apply refused because something had changed meanwhile.", kind: counter, read: manager(func(m *api.ManagerFacts) float64 { return float64(m.PlacementsRefused) })},

	// Raft.
	{name: "warden_raft_term", help: "Current term.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.Term) })},
	{name: "warden_raft_leader", help: "Whether this manager leads.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return truth(r.Leading) })},
	{name: "warden_raft_leader_known", help: "Whether this manager knows a leader.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return truth(r.LeaderKnown) })},
	{name: "warden_raft_leader_changes_total", help: "Times that this manager learned of a new leader.", kind: counter, read: raft(func(r *api.RaftFacts) float64 { return float64(r.LeaderChanges) })},
	{name: "warden_raft_last_index", help: "Last entry of this manager's log.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.LastIndex) })},
	{name: "warden_raft_commit_index", help: "Last entry that this manager knows to be committed.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.CommitIndex) })},
	{name: "warden_raft_applied_index", help: "Last entry that is in this manager's state.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.AppliedIndex) })},
	{name: "warden_raft_voters", help: "Managers with a vote.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.Voters) })},
	{name: "warden_raft_nonvoters", help: "Managers that follow without a vote.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.Nonvoters) })},
	{name: "warden_raft_log_entries", help: "Entries in this manager's log.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.LogEntries) })},
	{name: "warden_raft_disk_bytes", help: "Size of this manager's log and snapshots.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.DiskBytes) })},
	{name: "warden_raft_snapshot_index", help: "Last entry in the newest snapshot; 0 where there is none.", kind: gauge, read: raft(func(r *api.RaftFacts) float64 { return float64(r.SnapshotIndex) })},
	{name: "warden_raft_snapshot_timestamp_seconds", help: "When the newest snapshot was taken.", kind: gauge, read: at(func(f *api.Facts) int64 { return f.GetManager().GetRaft().GetSnapshotNs() })},
	{name: "warden_raft_append_seconds", help: "Time that a write of entries to this manager's log took, with its flush to disk.", histogram: func(f *api.Facts) *api.Histogram { return f.GetManager().GetRaft().GetAppend() }},
	{name: "warden_raft_commit_seconds", help: "Time from a proposal on this manager to its result.", histogram: func(f *api.Facts) *api.Histogram { return f.GetManager().GetRaft().GetCommit() }},

	// The cluster, by this manager's replica.
	{name: "warden_cluster_root_not_after_timestamp_seconds", help: "When the validity of the root certificate ends.", kind: gauge, read: at(func(f *api.Facts) int64 { return f.GetCluster().GetRootNotAfterNs() })},
	{name: "warden_cluster_issuing_not_after_timestamp_seconds", help: "When the validity of the issuing CA's certificate ends.", kind: gauge, read: at(func(f *api.Facts) int64 { return f.GetCluster().GetIssuingNotAfterNs() })},
	{name: "warden_cluster_generation", help: "Generation of what is rotated: issuing CA, keyset, lock (autolock and unlock key) and DEKs.", kind: gauge, labels: []string{"of"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			if c := f.GetCluster(); c != nil {
				set(float64(c.IssuingGeneration), "issuing")
				set(float64(c.KeysetGeneration), "keyset")
				set(float64(c.LockGeneration), "lock")
				set(float64(c.DekGeneration), "dek")
			}
		}},
	{name: "warden_cluster_outdated_leaves", help: "Nodes whose newest leaf is of an older generation: of the issuing CA, or, managers, of the DEKs.", kind: gauge, labels: []string{"of"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			if c := f.GetCluster(); c != nil {
				set(float64(c.LeavesOldIssuer), "issuing")
				set(float64(c.LeavesOldDek), "dek")
			}
		}},
	{name: "warden_cluster_near_expiry_leaves", help: "Nodes whose leaf is past four fifths of its life and was not renewed.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.LeavesNearExpiry) })},
	{name: "warden_cluster_expired_leaves", help: "Nodes whose leaf has ended.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.LeavesExpired) })},
	{name: "warden_cluster_distrusted_issuers", help: "Issuing CAs that are not accepted any more.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.DistrustedIssuers) })},
	{name: "warden_cluster_autolock", help: "Whether managers are to be locked at rest.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return truth(c.Autolock) })},
	{name: "warden_cluster_unlock_key_info", help: "ID of the cluster's unlock key, always 1; no series without autolock.", kind: gauge, labels: []string{"key_id"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			if id := f.GetCluster().GetUnlockKeyId(); id != "" {
				set(1, id)
			}
		}},
	{name: "warden_cluster_nodes", help: "Nodes, by effective role.", kind: gauge, labels: []string{"role"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			if c := f.GetCluster(); c != nil {
				set(float64(c.Managers), "manager")
				set(float64(c.Workers), "worker")
			}
		}},
	{name: "warden_cluster_evictions_total", help: "Nodes that were removed since the cluster began.", kind: counter, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.NodesRemoved) })},
	{name: "warden_cluster_services", help: "Services.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.Services) })},
	{name: "warden_cluster_secrets", help: "Secrets.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.Secrets) })},
	{name: "warden_cluster_zones", help: "Zones.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.Zones) })},
	{name: "warden_cluster_wanted_tasks", help: "Replicas of all services.", kind: gauge, read: cluster(func(c *api.ClusterFacts) float64 { return float64(c.TasksWanted) })},
	{name: "warden_cluster_tasks", help: "Tasks in the replicated state, ended ones that are remembered included, by state.", kind: gauge, labels: []string{"state"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, t := range f.GetCluster().GetTasks() {
				set(float64(t.Count), t.State)
			}
		}},
	{name: "warden_cluster_unplaced_tasks", help: "Tasks that no node fits, by the last filter that kept a node out.", kind: gauge, labels: []string{"reason"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, r := range f.GetCluster().GetUnplaced() {
				set(float64(r.Count), r.Reason)
			}
		}},

	// What only the leader knows.
	{name: "warden_leader_sessions", help: "Nodes whose session some manager claims, with an answer lately.", kind: gauge, read: leader(func(l *api.LeaderFacts) float64 { return float64(l.Sessions) })},
	{name: "warden_leader_nodes", help: "Nodes, by liveness.", kind: gauge, labels: []string{"liveness"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			if l := f.GetLeader(); l != nil {
				set(float64(l.NodesReady), "ready")
				set(float64(l.NodesDown), "down")
				set(float64(l.NodesUnknown), "unknown")
			}
		}},
	{name: "warden_leader_reachable_managers", help: "Managers with a vote that report to the leader, itself included.", kind: gauge, read: leader(func(l *api.LeaderFacts) float64 { return float64(l.ManagersReachable) })},
	{name: "warden_leader_alarms", help: "Nodes that an alarm is raised about, on whichever manager.", kind: gauge, read: leader(func(l *api.LeaderFacts) float64 { return float64(l.Alarms) })},
	{name: "warden_leader_manager_lock_state", help: "How each manager's own keys are, as it reported last: 1 for the present state.", kind: gauge, labels: []string{"node_id", "state"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, m := range f.GetLeader().GetManagers() {
				if m.LockState != "" {
					oneOf(lockStates[1:], m.LockState, func(v float64, l ...string) { set(v, m.NodeId, l[0]) })
				}
			}
		}},
	{name: "warden_leader_manager_lock_key_info", help: "ID of the unlock key that each manager's key file is sealed under, always 1.", kind: gauge, labels: []string{"node_id", "key_id"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, m := range f.GetLeader().GetManagers() {
				if m.UnlockKeyId != "" {
					set(1, m.NodeId, m.UnlockKeyId)
				}
			}
		}},
	{name: "warden_leader_manager_dek_generation", help: "Generation of each manager's DEK, as it reported last.", kind: gauge, labels: []string{"node_id"},
		read: func(f *api.Facts, set func(float64, ...string)) {
			for _, m := range f.GetLeader().GetManagers() {
				if m.LockState != "" {
					set(float64(m.DekGeneration), m.NodeId)
				}
			}
		}},
}

type reader = func(*api.Facts, func(float64, ...string))

func node(value func(*api.NodeFacts) float64) reader {
	return part((*api.Facts).GetNode, value)
}

func manager(value func(*api.ManagerFacts) float64) reader {
	return part((*api.Facts).GetManager, value)
}

func raft(value func(*api.RaftFacts) float64) reader {
	return part(func(f *api.Facts) *api.RaftFacts { return f.GetManager().GetRaft() }, value)
}

func cluster(value func(*api.ClusterFacts) float64) reader {
	return part((*api.Facts).GetCluster, value)
}

func leader(value func(*api.LeaderFacts) float64) reader {
	return part((*api.Facts).GetLeader, value)
}

// part reads one value of a part of the facts, where it is there.
func part[T any](of func(*api.Facts) *T, value func(*T) float64) reader {
	return func(f *api.Facts, set func(float64, ...string)) {
		if p := of(f); p != nil {
			set(value(p))
		}
	}
}

// at reads a time, where there is one.
func at(ns func(*api.Facts) int64) reader {
	return func(f *api.Facts, set func(float64, ...string)) {
		if t := ns(f); t != 0 {
			set(float64(t) / 1e9)
		}
	}
}

// oneOf sets each word to 0 but the present one, which is 1 also where it is not among them.
func oneOf(words []string, present string, set func(float64, ...string)) {
	known := false
	for _, w := range words {
		known = known || w == present
		set(truth(w == present), w)
	}
	if !known {
		set(1, present)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
