package control

import (
	"crypto/sha256"
	"crypto/x509"
	"time"

	"warden"
	"warden/api"
	"warden/internal/tally"
	"warden/scheduler"
	"warden/store"
)

// nearExpiry is the part of a leaf's life after which a missing renewal is worth a word: it was due at two thirds.
const nearExpiry = 0.8

// expiry says whether the present leaf of a node has ended, or is near it without having been renewed; left is how long it
// still counts. Pure.
func expiry(n *api.Node, now time.Time) (expired, near bool, left time.Duration) {
	if n.GetLeafNotAfterNs() == 0 {
		return false, false, 0
	}
	begin, end := time.Unix(0, n.LeafNotBeforeNs), time.Unix(0, n.LeafNotAfterNs)
	life := end.Sub(begin) - warden.LeafBackdate
	left = end.Sub(now)
	return left <= 0, left > 0 && left < time.Duration(float64(life)*(1-nearExpiry)), left
}

// ClusterFacts returns what a view says of the cluster, in numbers. It names no task, service or secret. Cost: one pass over nodes
// and tasks, some milliseconds for 10,000 of each; no lock. Pure.
func ClusterFacts(v *store.View, now time.Time) *api.ClusterFacts {
	c := v.Cluster()
	f := &api.ClusterFacts{
		RootNotAfterNs: notAfter(c.GetRootCert()), IssuingNotAfterNs: notAfter(c.GetIssuingCert()),
		IssuingGeneration: c.GetIssuingGeneration(), KeysetGeneration: c.GetKeysetGeneration(),
		LockGeneration: c.GetLockGeneration(), DekGeneration: c.GetDekGeneration(), Autolock: c.GetAutolock(), UnlockKeyId: c.GetUnlockKeyId(),
		DistrustedIssuers: uint64(len(c.GetDistrustedIssuers()) / sha256.Size), Secrets: uint64(len(v.Secrets())),
		Zones: uint64(len(v.Zones())), NodesRemoved: uint64(len(v.Tombstones())),
	}
	for _, n := range v.Nodes() {
		manager := n.EffectiveRole() == api.Role_ROLE_MANAGER
		if manager {
			f.Managers++
		} else {
			f.Workers++
		}
		expired, near, _ := expiry(n, now)
		count(&f.LeavesExpired, expired)
		count(&f.LeavesNearExpiry, near)
		count(&f.LeavesOldIssuer, n.GetLeafGeneration() < f.IssuingGeneration)
		count(&f.LeavesOldDek, manager && n.GetLeafDekGeneration() < f.DekGeneration)
	}
	for _, s := range v.Services() {
		f.Services++
		f.TasksWanted += s.GetSpec().GetReplicas()
	}
	states, unplaced, classes := map[api.TaskState]uint64{}, map[string]uint64{}, map[string]string{}
	for _, t := range v.Tasks() {
		states[t.GetStatus().GetState()]++
		if t.GetNodeId() != "" || t.GetStatus().GetState() != api.TaskState_TASK_PENDING || t.GetDesiredState() != api.TaskState_TASK_RUNNING {
			continue
		}
		message := t.GetStatus().GetMessage()
		class, known := classes[message] // the tasks of a service say the same
		if !known {
			class = scheduler.Class(message)
			classes[message] = class
		}
		if class != "" {
			unplaced[class]++
		}
	}
	f.Tasks = tally.Tasks(states)
	for _, class := range scheduler.Classes {
		if n := unplaced[class]; n > 0 {
			f.Unplaced = append(f.Unplaced, &api.ReasonCount{Reason: class, Count: n})
		}
	}
	return f
}

func count(n *uint64, yes bool) {
	if yes {
		*n++
	}
}

// notAfter returns the end of a certificate's validity in Unix nanoseconds; 0 where it does not parse.
func notAfter(der []byte) int64 {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return 0
	}
	return c.NotAfter.UnixNano()
}
