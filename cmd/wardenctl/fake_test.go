package main

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
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
	serial  int
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
	f.add(&api.Object{Of: &api.Object_Zone{Zone: &api.Zone{Id: "z1ccccccccccccccccccccccc", Meta: meta(ns), Name: "default"}}})
	return f
}

func meta(ns int64) *api.Meta { return &api.Meta{Version: 1, Index: 7, CreatedNs: ns, UpdatedNs: ns} }

func (f *fake) add(o *api.Object) { f.objects = append(f.objects, o) }

// key returns kind, ID and name of an object.
func key(o *api.Object) (api.Kind, string, string) {
	switch of := o.GetOf().(type) {
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
	f.add(&api.Object{Of: &api.Object_Secret{Secret: &api.Secret{Id: id, Meta: meta(time.Now().UnixNano()), Name: r.GetName(), Labels: r.GetLabels(), Zones: r.GetZones(),
		CurrentVersion: uint64(len(r.GetData()))}}}) // the fake shows the size that arrived
	return f.change(id), nil
}

func (f *fake) RemoveSecret(_ context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	return f.remove(api.Kind_KIND_SECRET, r.GetReference())
}

func (f *fake) CreateService(_ context.Context, r *api.CreateServiceRequest) (*api.ChangeReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id, spec, now := f.newID("v"), r.GetSpec(), time.Now().UnixNano()
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
		reply.Done, reply.Todo = []string{"its connections were cut"}, []string{"give secret db-password a new value"}
	}
	return reply, nil
}

func (f *fake) UpdateCluster(_ context.Context, r *api.UpdateClusterRequest) (*api.ChangeReply, error) {
	if r.GetLeafTtlNs() > int64(warden.LeafTTLMax) {
		return nil, api.Error(warden.Errorf(warden.CodeInvalid, "changing the cluster", "the life of certificates is over %s", warden.LeafTTLMax))
	}
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
		var err error
		if reply.SealedUnlockKey, err = courier.Seal(r.GetInbox(), []byte(fakeUnlockKey)); err != nil {
			return nil, api.Error(err)
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
