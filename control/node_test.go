package control_test

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

func TestUpdateNode(t *testing.T) {
	box, m2 := worker("box"), storetest.Manager(warden.NewID())
	box.Labels = map[string]string{"old": "1", "keep": "2"}
	w := newWorld(t, box, m2)
	w.cluster.liveness[box.Id] = api.Liveness_LIVENESS_READY
	w.cluster.silent = []string{"m3"}
	reply := do[*api.ChangeReply](t, w.Server, "UpdateNode", &api.UpdateNodeRequest{
		Reference: box.Id[:12], Availability: api.Availability_AVAILABILITY_DRAIN, Zone: "pci", LabelsAdd: map[string]string{"new": "3"}, LabelsRemove: []string{"old", "typo"},
	})
	n := w.store.View().Node(box.Id)
	if n.Availability != api.Availability_AVAILABILITY_DRAIN || n.Zone != "pci" || fmt.Sprint(n.Labels) != "map[keep:2 new:3]" || reply.Version != n.Meta.Version {
		t.Errorf("UpdateNode made %v, said %v", n, reply)
	}
	if got := strings.Join(reply.Warnings, "; "); !strings.Contains(got, `no label "typo"`) || !strings.Contains(got, "tasks of another zone move") {
		t.Errorf("warnings = %s", got)
	}
	if len(reply.SilentManagers) != 0 || len(w.cluster.calls) != 0 {
		t.Error("a change without a role waits for managers")
	}

	reply = do[*api.ChangeReply](t, w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "box", Role: api.Role_ROLE_MANAGER})
	n = w.store.View().Node(box.Id)
	if n.EffectiveRole() != api.Role_ROLE_MANAGER || n.Address != "10.0.0.9:2377" || n.Availability != api.Availability_AVAILABILITY_DRAIN {
		t.Errorf("promotion made %v", n)
	}
	if fmt.Sprint(reply.SilentManagers) != "[m3]" || len(reply.Warnings) != 0 {
		t.Errorf("promotion to three managers said %v", reply)
	}
	reply = do[*api.ChangeReply](t, w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "box", Role: api.Role_ROLE_MANAGER})
	if fmt.Sprint(reply.Warnings) != "[it is a manager already]" || reply.Version != n.Meta.Version {
		t.Errorf("promotion of a manager said %v", reply)
	}
	reply = do[*api.ChangeReply](t, w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "box", Role: api.Role_ROLE_WORKER})
	n = w.store.View().Node(box.Id)
	if n.EffectiveRole() != api.Role_ROLE_WORKER || n.Role != api.Role_ROLE_MANAGER || !strings.Contains(fmt.Sprint(reply.Warnings), "2 managers") {
		t.Errorf("demotion made %v, said %v", n, reply)
	}

	w.cluster.address = func() error { return warden.Errorf(warden.CodeInvalid, "", "no port") }
	other := worker("other")
	storetest.Propose(t, w.store, store.Put(storetest.Token(1), 0))
	token := w.store.View().Tokens()[0]
	other.TokenId = token.Id
	storetest.Propose(t, w.store, storetest.Join(other)...)
	w.cluster.liveness[other.Id] = api.Liveness_LIVENESS_READY
	_, err := call(t.Context(), w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "other", Role: api.Role_ROLE_MANAGER})
	wantError(t, "promotion without an address", err, warden.CodeInvalid, "no port")
}

// A leader that is told to go hands leadership over first, and the call goes to the next leader.
func TestLeaderGoes(t *testing.T) {
	for _, method := range []string{"UpdateNode", "RemoveNode"} {
		w := newWorld(t, storetest.Manager(warden.NewID()))
		root := &api.Actor{Kind: "uid", Name: "0"}
		req := fmt.Sprintf("\x0a%c%s", len(w.self), w.self) // reference = 1 in both
		if method == "UpdateNode" {
			req += "\x30\x01" // role = worker
		} else {
			req += "\x10\x01" // force
		}
		_, err := w.Run(t.Context(), service+method, []byte(req), root, "r")
		wantError(t, method+" of the leader itself", err, warden.CodeNotLeader)
		if n := w.store.View().Node(w.self); fmt.Sprint(w.cluster.calls) != "[step down]" || n.EffectiveRole() != api.Role_ROLE_MANAGER {
			t.Errorf("%s: calls %v, node %v: the old leader must leave it to the next", method, w.cluster.calls, n)
		}
		w.cluster.stepDown = func() error { return warden.Errorf(warden.CodeTimeout, "", "nobody takes over") }
		_, err = w.Run(t.Context(), service+method, []byte(req), root, "r")
		wantError(t, method+" where nobody takes over", err, warden.CodeTimeout)
	}
}

func TestRemoveNodeOfAManager(t *testing.T) {
	m2 := storetest.Manager(warden.NewID())
	m2.NextKeyHash, m2.JoinKeyHash = storetest.Hash(), storetest.Hash()
	fresh, expired, used, revoked := storetest.Token(api.Role_ROLE_WORKER), storetest.Token(api.Role_ROLE_WORKER), storetest.Token(api.Role_ROLE_MANAGER), storetest.Token(api.Role_ROLE_MANAGER)
	expired.ExpiresNs, used.UsesMax, used.Uses, revoked.RevokedNs = 1, 1, 1, 5
	manager := storetest.Token(api.Role_ROLE_MANAGER)
	db, card := storetest.Secret("db"), storetest.Secret("card", "pci")
	exposure := &api.Exposure{Id: store.ExposureID(m2.Id, db.Id, 1), NodeId: m2.Id, SecretId: db.Id, SecretName: "db", Version: 1, FirstNs: 7, LastNs: 8}
	w := newWorld(t, m2, fresh, manager, expired, used, revoked, db, card, storetest.SecretVersion(db, 1), storetest.SecretVersion(db, 2), storetest.SecretVersion(card, 1), exposure)
	w.cluster.silent = []string{"m3"}
	watch := w.store.Watch(api.Kind_KIND_TOMBSTONE, api.Kind_KIND_NODE, api.Kind_KIND_TOKEN)
	defer watch.Close()
	r := do[*api.RemoveNodeReply](t, w.Server, "RemoveNode", &api.RemoveNodeRequest{Reference: m2.Hostname, Compromised: true})

	v := w.store.View()
	tomb := v.Tombstone(m2.Id)
	if tomb == nil || v.Node(m2.Id) != nil || !tomb.Compromised || tomb.Role != api.Role_ROLE_MANAGER || tomb.Hostname != m2.Hostname || tomb.Zone != "default" {
		t.Fatalf("tombstone = %v", tomb)
	}
	for _, h := range [][]byte{m2.KeyHash, m2.NextKeyHash, m2.JoinKeyHash} {
		if !slices.ContainsFunc(tomb.KeyHashes, func(o []byte) bool { return bytes.Equal(o, h) }) {
			t.Error("the tombstone lacks a key of the node")
		}
	}
	for _, x := range []*api.Token{fresh, manager} { // in the one command
		if got := v.Token(x.Id); got.RevokedNs == 0 || got.Meta.Index != r.Index || tomb.Meta.Index != r.Index {
			t.Errorf("token = %v, want it revoked at index %d", got, r.Index)
		}
	}
	for _, x := range []*api.Token{expired, used, revoked} {
		if v.Token(x.Id).Meta.Version != 1 {
			t.Error("a token that had ended was changed")
		}
	}
	if fmt.Sprint(w.cluster.calls) != "[rotate await]" {
		t.Errorf("calls = %v, want new keys first, then the managers' answers", w.cluster.calls)
	}
	if r.Id != m2.Id || r.Role != api.Role_ROLE_MANAGER || !r.AllSecrets || fmt.Sprint(r.SilentManagers) != "[m3]" ||
		fmt.Sprint(r.Done) != "[revoked 2 outstanding join tokens rotated]" || fmt.Sprint(r.Todo) != "[root]" {
		t.Errorf("reply = %v", r)
	}
	var listed []string
	for _, e := range r.Exposures {
		listed = append(listed, fmt.Sprintf("%s@%d %d-%d", e.SecretName, e.Version, e.FirstNs, e.LastNs))
	}
	slices.Sort(listed)
	if got := strings.Join(listed, ", "); got != "card@1 0-0, db@1 7-8, db@2 0-0" {
		t.Errorf("exposures = %s, want every version of every secret", got)
	}

	m3 := storetest.Manager(warden.NewID())
	w = newWorld(t, m3)
	w.cluster.rotate = func() (done, todo []string, err error) {
		return []string{"half"}, nil, errors.New("disk full")
	}
	r = do[*api.RemoveNodeReply](t, w.Server, "RemoveNode", &api.RemoveNodeRequest{Reference: m3.Id, Force: true})
	if got := fmt.Sprint(r.Done, r.Todo); w.store.View().Tombstone(m3.Id) == nil || !strings.Contains(got, "half") || !strings.Contains(got, "not all rotated (disk full)") {
		t.Errorf("eviction whose rotation fails = %v", r)
	}
}

func TestRemoveNodeOfAWorker(t *testing.T) {
	box, down := worker("box"), worker("down")
	db, old := storetest.Secret("db"), warden.NewID()
	seen := &api.Exposure{Id: store.ExposureID(box.Id, db.Id, 1), NodeId: box.Id, SecretId: db.Id, SecretName: "db", Version: 1}
	past := &api.Exposure{Id: store.ExposureID(box.Id, old, 4), NodeId: box.Id, SecretId: old, SecretName: "removed", Version: 4}
	token := storetest.Token(api.Role_ROLE_WORKER)
	w := newWorld(t, box, down, db, storetest.SecretVersion(db, 1), seen, past, token)
	w.cluster.liveness[down.Id] = api.Liveness_LIVENESS_DOWN
	r := do[*api.RemoveNodeReply](t, w.Server, "RemoveNode", &api.RemoveNodeRequest{Reference: "down"})
	if len(r.Exposures) != 0 || w.store.View().Tombstone(down.Id).Compromised {
		t.Errorf("removal of a node that is down = %v", r)
	}
	r = do[*api.RemoveNodeReply](t, w.Server, "RemoveNode", &api.RemoveNodeRequest{Reference: "box", Compromised: true})
	if len(r.Exposures) != 2 || r.AllSecrets || len(r.Todo) != 1 {
		t.Errorf("reply = %v, want what it may have seen, the version that is gone included", r)
	}
	if fmt.Sprint(w.cluster.calls) != "[await await]" || w.store.View().Token(token.Id).RevokedNs != 0 {
		t.Errorf("calls = %v: a worker's eviction rotates and revokes nothing", w.cluster.calls)
	}
}

// Two managers that go at once are checked one after the other: each check alone would pass.
func TestManagersGoOneByOne(t *testing.T) {
	m2, m3 := storetest.Manager(warden.NewID()), storetest.Manager(warden.NewID())
	w := newWorld(t, m2, m3)
	entered := make(chan struct{}, 2)
	w.cluster.goes = func(string) error {
		managers := 0
		for _, n := range w.store.View().Nodes() {
			if n.EffectiveRole() == api.Role_ROLE_MANAGER {
				managers++
			}
		}
		entered <- struct{}{}
		for start := time.Now(); len(entered) < 2 && time.Since(start) < 100*time.Millisecond; {
			runtime.Gosched()
		}
		if managers < 3 {
			return warden.Errorf(warden.CodeNoQuorum, "", "one went already")
		}
		return nil
	}
	errs := make(chan error, 2)
	go func() {
		_, err := call(t.Context(), w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: m2.Id, Role: api.Role_ROLE_WORKER})
		errs <- err
	}()
	go func() {
		_, err := call(t.Context(), w.Server, "RemoveNode", &api.RemoveNodeRequest{Reference: m3.Id, Force: true})
		errs <- err
	}()
	a, b := warden.CodeOf(<-errs), warden.CodeOf(<-errs)
	if !(a == "" && b == warden.CodeNoQuorum || b == "" && a == warden.CodeNoQuorum) {
		t.Errorf("codes %q and %q, want one to go and one to stay", a, b)
	}
}

func TestTokens(t *testing.T) {
	w := newWorld(t)
	other := do[*api.CreateTokenReply](t, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_MANAGER, Zone: "pci"})
	first := do[*api.CreateTokenReply](t, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
	start := time.Now()
	second := do[*api.CreateTokenReply](t, w.Server, "CreateToken", &api.CreateTokenRequest{
		Role: api.Role_ROLE_WORKER, Rotate: true, UsesMax: 3, Hostname: "box", Cidr: "10.0.0.0/8", TtlNs: int64(time.Minute),
	})
	v := w.store.View()
	if v.Token(first.Id).RevokedNs == 0 || v.Token(other.Id).RevokedNs != 0 || second.Revoked != 1 || fmt.Sprint(second.Addresses) != "[127.0.0.1:2377]" {
		t.Errorf("rotate said %v", second)
	}
	x := v.Token(second.Id)
	if x.UsesMax != 3 || x.Hostname != "box" || x.Cidr != "10.0.0.0/8" || x.ExpiresNs < start.Add(time.Minute).UnixNano() || x.ExpiresNs != second.ExpiresNs || v.Token(other.Id).Zone != "pci" {
		t.Errorf("token = %v", x)
	}
	do[*api.ChangeReply](t, w.Server, "RevokeToken", &api.ReferenceRequest{Reference: second.Id[:6]})
	at := w.store.View().Token(second.Id).RevokedNs
	again := do[*api.ChangeReply](t, w.Server, "RevokeToken", &api.ReferenceRequest{Reference: second.Id})
	if at == 0 || w.store.View().Token(second.Id).RevokedNs != at || !strings.Contains(fmt.Sprint(again.Warnings), "was revoked at") {
		t.Errorf("second revocation said %v", again)
	}
}

// Ended tokens are remembered for a day and don't count.
func TestTokensMax(t *testing.T) {
	var records []store.Record
	for i := range warden.TokensMax + 50 {
		x := storetest.Token(api.Role_ROLE_WORKER)
		if i >= warden.TokensMax-1 {
			x.RevokedNs = 1
		}
		records = append(records, x)
	}
	w := newWorld(t, records...)
	do[*api.CreateTokenReply](t, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_MANAGER})
	_, err := call(t.Context(), w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
	wantError(t, "CreateToken beyond the bound", err, warden.CodeTooLarge, "token ls")
	r := do[*api.CreateTokenReply](t, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER, Rotate: true})
	if r.Revoked != warden.TokensMax-1 {
		t.Errorf("rotate revoked %d, want %d", r.Revoked, warden.TokensMax-1)
	}
}
