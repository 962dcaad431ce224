package control_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/secrets"
	"warden/store"
	"warden/store/storetest"
)

// value opens a version as a task gets it.
func (w *world) value(t *testing.T, secretID string, version uint64) (out string) {
	t.Helper()
	v := w.store.View()
	ks, err := secrets.ParseKeyset(v.Cluster().Keyset)
	if err != nil {
		t.Fatal(err)
	}
	sv := v.SecretVersion(secretID, version)
	b, err := secrets.OpenVersion(ks, w.config.ClusterID, secretID, version, sv.GetCiphertext(), sv.GetWrappedKey())
	if err != nil {
		t.Fatal(err)
	}
	_ = b.Use(func(b []byte) error { out = string(b); return nil })
	return out
}

func following(s *api.Secret) *api.SecretReference {
	r := storetest.Reference(s)
	r.Version = 0
	return r
}

func TestRotateSecret(t *testing.T) {
	w := newWorld(t)
	id := do[*api.ChangeReply](t, w.Server, "CreateSecret", &api.CreateSecretRequest{Name: "db", Data: []byte("one")}).Id
	for name, ref := range map[string]*api.SecretReference{"follows": {SecretName: "db"}, "pins": {SecretName: "db", Version: 1}} {
		in := secretRefs(ref)
		in.Spec.Name = name
		do[*api.ChangeReply](t, w.Server, "CreateService", in)
	}
	idle := secretRefs(&api.SecretReference{SecretName: "db"})
	idle.Spec.Name, idle.Spec.Replicas = "idle", 0
	do[*api.ChangeReply](t, w.Server, "CreateService", idle)
	before := w.store.View()

	reply := do[*api.RotateSecretReply](t, w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: id[:9], Data: []byte("two, longer")})
	if reply.Id != id || reply.Version != 2 || fmt.Sprint(reply.Services) != "[follows]" || reply.Index != w.store.View().Index() {
		t.Errorf("RotateSecret = %v", reply)
	}
	v := w.store.View()
	if v.Index() != before.Index()+1 {
		t.Errorf("%d commands, want one", v.Index()-before.Index())
	}
	if s := v.Secret(id); s.CurrentVersion != 2 || s.Meta.Version != 2 || v.SecretVersion(id, 2).SizeBytes != 11 {
		t.Errorf("secret = %v", s)
	}
	if a, b := w.value(t, id, 1), w.value(t, id, 2); a != "one" || b != "two, longer" {
		t.Errorf("values %q and %q", a, b)
	}
	for _, sv := range v.Services() { // a rotation changes no service: tasks follow from comparing resolved specs
		if sv.Meta.Version != 1 || sv.SpecVersion != 1 {
			t.Errorf("service %s = %v", sv.Spec.Name, sv.Meta)
		}
	}
}

// Whoever rotates at once makes a version each; none is lost, none has another's value.
func TestConcurrentRotations(t *testing.T) {
	w := newWorld(t)
	id := do[*api.ChangeReply](t, w.Server, "CreateSecret", &api.CreateSecretRequest{Name: "db", Data: []byte("0")}).Id
	const callers = 8
	var mu sync.Mutex // guards got
	got := map[uint64]string{}
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			value := fmt.Sprint("value ", i)
			reply, err := call(t.Context(), w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte(value)})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			got[reply.(*api.RotateSecretReply).Version] = value
		})
	}
	wg.Wait()
	if v := w.store.View(); len(got) != callers || v.Secret(id).CurrentVersion != 1+callers {
		t.Fatalf("%d versions for %d callers, the current one is %d", len(got), callers, v.Secret(id).CurrentVersion)
	}
	for version, want := range got {
		if value := w.value(t, id, version); value != want {
			t.Errorf("version %d opens to %q, want %q", version, value, want)
		}
	}
}

// Replies are lost and the calls made again, while others rotate, too: each call is one version, with its own value, and the
// current version never falls.
func TestRotationsWithLostReplies(t *testing.T) {
	w := newWorld(t)
	id := do[*api.ChangeReply](t, w.Server, "CreateSecret", &api.CreateSecretRequest{Name: "db", Data: []byte("0")}).Id
	var replies, dropped atomic.Int64
	s := follower(t, func(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
		reply, err := w.runOn(ctx, f)
		if replies.Add(1)%2 == 0 && strings.HasSuffix(f.Method, "RotateSecret") {
			dropped.Add(1)
			return nil, warden.Errorf(warden.CodeUnavailable, "forwarding", "the reply was lost")
		}
		return reply, err
	})
	const callers, each = 4, 5
	var mu sync.Mutex // guards got
	got := map[uint64]string{}
	var wg sync.WaitGroup
	for caller := range callers {
		wg.Go(func() {
			for i := range each {
				value, before := fmt.Sprint(caller, " ", i), w.store.View().Secret(id).CurrentVersion
				reply, err := call(t.Context(), s, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte(value)})
				if err != nil {
					t.Error(err)
					return
				}
				version, after := reply.(*api.RotateSecretReply).Version, w.store.View().Secret(id).CurrentVersion
				if version <= before || version > after {
					t.Errorf("version %d was made between %d and %d", version, before, after)
				}
				mu.Lock()
				got[version] = value
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if n := w.store.View().Secret(id).CurrentVersion; len(got) != callers*each || n != 1+callers*each || dropped.Load() == 0 {
		t.Fatalf("%d versions told, the current one is %d after %d calls, %d replies lost", len(got), n, callers*each, dropped.Load())
	}
	for version, want := range got {
		if value := w.value(t, id, version); value != want {
			t.Errorf("version %d opens to %q, want %q", version, value, want)
		}
	}
}

// A call that is repeated gets its version also where that was the last one there is room for; another call is refused.
func TestRotationRepeatedAtTheBound(t *testing.T) {
	db := storetest.Secret("db")
	db.CurrentVersion = warden.SecretVersionsMax - 1
	records := []store.Record{db}
	for n := range uint64(warden.SecretVersionsMax - 1) {
		records = append(records, storetest.SecretVersion(db, n+1))
	}
	w := newWorld(t, records...)
	ctx := withRequest(t.Context(), "the-last")
	for range 2 {
		reply, err := call(ctx, w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("x")})
		if err != nil || reply.(*api.RotateSecretReply).Version != warden.SecretVersionsMax {
			t.Fatalf("RotateSecret = %v, %v", reply, err)
		}
	}
	for range 2 {
		_, err := call(withRequest(t.Context(), "more"), w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("x")})
		wantError(t, "one version too many", err, warden.CodeTooLarge, "versions, which is the most", "secret rm db@N")
	}
}

// A repeated call finds the version that it made also after the keyset was rotated, which seals all of them again.
func TestRotationRepeatedAfterReseal(t *testing.T) {
	w := newWorld(t)
	id := do[*api.ChangeReply](t, w.Server, "CreateSecret", &api.CreateSecretRequest{Name: "db", Data: []byte("one")}).Id
	ctx := withRequest(t.Context(), "rotate-once")
	for range 2 {
		reply, err := call(ctx, w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("two")})
		if err != nil || reply.(*api.RotateSecretReply).Version != 2 || len(w.store.View().SecretVersions(id)) != 2 {
			t.Fatalf("RotateSecret = %v, %v", reply, err)
		}
		sv := w.store.View().SecretVersion(id, 2)
		storetest.Propose(t, w.store, store.Put(api.Clone(sv), sv.Meta.Version)) // as a rotation of the keyset does
	}
	other := withRequest(t.Context(), "used-elsewhere")
	if _, err := call(other, w.Server, "CreateZone", &api.CreateZoneRequest{Name: "edge"}); err != nil {
		t.Fatal(err)
	}
	do[*api.ChangeReply](t, w.Server, "CreateSecret", &api.CreateSecretRequest{Name: "fresh", Data: []byte("one")})
	_, err := call(other, w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: "fresh", Data: []byte("two")})
	wantError(t, "RotateSecret with the request ID of another call", err, warden.CodeConflict, "used for another request")
}

func TestRotationThatAServiceCannotBear(t *testing.T) {
	db, gone := storetest.Secret("db"), storetest.Secret("gone", "pci")
	records := []store.Record{db, storetest.SecretVersion(db, 1), gone, storetest.SecretVersion(gone, 1)}
	full, pins := storetest.Service("full", "default", following(db)), storetest.Service("pins", "default", storetest.Reference(db))
	stray := storetest.Service("stray", "default", following(gone)) // as if the zones of the secret had been changed since
	for i := range 8 {
		s := storetest.Secret(fmt.Sprintf("big%d", i))
		v := storetest.SecretVersion(s, 1)
		v.SizeBytes = warden.SecretBytesMax
		records = append(records, s, v)
		for _, sv := range []*api.Service{full, pins} {
			sv.Spec.Task.Secrets = append(sv.Spec.Task.Secrets, []*api.SecretReference{following(s), storetest.Reference(s)}[i%2])
		}
	}
	many := storetest.Secret("many")
	many.CurrentVersion = warden.SecretVersionsMax
	records = append(records, many)
	for n := range uint64(warden.SecretVersionsMax) {
		records = append(records, storetest.SecretVersion(many, n+1))
	}
	w := newWorld(t, append(records, full, pins, stray)...)
	room := warden.TaskSecretsMax - 8*warden.SecretBytesMax
	index := w.store.View().Index()
	rotate := func(name string, size int) error {
		_, err := call(t.Context(), w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: name, Data: make([]byte, size)})
		return err
	}
	wantError(t, "a value too large for a follower", rotate("db", room+1), warden.CodeTooLarge, "service full", "--secret-add db@1 full")
	wantError(t, "a secret whose zones leave a follower out", rotate("gone", 1), warden.CodeWrongZone, "service stray", "service update")
	wantError(t, "one version too many", rotate("many", 1), warden.CodeTooLarge, "100 versions", "secret rm many@N")
	if w.store.View().Index() != index {
		t.Error("a refused rotation reached the log")
	}
	if err := rotate("db", room); err != nil {
		t.Errorf("a value that just fits = %v", err)
	}
	do[*api.ChangeReply](t, w.Server, "RemoveSecret", &api.ReferenceRequest{Reference: "many@7"})
	if err := rotate("many", 1); err != nil {
		t.Errorf("after one version was removed = %v", err)
	}
}

func TestSecretUses(t *testing.T) {
	db, key := storetest.Secret("db"), storetest.Secret("key")
	db.CurrentVersion = 3
	v1, v2, v3, k1 := storetest.SecretVersion(db, 1), storetest.SecretVersion(db, 2), storetest.SecretVersion(db, 3), storetest.SecretVersion(key, 1)
	v3.SizeBytes = 33
	twice := following(db)
	twice.Target = "again"
	web, old := storetest.Service("web", "default", following(db), twice, following(key)), storetest.Service("old", "default", storetest.Reference(db))
	box := worker("box")
	in := func(s *api.Service, slot, version uint64, state api.TaskState) *api.Task {
		x := storetest.Placed(storetest.Task(s, slot), box.Id)
		x.Status.State = state
		for _, r := range x.Spec.Secrets {
			if r.SecretId == db.Id {
				r.Version = version
			} else {
				r.Version = 1
			}
		}
		return x
	}
	stopping := in(web, 1, 2, api.TaskState_TASK_RUNNING)
	stopping.DesiredState = api.TaskState_TASK_SHUTDOWN
	w := newWorld(t, db, v1, v2, v3, key, k1, web, old, box, stopping, in(web, 2, 3, api.TaskState_TASK_RUNNING), in(web, 3, 3, api.TaskState_TASK_STARTING),
		in(web, 4, 1, api.TaskState_TASK_SHUTDOWN), in(old, 1, 1, api.TaskState_TASK_RUNNING))
	show := func(names ...string) (out []string) {
		for _, u := range do[*api.ListReply](t, w.Server, "List", &api.ListRequest{Kind: api.Kind_KIND_SECRET, References: names}).Uses {
			out = append(out, fmt.Sprintf("%s@%d %d %t %v %d", w.store.View().Secret(u.SecretId).Name, u.Version, u.SizeBytes, u.Current, u.Services, u.Tasks))
		}
		return out
	}
	if got, want := fmt.Sprint(show("key", "db")), "[key@1 10 true [web] 3 db@1 10 false [old] 1 db@2 10 false [] 1 db@3 33 true [web] 2]"; got != want {
		t.Errorf("uses = %s, want %s", got, want)
	}
	if n := len(show()); n != 4 {
		t.Errorf("%d uses of all secrets, want 4", n)
	}
	remove := func(ref string) error {
		_, err := call(t.Context(), w.Server, "RemoveSecret", &api.ReferenceRequest{Reference: ref})
		return err
	}
	wantError(t, "removing a pinned version", remove("db@1"), warden.CodeInUse, "pinned by old", "1 task that has", "--secret-add db SERVICE")
	wantError(t, "removing one that a task still has", remove("db@2"), warden.CodeInUse, "1 task that has not ended", "service ls")
	wantError(t, "removing the current one", remove("db@3"), warden.CodeInUse, "current", "secret rotate db")
	wantError(t, "removing a secret in use", remove("db"), warden.CodeInUse, "service web", "service old")
	storetest.Propose(t, w.store, storetest.Report(stopping, api.TaskState_TASK_SHUTDOWN))
	if err := remove("db@2"); err != nil {
		t.Error(err)
	}
	if got := fmt.Sprint(show("db")); got != "[db@1 10 false [old] 1 db@3 33 true [web] 2]" {
		t.Errorf("uses afterwards = %s", got)
	}
}

func TestUpdateService(t *testing.T) {
	db := storetest.Secret("db")
	db.CurrentVersion = 2
	w := newWorld(t, db, storetest.SecretVersion(db, 1), storetest.SecretVersion(db, 2))
	id := do[*api.ChangeReply](t, w.Server, "CreateService", task(func(t *api.TaskSpec) { t.Env = []string{"A=1"} })).Id
	now := func() *api.Service { return w.store.View().Service(id) }
	update := func(version uint64, change func(*api.ServiceSpec)) *api.ChangeReply {
		t.Helper()
		s := api.Clone(now().Spec)
		change(s)
		return do[*api.ChangeReply](t, w.Server, "UpdateService", &api.UpdateServiceRequest{Reference: "new", Version: version, Spec: s})
	}
	if r := update(1, func(*api.ServiceSpec) {}); r.Version != 1 || now().Meta.Version != 1 {
		t.Errorf("an update that changes nothing = %v", r)
	}
	if r := do[*api.ChangeReply](t, w.Server, "ScaleService", &api.ScaleServiceRequest{Reference: "new", Replicas: 1}); r.Version != 1 || now().Meta.Version != 1 {
		t.Errorf("scaling to the same number = %v", r)
	}
	r := update(1, func(s *api.ServiceSpec) {
		s.Replicas, s.Update, s.Task.Zone = 5, &api.UpdatePolicy{Parallelism: 2, DelayNs: 1e9}, ""
		s.Task.Secrets = []*api.SecretReference{{SecretName: "db"}, {SecretName: "db", Version: 1, Target: "old"}}
		s.Task.Constraints = []string{"node.role == worker"}
	})
	x := now()
	if r.Id != id || r.Version != 2 || x.Meta.Version != 2 || x.SpecVersion != 2 || x.Spec.Replicas != 5 || x.Spec.Update.Parallelism != 2 || x.Spec.Task.Zone != "default" {
		t.Errorf("UpdateService = %v, service %v", r, x)
	}
	if s := x.Spec.Task.Secrets; len(s) != 2 || s[0].Version != 0 || s[0].SecretId != db.Id || s[0].Target != "db" || s[0].Mode != 0o400 || s[1].Version != 1 {
		t.Errorf("secrets = %v", s)
	}
	if c := x.Spec.Task.Constraints; fmt.Sprint(c) != "[node.role==worker]" {
		t.Errorf("constraints = %q", c)
	}
	if r := update(2, func(*api.ServiceSpec) {}); r.Version != 2 {
		t.Errorf("the spec as it was read = %v", r)
	}
	do[*api.ChangeReply](t, w.Server, "ScaleService", &api.ScaleServiceRequest{Reference: "new", Replicas: 6})
	if x := now(); x.SpecVersion != 2 || x.Meta.Version != 3 {
		t.Errorf("scaled: %v", x)
	}
	_, err := call(t.Context(), w.Server, "UpdateService", &api.UpdateServiceRequest{Reference: "new", Version: 2, Spec: now().Spec})
	wantError(t, "an update of what was read before", err, warden.CodeConflict, "version 3", "read it again")
	if now().Meta.Version != 3 {
		t.Error("a refused update changed something")
	}
}

// A service whose tasks could never be replaced, since the old task and the new one are more than a command holds, is refused.
func TestSpecsFitTwiceIntoACommand(t *testing.T) {
	w := newWorld(t)
	large := func(bytes int) *api.CreateServiceRequest {
		return task(func(t *api.TaskSpec) {
			for n := 0; bytes > 0; n++ {
				value := min(bytes, 32000)
				t.Env = append(t.Env, fmt.Sprintf("V%d=%s", n, strings.Repeat("x", value)))
				bytes -= value
			}
		})
	}
	_, err := call(t.Context(), w.Server, "CreateService", large(600<<10))
	wantError(t, "a spec of 600 KiB", err, warden.CodeTooLarge, "bytes, at most", "into secrets")
	id := do[*api.ChangeReply](t, w.Server, "CreateService", large(480<<10)).Id
	_, err = call(t.Context(), w.Server, "UpdateService", &api.UpdateServiceRequest{Reference: id, Version: 1, Spec: large(600 << 10).Spec})
	wantError(t, "an update to a spec of 600 KiB", err, warden.CodeTooLarge, "bytes, at most", "into secrets")

	sv := w.store.View().Service(id)
	replaces := func() []*api.Operation {
		old, next := storetest.Task(sv, 1), storetest.Task(sv, 1)
		old.Status.Error, old.Status.Message = strings.Repeat("e", 1<<10), strings.Repeat("m", 1<<10)
		return []*api.Operation{store.Put(old, 0), store.Put(next, 0)}
	}
	if n := proto.Size(&api.Command{Operations: replaces()}); n > warden.CommandBytes-(4<<10) {
		t.Errorf("two tasks of the largest service have %d bytes", n)
	}
}

// Of updates that were made from the same version, one wins; the others are told.
func TestConcurrentUpdates(t *testing.T) {
	w := newWorld(t)
	id := do[*api.ChangeReply](t, w.Server, "CreateService", task(func(*api.TaskSpec) {})).Id
	spec := w.store.View().Service(id).Spec
	const callers = 8
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			s := api.Clone(spec)
			s.Task.Env = []string{fmt.Sprint("I=", i)}
			_, errs[i] = call(t.Context(), w.Server, "UpdateService", &api.UpdateServiceRequest{Reference: id, Version: 1, Spec: s})
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else {
			wantError(t, "UpdateService", err, warden.CodeConflict)
		}
	}
	if won != 1 || w.store.View().Service(id).Meta.Version != 2 {
		t.Errorf("%d of %d won, version %d", won, callers, w.store.View().Service(id).Meta.Version)
	}
}

// A placement that was decided before a version went is refused by the apply; one that was committed keeps the version.
func TestRemovalRacesWithPlacement(t *testing.T) {
	db := storetest.Secret("db")
	web := storetest.Service("web", "default", following(db))
	box := worker("box")
	pending := storetest.Task(web, 1)
	pending.Spec.Secrets[0].Version = 1
	late := api.Clone(pending)
	late.Id, late.Slot = warden.NewID(), 2
	w := newWorld(t, db, storetest.SecretVersion(db, 1), web, box, pending)
	do[*api.RotateSecretReply](t, w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("two")})
	_, err := call(t.Context(), w.Server, "RemoveSecret", &api.ReferenceRequest{Reference: "db@1"})
	wantError(t, "removing what a pending task is to get", err, warden.CodeInUse, "1 task that")

	placed := storetest.Placed(pending, box.Id)
	storetest.Propose(t, w.store, store.Put(placed, 1)) // the placement of before the rotation still counts: the version is there
	if e := w.store.View().ExposuresByNode(box.Id); len(e) != 1 || e[0].Version != 1 {
		t.Errorf("exposures = %v", e)
	}
	storetest.Propose(t, w.store, storetest.Report(placed, api.TaskState_TASK_FAILED))
	do[*api.ChangeReply](t, w.Server, "RemoveSecret", &api.ReferenceRequest{Reference: "db@1"})
	_, err = w.store.Propose(t.Context(), storetest.Command(store.Put(late, 0)))
	wantError(t, "a task that was decided before the removal", err, warden.CodeNotFound, "no version 1")
	if e := w.store.View().ExposuresByNode(box.Id); len(e) != 1 || e[0].Version != 1 {
		t.Errorf("the exposure went with the version: %v", e)
	}
}
