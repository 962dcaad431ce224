package control_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/autolock"
)

func recipient(t *testing.T) []byte {
	t.Helper()
	key, err := autolock.NewUnlockKey()
	if err != nil {
		t.Fatal(err)
	}
	to := key.Recipient()
	return to[:]
}

func (w *world) lock(t *testing.T, autolock bool, to []byte, generation, dek uint64) {
	t.Helper()
	c := w.store.View().Cluster()
	if c.Autolock != autolock || string(c.UnlockRecipient) != string(to) || (c.UnlockKeyId != "") != autolock || c.LockGeneration != generation || c.DekGeneration != dek {
		t.Errorf("autolock %t under %q, generations %d and %d, want %t, %d and %d", c.Autolock, c.UnlockKeyId, c.LockGeneration, c.DekGeneration, autolock, generation, dek)
	}
}

// Autolock on, rotated, off and on again: the generations rise, a fresh DEK is asked for wherever another key seals it, and what a
// caller's fresh key would not be the cluster's for is refused.
func TestLockOfALiveCluster(t *testing.T) {
	w := newWorld(t)
	at := w.store.View().Cluster()
	lock, dek := at.LockGeneration, at.DekGeneration
	ttl := at.LeafTtlNs
	on, off := true, false
	refused := func(method string, req any, code warden.Code, text string) {
		t.Helper()
		_, err := call(t.Context(), w.Server, method, req.(proto.Message))
		if warden.CodeOf(err) != code || !strings.Contains(err.Error(), text) {
			t.Errorf("%s(%v) = %v, want [%s] with %q", method, req, err, code, text)
		}
	}
	refused("RotateUnlockKey", &api.RotateUnlockKeyRequest{UnlockRecipient: recipient(t)}, warden.CodeInvalid, "autolock is off")
	for _, bad := range [][]byte{nil, make([]byte, 32), make([]byte, 33)} {
		refused("UpdateCluster", &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: bad}, warden.CodeInvalid, "recipient")
	}
	w.lock(t, false, nil, lock, dek)

	first, second := recipient(t), recipient(t)
	do[*api.ChangeReply](t, w.Server, "UpdateCluster", &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: first})
	w.lock(t, true, first, lock+1, dek+1)
	refused("UpdateCluster", &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: second}, warden.CodeExists, "autolock is on already")
	for _, bad := range [][]byte{nil, make([]byte, 32), second[:31]} {
		refused("RotateUnlockKey", &api.RotateUnlockKeyRequest{UnlockRecipient: bad}, warden.CodeInvalid, "recipient")
	}
	do[*api.ChangeReply](t, w.Server, "RotateUnlockKey", &api.RotateUnlockKeyRequest{UnlockRecipient: second})
	w.lock(t, true, second, lock+2, dek+2)
	do[*api.ChangeReply](t, w.Server, "RotateUnlockKey", &api.RotateUnlockKeyRequest{UnlockRecipient: second})
	w.lock(t, true, second, lock+2, dek+2)
	do[*api.ChangeReply](t, w.Server, "RotateDEK", &api.RotateDEKRequest{})
	w.lock(t, true, second, lock+2, dek+3)
	do[*api.ChangeReply](t, w.Server, "UpdateCluster", &api.UpdateClusterRequest{Autolock: &off})
	w.lock(t, false, nil, lock+3, dek+3)
	do[*api.ChangeReply](t, w.Server, "UpdateCluster", &api.UpdateClusterRequest{Autolock: &off})
	w.lock(t, false, nil, lock+3, dek+3)
	do[*api.ChangeReply](t, w.Server, "UpdateCluster", &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: first})
	w.lock(t, true, first, lock+4, dek+4)
	if got := w.store.View().Cluster().LeafTtlNs; got != ttl {
		t.Errorf("the life of leaves went from %d to %d", ttl, got)
	}
}

func TestRotateIssuing(t *testing.T) {
	w := newWorld(t)
	before := w.store.View().Cluster().IssuingGeneration
	do[*api.ChangeReply](t, w.Server, "RotateIssuing", &api.RotateIssuingRequest{})
	if got := w.store.View().Cluster().IssuingGeneration; got != before+1 {
		t.Errorf("generation %d, want %d", got, before+1)
	}
	w.cluster.issuing = warden.Errorf(warden.CodeTooLarge, "rotating", "no room")
	if _, err := call(t.Context(), w.Server, "RotateIssuing", &api.RotateIssuingRequest{}); warden.CodeOf(err) != warden.CodeTooLarge {
		t.Errorf("RotateIssuing = %v", err)
	}
	if got := w.store.View().Cluster().IssuingGeneration; got != before+1 {
		t.Errorf("a refusal left generation %d", got)
	}
	s := do[*api.StatusReply](t, w.Server, "Status", &api.StatusRequest{})
	if notes := strings.Join(s.Notes, "; "); !strings.Contains(notes, "nodes have a leaf of the issuing CA of generation 2") {
		t.Errorf("status says %q", notes)
	}
}
