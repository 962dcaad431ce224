package main

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/internal/courier"
)

// fake serves Local and Control from memory: enough to see what the commands send and how they print what comes back. What a real
// manager decides is tested against real managers.
type fake struct {
	api.UnimplementedControlServer
	api.UnimplementedLocalServer

	mu      sync.Mutex
	info    *api.InfoReply
	status  *api.StatusReply
	objects []*api.Object
	states  []*api.NodeState
	events  []*api.Event
	chunks  []*api.LogChunk
	silent  []string
	refuse  error // of a change of the lock
	lose    error // likewise, after it was made where made is set
	made    bool
	serial  int
	uses    []*api.SecretUse
	rotates []string // what RotateSecret got, as "name value"
	races   int      // updates that somebody else is faster than
}

const (
	fakeUnlockKey = "WDNKEY-1-0123456789-abcdef"
	fakeToken     = "WDNTKN-1-0123456789-abcdef"
)

func (f *fake) serve(socket string) (stop func(), err error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(warden.MessageMax))
	if f.info.GetState() == "running" && f.info.GetRole() == api.Role_ROLE_MANAGER {
		api.RegisterControlServer(server, f)
	}
	api.RegisterLocalServer(server, f)
	go server.Serve(listener) // ends with Stop
	return server.Stop, nil
}

func newFakeManager(created time.Time) *fake {
	ns := created.UnixNano()
	f := &fake{
		info: &api.InfoReply{State: "running", ClusterId: "cluster00000000000000000", NodeId: "m1aaaaaaaaaaaaaaaaaaaaaaa", Role: api.Role_ROLE_MANAGER, Zone: "default",
			Hostname: "m1", Version: "1.0.0", StateDir: "/var/lib/warden", Executor: "process", Address: "192.0.2.1:2377", SessionManager: "m1aaaaaaaaaaaaaaaaaaaaaaa"},
		status: &api.StatusReply{LeaderId: "m1aaaaaaaaaaaaaaaaaaaaaaa", LeaderHostname: "m1", Managers: 1, ManagersReachable: 1, Workers: 1, WorkersReady: 1, AppliedIndex: 9, CommitIndex: 9},
		states: []*api.NodeState{
			{NodeId: "m1aaaaaaaaaaaaaaaaaaaaaaa", Liveness: api.Liveness_LIVENESS_READY, Leader: true, Reachable: true, Raft: "voter", LockState: "sealed"},
			{NodeId: "w1bbbbbbbbbbbbbbbbbbbbbbb", Liveness: api.Liveness_LIVENESS_READY, SessionManager: "m1aaaaaaaaaaaaaaaaaaaaaaa"},
		},
	}
	f.add(&api.Object{Of: &api.Object_Node{Node: &api.Node{Id: "m1aaaaaaaaaaaaaaaaaaaaaaa", Meta: meta(ns), Hostname: "m1", Role: api.Role_ROLE_MANAGER, DesiredRole: api.Role_ROLE_MANAGER,
		Zone: "default", Availability: api.Availability_AVAILABILITY_DRAIN, Address: "192.0.2.1:2377", Description: &api.NodeDescription{Version: "1.0.0"}}}})
	f.add(&api.Object{Of: &api.Object_Node{Node: &api.Node{Id: "w1bbbbbbbbbbbbbbbbbbbbbbb", Meta: meta(ns), Hostname: "w1", Role: api.Role_ROLE_WORKER, DesiredRole: api.Role_ROLE_WORKER,
		Zone: "pci", Availability: api.Availability_AVAILABILITY_ACTIVE, Ip: "192.0.2.2", Labels: map[string]string{"disk": "ssd"}, Description: &api.NodeDescription{Version: "1.0.0"}}}})
	f.status.Nodes = f.states
	f.add(&api.Object{Of: &api.Object_Cluster{Cluster: &api.Cluster{Id: "cluster00000000000000000", Meta: meta(ns), RootCert: []byte("DER of the root"), IssuingGeneration: 1,
		LockGeneration: 1, DekGeneration: 1}}})
	f.add(&api.Object{Of: &api.Object_Zone{Zone: &api.Zone{Id: "z1ccccccccccccccccccccccc", Meta: meta(ns), Name: "default"}}})
	return f
}

func meta(ns int64) *api.Meta { return &api.Meta{Version: 1, Index: 7, CreatedNs: ns, UpdatedNs: ns} }

func (f *fake) add(o *api.Object) { f.objects = append(f.objects, o) }

// key returns kind, ID and name of an object.
func key(o *api.Object) (api.Kind, string, string) {
	switch of := o.GetOf().(type) {
	case *api.Object_Cluster:
		return api.Kind_KIND_CLUSTER, of.Cluster.GetId(), ""
	case *api.Object_Node:
		return api.Kind_KIND_NODE, of.Node.GetId(), of.Node.GetHostname()
	case *api.Object_Zone:
		return api.Kind_KIND_ZONE, of.Zone.GetId(), of.Zone.GetName()
	case *api.Object_Service:
		return api.Kind_KIND_SERVICE, of.Service.GetId(), of.Service.GetSpec().GetName()
	case *api.Object_Task:
		return api.Kind_KIND_TASK, of.Task.GetId(), ""
	case *api.Object_Secret:
		return api.Kind_KIND_SECRET, of.Secret.GetId(), of.Secret.GetName()
	case *api.Object_Token:
		return api.Kind_KIND_TOKEN, of.Token.GetId(), ""
	}
	return 0, "", ""
}

// find returns the index of the object that a reference names.
func (f *fake) find(kind api.Kind, ref string) (int, error) {
	i := slices.IndexFunc(f.objects, func(o *api.Object) bool {
		k, id, name := key(o)
		return k == kind && (name == ref || strings.HasPrefix(id, ref))
	})
	if i < 0 {
		return 0, api.Error(warden.Hint(warden.Errorf(warden.CodeNotFound, "looking up", "no object %q", ref), "list what there is"))
	}
	return i, nil
}

func (f *fake) newID(letter string) string {
	f.serial++
	return warden.Base36([]byte{byte(f.serial)}, 2) + strings.Repeat(letter, warden.IDLength-2)
}

func (f *fake) change(id string) *api.ChangeReply {
	return &api.ChangeReply{Id: id, Version: 1, Index: 8, SilentManagers: f.silent}
}

func (f *fake) List(_ context.Context, r *api.ListRequest) (*api.ListReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	reply := &api.ListReply{Index: 9}
	if len(r.GetReferences()) == 0 {
		for _, o := range f.objects {
			if k, _, _ := key(o); k == r.GetKind() {
				reply.Objects = append(reply.Objects, o)
			}
		}
	}
	for _, ref := range r.GetReferences() {
		i, err := f.find(r.GetKind(), ref)
		if err != nil {
			return nil, err
		}
		reply.Objects = append(reply.Objects, f.objects[i])
	}
	if r.GetKind() == api.Kind_KIND_NODE {
		reply.Nodes = f.states
	}
	for _, s := range pick(reply, (*api.Object).GetSecret) {
		for _, u := range f.uses {
			if u.GetSecretId() == s.GetId() {
				reply.Uses = append(reply.Uses, u)
			}
		}
	}
	return reply, nil
}

func (f *fake) remove(kind api.Kind, ref string) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, err := f.find(kind, ref)
	if err != nil {
		return nil, err
	}
	_, id, _ := key(f.objects[i])
	f.objects = slices.Delete(f.objects, i, i+1)
	return f.change(id), nil
}

func (f *fake) CreateZone(_ context.Context, r *api.CreateZoneRequest) (*api.ChangeReply, error) {
	if err := warden.CheckName("zone", r.GetName()); err != nil {
		return nil, api.Error(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.newID("z")
	f.add(&api.Object{Of: &api.Object_Zone{Zone: &api.Zone{Id: id, Meta: meta(time.Now().UnixNano()), Name: r.GetName()}}})
	return f.change(id), nil
}

func (f *fake) RemoveZone(_ context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	if r.GetReference() == "default" {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeInUse, "removing zone default", "nodes use it: m1"), "move them first"))
	}
	return f.remove(api.Kind_KIND_ZONE, r.GetReference())
}

func (f *fake) CreateSecret(_ context.Context, r *api.CreateSecretRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.newID("s")
	f.add(&api.Object{Of: &api.Object_Secret{Secret: &api.Secret{Id: id, Meta: meta(time.Now().UnixNano()), Name: r.GetName(), Labels: r.GetLabels(), Zones: r.GetZones(), CurrentVersion: 1}}})
	f.uses = append(f.uses, &api.SecretUse{SecretId: id, Version: 1, SizeBytes: uint64(len(r.GetData())), Current: true, CreatedNs: time.Now().UnixNano()})
	return f.change(id), nil
}

// followers returns the names of services that have the secret without a version.
func (f *fake) followers(name string) (names []string) {
	for _, o := range f.objects {
		if slices.ContainsFunc(o.GetService().GetSpec().GetTask().GetSecrets(), func(r *api.SecretReference) bool { return r.GetSecretName() == name && r.GetVersion() == 0 }) {
			names = append(names, o.GetService().GetSpec().GetName())
		}
	}
	return names
}

func (f *fake) RotateSecret(_ context.Context, r *api.RotateSecretRequest) (*api.RotateSecretReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, err := f.find(api.Kind_KIND_SECRET, r.GetReference())
	if err != nil {
		return nil, err
	}
	s := api.Clone(f.objects[i].GetSecret())
	if s.GetName() == "stuck" {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeTooLarge, "rotating secret "+s.GetName(), "it has 100 versions"), "remove some"))
	}
	s.CurrentVersion++
	f.objects[i] = &api.Object{Of: &api.Object_Secret{Secret: s}}
	f.rotates = append(f.rotates, s.GetName()+" "+string(r.GetData()))
	for _, u := range f.uses {
		if u.GetSecretId() == s.GetId() {
			u.Current = false
		}
	}
	f.uses = append(f.uses, &api.SecretUse{SecretId: s.GetId(), Version: s.GetCurrentVersion(), SizeBytes: uint64(len(r.GetData())), Current: true, Services: f.followers(s.GetName())})
	return &api.RotateSecretReply{Id: s.GetId(), Version: s.GetCurrentVersion(), Services: f.followers(s.GetName())}, nil
}

func (f *fake) RemoveSecret(_ context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	return f.remove(api.Kind_KIND_SECRET, r.GetReference())
}

func (f *fake) CreateService(_ context.Context, r *api.CreateServiceRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id, spec, now := f.newID("v"), r.GetSpec(), time.Now().UnixNano()
	for _, r := range spec.GetTask().GetSecrets() { // as a manager does
		if r.Target == "" {
			r.Target = r.GetSecretName()
		}
		if i, err := f.find(api.Kind_KIND_SECRET, r.GetSecretName()); err == nil {
			r.SecretId = f.objects[i].GetSecret().GetId()
		}
	}
	f.add(&api.Object{Of: &api.Object_Service{Service: &api.Service{Id: id, Meta: meta(now), Spec: spec}}})
	for slot := uint64(1); slot <= spec.GetReplicas(); slot++ {
		task := &api.Task{Id: f.newID("t"), Meta: meta(now), ServiceId: id, ServiceName: spec.GetName(), Slot: slot, DesiredState: api.TaskState_TASK_RUNNING, Spec: spec.GetTask(),
			NodeId: "w1bbbbbbbbbbbbbbbbbbbbbbb", Status: &api.TaskStatus{State: api.TaskState_TASK_RUNNING, TimeNs: now}}
		if zone := spec.GetTask().GetZone(); zone != "pci" {
			task.NodeId = ""
			task.Status = &api.TaskStatus{State: api.TaskState_TASK_PENDING, TimeNs: now, Message: `no suitable node (1 node not in zone "` + zone + `")`}
		}
		f.add(&api.Object{Of: &api.Object_Task{Task: task}})
	}
	return f.change(id), nil
}

func (f *fake) UpdateService(_ context.Context, r *api.UpdateServiceRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, err := f.find(api.Kind_KIND_SERVICE, r.GetReference())
	if err != nil {
		return nil, err
	}
	s := api.Clone(f.objects[i].GetService())
	if f.races > 0 {
		f.races--
		s.Meta.Version++
		f.objects[i] = &api.Object{Of: &api.Object_Service{Service: s}}
	}
	if s.GetMeta().GetVersion() != r.GetVersion() {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeConflict, "updating service "+r.GetReference(), "it was changed meanwhile"), "read it again"))
	}
	if r.GetSpec().GetTask().GetZone() == "dmz" {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeNotFound, "updating service "+r.GetReference(), `no zone is named "dmz"`), "declare it first"))
	}
	if !proto.Equal(s.GetSpec(), r.GetSpec()) {
		s.Meta.Version++
	}
	s.Spec = r.GetSpec()
	f.objects[i] = &api.Object{Of: &api.Object_Service{Service: s}}
	return &api.ChangeReply{Id: s.GetId(), Version: s.GetMeta().GetVersion(), Index: 8}, nil
}

func (f *fake) ScaleService(_ context.Context, r *api.ScaleServiceRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, err := f.find(api.Kind_KIND_SERVICE, r.GetReference())
	if err != nil {
		return nil, err
	}
	s := api.Clone(f.objects[i].GetService())
	s.Spec.Replicas = r.GetReplicas()
	f.objects[i] = &api.Object{Of: &api.Object_Service{Service: s}}
	return f.change(s.GetId()), nil
}

func (f *fake) RemoveService(_ context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	return f.remove(api.Kind_KIND_SERVICE, r.GetReference())
}

func (f *fake) UpdateNode(_ context.Context, r *api.UpdateNodeRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, err := f.find(api.Kind_KIND_NODE, r.GetReference())
	if err != nil {
		return nil, err
	}
	n := api.Clone(f.objects[i].GetNode())
	if r.GetRole() != 0 {
		n.Role, n.DesiredRole = r.GetRole(), r.GetRole()
	}
	if r.GetAvailability() != 0 {
		n.Availability = r.GetAvailability()
	}
	if n.Labels == nil {
		n.Labels = map[string]string{}
	}
	for k, v := range r.GetLabelsAdd() {
		n.Labels[k] = v
	}
	for _, k := range r.GetLabelsRemove() {
		delete(n.Labels, k)
	}
	f.objects[i] = &api.Object{Of: &api.Object_Node{Node: n}}
	return f.change(n.GetId()), nil
}

func (f *fake) RemoveNode(_ context.Context, r *api.RemoveNodeRequest) (*api.RemoveNodeReply, error) {
	if !r.GetForce() {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeInUse, "removing node "+r.GetReference(), "it is not down"), "stop it, or use --force"))
	}
	change, err := f.remove(api.Kind_KIND_NODE, r.GetReference())
	if err != nil {
		return nil, err
	}
	reply := &api.RemoveNodeReply{Id: change.GetId(), Hostname: "w1", Role: api.Role_ROLE_WORKER, SilentManagers: f.silent}
	if r.GetCompromised() {
		at := time.Date(2026, 3, 1, 10, 0, 0, 0, time.UTC).UnixNano()
		reply.Exposures = []*api.Exposure{{SecretName: "db-password", Version: 2, FirstNs: at, LastNs: at + int64(time.Hour)}}
		for _, u := range f.uses { // whatever is current, and of "old" the first version alone
			i, err := f.find(api.Kind_KIND_SECRET, u.GetSecretId())
			if err != nil {
				return nil, err
			}
			name := f.objects[i].GetSecret().GetName()
			if name == "old" && u.GetVersion() == 1 || name != "old" && name != "elsewhere" && u.GetCurrent() {
				reply.Exposures = append(reply.Exposures, &api.Exposure{SecretId: u.GetSecretId(), SecretName: name, Version: u.GetVersion(), FirstNs: at, LastNs: at})
			}
		}
		reply.Done, reply.Todo = []string{"its connections were cut"}, []string{"give secret db-password a new value"}
	}
	return reply, nil
}

func (f *fake) UpdateCluster(_ context.Context, r *api.UpdateClusterRequest) (*api.ChangeReply, error) {
	if r.GetLeafTtlNs() > int64(warden.LeafTTLMax) {
		return nil, api.Error(warden.Errorf(warden.CodeInvalid, "changing the cluster", "the life of certificates is over %s", warden.LeafTTLMax))
	}
	if r.Autolock == nil {
		return f.change("cluster"), nil
	}
	if !r.GetAutolock() {
		return f.relock(nil)
	}
	return f.relock(r.GetUnlockRecipient())
}

func (f *fake) RotateUnlockKey(_ context.Context, r *api.RotateUnlockKeyRequest) (*api.ChangeReply, error) {
	return f.relock(r.GetUnlockRecipient())
}

// relock makes the recipient the cluster's, and that of every manager but those that are unreachable. What it answers, refuse and lose
// may replace: a refusal for sure, and an answer that is lost before or after the change.
func (f *fake) relock(recipient []byte) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return nil, api.Error(f.refuse)
	}
	c := f.cluster()
	c.Autolock, c.UnlockKeyId = len(recipient) > 0, ""
	if c.Autolock {
		to, err := autolock.ParseRecipient(recipient)
		if err != nil {
			return nil, api.Error(err)
		}
		c.UnlockKeyId = to.KeyID()
		c.DekGeneration++
	}
	if f.lose != nil && !f.made {
		c.UnlockKeyId = "key0000001"
		return nil, api.Error(f.lose)
	}
	f.follow()
	if f.lose != nil {
		return nil, api.Error(f.lose)
	}
	return f.change("cluster"), nil
}

func (f *fake) cluster() *api.Cluster {
	for _, o := range f.objects {
		if c := o.GetCluster(); c != nil {
			return c
		}
	}
	return nil
}

// lock turns autolock on under the key with this ID.
func (f *fake) lock(id string) {
	c := f.cluster()
	c.Autolock, c.UnlockKeyId = true, id
	f.follow()
}

// follow has the managers that are reachable do what the cluster says.
func (f *fake) follow() {
	for _, s := range f.states {
		if s.Reachable {
			s.LockState, s.UnlockKeyId, s.DekGeneration = "unlocked", f.cluster().UnlockKeyId, f.cluster().DekGeneration
			for _, o := range f.objects {
				if n := o.GetNode(); n.GetId() == s.NodeId {
					n.LeafDekGeneration = s.DekGeneration
				}
			}
		}
	}
}

func (f *fake) RotateDEK(context.Context, *api.RotateDEKRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cluster().DekGeneration++
	f.follow()
	return f.change("cluster"), nil
}

func (f *fake) RotateIssuing(context.Context, *api.RotateIssuingRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cluster().IssuingGeneration++
	return f.change("cluster"), nil
}

func (f *fake) CreateToken(_ context.Context, r *api.CreateTokenRequest) (*api.CreateTokenReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	expires := time.Now().Add(time.Hour).UnixNano()
	f.add(&api.Object{Of: &api.Object_Token{Token: &api.Token{Id: "tok000000001", Meta: meta(time.Now().UnixNano()), Role: r.GetRole(), Zone: r.GetZone(), Hostname: r.GetHostname(),
		Cidr: r.GetCidr(), ExpiresNs: expires, UsesMax: r.GetUsesMax(), Key: []byte("CANARY")}}})
	return &api.CreateTokenReply{Id: "tok000000001", Token: fakeToken, ExpiresNs: expires, Revoked: 2, Addresses: []string{"192.0.2.1:2377"}}, nil
}

func (f *fake) RevokeToken(_ context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	return f.remove(api.Kind_KIND_TOKEN, r.GetReference())
}

func (f *fake) Status(context.Context, *api.StatusRequest) (*api.StatusReply, error) {
	return f.status, nil
}

func (f *fake) Logs(_ *api.ControlLogsRequest, stream grpc.ServerStreamingServer[api.LogChunk]) error {
	for _, chunk := range f.chunks {
		if err := stream.Send(chunk); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) Events(r *api.EventsRequest, stream grpc.ServerStreamingServer[api.Event]) error {
	for _, e := range f.events {
		if len(r.GetKinds()) > 0 && !slices.Contains(r.GetKinds(), e.GetKind()) {
			continue
		}
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) Init(_ context.Context, r *api.InitRequest) (*api.InitReply, error) {
	if f.info.GetState() != "uninitialized" {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeInitialized, "starting a cluster", "this daemon belongs to one already"), "leave it first"))
	}
	if r.GetAutolock() && (r.GetLeafTtlNs() != int64(90*24*time.Hour) || r.GetAvailability() != api.Availability_AVAILABILITY_ACTIVE) {
		return nil, api.Error(warden.Errorf(warden.CodeInvalid, "starting a cluster", "the story asks for other settings"))
	}
	reply := &api.InitReply{ClusterId: "cluster", NodeId: "m1aaaaaaaaaaaaaaaaaaaaaaa"}
	if r.GetAutolock() {
		if len(r.GetUnlockRecipient()) != 32 {
			return nil, api.Error(warden.Errorf(warden.CodeInvalid, "starting a cluster", "the unlock recipient has %d bytes", len(r.GetUnlockRecipient())))
		}
		reply.UnlockKeyId = "key0000001"
	}
	return reply, nil
}

func (f *fake) Join(_ context.Context, r *api.LocalJoinRequest) (*api.LocalJoinReply, error) {
	if r.GetToken() != fakeToken {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeInvalid, "joining", "malformed join token"), "copy the whole token"))
	}
	if want := []string{"192.0.2.1:2377", "192.0.2.2:9000"}; !slices.Equal(r.GetAddresses(), want) {
		return nil, api.Error(warden.Errorf(warden.CodeInvalid, "joining", "got addresses %q, want %q", r.GetAddresses(), want))
	}
	return &api.LocalJoinReply{NodeId: "w2ddddddddddddddddddddddd", Role: api.Role_ROLE_WORKER, Zone: "pci"}, nil
}

func (f *fake) Leave(_ context.Context, r *api.LeaveRequest) (*api.LeaveReply, error) {
	if !r.GetForce() {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeNoQuorum, "leaving", "this is a manager"), "use --force"))
	}
	return &api.LeaveReply{Warnings: []string{"the cluster is gone"}}, nil
}

func (f *fake) Unlock(_ context.Context, r *api.UnlockRequest) (*api.UnlockReply, error) {
	right := false
	if key, err := fakeInbox.Open(r.GetSealedKey()); err == nil {
		_ = key.Use(func(b []byte) error { right = string(b) == fakeUnlockKey; return nil })
	}
	if !right {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeWrongUnlock, "unlocking", "this key does not open this manager"), "it needs key0000001"))
	}
	return &api.UnlockReply{NodeId: "m1aaaaaaaaaaaaaaaaaaaaaaa"}, nil
}

// fakeInbox is where the fake's unlock key goes.
var fakeInbox, _ = courier.NewInbox()

func (f *fake) Info(context.Context, *api.InfoRequest) (*api.InfoReply, error) {
	info := api.Clone(f.info)
	info.UnlockInbox = fakeInbox.Public()
	return info, nil
}
