package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/internal/courier"
	"warden/internal/durable"
	"warden/internal/leaktest"
	"warden/manager"
	"warden/store/sealedlog"
)

// child is what a daemon in a process of its own is told, so that a test can kill it between two writes.
type child struct {
	StateDir, Listen, Socket string
	Points                   string // file: exists while points count, and takes their names
	KillAt                   int    // the process kills itself at this point, counted from 1; 0: never
}

const childEnv = "WARDEN_TEST_CHILD"

func TestMain(m *testing.M) {
	if told := os.Getenv(childEnv); told != "" {
		var c child
		if err := json.Unmarshal([]byte(told), &c); err != nil {
			panic(err)
		}
		c.run()
		return
	}
	leaktest.Main(m)
}

func (c child) run() {
	n := 0
	point := func(name string) error {
		f, err := os.OpenFile(c.Points, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return nil
		}
		defer f.Close()
		n++
		fmt.Fprintln(f, name)
		if n == c.KillAt {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}
	durable.SetFault(func(name string) error {
		if name == "before rename" || name == "after rename" { // nothing else of a write leaves another state behind
			return point(name)
		}
		return nil
	})
	step = func(name string) { _ = point(name) }
	err := Run(context.Background(), Config{StateDir: c.StateDir, Listen: c.Listen, Socket: c.Socket, Hostname: "h", Version: "test", Executor: idle{}, Logger: slog.New(slog.DiscardHandler)})
	panic(err)
}

// spawn runs the place's daemon in a process of its own. ended is closed when it has ended.
func (p *place) spawn(killAt int) (ended <-chan struct{}, kill func()) {
	p.t.Helper()
	told, err := json.Marshal(child{StateDir: p.cfg.StateDir, Listen: p.cfg.Listen, Socket: p.cfg.Socket, Points: p.points(), KillAt: killAt})
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(told))
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	kill = func() { _ = cmd.Process.Kill(); <-done }
	p.t.Cleanup(kill)
	cc := must[*grpc.ClientConn](p.t)(grpc.NewClient("unix:"+p.cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials())))
	p.t.Cleanup(func() { cc.Close() })
	p.local, p.ctl = api.NewLocalClient(cc), api.NewControlClient(cc)
	must[*api.InfoReply](p.t)(p.local.Info(p.t.Context(), &api.InfoRequest{}, grpc.WaitForReady(true)))
	return done, kill
}

func (p *place) points() string { return filepath.Join(filepath.Dir(p.cfg.StateDir), "points") }

func (p *place) newKey() (autolock.UnlockKey, []byte) {
	key := must[autolock.UnlockKey](p.t)(autolock.NewUnlockKey())
	to := key.Recipient()
	return key, to[:]
}

func (p *place) unlock(key autolock.UnlockKey) error {
	sealed := must[[]byte](p.t)(courier.Seal(p.info().UnlockInbox, []byte(textOf(key))))
	return fails(p.local.Unlock(p.t.Context(), &api.UnlockRequest{SealedKey: sealed}))
}

// poll asks until it is true, or fails the test after a minute.
func poll(t testing.TB, what string, ask func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for stop := time.Now().Add(time.Minute); !ask(); <-tick.C {
		if time.Now().After(stop) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// state returns what the leader knows of the one manager; nil where it does not answer.
func (p *place) state() *api.NodeState {
	r, err := p.ctl.List(p.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
	if err != nil || len(r.Nodes) == 0 {
		return nil
	}
	return r.Nodes[0]
}

// renewed reports whether the manager's node key is of DEK generation 2.
func (p *place) renewed() bool {
	r, err := p.ctl.List(p.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
	return err == nil && r.Objects[0].GetNode().LeafDekGeneration == 2 && len(r.Objects[0].GetNode().NextKeyHash) == 0
}

// isRotated reports whether the cluster's unlock key is this one.
func (p *place) isRotated(keyID string) (is bool) {
	p.t.Helper()
	poll(p.t, "the manager serves", func() bool {
		r, err := p.ctl.List(p.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_CLUSTER})
		is = err == nil && r.Objects[0].GetCluster().UnlockKeyId == keyID
		return err == nil
	})
	return is
}

func (p *place) awaitLock(keyID string, dek uint64) {
	p.t.Helper()
	var last *api.NodeState
	defer func() {
		if p.t.Failed() {
			p.t.Logf("last: %v", last)
		}
	}()
	poll(p.t, fmt.Sprintf("sealed under %q with DEK %d", keyID, dek), func() bool {
		last = p.state()
		return last.GetLockState() == manager.LockUnlocked && last.GetUnlockKeyId() == keyID && last.GetDekGeneration() == dek
	})
}

func (p *place) read(key autolock.UnlockKey) (autolock.Identity, error) {
	kf, err := autolock.ReadKeyFile(p.path(keyFile))
	if err != nil || !kf.Locked {
		id, _ := kf.Identity()
		return id, err
	}
	return kf.Unlock(key)
}

// mark returns the bytes that all sealed under the keyring's primary begins with.
func mark(t testing.TB, k *autolock.Keyring) []byte {
	return must[[]byte](t)(k.Seal([]byte("x"), nil))[:5]
}

// holds returns the files below the state directory that hold the bytes.
func (p *place) holds(b []byte) (files []string) {
	p.t.Helper()
	err := filepath.WalkDir(p.cfg.StateDir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if bytes.Contains(content, b) {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return files
}

// newAutolocked returns a stopped place with a cluster of its own, with some records.
func newAutolocked(t testing.TB) (*place, autolock.UnlockKey, string) {
	p := newPlace(t)
	p.start()
	key, to := p.newKey()
	made := must[*api.InitReply](t)(p.local.Init(t.Context(), &api.InitRequest{Autolock: true, Advertise: p.cfg.Listen, UnlockRecipient: to}))
	for i := range 5 {
		must[*api.ChangeReply](t)(p.ctl.CreateZone(t.Context(), &api.CreateZoneRequest{Name: fmt.Sprintf("zone%d", i)}))
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	return p, key, made.UnlockKeyId
}

// I9: killed at any point of a rotation, the key file opens with the old key or the new, and the next start goes on to where nothing is
// sealed under older keys and the old unlock key opens nothing.
func TestI9KilledInARotation(t *testing.T) {
	var points []string
	for n := 0; n == 0 || n <= len(points); n++ {
		name := "no kill"
		if n > 0 {
			name = fmt.Sprintf("%02d %s", n, points[n-1])
		}
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			if n > 0 { // the points are known by then; they wait more than they work
				t.Parallel()
			}
			p, old, oldID := newAutolocked(t)
			before := must[autolock.Identity](t)(p.read(old))
			ended, kill := p.spawn(n)
			if err := p.unlock(old); err != nil {
				t.Fatal(err)
			}
			poll(t, "the manager serves", func() bool { return p.state().GetLockState() == manager.LockUnlocked })
			poll(t, "the file is written", func() bool { return os.WriteFile(p.points(), nil, 0o600) == nil })
			key, to := p.newKey()
			newID := key.Recipient().KeyID()
			_, err := p.ctl.RotateUnlockKey(t.Context(), &api.RotateUnlockKeyRequest{UnlockRecipient: to})
			if n == 0 {
				if err != nil {
					t.Fatal(err)
				}
				p.awaitLock(newID, 2)
				poll(t, "the node key is renewed", p.renewed)
				points = strings.Split(strings.TrimSpace(string(must[[]byte](t)(os.ReadFile(p.points())))), "\n")
				if want := "after the sealer knows that it is cleaned"; !slices.Contains(points, want) || len(points) > 40 {
					t.Fatalf("%d points %q, want one %q", len(points), points, want)
				}
			}
			poll(t, "the process has killed itself, or come to the end", func() bool { // a renewal may take a point more or less
				select {
				case <-ended:
					return true
				default:
					return p.state().GetLockState() == manager.LockUnlocked && p.state().GetUnlockKeyId() == newID && p.renewed()
				}
			})
			kill()
			os.Remove(p.points())

			p.start()
			info := p.info()
			if info.State != StateLocked || info.UnlockKeyId != oldID && info.UnlockKeyId != newID {
				t.Fatalf("after the kill: %s under %s, want %s or %s", info.State, info.UnlockKeyId, oldID, newID)
			}
			right, wrong := old, key
			if info.UnlockKeyId == newID {
				right, wrong = key, old
			}
			if err := p.unlock(wrong); code(err) != warden.CodeWrongUnlock {
				t.Errorf("the other key: %v", err)
			}
			if err := p.unlock(right); err != nil {
				t.Fatal(err)
			}
			if err != nil && !p.isRotated(newID) { // killed before it was committed, as the manager wrote something else: asked for again
				must[*api.ChangeReply](t)(p.ctl.RotateUnlockKey(t.Context(), &api.RotateUnlockKeyRequest{UnlockRecipient: to}))
			}
			p.awaitLock(newID, 2)
			if r := must[*api.ListReply](t)(p.ctl.List(t.Context(), &api.ListRequest{Kind: api.Kind_KIND_ZONE})); len(r.Objects) != 6 {
				t.Errorf("%d zones, want 6", len(r.Objects))
			}
			poll(t, "the node key is renewed", p.renewed)
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			p.closedTo(t, old, before, key)
		})
	}
}

// closedTo wants the disk to say nothing to who has the old unlock key and all that it opened before.
func (p *place) closedTo(t *testing.T, old autolock.UnlockKey, before autolock.Identity, now autolock.UnlockKey) {
	t.Helper()
	if _, err := p.read(old); warden.CodeOf(err) != warden.CodeWrongUnlock {
		t.Errorf("the old key on the key file: %v", err)
	}
	id := must[autolock.Identity](t)(p.read(now))
	if id.Keyring.Keys() != 1 || id.DEKGeneration != 2 || id.LockGeneration != 2 || bytes.Equal(id.Chain[0], before.Chain[0]) {
		t.Errorf("%d DEKs, generations %d and %d, the leaf is the old one: %t", id.Keyring.Keys(), id.LockGeneration, id.DEKGeneration, bytes.Equal(id.Chain[0], before.Chain[0]))
	}
	if files := p.holds(mark(t, before.Keyring)); len(files) != 0 {
		t.Errorf("%v hold the ID of the old DEK", files)
	}
	if files := p.holds(mark(t, id.Keyring)); len(files) == 0 {
		t.Error("no file holds the ID of the new DEK: the search finds nothing at all")
	}
	if log, err := sealedlog.Open(p.path(raftDir), id.ClusterID, id.NodeID, before.Keyring, slog.New(slog.DiscardHandler)); err == nil {
		log.Close()
		t.Error("the old DEK opens the log")
	}
	log, err := sealedlog.Open(p.path(raftDir), id.ClusterID, id.NodeID, id.Keyring, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("the new DEK on the log: %v", err)
	}
	log.Close()
}

// Autolock on, off and on again on a running manager, and many rotations at once: what the file is sealed under is what the cluster says last.
func TestLockFollowsALiveCluster(t *testing.T) {
	p := newPlace(t)
	p.start()
	must[*api.InitReply](t)(p.local.Init(t.Context(), &api.InitRequest{Advertise: p.cfg.Listen}))
	clear := must[autolock.Identity](t)(p.read(autolock.UnlockKey{}))
	on, off := true, false
	key, to := p.newKey()
	must[*api.ChangeReply](t)(p.ctl.UpdateCluster(t.Context(), &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: to}))
	p.awaitLock(key.Recipient().KeyID(), 2)
	if files := append(p.holds(mark(t, clear.Keyring)), p.holds([]byte("PRIVATE KEY"))...); len(files) != 0 {
		t.Errorf("%v hold what was in clear before", files)
	}
	must[*api.ChangeReply](t)(p.ctl.UpdateCluster(t.Context(), &api.UpdateClusterRequest{Autolock: &off}))
	p.awaitLock("", 2)
	for range 5 {
		_, to = p.newKey()
		must[*api.ChangeReply](t)(p.ctl.UpdateCluster(t.Context(), &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: to}))
		key, to = p.newKey()
		must[*api.ChangeReply](t)(p.ctl.RotateUnlockKey(t.Context(), &api.RotateUnlockKeyRequest{UnlockRecipient: to}))
		must[*api.ChangeReply](t)(p.ctl.UpdateCluster(t.Context(), &api.UpdateClusterRequest{Autolock: &off}))
	}
	must[*api.ChangeReply](t)(p.ctl.UpdateCluster(t.Context(), &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: to}))
	p.awaitLock(key.Recipient().KeyID(), 13)
	if id := must[autolock.Identity](t)(p.read(key)); id.Keyring.Keys() != 1 {
		t.Errorf("%d DEKs are left", id.Keyring.Keys())
	}
}

// A disk that is full in the middle leaves the old file and says so; the rotation goes on when there is room again.
func TestRotationOnAFullDisk(t *testing.T) {
	p := newPlace(t)
	p.start()
	old, to := p.newKey()
	must[*api.InitReply](t)(p.local.Init(t.Context(), &api.InitRequest{Autolock: true, Advertise: p.cfg.Listen, UnlockRecipient: to}))
	undo := durable.SetFault(func(name string) error {
		if name == "before write" {
			return syscall.ENOSPC
		}
		return nil
	})
	key, to := p.newKey()
	must[*api.ChangeReply](t)(p.ctl.RotateUnlockKey(t.Context(), &api.RotateUnlockKeyRequest{UnlockRecipient: to}))
	poll(t, "the old key shows", func() bool { return p.state().GetLockState() == manager.LockOldKey })
	if got := p.state(); got.UnlockKeyId != old.Recipient().KeyID() || got.DekGeneration != 1 {
		t.Errorf("on a full disk: %v", got)
	}
	poll(t, "the daemon says why", func() bool { return strings.Contains(p.info().Message, "no space left") })
	if _, err := p.read(old); err != nil {
		t.Errorf("the old key on the old file: %v", err)
	}
	undo()
	p.awaitLock(key.Recipient().KeyID(), 2)
	poll(t, "the trouble is over", func() bool { return p.info().Message == "" })
}

// A renewal may bring a newer lock than the replica's record has as yet: what it sealed is not sealed back, here even into the clear,
// unless the replica has caught up since and still says otherwise.
func TestRenewalAheadOfTheReplica(t *testing.T) {
	p := newPlace(t)
	p.start()
	must[*api.InitReply](t)(p.local.Init(t.Context(), &api.InitRequest{Advertise: p.cfg.Listen}))
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{cfg: p.cfg, logger: p.cfg.Logger, ctx: t.Context(), failed: make(chan error, 1)}
	if err := d.load(); err != nil {
		t.Fatal(err)
	}
	defer d.halt()
	poll(t, "the manager is ready", d.manager.Ready)
	d.keeper.end()
	i, sealer := d.identity, d.sealer
	key, _ := p.newKey()
	to := key.Recipient()
	if _, err := i.relock(sealer, lock{&to, 2, 2}, time.Now()); err != nil { // as install does
		t.Fatal(err)
	}
	k := newLockKeeper(d, d.manager, i, sealer)
	k.caughtUp = func(time.Time) bool { return false }
	if err := k.follow(true); err != nil {
		t.Fatal(err)
	}
	kf := must[*autolock.KeyFile](t)(autolock.ReadKeyFile(p.path(keyFile)))
	if !kf.Locked || *kf.Recipient() != to {
		t.Fatalf("sealed to %q, want %s", kf.KeyID, to)
	}
	if id := must[autolock.Identity](t)(p.read(key)); id.Keyring.Keys() != 1 || id.LockGeneration != 2 {
		t.Errorf("%d DEKs, generation %d: want the re-sealing done", id.Keyring.Keys(), id.LockGeneration)
	}
	if d.manager.CaughtUpSince(time.Now().Add(time.Hour)) {
		t.Error("the replica has caught up with what is to come")
	}
	k.caughtUp = d.manager.CaughtUpSince
	poll(t, "the record counts", func() bool {
		if err := k.follow(true); err != nil {
			t.Fatal(err)
		}
		id, _ := p.read(key)
		return id.LockGeneration == 1
	})
}

// Where an unlocked manager fails to start after its key file was sealed to another key, as a peer said, the other key is asked for.
func TestUnlockOfAFileThatWasSealedMeanwhile(t *testing.T) {
	p, old, oldID := newAutolocked(t)
	p.start()
	if got := p.info().UnlockKeyId; got != oldID {
		t.Fatalf("asks for %s, want %s", got, oldID)
	}
	key, _ := p.newKey()
	to := key.Recipient()
	if err := autolock.WriteKeyFile(p.path(keyFile), must[autolock.Identity](t)(p.read(old)), &to); err != nil {
		t.Fatal(err)
	}
	l := must[net.Listener](t)(net.Listen("tcp", p.cfg.Listen))
	err := p.unlock(old)
	l.Close()
	if code(err) != warden.CodeUnavailable {
		t.Fatalf("with the port taken: %v", err)
	}
	if got := p.info().UnlockKeyId; got != to.KeyID() {
		t.Errorf("asks for %s, want %s", got, to)
	}
	if err := p.unlock(old); code(err) != warden.CodeWrongUnlock {
		t.Errorf("the old key: %v", err)
	}
	if err := p.unlock(key); err != nil {
		t.Error(err)
	}
}
