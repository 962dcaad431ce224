package control_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/control"
	"warden/secrets"
	"warden/store"
	"warden/store/storetest"
	"warden/tokens"
)

func withRequest(ctx context.Context, id string) context.Context {
	return metadata.NewIncomingContext(ctx, metadata.Pairs("warden-request-id", id))
}

// A call whose reply is lost on the way back from the leader is made again by the manager that took it. The caller sees one
// success, and there is one object.
func TestLostReply(t *testing.T) {
	db := storetest.Secret("db")
	web := storetest.Service("web", "default")
	token := storetest.Token(api.Role_ROLE_WORKER)
	box := worker("box")
	w := newWorld(t, db, storetest.SecretVersion(db, 1), web, storetest.Zone("old"), token, box)
	w.cluster.liveness[box.Id] = api.Liveness_LIVENESS_READY
	var lost proto.Message
	drop := false
	s := follower(t, func(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
		reply, err := w.runOn(ctx, f)
		if drop && err == nil {
			drop = false
			lost = &api.ChangeReply{}
			if strings.HasSuffix(f.Method, "CreateToken") {
				lost = &api.CreateTokenReply{}
			} else if strings.HasSuffix(f.Method, "RemoveNode") {
				lost = &api.RemoveNodeReply{}
			} else if strings.HasSuffix(f.Method, "RotateSecret") {
				lost = &api.RotateSecretReply{}
			}
			if err := proto.Unmarshal(reply.Reply, lost); err != nil {
				t.Error(err)
			}
			return nil, warden.Errorf(warden.CodeUnavailable, "forwarding", "the leader went away")
		}
		return reply, err
	})
	on := true
	for _, c := range []struct {
		method string
		req    proto.Message
	}{
		{"CreateZone", &api.CreateZoneRequest{Name: "new"}},
		{"CreateSecret", &api.CreateSecretRequest{Name: "new", Data: []byte("value")}},
		{"CreateService", task(func(*api.TaskSpec) {})},
		{"ScaleService", &api.ScaleServiceRequest{Reference: "web", Replicas: 3}},
		{"UpdateCluster", &api.UpdateClusterRequest{LeafTtlNs: int64(2 * warden.LeafTTLMin)}},
		{"UpdateCluster", &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: recipient(t)}},
		{"RotateUnlockKey", &api.RotateUnlockKeyRequest{UnlockRecipient: recipient(t)}},
		{"RotateDEK", &api.RotateDEKRequest{}},
		{"RotateIssuing", &api.RotateIssuingRequest{}},
		{"UpdateNode", &api.UpdateNodeRequest{Reference: "box", LabelsAdd: map[string]string{"a": "b"}, Role: api.Role_ROLE_MANAGER}},
		{"UpdateNode", &api.UpdateNodeRequest{Reference: "box", LabelsRemove: []string{"a"}, Role: api.Role_ROLE_WORKER}},
		{"RevokeToken", &api.ReferenceRequest{Reference: token.Id}},
	} {
		drop = true
		reply := do[*api.ChangeReply](t, s, c.method, c.req)
		if first := lost.(*api.ChangeReply); reply.Id != first.Id || reply.Version != first.Version || reply.Index != first.Index {
			t.Errorf("%s made again = %v, want %v", c.method, reply, first)
		}
	}
	drop = true
	for want := uint64(2); want <= 3; want++ { // the second by a value that is the same
		rotated := do[*api.RotateSecretReply](t, s, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("value")})
		if v := w.store.View(); rotated.Version != want || v.Secret(db.Id).CurrentVersion != want || len(v.SecretVersions(db.Id)) != int(want) {
			t.Errorf("RotateSecret = %v, %d versions", rotated, len(v.SecretVersions(db.Id)))
		}
	}
	now := w.store.View().Service(web.Id)
	next := api.Clone(now.Spec)
	next.Task.Force++
	drop = true
	updated := do[*api.ChangeReply](t, s, "UpdateService", &api.UpdateServiceRequest{Reference: "web", Version: now.Meta.Version, Spec: next})
	if first := lost.(*api.ChangeReply); updated.Id != web.Id || updated.Version != first.Version || updated.Index != first.Index || w.store.View().Service(web.Id).Spec.Task.Force != 1 {
		t.Errorf("UpdateService made again = %v, want %v", updated, first)
	}
	for _, c := range []struct{ method, ref string }{{"RemoveService", "web"}, {"RemoveSecret", "db@1"}, {"RemoveSecret", "db"}, {"RemoveZone", "old"}} {
		drop = true
		reply := do[*api.ChangeReply](t, s, c.method, &api.ReferenceRequest{Reference: c.ref})
		if reply.Index != lost.(*api.ChangeReply).Index {
			t.Errorf("%s made again = %v, want %v", c.method, reply, lost)
		}
		_, err := call(t.Context(), s, c.method, &api.ReferenceRequest{Reference: c.ref})
		wantError(t, c.method+" as a new call", err, warden.CodeNotFound)
	}
	if v := w.store.View(); len(v.Secrets()) != 1 || len(v.Services()) != 1 || len(v.Zones()) != 3 || v.Node(box.Id).Labels["a"] != "" {
		t.Errorf("%d secrets, %d services, %d zones, want one more and one less of each", len(v.Secrets()), len(v.Services()), len(v.Zones()))
	}

	drop = true
	made := do[*api.CreateTokenReply](t, s, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER, Rotate: true})
	parsed, err := tokens.Parse(made.Token)
	if err != nil {
		t.Fatal(err)
	}
	key, first := parsed.Key(), lost.(*api.CreateTokenReply)
	if got := w.store.View().Token(made.Id); string(got.GetKey()) != string(key[:]) || first.Id != made.Id || first.Token == made.Token || parsed.ID != made.Id {
		t.Errorf("the token of the second reply is not the one in the state")
	}
	if n := len(w.store.View().Tokens()); n != 2 {
		t.Errorf("%d tokens, want the revoked one and the new one", n)
	}

	drop = true
	gone := do[*api.RemoveNodeReply](t, s, "RemoveNode", &api.RemoveNodeRequest{Reference: "box", Force: true})
	if first := lost.(*api.RemoveNodeReply); gone.Id != box.Id || gone.Index != first.Index || gone.Hostname != "box" {
		t.Errorf("RemoveNode made again = %v, want %v", gone, first)
	}
	_, err = call(t.Context(), s, "RemoveNode", &api.RemoveNodeRequest{Reference: box.Id, Force: true})
	wantError(t, "RemoveNode as a new call", err, warden.CodeNotFound, "was removed at")
}

// A call whose reply is lost is made again, and meanwhile somebody else has removed what it made or changed, or made another of the
// name: nobody is told that it was wrong, or that nothing was there, though it had its effect.
func TestLostReplyAndChangedSince(t *testing.T) {
	db := storetest.Secret("db")
	w := newWorld(t, db, storetest.SecretVersion(db, 1), storetest.Service("web", "default"))
	var since func()
	s := follower(t, func(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
		reply, err := w.runOn(ctx, f)
		if since != nil && err == nil {
			others := since
			since = nil
			others()
			return nil, warden.Errorf(warden.CodeUnavailable, "forwarding", "the leader went away")
		}
		return reply, err
	})
	other := func(method string, req proto.Message) func() {
		return func() { do[*api.ChangeReply](t, w.Server, method, req) }
	}
	rm := func(method, name string) func() { return other(method, &api.ReferenceRequest{Reference: name}) }
	create := func(name string) *api.CreateSecretRequest {
		return &api.CreateSecretRequest{Name: name, Data: []byte("value")}
	}
	for _, c := range []struct {
		what, method string
		req          proto.Message
		since        []func()
	}{
		{"a secret that is removed", "CreateSecret", create("a"), []func(){rm("RemoveSecret", "a")}},
		{"a secret whose name has another", "CreateSecret", create("b"), []func(){rm("RemoveSecret", "b"), other("CreateSecret", create("b"))}},
		{"rotation of one that is removed and made", "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("value")}, []func(){rm("RemoveSecret", "db"), other("CreateSecret", create("db"))}},
		{"rotation of one that is removed", "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("value")}, []func(){rm("RemoveSecret", "db")}},
		{"a service that is removed", "ScaleService", &api.ScaleServiceRequest{Reference: "web", Replicas: 3}, []func(){rm("RemoveService", "web")}},
		{"a zone that is removed", "CreateZone", &api.CreateZoneRequest{Name: "z"}, []func(){rm("RemoveZone", "z")}},
	} {
		since = func() {
			for _, f := range c.since {
				f()
			}
		}
		_, err := call(t.Context(), s, c.method, c.req)
		wantError(t, c.method+" of "+c.what, err, warden.CodeConflict, "had its effect at index")
		if since != nil {
			t.Errorf("%s of %s: no reply was lost", c.method, c.what)
		}
		_, err = call(t.Context(), s, c.method, c.req)
		if warden.CodeOf(err) == warden.CodeConflict {
			t.Errorf("%s of %s, as a new call, = %v", c.method, c.what, err)
		}
	}
}

// A call whose reply is lost is made again, and others have changed the object meanwhile: the answer names the version that it made.
func TestLostReplyNamesItsVersion(t *testing.T) {
	w := newWorld(t, storetest.Service("web", "default"))
	scale := func(n uint64) *api.ScaleServiceRequest {
		return &api.ScaleServiceRequest{Reference: "web", Replicas: n}
	}
	var since []proto.Message // changes by others, made once
	s := follower(t, func(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
		reply, err := w.runOn(ctx, f)
		if len(since) == 0 || err != nil {
			return reply, err
		}
		for _, req := range since {
			if _, ok := req.(*api.RotateSecretRequest); ok {
				do[*api.RotateSecretReply](t, w.Server, "RotateSecret", req)
				continue
			}
			do[*api.ChangeReply](t, w.Server, "ScaleService", req)
		}
		since = nil
		return nil, warden.Errorf(warden.CodeUnavailable, "forwarding", "the leader went away")
	})
	since = []proto.Message{&api.RotateSecretRequest{Reference: "db", Data: []byte("newer")}}
	if reply := do[*api.ChangeReply](t, s, "CreateSecret", &api.CreateSecretRequest{Name: "db", Data: []byte("value")}); reply.Version != 1 || since != nil {
		t.Errorf("a secret that was rotated since was created as %v, want version 1", reply)
	}
	since = []proto.Message{scale(5), scale(3)}
	if reply := do[*api.ChangeReply](t, s, "ScaleService", scale(3)); reply.Version != 2 || since != nil {
		t.Errorf("a service that was scaled twice since was scaled to %v, want version 2", reply)
	}
}

// Each of many changes of one object at once is told the version that it made, not one of the others': who updates from that
// would overwrite what it never saw.
func TestChangesAtOnceKnowTheirVersions(t *testing.T) {
	w := newWorld(t, storetest.Service("web", "default"))
	var wg sync.WaitGroup
	var mu sync.Mutex // guards told
	told := map[uint64]uint64{}
	for n := range uint64(8) {
		wg.Go(func() {
			for i := range uint64(20) {
				reply, err := call(t.Context(), w.Server, "ScaleService", &api.ScaleServiceRequest{Reference: "web", Replicas: 1000 + 100*n + i})
				if warden.CodeOf(err) == warden.CodeConflict {
					continue // others were faster too often
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				told[reply.(*api.ChangeReply).Version]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for version, n := range told {
		if n > 1 {
			t.Errorf("version %d was told to %d callers", version, n)
		}
	}
	if len(told) < 8 {
		t.Errorf("%d changes were made", len(told))
	}
}

// A repeated eviction of a manager does again what comes after the command: the first leader may have died before.
func TestLostReplyOfAManagersEviction(t *testing.T) {
	m2 := storetest.Manager(warden.NewID())
	token := storetest.Token(api.Role_ROLE_WORKER)
	w := newWorld(t, m2, token)
	ctx := withRequest(t.Context(), "evict-m2")
	for i := range 2 {
		got, err := call(ctx, w.Server, "RemoveNode", &api.RemoveNodeRequest{Reference: m2.Hostname, Force: true})
		if err != nil {
			t.Fatal(err)
		}
		r := got.(*api.RemoveNodeReply)
		if r.Id != m2.Id || !r.AllSecrets || len(r.Done) != 2 || !strings.Contains(r.Done[0], "revoked 1 ") {
			t.Errorf("RemoveNode, call %d = %v", i+1, r)
		}
	}
	if got := strings.Join(w.cluster.calls, " "); got != "rotate await rotate await" {
		t.Errorf("calls = %s", got)
	}
}

func TestSameRequestIDTwice(t *testing.T) {
	w := newWorld(t)
	ctx := withRequest(t.Context(), "deploy-42")
	var ids []string
	for range 2 {
		for _, c := range []struct {
			method string
			req    proto.Message
		}{{"CreateSecret", &api.CreateSecretRequest{Name: "s", Data: []byte("v")}}} {
			reply, err := call(ctx, w.Server, c.method, c.req)
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, reply.(*api.ChangeReply).Id)
		}
	}
	if ids[0] != ids[1] || !warden.ValidID(ids[0]) {
		t.Errorf("IDs = %v, want one", ids)
	}
	_, err := call(ctx, w.Server, "CreateSecret", &api.CreateSecretRequest{Name: "other", Data: []byte("v")})
	wantError(t, "another name with the same request ID", err, warden.CodeInvalid, "used for another request")
	_, err = call(ctx, w.Server, "CreateZone", &api.CreateZoneRequest{Name: "other"})
	wantError(t, "another kind with the same request ID", err, warden.CodeConflict, "used for another request")
	_, err = call(ctx, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER, Rotate: true})
	wantError(t, "a token with the same request ID", err, warden.CodeInvalid, "used for another request")
	if n := len(w.store.View().Tokens()); n != 0 {
		t.Errorf("%d tokens, want none", n)
	}
	if v := w.store.View(); len(v.Secrets()) != 1 || v.Zone("other") != nil {
		t.Error("a repeated request ID made something new")
	}
	_, err = call(ctx, w.Server, "RemoveSecret", &api.ReferenceRequest{Reference: "nothing"})
	if err != nil { // the stored result of this request ID; the caller broke its promise, and nothing was removed
		t.Error(err)
	}
	if w.store.View().SecretByName("s") == nil {
		t.Error("a repeated request ID removed something")
	}
	for _, bad := range []string{"", "a b", "a#1", strings.Repeat("x", 61)} {
		_, err := call(withRequest(t.Context(), bad), w.Server, "CreateZone", &api.CreateZoneRequest{Name: "z"})
		wantError(t, fmt.Sprintf("request ID %q", bad), err, warden.CodeInvalid)
	}
	// A token that somebody used must not be replaced by one of the same ID.
	tctx := withRequest(t.Context(), "token-1")
	first, err := call(tctx, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
	if err != nil {
		t.Fatal(err)
	}
	storetest.Propose(t, w.store, storetest.UseToken(first.(*api.CreateTokenReply).Id))
	_, err = call(tctx, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
	wantError(t, "a token that was used", err, warden.CodeInvalid)
}

func TestConcurrentCreatesOfOneName(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		method string
		req    proto.Message
	}{
		{"CreateZone", &api.CreateZoneRequest{Name: "one"}},
		{"CreateSecret", &api.CreateSecretRequest{Name: "one", Data: []byte("v")}},
		{"CreateService", spec(func(s *api.ServiceSpec) { s.Name = "one" })},
	} {
		const callers = 16
		errs := make([]error, callers)
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() { _, errs[i] = call(t.Context(), w.Server, c.method, proto.Clone(c.req)) })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else {
				wantError(t, c.method, err, warden.CodeExists)
			}
		}
		if won != 1 {
			t.Errorf("%s: %d of %d won, want exactly one", c.method, won, callers)
		}
	}
	const scalers = 8
	var wg sync.WaitGroup
	for i := range scalers {
		wg.Go(func() {
			if _, err := call(t.Context(), w.Server, "ScaleService", &api.ScaleServiceRequest{Reference: "one", Replicas: uint64(10 + i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if v := w.store.View().ServiceByName("one").Meta.Version; v != 1+scalers {
		t.Errorf("version %d after %d changes: a change was lost", v, scalers)
	}
}

// What others change between the plan and the commit makes a conflict; the plan is made again on the fresh state.
func TestConflictIsTriedAgain(t *testing.T) {
	box := worker("box")
	w := newWorld(t, box)
	w.cluster.liveness[box.Id] = api.Liveness_LIVENESS_READY
	plans := 0
	w.cluster.address = func() error {
		if plans++; plans <= 3 {
			now := w.store.View().Node(box.Id)
			n := api.Clone(now)
			n.Labels = map[string]string{"by": fmt.Sprint("another", plans)}
			storetest.Propose(t, w.store, store.Put(n, now.Meta.Version))
		}
		return nil
	}
	do[*api.ChangeReply](t, w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "box", Role: api.Role_ROLE_MANAGER})
	if n := w.store.View().Node(box.Id); plans != 4 || n.Labels["by"] != "another3" || n.EffectiveRole() != api.Role_ROLE_MANAGER {
		t.Errorf("after %d plans: %v", plans, n)
	}

	other := worker("other")
	w = newWorld(t, other)
	w.cluster.liveness[other.Id] = api.Liveness_LIVENESS_READY
	w.cluster.address = func() error {
		now := w.store.View().Node(other.Id)
		storetest.Propose(t, w.store, store.Put(api.Clone(now), now.Meta.Version))
		return nil
	}
	_, err := call(t.Context(), w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "other", Role: api.Role_ROLE_MANAGER})
	wantError(t, "UpdateNode with endless conflicts", err, warden.CodeConflict, "try again")
}

func TestCreateSecretSeals(t *testing.T) {
	w := newWorld(t)
	req := &api.CreateSecretRequest{Name: "db", Data: []byte("the value"), Zones: []string{"pci", "default", "pci"}, Labels: map[string]string{"a": "b"}}
	reply := do[*api.ChangeReply](t, w.Server, "CreateSecret", req)
	v := w.store.View()
	s, sv := v.Secret(reply.Id), v.SecretVersion(reply.Id, 1)
	if s.GetName() != "db" || s.CurrentVersion != 1 || fmt.Sprint(s.Zones) != "[default pci]" || sv.SizeBytes != 9 || sv.KeysetGeneration != 1 {
		t.Errorf("secret = %v, version = %v", s, sv)
	}
	ks, err := secrets.ParseKeyset(v.Cluster().Keyset)
	if err != nil {
		t.Fatal(err)
	}
	value, err := secrets.OpenVersion(ks, w.config.ClusterID, s.Id, 1, sv.Ciphertext, sv.WrappedKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := value.Use(func(b []byte) error {
		if string(b) != "the value" {
			t.Errorf("the version opens to %q", b)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	direct := &api.CreateSecretRequest{Name: "wiped", Data: []byte("the value")}
	if _, err := w.CreateSecret(asRoot(t.Context()), direct); err != nil || strings.Trim(string(direct.Data), "\x00") != "" {
		t.Errorf("CreateSecret left %q in the request, err %v", direct.Data, err)
	}
}

// Whoever took the call keeps no copy of the value, forwarded or not.
func TestInterceptWipesValues(t *testing.T) {
	w := newWorld(t)
	var forwarded []byte
	s := follower(t, func(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
		forwarded = f.Request
		f = proto.Clone(f).(*api.ForwardRequest) // gRPC sends a copy
		return w.runOn(ctx, f)
	})
	for name, on := range map[string]*control.Server{"here": w.Server, "there": s} {
		create := &api.CreateSecretRequest{Name: name, Data: []byte("planted-value")}
		if _, err := on.Intercept(asRoot(t.Context()), create, &grpc.UnaryServerInfo{FullMethod: service + "CreateSecret"}, func(ctx context.Context, req any) (any, error) {
			return on.CreateSecret(ctx, req.(*api.CreateSecretRequest))
		}); err != nil {
			t.Fatal(err)
		}
		rotate := &api.RotateSecretRequest{Reference: name, Data: []byte("planted-value")}
		if _, err := on.Intercept(asRoot(t.Context()), rotate, &grpc.UnaryServerInfo{FullMethod: service + "RotateSecret"}, func(ctx context.Context, req any) (any, error) {
			return on.RotateSecret(ctx, req.(*api.RotateSecretRequest))
		}); err != nil {
			t.Fatal(err)
		}
		if strings.Trim(string(create.Data)+string(rotate.Data), "\x00") != "" {
			t.Errorf("Intercept %s left %q and %q in the requests", name, create.Data, rotate.Data)
		}
		if on == s && (len(forwarded) == 0 || strings.Contains(string(forwarded), "planted-value")) {
			t.Errorf("the forwarded request is %q afterwards", forwarded)
		}
	}
	if strings.Contains(w.log.String(), "planted-value") {
		t.Error("the log holds a value")
	}
}
