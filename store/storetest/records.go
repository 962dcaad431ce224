package storetest

import (
	"crypto/rand"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// Valid records for tests, each with a new ID, which pass the rules of the apply once what they refer to exists.

// Hash returns 32 random bytes, as the hash of a key.
func Hash() []byte {
	h := make([]byte, 32)
	rand.Read(h)
	return h
}

// Genesis returns the operations of a first command: a cluster, the zone default, and one manager.
func Genesis(clusterID, nodeID string) []*api.Operation {
	return []*api.Operation{store.Put(Cluster(clusterID), 0), store.Put(Zone(warden.DefaultZone), 0), store.Put(Manager(nodeID), 0)}
}

// Cluster returns a cluster record whose certificates and keys are stand-ins.
func Cluster(id string) *api.Cluster {
	return &api.Cluster{Id: id, RootCert: []byte("root"), IssuingCert: []byte("issuing"), SealedIssuingKey: []byte("sealed"), IssuingGeneration: 1,
		LeafTtlNs: int64(warden.LeafTTLDefault), Keyset: []byte("keyset"), KeysetGeneration: 1, ApplyVersion: 1}
}

// Zone returns a zone.
func Zone(name string) *api.Zone { return &api.Zone{Id: warden.NewID(), Name: name} }

// Manager returns a manager of the default zone that came with the cluster and takes no tasks.
func Manager(id string) *api.Node {
	return &api.Node{Id: id, Hostname: "m-" + id[:4], Role: api.Role_ROLE_MANAGER, DesiredRole: api.Role_ROLE_MANAGER, Zone: warden.DefaultZone,
		Availability: api.Availability_AVAILABILITY_DRAIN, Address: "127.0.0.1:2377", KeyHash: Hash()}
}

// Token returns an unlimited token of the default zone, which is valid for an hour.
func Token(role api.Role) *api.Token {
	return &api.Token{Id: warden.NewID()[:12], Role: role, ExpiresNs: time.Now().Add(time.Hour).UnixNano(), Key: Hash(), RootHash: Hash()}
}

// Node returns an active node with 4 CPUs and 8 GiB, as the token admits it. Join makes it one.
func Node(hostname string, token *api.Token) *api.Node {
	n := &api.Node{Id: warden.NewID(), Hostname: hostname, Role: token.GetRole(), DesiredRole: token.GetRole(), Zone: token.GetZone(),
		Availability: api.Availability_AVAILABILITY_ACTIVE, KeyHash: Hash(), JoinKeyHash: Hash(), TokenId: token.GetId(),
		Description: &api.NodeDescription{Hostname: hostname, Os: "linux", Arch: "amd64", NanoCpus: 4e9, MemoryBytes: 8 << 30}}
	if n.Zone == "" {
		n.Zone = warden.DefaultZone
	}
	return n
}

// Join returns the operations that make the node: a use of its token, and its record.
func Join(n *api.Node) []*api.Operation {
	return []*api.Operation{UseToken(n.GetTokenId()), store.Put(n, 0)}
}

// UseToken returns the operation that takes one use.
func UseToken(id string) *api.Operation {
	return &api.Operation{Of: &api.Operation_UseToken{UseToken: &api.UseToken{TokenId: id}}}
}

// Report returns the operation that moves the task to the state, as its node reports it.
func Report(t *api.Task, state api.TaskState) *api.Operation {
	return &api.Operation{Of: &api.Operation_ReportTask{ReportTask: &api.ReportTask{TaskId: t.GetId(), NodeId: t.GetNodeId(),
		Status: &api.TaskStatus{State: state}}}}
}

// Service returns a service of one replica.
func Service(name, zone string, secrets ...*api.SecretReference) *api.Service {
	return &api.Service{Id: warden.NewID(), Spec: &api.ServiceSpec{Name: name, Replicas: 1, Task: &api.TaskSpec{
		Image: "host", Command: []string{"sleep", "60"}, Zone: zone, Secrets: secrets, Resources: &api.Resources{}, Restart: api.RestartCondition_RESTART_ANY}}}
}

// Task returns a new task of the service, not placed.
func Task(s *api.Service, slot uint64) *api.Task {
	return &api.Task{Id: warden.NewID(), ServiceId: s.GetId(), ServiceName: s.GetSpec().GetName(), Slot: slot, DesiredState: api.TaskState_TASK_RUNNING,
		Status: &api.TaskStatus{State: api.TaskState_TASK_PENDING}, Spec: api.Clone(s.GetSpec().GetTask()), SpecVersion: s.GetSpecVersion()}
}

// Placed returns a copy of the task that is assigned to the node.
func Placed(t *api.Task, nodeID string) *api.Task {
	t = api.Clone(t)
	t.NodeId, t.Status = nodeID, &api.TaskStatus{State: api.TaskState_TASK_ASSIGNED}
	return t
}

// Secret returns a secret whose current version is 1; SecretVersion makes that.
func Secret(name string, zones ...string) *api.Secret {
	return &api.Secret{Id: warden.NewID(), Name: name, Zones: zones, CurrentVersion: 1}
}

// SecretVersion returns a version of the secret, whose ciphertext is a stand-in.
func SecretVersion(s *api.Secret, version uint64) *api.SecretVersion {
	return &api.SecretVersion{Id: store.SecretVersionID(s.GetId(), version), SecretId: s.GetId(), Version: version,
		Ciphertext: []byte("ciphertext"), WrappedKey: []byte("wrapped"), SizeBytes: 10, KeysetGeneration: 1}
}

// Reference returns a reference to version 1 of the secret, under its name.
func Reference(s *api.Secret) *api.SecretReference {
	return &api.SecretReference{SecretId: s.GetId(), SecretName: s.GetName(), Version: 1, Target: s.GetName(), Mode: 0o400}
}
