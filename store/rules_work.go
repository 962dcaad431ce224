package store

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

func (x *tx) ruleService(old, next *api.Service) error {
	spec := next.GetSpec()
	zone := spec.GetTask().GetZone()
	if err := firstError(
		checkID("the service's ID", next.GetId()),
		checkLabels("labels", spec.GetLabels()),
		checkTaskSpec(spec.GetTask()),
		checkUpdate(spec.GetUpdate()),
		x.zoneExists(zone)); err != nil {
		return err
	}
	if spec.GetReplicas() > warden.ReplicasMax {
		return warden.Errorf(warden.CodeTooLarge, "", "%d replicas, at most %d", spec.GetReplicas(), warden.ReplicasMax)
	}
	if err := x.secretsMayEnter(spec.GetTask().GetSecrets(), zone); err != nil {
		return err
	}
	if old == nil {
		next.SpecVersion = 1
		return firstError(x.unique(api.Kind_KIND_SERVICE, spec.GetName()), x.room(api.Kind_KIND_SERVICE, warden.ServicesMax))
	}
	if old.GetSpec().GetName() != spec.GetName() {
		return invalid("the name of a service never changes")
	}
	next.SpecVersion = old.GetSpecVersion()
	if !proto.Equal(old.GetSpec().GetTask(), spec.GetTask()) {
		next.SpecVersion++
	}
	return nil
}

// secretsMayEnter refuses references to secrets or versions that don't exist, or whose zones leave this one out (I6), and more
// than a task can hold. Version 0 is the current one.
func (x *tx) secretsMayEnter(refs []*api.SecretReference, zone string) error {
	var total uint64
	for _, r := range refs {
		secret := as[*api.Secret](x.find(api.Kind_KIND_SECRET, r.GetSecretId()))
		n := r.GetVersion()
		if n == 0 {
			n = secret.GetCurrentVersion()
		}
		version := as[*api.SecretVersion](x.find(api.Kind_KIND_SECRET_VERSION, SecretVersionID(r.GetSecretId(), n)))
		switch {
		case secret == nil || secret.GetName() != r.GetSecretName():
			return warden.Errorf(warden.CodeNotFound, "", "no secret is %s (%s)", clip(r.GetSecretName()), r.GetSecretId())
		case version == nil:
			return warden.Errorf(warden.CodeNotFound, "", "secret %s has no version %d", secret.GetName(), n)
		case len(secret.GetZones()) > 0 && !slices.Contains(secret.GetZones(), zone):
			return warden.Errorf(warden.CodeWrongZone, "", "secret %s may not enter zone %s", secret.GetName(), clip(zone))
		}
		total += version.GetSizeBytes()
	}
	if total > warden.TaskSecretsMax {
		return warden.Errorf(warden.CodeTooLarge, "", "its secrets have %d bytes, at most %d", total, warden.TaskSecretsMax)
	}
	return nil
}

func (x *tx) ruleTask(old, next *api.Task) error {
	if err := checkTaskStates(next); err != nil {
		return err
	}
	if next.GetStatus() != nil {
		clipStatus(next.Status)
	}
	if old == nil {
		service := as[*api.Service](x.find(api.Kind_KIND_SERVICE, next.GetServiceId()))
		if service == nil || service.GetSpec().GetName() != next.GetServiceName() {
			return warden.Errorf(warden.CodeNotFound, "", "no service is %s (%s)", clip(next.GetServiceName()), clip(next.GetServiceId()))
		}
		if err := firstError(checkID("the task's ID", next.GetId()), checkTaskSpec(next.GetSpec()), x.resolved(next.GetSpec().GetSecrets())); err != nil {
			return err
		}
	} else {
		now, then := next.GetStatus().GetState(), old.GetStatus().GetState()
		stops := next.GetDesiredState() == api.TaskState_TASK_SHUTDOWN
		switch {
		case stops && (next.GetSpec().GetStopGraceNs() < 0 || next.GetSpec().GetStopGraceNs() > int64(warden.StopGraceMax)):
			return invalid("the time to stop is out of range")
		case next.GetDesiredState() < old.GetDesiredState():
			return warden.Errorf(warden.CodeConflict, "", "it is to end, and is never started again")
		case now < then || then.Ended() && now != then:
			return warden.Errorf(warden.CodeConflict, "", "its state is %s, and only moves forward", then.Word())
		case old.GetNodeId() != "" && next.GetNodeId() != old.GetNodeId():
			return warden.Errorf(warden.CodeConflict, "", "it is placed already, and never moves")
		}
		if err := frozen(old, next, func(c *api.Task) {
			c.NodeId, c.DesiredState, c.Status, c.StartAfterNs = old.GetNodeId(), old.GetDesiredState(), old.GetStatus(), old.GetStartAfterNs()
			if c.GetSpec() != nil && stops { // in the time that its service gives now
				c.Spec.StopGraceNs = old.GetSpec().GetStopGraceNs()
			}
		}); err != nil {
			return err
		}
	}
	if next.GetNodeId() != "" && old.GetNodeId() == "" {
		return x.place(next)
	}
	return nil
}

// resolved refuses references that name no version, or one that is gone: from here on the task holds it (secretUsers).
func (x *tx) resolved(refs []*api.SecretReference) error {
	for _, r := range refs {
		if r.GetVersion() == 0 {
			return invalid("secret %s is referenced without a version", clip(r.GetSecretName()))
		}
		if x.find(api.Kind_KIND_SECRET_VERSION, SecretVersionID(r.GetSecretId(), r.GetVersion())) == nil {
			return warden.Errorf(warden.CodeNotFound, "", "secret %s has no version %d", clip(r.GetSecretName()), r.GetVersion())
		}
	}
	return nil
}

// checkTaskStates checks that states are known and fit one another.
func checkTaskStates(t *api.Task) error {
	state := t.GetStatus().GetState()
	switch {
	case state == api.TaskState_TASK_UNSPECIFIED || api.TaskState_name[int32(state)] == "":
		return invalid("its state is unknown")
	case t.GetDesiredState() != api.TaskState_TASK_RUNNING && t.GetDesiredState() != api.TaskState_TASK_SHUTDOWN:
		return invalid("its desired state is neither running nor shutdown")
	case t.GetNodeId() == "" && state > api.TaskState_TASK_PENDING && !state.Ended():
		return invalid("it has no node, and is %s", state.Word())
	case t.GetNodeId() != "" && state < api.TaskState_TASK_ASSIGNED:
		return invalid("it has a node, and is %s", state.Word())
	}
	return nil
}

// place judges the placement of next, and records what its node will get to see (I6).
func (x *tx) place(next *api.Task) error {
	noFit := func(format string, args ...any) error { return warden.Errorf(warden.CodeNoFit, "", format, args...) }
	node := as[*api.Node](x.find(api.Kind_KIND_NODE, next.GetNodeId()))
	switch {
	case next.GetStatus().GetState().Ended():
		return noFit("it has ended")
	case next.GetDesiredState() != api.TaskState_TASK_RUNNING:
		return noFit("it is to end")
	case node == nil:
		return noFit("there is no node %s", clip(next.GetNodeId()))
	case x.find(api.Kind_KIND_TOMBSTONE, node.GetId()) != nil:
		return noFit("node %s was removed", node.GetHostname())
	case node.GetAvailability() != api.Availability_AVAILABILITY_ACTIVE:
		return noFit("node %s takes no tasks: its availability is %s", node.GetHostname(), node.GetAvailability().Word())
	case node.GetZone() != next.GetSpec().GetZone():
		return warden.Errorf(warden.CodeWrongZone, "", "node %s is in zone %s, the task is for zone %s",
			node.GetHostname(), node.GetZone(), clip(next.GetSpec().GetZone()))
	}
	if err := x.fits(node, next); err != nil {
		return err
	}
	if err := x.secretsMayEnter(next.GetSpec().GetSecrets(), node.GetZone()); err != nil {
		return err
	}
	for _, r := range next.GetSpec().GetSecrets() {
		x.expose(next, r)
	}
	return nil
}

// fits refuses a task beyond what the node has. A node that has not said what it has takes no reservations.
func (x *tx) fits(node *api.Node, t *api.Task) error {
	held := x.load(node.GetId())
	if held.tasks >= warden.AssignTasksMax {
		return warden.Errorf(warden.CodeNoFit, "", "node %s holds %d tasks, which is the most", node.GetHostname(), held.tasks)
	}
	for _, r := range []struct {
		what               string
		wanted, used, have int64
	}{
		{"nano CPUs", t.GetSpec().GetResources().GetReserveNanoCpus(), held.nanoCPUs, node.GetDescription().GetNanoCpus()},
		{"bytes of memory", t.GetSpec().GetResources().GetReserveMemoryBytes(), held.memoryBytes, node.GetDescription().GetMemoryBytes()},
	} {
		if r.wanted > 0 && r.wanted > r.have-r.used {
			return warden.Errorf(warden.CodeNoFit, "", "node %s has %d of %d %s free, the task reserves %d",
				node.GetHostname(), max(0, r.have-r.used), r.have, r.what, r.wanted)
		}
	}
	return nil
}

// expose records that the task's node gets the secret version.
func (x *tx) expose(t *api.Task, r *api.SecretReference) {
	id := ExposureID(t.GetNodeId(), r.GetSecretId(), r.GetVersion())
	next := &api.Exposure{Id: id, NodeId: t.GetNodeId(), SecretId: r.GetSecretId(), SecretName: r.GetSecretName(), Version: r.GetVersion(),
		FirstNs: x.now, LastNs: x.now, FirstTaskId: t.GetId()}
	old := x.find(api.Kind_KIND_EXPOSURE, id)
	if e := as[*api.Exposure](old); e != nil {
		next.FirstNs, next.FirstTaskId = e.GetFirstNs(), e.GetFirstTaskId()
	}
	x.store(api.Kind_KIND_EXPOSURE, old, next)
}

// forgetExposures removes those of the exposures whose node and version are both gone.
func (x *tx) forgetExposures(exposures []*api.Exposure) {
	for _, e := range exposures {
		if x.find(api.Kind_KIND_NODE, e.GetNodeId()) == nil &&
			x.find(api.Kind_KIND_SECRET_VERSION, SecretVersionID(e.GetSecretId(), e.GetVersion())) == nil {
			x.remove(api.Kind_KIND_EXPOSURE, e)
		}
	}
}

// ruleDeleteTask keeps a task that its node may still run.
func (x *tx) ruleDeleteTask(old *api.Task) error {
	if old.Holds() && x.find(api.Kind_KIND_NODE, old.GetNodeId()) != nil {
		return warden.Errorf(warden.CodeInUse, "", "its node may still run it: its state is %s", old.GetStatus().GetState().Word())
	}
	return nil
}

// reportTask moves a task's state forward. Reports that are late, false or out of range are skipped: they cross with
// commands, and no node can spoil a batch with others' reports.
func (x *tx) reportTask(r *api.ReportTask) {
	old := as[*api.Task](x.find(api.Kind_KIND_TASK, r.GetTaskId()))
	state := r.GetStatus().GetState()
	switch then := old.GetStatus().GetState(); {
	case old == nil || old.GetNodeId() == "" || old.GetNodeId() != r.GetNodeId():
		return
	case x.find(api.Kind_KIND_NODE, r.GetNodeId()) == nil || x.find(api.Kind_KIND_TOMBSTONE, r.GetNodeId()) != nil:
		return
	case api.TaskState_name[int32(state)] == "" || state < then || then.Ended():
		return
	}
	next := shallow(old)
	next.Status = r.GetStatus()
	clipStatus(next.Status)
	if !proto.Equal(old.GetStatus(), next.GetStatus()) {
		x.store(api.Kind_KIND_TASK, old, next)
	}
}

func clipStatus(s *api.TaskStatus) {
	s.Message, s.Error = cut(s.GetMessage(), statusTextMax), cut(s.GetError(), statusTextMax)
}

func (x *tx) ruleSecret(old, next *api.Secret) error {
	if err := firstError(checkID("the secret's ID", next.GetId()), checkLabels("labels", next.GetLabels())); err != nil {
		return err
	}
	if len(next.GetZones()) > warden.ZonesMax {
		return warden.Errorf(warden.CodeTooLarge, "", "%d zones, at most %d", len(next.GetZones()), warden.ZonesMax)
	}
	seen := map[string]bool{}
	for _, z := range next.GetZones() {
		if seen[z] {
			return invalid("zone %s is named twice", clip(z))
		}
		seen[z] = true
		if err := x.zoneExists(z); err != nil {
			return err
		}
	}
	x.after = append(x.after, func() error {
		current := as[*api.Secret](x.find(api.Kind_KIND_SECRET, next.GetId()))
		if v := current.GetCurrentVersion(); v != 0 && x.find(api.Kind_KIND_SECRET_VERSION, SecretVersionID(next.GetId(), v)) == nil {
			return warden.Errorf(warden.CodeNotFound, "putting secret "+next.GetId(), "its current version %d does not exist", v)
		}
		return nil
	})
	if old == nil {
		return firstError(x.unique(api.Kind_KIND_SECRET, next.GetName()), x.room(api.Kind_KIND_SECRET, warden.SecretsMax))
	}
	switch {
	case old.GetName() != next.GetName():
		return invalid("the name of a secret never changes")
	case next.GetCurrentVersion() < old.GetCurrentVersion():
		return invalid("the current version never falls") // nor is a number used twice: exposures name it
	case next.GetCurrentVersion() > old.GetCurrentVersion():
		x.after = append(x.after, func() error { return x.followersBear(next.GetId()) })
	}
	return nil
}

// followersBear refuses a new current version that a service which follows the secret can't have.
func (x *tx) followersBear(secretID string) error {
	for _, s := range list[*api.Service](x.txn, api.Kind_KIND_SERVICE, bySecret, secretID) {
		t := s.GetSpec().GetTask()
		if !slices.ContainsFunc(t.GetSecrets(), func(r *api.SecretReference) bool { return r.GetSecretId() == secretID && r.GetVersion() == 0 }) {
			continue
		}
		if err := x.secretsMayEnter(t.GetSecrets(), t.GetZone()); err != nil {
			return warden.Wrap("putting secret "+secretID+", which service "+s.GetSpec().GetName()+" follows", err)
		}
	}
	return nil
}

func (x *tx) ruleDeleteSecret(old *api.Secret) error {
	if err := inUse(x.secretUsers(old.GetId(), 0)); err != nil {
		return err
	}
	for _, v := range list[*api.SecretVersion](x.txn, api.Kind_KIND_SECRET_VERSION, bySecret, old.GetId()) {
		x.remove(api.Kind_KIND_SECRET_VERSION, v)
	}
	x.forgetExposures(list[*api.Exposure](x.txn, api.Kind_KIND_EXPOSURE, bySecret, old.GetId()))
	return nil
}

// secretUsers names the services that pin the version and the tasks that have it and have not ended; 0: all that use the secret.
func (x *tx) secretUsers(secretID string, version uint64) []string {
	uses := func(spec *api.TaskSpec) bool {
		return slices.ContainsFunc(spec.GetSecrets(), func(r *api.SecretReference) bool {
			return r.GetSecretId() == secretID && (version == 0 || r.GetVersion() == version)
		})
	}
	var users []string
	for _, s := range list[*api.Service](x.txn, api.Kind_KIND_SERVICE, bySecret, secretID) {
		if uses(s.GetSpec().GetTask()) {
			users = append(users, "service "+s.GetSpec().GetName())
		}
	}
	for _, t := range list[*api.Task](x.txn, api.Kind_KIND_TASK, bySecret, secretID) {
		if uses(t.GetSpec()) && !t.GetStatus().GetState().Ended() {
			users = append(users, fmt.Sprintf("task %s.%d", t.GetServiceName(), t.GetSlot()))
		}
	}
	return users
}

func (x *tx) ruleSecretVersion(old, next *api.SecretVersion) error {
	if err := checkSecretVersion(next); err != nil {
		return err
	}
	if c := x.cluster(); c != nil && next.GetKeysetGeneration() != c.GetKeysetGeneration() {
		// Sealed under a key that a rotation has just replaced, and is about to drop: seal it again.
		return warden.Errorf(warden.CodeConflict, "", "the value is sealed under generation %d of the keyset", next.GetKeysetGeneration())
	}
	if old != nil { // re-sealed under a newer keyset
		if next.GetKeysetGeneration() < old.GetKeysetGeneration() {
			return invalid("generations never fall")
		}
		return frozen(old, next, func(c *api.SecretVersion) {
			c.WrappedKey, c.KeysetGeneration = old.GetWrappedKey(), old.GetKeysetGeneration()
		})
	}
	if x.find(api.Kind_KIND_SECRET, next.GetSecretId()) == nil {
		return warden.Errorf(warden.CodeNotFound, "", "there is no secret %s", clip(next.GetSecretId()))
	}
	if n := len(idsOf(x.txn, api.Kind_KIND_SECRET_VERSION, bySecret, next.GetSecretId())); n >= warden.SecretVersionsMax {
		return warden.Hint(warden.Errorf(warden.CodeTooLarge, "", "the secret has %d versions, which is the most", n),
			"remove some that nothing uses: wardenctl secret rm NAME@VERSION")
	}
	x.after = append(x.after, func() error {
		if current := as[*api.Secret](x.find(api.Kind_KIND_SECRET, next.GetSecretId())); current.GetCurrentVersion() != next.GetVersion() {
			return warden.Errorf(warden.CodeInvalid, "putting secret version "+next.GetId(), "a new version becomes the current one")
		}
		return nil
	})
	return nil
}

func (x *tx) ruleDeleteSecretVersion(old *api.SecretVersion) error {
	if err := inUse(x.secretUsers(old.GetSecretId(), old.GetVersion())); err != nil {
		return err
	}
	x.after = append(x.after, func() error {
		secret := as[*api.Secret](x.find(api.Kind_KIND_SECRET, old.GetSecretId()))
		if secret.GetCurrentVersion() == old.GetVersion() {
			return warden.Errorf(warden.CodeInUse, "removing secret version "+old.GetId(), "it is the current one")
		}
		x.forgetExposures(list[*api.Exposure](x.txn, api.Kind_KIND_EXPOSURE, bySecret, old.GetSecretId()))
		return nil
	})
	return nil
}
