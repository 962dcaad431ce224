package main

import (
	"crypto/x509"
	"encoding/hex"
	"time"

	"warden/api"
)

// The views say what inspect shows of each noun, in Docker's shape where Docker has the noun. What is not named here is not
// shown: a new field of a record stays hidden until someone decides about it.

// stamp returns a time as inspect shows it, "" for 0.
func stamp(ns int64) string {
	if ns == 0 {
		return ""
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339Nano)
}

// length returns a length of time as inspect shows it, "" for 0, which means the default.
func length(ns int64) string {
	if ns == 0 {
		return ""
	}
	return time.Duration(ns).String()
}

func labelsOf(labels map[string]string) map[string]string {
	if labels == nil {
		return map[string]string{}
	}
	return labels
}

func listOf(words []string) []string {
	if words == nil {
		return []string{}
	}
	return words
}

// record returns the members that every noun begins with.
func record(id string, meta *api.Meta, rest ...member) object {
	return append(object{
		{"ID", id},
		{"Version", object{{"Index", meta.GetIndex()}, {"Number", meta.GetVersion()}}},
		{"CreatedAt", stamp(meta.GetCreatedNs())},
		{"UpdatedAt", stamp(meta.GetUpdatedNs())},
	}, rest...)
}

var livenessWords = map[api.Liveness]string{
	api.Liveness_LIVENESS_UNKNOWN: "unknown",
	api.Liveness_LIVENESS_READY:   "ready",
	api.Liveness_LIVENESS_DOWN:    "down",
}

// reachability returns Docker's word for a manager's connection to the leader.
func reachability(st *api.NodeState) string {
	if st.GetReachable() || st.GetLeader() {
		return "reachable"
	}
	return "unreachable"
}

func nodeView(n *api.Node, st *api.NodeState) object {
	d := n.GetDescription()
	var manager object
	if n.GetRole() == api.Role_ROLE_MANAGER || n.GetDesiredRole() == api.Role_ROLE_MANAGER {
		manager = object{
			{"Leader", st.GetLeader()},
			{"Reachability", reachability(st)},
			{"Addr", n.GetAddress()},
			{"Raft", st.GetRaft()},
			{"LockState", st.GetLockState()},
			{"UnlockKeyID", st.GetUnlockKeyId()},
			{"DEKGeneration", st.GetDekGeneration()},
		}
	}
	return record(n.GetId(), n.GetMeta(),
		member{"Spec", object{
			{"Role", n.GetDesiredRole().Word()},
			{"Availability", n.GetAvailability().Word()},
			{"Labels", labelsOf(n.GetLabels())},
			{"Zone", n.GetZone()},
		}},
		member{"Role", n.EffectiveRole().Word()},
		member{"RaftRole", n.GetRole().Word()},
		member{"Hostname", n.GetHostname()},
		member{"Description", object{
			{"Hostname", d.GetHostname()},
			{"Platform", object{{"Architecture", d.GetArch()}, {"OS", d.GetOs()}}},
			{"Resources", object{{"NanoCPUs", d.GetNanoCpus()}, {"MemoryBytes", d.GetMemoryBytes()}}},
			{"Engine", object{{"EngineVersion", d.GetVersion()}, {"Labels", labelsOf(d.GetEngineLabels())}}},
			{"Executor", d.GetExecutor()},
			{"SecretMounts", d.GetSecretMounts()},
			{"Advertise", d.GetAdvertise()},
		}},
		member{"Status", object{
			{"State", livenessWords[st.GetLiveness()]},
			{"Message", st.GetMessage()},
			{"Addr", n.GetIp()},
			{"SessionManager", st.GetSessionManager()},
			{"SeenAt", stamp(st.GetSeenNs())},
		}},
		member{"ManagerStatus", manager},
		member{"Certificate", certificateView(n)},
		member{"TokenID", n.GetTokenId()},
	)
}

func certificateView(n *api.Node) object {
	serial, subject := "", ""
	if leaf, err := x509.ParseCertificate(n.GetLeaf()); err == nil {
		serial, subject = leaf.SerialNumber.Text(16), leaf.Subject.String()
	}
	return object{
		{"Subject", subject},
		{"Serial", serial},
		{"Role", n.GetLeafRole().Word()},
		{"Zone", n.GetLeafZone()},
		{"IssuerGeneration", n.GetLeafGeneration()},
		{"DEKGeneration", n.GetLeafDekGeneration()},
		{"NotBefore", stamp(n.GetLeafNotBeforeNs())},
		{"NotAfter", stamp(n.GetLeafNotAfterNs())},
		{"KeyHash", hex.EncodeToString(n.GetKeyHash())},
		{"NextKeyHash", hex.EncodeToString(n.GetNextKeyHash())},
	}
}

func zoneView(z *api.Zone) object {
	return record(z.GetId(), z.GetMeta(), member{"Name", z.GetName()})
}

func secretView(s *api.Secret, uses []*api.SecretUse) object {
	versions := make([]object, 0, len(uses))
	for _, u := range uses {
		versions = append(versions, object{
			{"Version", u.GetVersion()},
			{"CreatedAt", stamp(u.GetCreatedNs())},
			{"Size", u.GetSizeBytes()},
			{"Current", u.GetCurrent()},
			{"Services", listOf(u.GetServices())},
			{"Tasks", u.GetTasks()},
		})
	}
	return record(s.GetId(), s.GetMeta(),
		member{"Spec", object{
			{"Name", s.GetName()},
			{"Labels", labelsOf(s.GetLabels())},
			{"Zones", listOf(s.GetZones())},
		}},
		member{"CurrentVersion", s.GetCurrentVersion()},
		member{"Versions", versions},
	)
}

func serviceView(s *api.Service, r api.Rollout) object {
	spec := s.GetSpec()
	state := "updating"
	if r.Complete() {
		state = "completed"
	}
	parallelism := uint32(1)
	if spec.GetUpdate() != nil {
		parallelism = spec.GetUpdate().GetParallelism()
	}
	return record(s.GetId(), s.GetMeta(),
		member{"Spec", object{
			{"Name", spec.GetName()},
			{"Labels", labelsOf(spec.GetLabels())},
			{"TaskTemplate", taskSpecView(spec.GetTask())},
			{"Mode", object{{"Replicated", object{{"Replicas", spec.GetReplicas()}}}}},
			{"UpdateConfig", object{{"Parallelism", parallelism}, {"Delay", length(spec.GetUpdate().GetDelayNs())}, {"Order", "stop-first"}}},
		}},
		member{"UpdateStatus", object{{"State", state}, {"Replicas", r.Total}, {"UpToDate", r.Updated}, {"Running", r.Running}, {"Completed", r.Done}}},
		member{"SpecVersion", s.GetSpecVersion()},
	)
}

func taskSpecView(t *api.TaskSpec) object {
	secrets := make([]object, 0, len(t.GetSecrets()))
	for _, r := range t.GetSecrets() {
		secrets = append(secrets, object{
			{"SecretID", r.GetSecretId()},
			{"SecretName", r.GetSecretName()},
			{"Version", r.GetVersion()},
			{"File", object{{"Name", r.GetTarget()}, {"UID", r.GetUid()}, {"GID", r.GetGid()}, {"Mode", r.GetMode()}}},
		})
	}
	r := t.GetResources()
	return object{
		{"ContainerSpec", object{
			{"Image", t.GetImage()},
			{"Args", listOf(t.GetCommand())},
			{"Env", listOf(t.GetEnv())},
			{"Labels", labelsOf(t.GetLabels())},
			{"StopGracePeriod", length(t.GetStopGraceNs())},
			{"Secrets", secrets},
		}},
		{"Resources", object{
			{"Limits", object{{"NanoCPUs", r.GetLimitNanoCpus()}, {"MemoryBytes", r.GetLimitMemoryBytes()}}},
			{"Reservations", object{{"NanoCPUs", r.GetReserveNanoCpus()}, {"MemoryBytes", r.GetReserveMemoryBytes()}}},
		}},
		{"RestartPolicy", object{
			{"Condition", restartWords[t.GetRestart()]},
			{"Delay", length(t.GetRestartDelayNs())},
			{"MaxAttempts", t.GetRestartAttemptsMax()},
		}},
		{"Placement", object{{"Zone", t.GetZone()}, {"Constraints", listOf(t.GetConstraints())}}},
		{"ForceUpdate", t.GetForce()},
	}
}

func taskView(t *api.Task) object {
	st := t.GetStatus()
	return record(t.GetId(), t.GetMeta(),
		member{"Name", taskName(t)},
		member{"ServiceID", t.GetServiceId()},
		member{"ServiceName", t.GetServiceName()},
		member{"Slot", t.GetSlot()},
		member{"NodeID", t.GetNodeId()},
		member{"DesiredState", t.GetDesiredState().Word()},
		member{"Status", object{
			{"Timestamp", stamp(st.GetTimeNs())},
			{"State", st.GetState().Word()},
			{"Message", st.GetMessage()},
			{"Err", st.GetError()},
			{"ExitCode", st.GetExitCode()},
		}},
		member{"Spec", taskSpecView(t.GetSpec())},
		member{"SpecVersion", t.GetSpecVersion()},
		member{"StartAfter", stamp(t.GetStartAfterNs())},
		member{"Restarts", t.GetRestarts()},
	)
}
