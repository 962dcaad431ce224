package control_test

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/control"
	"warden/store"
	"warden/store/storetest"
)

func many(n int, of string) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf(of, i))
	}
	return out
}

func labels(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprint(i)] = ""
	}
	return m
}

func spec(change func(*api.ServiceSpec)) *api.CreateServiceRequest {
	s := &api.ServiceSpec{Name: "new", Replicas: 1, Task: &api.TaskSpec{Image: "host"}}
	change(s)
	return &api.CreateServiceRequest{Spec: s}
}

func task(change func(*api.TaskSpec)) *api.CreateServiceRequest {
	return spec(func(s *api.ServiceSpec) { change(s.Task) })
}

func secretRefs(refs ...*api.SecretReference) *api.CreateServiceRequest {
	return task(func(t *api.TaskSpec) { t.Secrets = refs })
}

func TestRefusals(t *testing.T) {
	up, down, leaving := worker("up"), worker("down"), worker("leaving")
	leaving.Role = api.Role_ROLE_MANAGER // its demotion is going on
	db, card := storetest.Secret("db"), storetest.Secret("card", "pci")
	web := storetest.Service("web", "default", storetest.Reference(db))
	card1, db1 := storetest.SecretVersion(card, 1), storetest.SecretVersion(db, 1)
	token := storetest.Token(api.Role_ROLE_WORKER)
	gone := &api.Tombstone{Id: warden.NewID(), Hostname: "gone", Role: api.Role_ROLE_WORKER, RemovedNs: 1e18}
	twin1, twin2 := worker("twin"), worker("twin")
	var big []store.Record
	var bigRefs []*api.SecretReference
	for i := range 9 {
		s := storetest.Secret(fmt.Sprintf("big%d", i))
		v := storetest.SecretVersion(s, 1)
		v.SizeBytes = warden.SecretBytesMax
		big, bigRefs = append(big, s, v), append(bigRefs, &api.SecretReference{SecretName: s.Name})
	}
	w := newWorld(t, append(big, up, down, leaving, db, card, db1, card1, web, token, gone, twin1, twin2)...)
	w.cluster.liveness[up.Id] = api.Liveness_LIVENESS_READY
	w.cluster.liveness[down.Id] = api.Liveness_LIVENESS_DOWN
	noQuorum := warden.Hint(warden.Errorf(warden.CodeNoQuorum, "", "it is the only one"), "promote first")

	update := func(ref string, version uint64, change func(*api.ServiceSpec)) *api.UpdateServiceRequest {
		s := api.Clone(web.Spec)
		s.Task.Secrets[0].SecretId = "" // the name counts
		change(s)
		return &api.UpdateServiceRequest{Reference: ref, Version: version, Spec: s}
	}
	type row struct {
		method string
		req    proto.Message
		code   warden.Code
		text   string // in the error or its hint
		stays  error
	}
	ref := func(s string) *api.ReferenceRequest { return &api.ReferenceRequest{Reference: s} }
	node := func(s string) *api.UpdateNodeRequest { return &api.UpdateNodeRequest{Reference: s} }
	on := true
	rows := []row{
		{method: "List", req: &api.ListRequest{}, code: warden.CodeInvalid, text: "unknown kind"},
		{method: "List", req: &api.ListRequest{Kind: 99}, code: warden.CodeInvalid, text: "unknown kind 99"},
		{method: "List", req: &api.ListRequest{Kind: api.Kind_KIND_NODE, References: []string{"nobody"}}, code: warden.CodeNotFound, text: "nobody"},
		{method: "List", req: &api.ListRequest{Kind: api.Kind_KIND_NODE, References: []string{"twin"}}, code: warden.CodeAmbiguous, text: "more characters"},
		{method: "List", req: &api.ListRequest{Kind: api.Kind_KIND_EXPOSURE, References: []string{"nobody"}}, code: warden.CodeNotFound},
		{method: "List", req: &api.ListRequest{Kind: api.Kind_KIND_SECRET_VERSION, References: []string{"nobody"}}, code: warden.CodeNotFound},
		{method: "List", req: &api.ListRequest{Kind: api.Kind_KIND_NODE, References: many(1001, "n%d")}, code: warden.CodeTooLarge},

		{method: "UpdateCluster", req: &api.UpdateClusterRequest{LeafTtlNs: int64(warden.LeafTTLMin) - 1}, code: warden.CodeInvalid, text: "give one from"},
		{method: "UpdateCluster", req: &api.UpdateClusterRequest{LeafTtlNs: int64(warden.LeafTTLMax) + 1}, code: warden.CodeInvalid, text: "out of range"},
		{method: "UpdateCluster", req: &api.UpdateClusterRequest{LeafTtlNs: -1}, code: warden.CodeInvalid},
		{method: "UpdateCluster", req: &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: make([]byte, 32)}, code: warden.CodeInvalid, text: "low order"},
		{method: "RotateUnlockKey", req: &api.RotateUnlockKeyRequest{UnlockRecipient: recipient(t)}, code: warden.CodeInvalid, text: "--autolock=true"},
		{method: "RotateUnlockKey", req: &api.RotateUnlockKeyRequest{}, code: warden.CodeInvalid, text: "0 bytes"},
		{method: "RotateIssuing", req: &api.RotateIssuingRequest{}, stays: warden.Errorf(warden.CodeTooLarge, "", "no room"), code: warden.CodeTooLarge, text: "no room"},

		{method: "CreateToken", req: &api.CreateTokenRequest{}, code: warden.CodeInvalid, text: "neither worker nor manager"},
		{method: "CreateToken", req: &api.CreateTokenRequest{Role: 7}, code: warden.CodeInvalid},
		{method: "CreateToken", req: &api.CreateTokenRequest{Role: 1, TtlNs: 1}, code: warden.CodeInvalid, text: "give one from"},
		{method: "CreateToken", req: &api.CreateTokenRequest{Role: 1, TtlNs: int64(warden.TokenTTLMax) + 1}, code: warden.CodeInvalid},
		{method: "CreateToken", req: &api.CreateTokenRequest{Role: 2, Zone: "pcl"}, code: warden.CodeNotFound, text: "zone create"},
		{method: "CreateToken", req: &api.CreateTokenRequest{Role: 1, Cidr: "10.0.0.1/8"}, code: warden.CodeInvalid, text: "10.1.0.0/16"},
		{method: "CreateToken", req: &api.CreateTokenRequest{Role: 1, Hostname: strings.Repeat("h", 254)}, code: warden.CodeInvalid},
		{method: "CreateToken", req: &api.CreateTokenRequest{Role: 1, Hostname: "a b"}, code: warden.CodeInvalid},
		{method: "RevokeToken", req: ref("nobody"), code: warden.CodeNotFound},

		{method: "UpdateNode", req: node("nobody"), code: warden.CodeNotFound},
		{method: "UpdateNode", req: node(""), code: warden.CodeInvalid},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "up", Availability: 9}, code: warden.CodeInvalid, text: "availability"},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "up", Role: 9}, code: warden.CodeInvalid, text: "role"},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "up", Zone: "pcl"}, code: warden.CodeNotFound, text: "zone ls"},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "up", LabelsAdd: labels(warden.LabelsMax + 1)}, code: warden.CodeTooLarge},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "up", LabelsAdd: map[string]string{"": "x"}}, code: warden.CodeInvalid},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "up", LabelsAdd: map[string]string{"k": strings.Repeat("v", 513)}}, code: warden.CodeInvalid},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "down", Role: api.Role_ROLE_MANAGER}, code: warden.CodeNoQuorum, text: "bring it up"},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: "leaving", Role: api.Role_ROLE_MANAGER}, code: warden.CodeConflict, text: "few seconds"},
		{method: "UpdateNode", req: &api.UpdateNodeRequest{Reference: w.self, Role: api.Role_ROLE_WORKER}, stays: noQuorum, code: warden.CodeNoQuorum, text: "promote first"},

		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: "nobody"}, code: warden.CodeNotFound},
		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: "twin"}, code: warden.CodeAmbiguous},
		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: gone.Id}, code: warden.CodeNotFound, text: "removed at 2001-09-09T01:46:40Z"},
		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: "up"}, code: warden.CodeInUse, text: "--force"},
		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: "twin", Force: true}, code: warden.CodeAmbiguous},
		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: w.self}, code: warden.CodeInUse, text: "node demote"},
		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: w.self, Force: true}, stays: noQuorum, code: warden.CodeNoQuorum, text: "promote first"},
		{method: "RemoveNode", req: &api.RemoveNodeRequest{Reference: w.self, Compromised: true}, stays: noQuorum, code: warden.CodeNoQuorum},

		{method: "CreateZone", req: &api.CreateZoneRequest{Name: "PCI"}, code: warden.CodeInvalid, text: "a-z"},
		{method: "CreateZone", req: &api.CreateZoneRequest{}, code: warden.CodeInvalid},
		{method: "CreateZone", req: &api.CreateZoneRequest{Name: "pci"}, code: warden.CodeExists, text: "another name"},
		{method: "RemoveZone", req: ref("nobody"), code: warden.CodeNotFound},
		{method: "RemoveZone", req: ref("default"), code: warden.CodeDenied},
		{method: "RemoveZone", req: ref("pci"), code: warden.CodeInUse, text: "secret card"},

		{method: "CreateService", req: &api.CreateServiceRequest{}, code: warden.CodeInvalid, text: "spec"},
		{method: "CreateService", req: &api.CreateServiceRequest{Spec: &api.ServiceSpec{Name: "new"}}, code: warden.CodeInvalid},
		{method: "CreateService", req: spec(func(s *api.ServiceSpec) { s.Name = "No" }), code: warden.CodeInvalid},
		{method: "CreateService", req: spec(func(s *api.ServiceSpec) { s.Name = "web" }), code: warden.CodeExists, text: "another name"},
		{method: "CreateService", req: spec(func(s *api.ServiceSpec) { s.Replicas = warden.ReplicasMax + 1 }), code: warden.CodeTooLarge},
		{method: "CreateService", req: spec(func(s *api.ServiceSpec) { s.Labels = labels(65) }), code: warden.CodeTooLarge},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Labels = labels(65) }), code: warden.CodeTooLarge},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Image = "" }), code: warden.CodeInvalid, text: "image"},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Image = strings.Repeat("i", 257) }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Command = many(257, "%d") }), code: warden.CodeInvalid, text: "words"},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Command = []string{strings.Repeat("c", 64<<10+1)} }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Env = many(257, "A%d=1") }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Env = []string{"A"} }), code: warden.CodeInvalid, text: "KEY=VALUE"},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Env = []string{"1A=x"} }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Env = []string{"A=\x00"} }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Env = []string{"A=" + strings.Repeat("v", 32<<10)} }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Constraints = []string{"node.role"} }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Constraints = many(33, "node.labels.a%d==1") }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Zone = "pcl" }), code: warden.CodeNotFound, text: "zone create"},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Resources = &api.Resources{LimitNanoCpus: -1} }), code: warden.CodeInvalid, text: "negative"},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Resources = &api.Resources{ReserveMemoryBytes: 2, LimitMemoryBytes: 1} }), code: warden.CodeInvalid, text: "below"},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Resources = &api.Resources{ReserveNanoCpus: math.MaxInt64} }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.Restart = 9 }), code: warden.CodeInvalid, text: "restart"},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.RestartDelayNs = -1 }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.RestartDelayNs = int64(warden.RestartDelayMax) + 1 }), code: warden.CodeInvalid},
		{method: "CreateService", req: task(func(s *api.TaskSpec) { s.StopGraceNs = int64(warden.StopGraceMax) + 1 }), code: warden.CodeInvalid},
		{method: "CreateService", req: secretRefs(&api.SecretReference{SecretName: "nothing"}), code: warden.CodeNotFound, text: "nothing"},
		{method: "CreateService", req: secretRefs(&api.SecretReference{SecretName: "card"}), code: warden.CodeWrongZone, text: "for zone default, the secret for pci"},
		{method: "CreateService", req: secretRefs(&api.SecretReference{SecretName: "db", Version: 2}), code: warden.CodeNotFound, text: "no version 2"},
		{method: "CreateService", req: secretRefs(&api.SecretReference{SecretName: "db", Target: "../x"}), code: warden.CodeInvalid, text: "file name"},
		{method: "CreateService", req: secretRefs(&api.SecretReference{SecretName: "db", Target: "a\x1b"}), code: warden.CodeInvalid},
		{method: "CreateService", req: secretRefs(&api.SecretReference{SecretName: "db", Mode: 0o4755}), code: warden.CodeInvalid, text: "0777"},
		{method: "CreateService", req: secretRefs(&api.SecretReference{SecretName: "db"}, &api.SecretReference{SecretId: db.Id}), code: warden.CodeInvalid, text: "two secrets"},
		{method: "CreateService", req: secretRefs(make([]*api.SecretReference, 65)...), code: warden.CodeInvalid, text: "at most 64"},
		{method: "CreateService", req: secretRefs(bigRefs...), code: warden.CodeInvalid, text: "together"},
		{method: "CreateService", req: spec(func(s *api.ServiceSpec) { s.Update = &api.UpdatePolicy{Parallelism: warden.ReplicasMax + 1} }), code: warden.CodeTooLarge, text: "at once"},
		{method: "CreateService", req: spec(func(s *api.ServiceSpec) { s.Update = &api.UpdatePolicy{DelayNs: -1} }), code: warden.CodeInvalid, text: "delay"},
		{method: "CreateService", req: spec(func(s *api.ServiceSpec) { s.Update = &api.UpdatePolicy{DelayNs: int64(warden.UpdateDelayMax) + 1} }), code: warden.CodeInvalid, text: "24h"},

		{method: "UpdateService", req: &api.UpdateServiceRequest{Reference: "web", Version: 1}, code: warden.CodeInvalid, text: "spec is missing"},
		{method: "UpdateService", req: update("nobody", 1, func(*api.ServiceSpec) {}), code: warden.CodeNotFound},
		{method: "UpdateService", req: update("web", 2, func(*api.ServiceSpec) {}), code: warden.CodeConflict, text: "read it again"},
		{method: "UpdateService", req: update("web", 0, func(*api.ServiceSpec) {}), code: warden.CodeConflict},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Name = "other" }), code: warden.CodeInvalid, text: "never changes"},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Replicas = warden.ReplicasMax + 1 }), code: warden.CodeTooLarge},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Task.Image = "" }), code: warden.CodeInvalid, text: "image"},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Task.Zone = "pcl" }), code: warden.CodeNotFound, text: "zone create"},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Task.Constraints = []string{"node.role"} }), code: warden.CodeInvalid},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Task.Secrets[0].SecretName = "card" }), code: warden.CodeWrongZone, text: "for zone default"},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Task.Secrets[0].Version = 7 }), code: warden.CodeNotFound, text: "no version 7"},
		{method: "UpdateService", req: update("web", 1, func(s *api.ServiceSpec) { s.Update = &api.UpdatePolicy{DelayNs: -1} }), code: warden.CodeInvalid, text: "delay"},
		{method: "ScaleService", req: &api.ScaleServiceRequest{Reference: "web", Replicas: warden.ReplicasMax + 1}, code: warden.CodeTooLarge},
		{method: "ScaleService", req: &api.ScaleServiceRequest{Reference: "nobody"}, code: warden.CodeNotFound},
		{method: "RemoveService", req: ref("nobody"), code: warden.CodeNotFound},

		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "new"}, code: warden.CodeInvalid, text: "empty"},
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "NEW", Data: []byte("x")}, code: warden.CodeInvalid},
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "db", Data: []byte("x")}, code: warden.CodeExists, text: "another name"},
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "new", Data: make([]byte, warden.SecretBytesMax+1)}, code: warden.CodeTooLarge},
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "new", Data: []byte("x"), Zones: []string{"pcl"}}, code: warden.CodeNotFound, text: "zone create"},
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "new", Data: []byte("x"), Zones: many(257, "z%d")}, code: warden.CodeTooLarge},
		{method: "CreateSecret", req: &api.CreateSecretRequest{Name: "new", Data: []byte("x"), Labels: labels(65)}, code: warden.CodeTooLarge},
		{method: "RotateSecret", req: &api.RotateSecretRequest{Reference: "nobody", Data: []byte("x")}, code: warden.CodeNotFound},
		{method: "RotateSecret", req: &api.RotateSecretRequest{Reference: "db"}, code: warden.CodeInvalid, text: "empty"},
		{method: "RotateSecret", req: &api.RotateSecretRequest{Reference: "db", Data: make([]byte, warden.SecretBytesMax+1)}, code: warden.CodeTooLarge, text: "512000"},
		{method: "RemoveSecret", req: ref("db@1"), code: warden.CodeInUse, text: "current"},
		{method: "RemoveSecret", req: ref("db@2"), code: warden.CodeNotFound, text: "no version 2"},
		{method: "RemoveSecret", req: ref("nobody@1"), code: warden.CodeNotFound, text: "nobody"},
		{method: "RemoveSecret", req: ref("db@0"), code: warden.CodeInvalid, text: "NAME@VERSION"},
		{method: "RemoveSecret", req: ref("db@01"), code: warden.CodeInvalid},
		{method: "RemoveSecret", req: ref("db@"), code: warden.CodeInvalid},
		{method: "RemoveSecret", req: ref("db@1@2"), code: warden.CodeInvalid},
		{method: "RemoveSecret", req: ref("db"), code: warden.CodeInUse, text: "service web"},
		{method: "RemoveSecret", req: ref("nobody"), code: warden.CodeNotFound},
	}
	methods := map[string]bool{}
	for _, r := range rows {
		methods[r.method] = true
		if r.req != nil && r.method == "CreateService" {
			for i, s := range r.req.(*api.CreateServiceRequest).GetSpec().GetTask().GetSecrets() {
				if s == nil {
					r.req.(*api.CreateServiceRequest).Spec.Task.Secrets[i] = &api.SecretReference{SecretName: "db"}
				}
			}
		}
		w.cluster.stays = r.stays
		index := w.store.View().Node(up.Id).Meta.Index
		_, err := call(t.Context(), w.Server, r.method, r.req)
		text := fmt.Sprint(r.req)
		wantError(t, r.method+"("+text[:min(len(text), 120)]+")", err, r.code, r.text)
		if w.store.View().Node(up.Id).Meta.Index != index {
			t.Errorf("%s changed something", r.method)
		}
	}
	for _, m := range api.Control_ServiceDesc.Methods {
		if m.MethodName != "Status" && m.MethodName != "RotateDEK" && !methods[m.MethodName] {
			t.Errorf("no refusal of %s is in the table", m.MethodName)
		}
	}
	v := w.store.View()
	if len(v.Services()) != 1 || len(v.Secrets()) != 11 || len(v.Zones()) != 2 || len(v.Tokens()) != 1 || len(v.Tombstones()) != 1 {
		t.Error("a refused request left something")
	}
}

// Without an actor, or with one that policy does not know, nothing runs: no method, no stream.
func TestDenied(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		name  string
		actor *api.Actor
	}{{"nobody", nil}, {"node", &api.Actor{Kind: "node", Name: w.self}}, {"operator", &api.Actor{Kind: "operator", Name: "eve"}}, {"bad uid", &api.Actor{Kind: "uid", Name: "root"}}} {
		ctx := control.WithActor(t.Context(), c.actor)
		for _, m := range api.Control_ServiceDesc.Methods {
			_, err := m.Handler(w.Server, ctx, func(any) error { return nil }, w.Intercept)
			wantError(t, c.name+" calls "+m.MethodName, api.FromError(err), warden.CodeDenied)
			_, err = w.Run(t.Context(), service+m.MethodName, nil, c.actor, "r")
			if m.MethodName != "Status" {
				wantError(t, c.name+" runs "+m.MethodName, err, warden.CodeDenied)
			}
		}
		events := w.Events(&api.EventsRequest{}, &stream[api.Event]{ctx: ctx})
		wantError(t, c.name+" watches events", api.FromError(events), warden.CodeDenied)
		logs := w.Logs(&api.ControlLogsRequest{References: []string{"x"}}, &stream[api.LogChunk]{ctx: ctx})
		wantError(t, c.name+" reads logs", api.FromError(logs), warden.CodeDenied)
	}
	if w.store.View().Index() > 1 {
		t.Error("a denied call reached the log")
	}
	if !strings.Contains(w.log.String(), "denied a call") {
		t.Error("denials are not logged")
	}
}

func TestRunRefuses(t *testing.T) {
	w := newWorld(t)
	root := &api.Actor{Kind: "uid", Name: "0"}
	for _, c := range []struct {
		name, method, request, id string
		code                      warden.Code
	}{
		{"an unknown method", service + "Explode", "", "r", warden.CodeUnsupported},
		{"another service", "/warden.v1.Local/Unlock", "", "r", warden.CodeUnsupported},
		{"no service", "List", "", "r", warden.CodeUnsupported},
		{"Status", service + "Status", "", "r", warden.CodeUnsupported},
		{"a stream", service + "Logs", "", "r", warden.CodeUnsupported},
		{"garbage", service + "CreateZone", "\xff\xff", "r", warden.CodeInvalid},
		{"no request ID", service + "CreateZone", "", "", warden.CodeInvalid},
		{"a request ID of an attempt", service + "CreateZone", "", "r#1", warden.CodeInvalid},
		{"a long request ID", service + "CreateZone", "", strings.Repeat("r", 61), warden.CodeInvalid},
	} {
		_, err := w.Run(t.Context(), c.method, []byte(c.request), root, c.id)
		wantError(t, "Run of "+c.name, err, c.code)
	}
	follows := follower(t, nil)
	_, err := follows.Run(t.Context(), service+"List", nil, root, "r")
	wantError(t, "Run where another leads", err, warden.CodeNotLeader)
	raw, err := proto.Marshal(&api.CreateSecretRequest{Name: "s", Data: []byte("planted-value")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Run(t.Context(), service+"CreateSecret", raw, root, "r"); err != nil {
		t.Error(err)
	}
	if slices.ContainsFunc(raw, func(b byte) bool { return b != 0 }) {
		t.Error("Run left the value in the request")
	}
}

func TestInterceptForwards(t *testing.T) {
	w := newWorld(t)
	var got []*api.ForwardRequest
	failures := []warden.Code{warden.CodeNoLeader, warden.CodeNotLeader, warden.CodeUnavailable, warden.CodeTimeout}
	s := follower(t, func(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
		got = append(got, proto.Clone(f).(*api.ForwardRequest))
		if len(got) <= len(failures) {
			return nil, warden.Errorf(failures[len(got)-1], "forwarding", "not now")
		}
		return w.runOn(ctx, f)
	})
	reply := do[*api.ChangeReply](t, s, "CreateZone", &api.CreateZoneRequest{Name: "edge"})
	if w.store.View().Zone("edge").GetId() != reply.Id || len(got) != 5 {
		t.Fatalf("CreateZone by way of another manager = %v after %d attempts", reply, len(got))
	}
	for _, f := range got {
		if f.RequestId != got[0].RequestId || f.Caller.Name != "0" || f.Method != service+"CreateZone" {
			t.Errorf("forwarded %v, want the same request ID and the caller each time", f)
		}
	}
	_, err := call(t.Context(), s, "CreateZone", &api.CreateZoneRequest{Name: "edge"})
	wantError(t, "a refusal by way of another manager", err, warden.CodeExists, "another name")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	attempts := 0
	s = follower(t, func(context.Context, *api.ForwardRequest) (*api.ForwardReply, error) {
		if attempts++; attempts == 3 {
			cancel() // the caller waits no longer
		}
		return nil, warden.Errorf(warden.CodeNoLeader, "forwarding", "not now")
	})
	_, err = call(ctx, s, "List", &api.ListRequest{Kind: api.Kind_KIND_ZONE})
	wantError(t, "List without a leader", err, warden.CodeNoLeader)
	if attempts != 3 {
		t.Errorf("%d attempts, want one after the other until the caller is gone", attempts)
	}
	if _, err := call(t.Context(), s, "List", &api.ListRequest{Kind: api.Kind_KIND_ZONE, Local: true}); err != nil {
		t.Errorf("List with local = %v", err)
	}
}
