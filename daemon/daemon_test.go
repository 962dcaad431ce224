package daemon

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/internal/courier"
	"warden/internal/sensitive"
)

func code(err error) warden.Code { return warden.CodeOf(api.FromError(err)) }

func TestLockedStart(t *testing.T) {
	p := newPlace(t)
	p.start()
	for _, low := range [][]byte{nil, make([]byte, 32), make([]byte, 31)} {
		_, err := p.local.Init(t.Context(), &api.InitRequest{Autolock: true, Advertise: p.cfg.Listen, UnlockRecipient: low})
		if code(err) != warden.CodeInvalid || p.info().State != StateUninitialized || exists(p.path(identityDir)) {
			t.Fatalf("init with the recipient %x: %v, %s", low, err, p.info().State)
		}
	}
	key := must[autolock.UnlockKey](t)(autolock.NewUnlockKey())
	to := key.Recipient()
	made := must[*api.InitReply](t)(p.local.Init(t.Context(), &api.InitRequest{Autolock: true, Advertise: p.cfg.Listen, UnlockRecipient: to[:]}))
	unlockKey := textOf(key)
	unlock := func(key []byte) error {
		request := &api.UnlockRequest{}
		if to := p.info().UnlockInbox; len(to) > 0 {
			request.SealedKey = must[[]byte](t)(courier.Seal(to, key))
		}
		return fails(p.local.Unlock(t.Context(), request))
	}
	if got := p.info(); got.State != StateRunning || got.Role != api.Role_ROLE_MANAGER {
		t.Fatalf("after init: %+v", got)
	}
	if _, err := p.local.Init(t.Context(), &api.InitRequest{}); code(err) != warden.CodeInitialized {
		t.Errorf("a second init: %v", err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	raw := must[[]byte](t)(os.ReadFile(p.path(keyFile)))
	if bytes.Contains(raw, []byte(unlockKey)) || bytes.Contains(raw, []byte("BEGIN PRIVATE KEY")) {
		t.Error("the key file holds what is secret")
	}

	p.start()
	if got := p.info(); got.State != StateLocked || got.UnlockKeyId != made.UnlockKeyId || got.NodeId != made.NodeId {
		t.Fatalf("after the start: %+v", got)
	}
	if c, err := net.Dial("tcp", p.cfg.Listen); err == nil {
		c.Close()
		t.Error("a locked manager has its port open")
	}
	for what, err := range map[string]error{
		"ls":   fails(p.ctl.List(t.Context(), &api.ListRequest{Kind: api.Kind_KIND_NODE}, grpc.WaitForReady(true))),
		"zone": fails(p.ctl.CreateZone(t.Context(), &api.CreateZoneRequest{Name: "pci"})),
	} {
		if code(err) != warden.CodeLocked || !strings.Contains(err.Error(), made.UnlockKeyId) {
			t.Errorf("%s of a locked manager: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"init": fails(p.local.Init(t.Context(), &api.InitRequest{})), "join": fails(p.local.Join(t.Context(), &api.LocalJoinRequest{Token: "x"})),
	} {
		if code(err) != warden.CodeInitialized {
			t.Errorf("%s of a locked manager: %v", what, err)
		}
	}
	if _, err := p.local.Leave(t.Context(), &api.LeaveRequest{}); code(err) != warden.CodeLocked {
		t.Errorf("leave without force: %v", err)
	}

	var wrong []byte
	must[autolock.UnlockKey](t)(autolock.NewUnlockKey()).Text().Use(func(b []byte) error { wrong = bytes.Clone(b); return nil })
	for _, c := range []struct {
		what string
		key  []byte
		code warden.Code
	}{
		{"wrong", wrong, warden.CodeWrongUnlock},
		{"garbage", []byte("open sesame"), warden.CodeInvalid},
		{"empty", nil, warden.CodeInvalid},
		{"a typo", []byte(unlockKey[:len(unlockKey)-1] + "!"), warden.CodeInvalid},
		{"oversized", []byte(strings.Repeat("x", warden.UnlockKeyTextMax+1)), warden.CodeTooLarge},
	} {
		err := unlock(c.key)
		if code(err) != c.code {
			t.Errorf("%s key: %v, want [%s]", c.what, err, c.code)
		}
		if len(c.key) > 0 && strings.Contains(err.Error(), string(c.key)) {
			t.Errorf("%s key: the error shows it", c.what)
		}
		if p.info().State != StateLocked {
			t.Fatalf("%s key: not locked any more", c.what)
		}
	}
	if err := fails(p.local.Unlock(t.Context(), &api.UnlockRequest{SealedKey: []byte(unlockKey)})); code(err) != warden.CodeInvalid {
		t.Errorf("a key that is not sealed to the daemon: %v", err)
	}
	if err := unlock([]byte(unlockKey + "\n")); err != nil {
		t.Fatal(err)
	}
	if p.info().State != StateRunning {
		t.Error("not running after the unlock")
	}
	if err := unlock([]byte(unlockKey)); code(err) != warden.CodeInvalid {
		t.Errorf("unlock of an unlocked manager: %v", err)
	}
	if _, err := p.local.Leave(t.Context(), &api.LeaveRequest{}); code(err) != warden.CodeInUse {
		t.Errorf("a manager's leave without force: %v", err)
	}
	if _, err := p.local.Leave(t.Context(), &api.LeaveRequest{Force: true}); err != nil {
		t.Fatal(err)
	}
	if exists(p.path(identityDir)) || exists(p.path(raftDir)) || p.info().State != StateUninitialized {
		t.Error("leave left something")
	}
	if _, err := p.ctl.CreateZone(t.Context(), &api.CreateZoneRequest{Name: "pci"}); code(err) != warden.CodeUninitialized {
		t.Errorf("control after the leave: %v", err)
	}
}

func textOf(key autolock.UnlockKey) (text string) {
	key.Text().Use(func(b []byte) error { text = string(b); return nil })
	return text
}

func fails[T proto.Message](_ T, err error) error { return err }

// A key file that can't be taken stops the start, with the file's name and a remedy, and stays as it is.
func TestBadKeyFileStopsTheStart(t *testing.T) {
	p := newPKI(t, warden.NewID())
	self := warden.NewID()
	for _, c := range []struct {
		name  string
		spoil func(path string) error
		code  warden.Code
	}{
		{"corrupt", func(path string) error {
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path, bytes.Replace(b, []byte("-----BEGIN"), []byte("-----BEGUN"), 1), 0o600)
			}
			return err
		}, warden.CodeCorrupt},
		{"empty", func(path string) error { return os.WriteFile(path, nil, 0o600) }, warden.CodeCorrupt},
		{"wide", func(path string) error { return os.Chmod(path, 0o640) }, warden.CodePermissions},
		{"foreign", func(path string) error { // the chain is another node's
			id := p.node(t, self, ca.RoleWorker)
			id.Chain = p.node(t, warden.NewID(), ca.RoleWorker).Chain
			return autolock.WriteKeyFile(path, id, nil)
		}, warden.CodeForeign},
		{"no key", func(path string) error {
			id := p.node(t, self, ca.RoleWorker)
			id.Key = sensitive.New([]byte("garbage"))
			return autolock.WriteKeyFile(path, id, nil)
		}, ""},
	} {
		at := newPlace(t)
		if err := os.MkdirAll(at.cfg.StateDir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := writeIdentity(at.cfg.StateDir, p.node(t, self, ca.RoleWorker), nil); err != nil {
			t.Fatal(err)
		}
		if err := c.spoil(at.path(keyFile)); err != nil {
			t.Logf("%s: refused at the writing: %v", c.name, err)
			continue
		}
		before := must[[]byte](t)(os.ReadFile(at.path(keyFile)))
		err := at.run()
		if err == nil || c.code != "" && warden.CodeOf(err) != c.code {
			t.Errorf("%s: %v [%s], want [%s]", c.name, err, warden.CodeOf(err), c.code)
		} else if !strings.Contains(err.Error(), at.path(keyFile)) || warden.HintOf(err) == "" {
			t.Errorf("%s: %q, hint %q: no file name or remedy", c.name, err, warden.HintOf(err))
		}
		if !bytes.Equal(before, must[[]byte](t)(os.ReadFile(at.path(keyFile)))) {
			t.Errorf("%s: the refusal changed the file", c.name)
		}
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	p := newPlace(t)
	p.start()
	second := newPlace(t)
	second.cfg.StateDir = p.cfg.StateDir
	if err := second.run(); warden.CodeOf(err) != warden.CodeInUse || warden.HintOf(err) == "" {
		t.Errorf("the same state directory: %v", err)
	}
	third := newPlace(t)
	third.cfg.Socket = p.cfg.Socket
	err := Run(t.Context(), third.cfg)
	if warden.CodeOf(err) != warden.CodeInUse || warden.HintOf(err) == "" {
		t.Errorf("the same socket: %v", err)
	}
	if p.info().State != StateUninitialized {
		t.Error("the first one does not answer any more")
	}
}

// A socket that nobody answers at is replaced; a file that is no socket is not ours to remove.
func TestStaleSocket(t *testing.T) {
	p := newPlace(t)
	l := must[*net.UnixListener](t)(net.ListenUnix("unix", &net.UnixAddr{Name: p.cfg.Socket, Net: "unix"}))
	l.SetUnlinkOnClose(false)
	l.Close()
	p.start()
	if fi := must[os.FileInfo](t)(os.Lstat(p.cfg.Socket)); fi.Mode().Perm() != 0o660 {
		t.Errorf("the socket's mode is %v", fi.Mode())
	}

	q := newPlace(t)
	if err := os.WriteFile(q.cfg.Socket, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), q.cfg); err == nil {
		t.Error("started")
	}
	if b, err := os.ReadFile(q.cfg.Socket); err != nil || string(b) != "precious" {
		t.Errorf("a file at the socket's path: %q, %v", b, err)
	}
}

// An order to wipe for who this node was before leaves who it is now alone.
func TestEvictionOfAnEarlierIdentity(t *testing.T) {
	at := newPlace(t)
	if err := os.MkdirAll(at.cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	id := newPKI(t, warden.NewID()).node(t, warden.NewID(), ca.RoleWorker)
	if err := writeIdentity(at.cfg.StateDir, id, nil); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{cfg: at.cfg, logger: at.cfg.Logger, ctx: t.Context(), failed: make(chan error, 1)}
	if err := d.load(); err != nil {
		t.Fatal(err)
	}
	d.evict(&api.EvictRequest{NodeId: warden.NewID()})
	if !exists(at.path(keyFile)) || d.info().State != StateRunning {
		t.Fatal("wiped")
	}
	d.evict(&api.EvictRequest{NodeId: id.NodeID})
	if exists(at.path(identityDir)) || d.info().State != StateEvicted {
		t.Error("not wiped")
	}
}

// A key file that is missing, as on a disk that was not mounted, costs nothing: neither state nor tasks are wiped for it.
func TestMissingKeyFileLosesNothing(t *testing.T) {
	p := newPlace(t)
	p.start()
	must[*api.InitReply](t)(p.local.Init(t.Context(), &api.InitRequest{Advertise: p.cfg.Listen}))
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if exists(p.path(unfinishedFile)) {
		t.Error("an init that finished left its mark")
	}
	aside := p.path("aside")
	if err := os.Rename(p.path(identityDir), aside); err != nil {
		t.Fatal(err)
	}
	err := p.run()
	if code(err) != warden.CodeCorrupt || !strings.Contains(err.Error(), "node.key") || warden.HintOf(err) == "" {
		t.Fatalf("starting without the key file = %v, want [corrupt], the file and a hint", err)
	}
	if !exists(p.path(raftDir)) {
		t.Fatal("the state is gone")
	}
	if err := os.Rename(aside, p.path(identityDir)); err != nil {
		t.Fatal(err)
	}
	p.start()
	if p.info().State != StateRunning {
		t.Errorf("with the key file back: %s", p.info().State)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(p.path(identityDir)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.path(unfinishedFile), nil, 0o600); err != nil { // as the hint says, or a crash in a leave
		t.Fatal(err)
	}
	p.start()
	if p.info().State != StateUninitialized || exists(p.path(raftDir)) || exists(p.path(unfinishedFile)) {
		t.Errorf("an unfinished leave was not finished: %s", p.info().State)
	}
}

// Tasks of either executor are such: without their daemon's identity nobody ends them, and wiping loses their records.
func TestMissingKeyFileLosesNoTasks(t *testing.T) {
	for _, dir := range []string{"tasks", "tasks/docker"} {
		p := newPlace(t)
		task := p.path(filepath.Join(dir, warden.NewID()))
		if err := os.MkdirAll(task, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := p.run(); code(err) != warden.CodeCorrupt || !strings.Contains(err.Error(), "tasks") || !exists(task) {
			t.Errorf("starting without the key file and with a task in %s = %v, want [corrupt] and the task", dir, err)
		}
	}
	p := newPlace(t)
	if err := os.MkdirAll(p.path("tasks/docker"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.path("tasks/docker/gate"), nil, 0o700); err != nil {
		t.Fatal(err)
	}
	p.start()
	if got := p.info().State; got != StateUninitialized {
		t.Errorf("without a task: %s", got)
	}
}
