package daemon

import (
	"bytes"
	"crypto"
	"os"
	"path/filepath"
	"testing"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
)

func TestInstallRefuses(t *testing.T) {
	p := newPKI(t, warden.NewID())
	other := newPKI(t, p.id)
	self := warden.NewID()
	dir := t.TempDir()
	id := p.node(t, self, ca.RoleWorker)
	if err := writeIdentity(dir, id, nil); err != nil {
		t.Fatal(err)
	}
	i := must[*identity](t)(openIdentity(dir, id))
	before := must[[]byte](t)(os.ReadFile(filepath.Join(dir, keyFile)))
	lock := &api.LockState{}

	csr := must[[]byte](t)(ca.NewCSR(i.cert.PrivateKey.(crypto.Signer)))
	install := func(what string, code warden.Code, r *api.InstallRequest) {
		t.Helper()
		if _, _, err := i.install(r); warden.CodeOf(err) != code {
			t.Errorf("%s: %v [%s], want [%s]", what, err, warden.CodeOf(err), code)
		}
	}
	install("nothing pending", warden.CodeInvalid, &api.InstallRequest{Chain: p.chain(t, csr, self, ca.RoleWorker), Lock: lock})
	next := must[[]byte](t)(i.renew())
	good := p.chain(t, next, self, ca.RoleWorker)
	install("the old key", warden.CodeWrongKey, &api.InstallRequest{Chain: p.chain(t, csr, self, ca.RoleWorker), Lock: lock})
	install("another root", warden.CodeWrongRoot, &api.InstallRequest{Chain: other.chain(t, next, self, ca.RoleWorker), Lock: lock})
	install("our root under another's leaf", warden.CodeUnauthentic, &api.InstallRequest{
		Chain: [][]byte{other.chain(t, next, self, ca.RoleWorker)[0], good[1], good[2]}, Lock: lock})
	install("another node", warden.CodeForeign, &api.InstallRequest{Chain: p.chain(t, next, warden.NewID(), ca.RoleWorker), Lock: lock})
	install("no chain", warden.CodeInvalid, &api.InstallRequest{Lock: lock})
	install("a long chain", warden.CodeInvalid, &api.InstallRequest{Chain: [][]byte{good[0], good[1], good[1], good[1], good[2]}, Lock: lock})
	install("garbage", warden.CodeInvalid, &api.InstallRequest{Chain: [][]byte{[]byte("x"), good[1], good[2]}, Lock: lock})
	manager := p.chain(t, next, self, ca.RoleManager)
	install("a manager without lock state", warden.CodeInvalid, &api.InstallRequest{Chain: manager})
	install("autolock without a recipient", warden.CodeInvalid, &api.InstallRequest{Chain: manager, Lock: &api.LockState{Autolock: true}})
	install("a short recipient", warden.CodeInvalid, &api.InstallRequest{Chain: manager, Lock: &api.LockState{Autolock: true, Recipient: make([]byte, 31)}})
	if !bytes.Equal(before, must[[]byte](t)(os.ReadFile(filepath.Join(dir, keyFile)))) {
		t.Error("a refused install changed the key file")
	}

	// The next renewal's key counts, an earlier one's does not.
	newest := must[[]byte](t)(i.renew())
	install("a superseded renewal", warden.CodeWrongKey, &api.InstallRequest{Chain: good, Lock: lock})
	unlock := must[autolock.UnlockKey](t)(autolock.NewUnlockKey())
	to := unlock.Recipient()
	promoted, demoted, err := i.install(&api.InstallRequest{Chain: p.chain(t, newest, self, ca.RoleManager), Lock: &api.LockState{Autolock: true, Recipient: to[:]}})
	if err != nil || !promoted || demoted {
		t.Fatalf("install = %t, %t, %v", promoted, demoted, err)
	}
	install("the same once more", warden.CodeInvalid, &api.InstallRequest{Chain: p.chain(t, newest, self, ca.RoleManager), Lock: lock})
	kf := must[*autolock.KeyFile](t)(autolock.ReadKeyFile(filepath.Join(dir, keyFile)))
	if !kf.Locked || kf.Role != ca.RoleManager {
		t.Errorf("the key file is %+v", kf)
	}
	promoted, demoted, err = i.install(&api.InstallRequest{Chain: p.chain(t, must[[]byte](t)(i.renew()), self, ca.RoleWorker)})
	if err != nil || promoted || !demoted {
		t.Fatalf("install = %t, %t, %v", promoted, demoted, err)
	}
	kf = must[*autolock.KeyFile](t)(autolock.ReadKeyFile(filepath.Join(dir, keyFile)))
	if got := must[autolock.Identity](t)(kf.Identity()); got.Keyring != nil || kf.Locked {
		t.Error("a worker keeps a DEK or a lock")
	}
}

// Whatever step of a join a crash follows, the node is nobody, or somebody who knows where to dial.
func TestCrashDuringAJoin(t *testing.T) {
	p := newPKI(t, warden.NewID())
	id := p.node(t, warden.NewID(), ca.RoleWorker)
	for _, steps := range []int{1, 2} {
		at := newPlace(t)
		if err := os.MkdirAll(at.cfg.StateDir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := writeManagers(at.cfg.StateDir, &api.ManagerList{Managers: []*api.ManagerInfo{{NodeId: warden.NewID(), Address: "127.67.99.2:1"}}}); err != nil {
			t.Fatal(err)
		}
		if steps > 1 {
			if err := autolock.WriteKeyFile(at.path(keyFile), id, nil); err != nil {
				t.Fatal(err)
			}
		}
		at.start()
		if steps == 1 {
			if s := at.info().State; s != StateUninitialized || exists(at.path(managersFile)) {
				t.Errorf("without a key file: %s, %s is left: %t", s, managersFile, exists(at.path(managersFile)))
			}
		} else if r := at.info(); r.State != StateRunning || r.NodeId != id.NodeID || !exists(at.path(managersFile)) {
			t.Errorf("with a key file: %+v", r)
		}
		at.stop()
	}
}

// A demotion that a crash cut short leaves no replicated state, which a later promotion could not open.
func TestWorkerKeepsNoReplicatedState(t *testing.T) {
	at := newPlace(t)
	if err := os.MkdirAll(at.path(raftDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(at.path(raftDir), "log.db"), []byte("sealed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeIdentity(at.cfg.StateDir, newPKI(t, warden.NewID()).node(t, warden.NewID(), ca.RoleWorker), nil); err != nil {
		t.Fatal(err)
	}
	at.start()
	if at.info().State != StateRunning || exists(at.path(raftDir)) {
		t.Error("the state is still there")
	}
}
