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
	i := must[*identity](t)(openIdentity(dir, id, nil))
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

// A renewal and a rotation cross: what a leaf comes with is followed where it is newer, never where it is older, and never into the clear.
func TestInstallFollowsNewerLocksOnly(t *testing.T) {
	p := newPKI(t, warden.NewID())
	dir := t.TempDir()
	id := p.node(t, warden.NewID(), ca.RoleManager)
	id.LockGeneration, id.DEKGeneration = 5, 5
	recipient := func() *autolock.Recipient {
		to := must[autolock.UnlockKey](t)(autolock.NewUnlockKey()).Recipient()
		return &to
	}
	own := recipient()
	if err := writeIdentity(dir, id, own); err != nil {
		t.Fatal(err)
	}
	i := must[*identity](t)(openIdentity(dir, id, own))
	for _, c := range []struct {
		name            string
		lock            *api.LockState
		follows, newDEK bool
	}{
		{"an older state", &api.LockState{Autolock: true, Recipient: recipient()[:], Generation: 4, DekGeneration: 4}, false, false},
		{"the same generation", &api.LockState{Autolock: true, Recipient: recipient()[:], Generation: 5, DekGeneration: 5}, false, false},
		{"autolock off, by word alone", &api.LockState{Generation: 9, DekGeneration: 9}, false, false},
		{"another DEK", &api.LockState{Autolock: true, Recipient: own[:], Generation: 5, DekGeneration: 6}, true, true},
		{"another key", &api.LockState{Autolock: true, Recipient: recipient()[:], Generation: 6, DekGeneration: 7}, true, true},
	} {
		before, sealer, to := i.id, i.sealer, *i.recipient
		record := must[[]byte](t)(sealer.Seal([]byte("x"), nil))
		r := &api.InstallRequest{Chain: p.chain(t, must[[]byte](t)(i.renew()), id.NodeID, ca.RoleManager), Lock: c.lock}
		if _, _, err := i.install(r); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if i.sealer != sealer || sealer.UnderPrimary(record) == c.newDEK {
			t.Errorf("%s: another DEK: %t, want %t", c.name, !sealer.UnderPrimary(record), c.newDEK)
		}
		if got, err := sealer.Open(record, nil); err != nil || string(got) != "x" {
			t.Errorf("%s: what was sealed before does not open: %v", c.name, err)
		}
		kf := must[*autolock.KeyFile](t)(autolock.ReadKeyFile(filepath.Join(dir, keyFile)))
		want := to
		if c.follows {
			want = autolock.Recipient(c.lock.Recipient)
		}
		if *kf.Recipient() != want || *i.recipient != want || c.follows != (i.id.DEKGeneration != before.DEKGeneration) {
			t.Errorf("%s: sealed to %s, generation %d, want %s", c.name, kf.KeyID, i.id.DEKGeneration, want)
		}
		if before.Key.Use(func([]byte) error { return nil }) == nil {
			t.Errorf("%s: the old node key is not wiped", c.name)
		}
	}
}

// What a peer or an earlier lie left in the key file is put right by the replica's own record, whatever generation it claimed, with a DEK
// that was never sealed to anybody else.
func TestLockMisses(t *testing.T) {
	a, b := autolock.Recipient{1}, autolock.Recipient{2}
	for _, c := range []struct {
		name      string
		want      lock
		to        *autolock.Recipient
		lock, dek uint64
		file, new bool
	}{
		{"as it is", lock{&a, 3, 3}, &a, 3, 3, false, false},
		{"in clear as it is", lock{nil, 3, 3}, nil, 3, 3, false, false},
		{"turned on", lock{&a, 4, 4}, nil, 3, 3, true, true},
		{"turned off", lock{nil, 4, 3}, &a, 3, 3, true, false},
		{"another key", lock{&b, 4, 4}, &a, 3, 3, true, true},
		{"another DEK", lock{&a, 3, 4}, &a, 3, 3, true, true},
		{"a foreign key of a later generation", lock{&a, 3, 3}, &b, 1 << 60, 1 << 60, true, true},
		{"a foreign key of the same generation", lock{&a, 3, 3}, &b, 3, 3, true, true},
	} {
		file, dek := c.want.misses(autolock.Identity{LockGeneration: c.lock, DEKGeneration: c.dek}, c.to)
		if file != c.file || dek != c.new {
			t.Errorf("%s: misses = %t, %t, want %t, %t", c.name, file, dek, c.file, c.new)
		}
	}
}
