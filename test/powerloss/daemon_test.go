package powerloss_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/daemon"
	"warden/executor"
	"warden/internal/courier"
	"warden/manager"
	"warden/store"
	"warden/store/sealedlog"
)

// idle is an executor that has no tasks.
type idle struct{}

func (idle) Name() string         { return "process" }
func (idle) SecretMounts() string { return "detached" }
func (idle) Start(context.Context, executor.Spec) (executor.Task, error) {
	return nil, warden.Errorf(warden.CodeUnsupported, "starting a task", "this test has none")
}
func (idle) Adopt(context.Context) ([]executor.Task, error) { return nil, nil }

const address = "127.0.0.1:2377" // in a network of the process's own

// manage is a daemon that runs in this process, and its clients.
type manage struct {
	base  string
	local api.LocalClient
	ctl   api.ControlClient
	stop  func() error
}

// run starts the daemon of base/state and waits until it answers. The process has a network of its own.
func run(base string) (*manage, error) {
	if err := loopback(); err != nil {
		return nil, err
	}
	return start(base, "state", address)
}

// start starts the daemon of a folder of base.
func start(base, folder, address string) (*manage, error) {
	socket := base + "." + folder
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- daemon.Run(ctx, daemon.Config{StateDir: filepath.Join(base, folder), Listen: address, Socket: socket, Hostname: folder, Version: "test", Executor: idle{},
			Logger: slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelWarn}))})
	}()
	cc, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		cancel()
		return nil, err
	}
	m := &manage{base: base, local: api.NewLocalClient(cc), ctl: api.NewControlClient(cc), stop: func() error {
		cancel()
		cc.Close()
		return <-ended
	}}
	answers := make(chan error, 1)
	go func() {
		_, err := m.local.Info(ctx, &api.InfoRequest{}, grpc.WaitForReady(true))
		answers <- err
	}()
	select {
	case err = <-answers:
	case err = <-ended:
		ended <- err
		err = fmt.Errorf("the daemon ended: %w", err)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return m, nil
}

// loopback brings up the loopback interface.
func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// await asks until ask returns nil.
func await(what string, ask func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-late:
			return fmt.Errorf("waiting until %s: %w", what, err)
		}
	}
}

func (m *manage) zone(name string) error {
	_, err := m.ctl.CreateZone(context.Background(), &api.CreateZoneRequest{Name: name})
	return err
}

// lockIs waits until the one manager has followed the lock to this unlock key, and its node key to this generation of DEKs.
func (m *manage) lockIs(keyID string, dek uint64) error {
	return await("the manager has followed its lock", func() error {
		r, err := m.ctl.List(context.Background(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
		if err != nil {
			return err
		}
		if len(r.Nodes) != 1 || len(r.Objects) != 1 {
			return errors.New("no manager is there")
		}
		n, record := r.Nodes[0], r.Objects[0].GetNode()
		if n.LockState != manager.LockUnlocked || n.UnlockKeyId != keyID || n.DekGeneration != dek || record.LeafDekGeneration != dek || len(record.NextKeyHash) > 0 {
			return fmt.Errorf("%v, leaf of generation %d, want %q and %d", n, record.LeafDekGeneration, keyID, dek)
		}
		return nil
	})
}

// The stages of a manager's lock: what its key file is sealed under. A stage's unlock key is in base/unlockN.
const stageClear, stageOn, stageRotated, stageOff = 0, 1, 2, 3

// newUnlockKey makes the unlock key of a stage.
func newUnlockKey(base string, stage int) (autolock.UnlockKey, error) {
	key, err := autolock.NewUnlockKey()
	if err != nil {
		return key, err
	}
	err = key.Text().Use(func(text []byte) error {
		return os.WriteFile(filepath.Join(base, fmt.Sprintf("unlock%d", stage)), bytes.TrimSpace(text), 0o600)
	})
	return key, err
}

// markStage keeps what all begins with that is sealed under the DEK of now.
func markStage(base string, stage int) error {
	_, id, err := readIdentity(base)
	if err != nil {
		return err
	}
	sealed, err := id.Keyring.Seal([]byte("x"), nil)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(base, fmt.Sprintf("mark%d", stage)), sealed[:5], 0o600)
}

// readIdentity opens the key file and returns which unlock key did it, stageClear for none.
func readIdentity(base string) (stage int, id autolock.Identity, err error) {
	kf, err := autolock.ReadKeyFile(filepath.Join(state(base), "identity", "node.key"))
	if err != nil {
		return 0, id, err
	}
	if !kf.Locked {
		id, err = kf.Identity()
		return stageClear, id, err
	}
	for _, stage := range []int{stageOn, stageRotated} {
		if key, err := unlockKey(base, stage); err == nil && key.Recipient().KeyID() == kf.KeyID {
			id, err := kf.Unlock(key)
			return stage, id, err
		}
	}
	return 0, id, fmt.Errorf("the key file is sealed under %s, which is no unlock key of ours", kf.KeyID)
}

func init() {
	sequences["init"] = func(base string, note func(string, ...any)) error {
		m, err := run(base)
		if err != nil {
			return err
		}
		if _, err := m.local.Init(context.Background(), &api.InitRequest{Advertise: address}); err != nil {
			return err
		}
		note("init")
		if err := markStage(base, stageClear); err != nil {
			return err
		}
		for _, name := range []string{"za", "zb"} {
			if err := m.zone(name); err != nil {
				return err
			}
			note("zone %s", name)
		}
		return m.stop()
	}
	sequences["rotations"] = func(base string, note func(string, ...any)) error {
		note("zone za")
		note("zone zb")
		m, err := run(base)
		if err != nil {
			return err
		}
		ctx, on, off := context.Background(), true, false
		if err := m.lockIs("", 1); err != nil {
			return err
		}
		for _, s := range []struct {
			stage int
			dek   uint64
			ask   func(to []byte) error
		}{
			{stageOn, 2, func(to []byte) error {
				_, err := m.ctl.UpdateCluster(ctx, &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: to})
				return err
			}},
			{stageRotated, 3, func(to []byte) error {
				_, err := m.ctl.RotateUnlockKey(ctx, &api.RotateUnlockKeyRequest{UnlockRecipient: to})
				return err
			}},
			{stageOff, 3, func([]byte) error {
				_, err := m.ctl.UpdateCluster(ctx, &api.UpdateClusterRequest{Autolock: &off})
				return err
			}},
		} {
			keyID, to := "", []byte(nil)
			if s.stage != stageOff {
				key, err := newUnlockKey(base, s.stage)
				if err != nil {
					return err
				}
				r := key.Recipient()
				keyID, to = r.KeyID(), r[:]
			}
			if err := s.ask(to); err != nil {
				return err
			}
			note("asked for %d", s.stage)
			if err := m.lockIs(keyID, s.dek); err != nil {
				return err
			}
			note("followed %d", s.stage)
			if err := markStage(base, s.stage); err != nil {
				return err
			}
			name := fmt.Sprintf("z%d", s.stage)
			if err := m.zone(name); err != nil {
				return err
			}
			note("zone %s", name)
		}
		return m.stop()
	}
	sequences["leave"] = func(base string, note func(string, ...any)) error {
		note("zone zb")
		m, err := run(base)
		if err != nil {
			return err
		}
		if _, err := m.local.Leave(context.Background(), &api.LeaveRequest{Force: true}); err != nil {
			return err
		}
		note("left")
		return m.stop()
	}
	// live starts the daemon on what a crash left, unlocks it, and wants it to follow its lock and take changes. The notes come in a file.
	sequences["live"] = func(base string, _ func(string, ...any)) error {
		notes, err := readNotes(base)
		if err != nil {
			return err
		}
		m, err := run(base)
		if err != nil {
			return err
		}
		err = m.check(notes)
		return errors.Join(err, m.stop())
	}
}

// check wants the daemon to be nobody, where that may be, or a manager that works.
func (m *manage) check(notes []string) error {
	ctx := context.Background()
	info, err := m.local.Info(ctx, &api.InfoRequest{})
	if err != nil {
		return err
	}
	zones := zonesOf(notes)
	switch info.State {
	case daemon.StateUninitialized:
		if slices.Contains(notes, "left") || !slices.Contains(notes, "init") && !slices.ContainsFunc(notes, isOfACluster) || isLeaving(notes) {
			_, err := m.local.Init(ctx, &api.InitRequest{Advertise: address}) // nothing of before is in the way
			return err
		}
		return errors.New("the cluster is gone")
	case daemon.StateLocked:
		stage := stageOn
		key, err := unlockKey(m.base, stageOn)
		if err != nil || key.Recipient().KeyID() != info.UnlockKeyId {
			stage = stageRotated
			if key, err = unlockKey(m.base, stageRotated); err != nil {
				return err
			}
		}
		if f := followed(notes); stage != f && stage != f+1 {
			return fmt.Errorf("it is sealed as in stage %d, followed was %d", stage, f)
		}
		err = key.Text().Use(func(text []byte) error {
			sealed, err := courier.Seal(info.UnlockInbox, text)
			if err == nil {
				_, err = m.local.Unlock(ctx, &api.UnlockRequest{SealedKey: sealed})
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if slices.Contains(notes, "left") {
		return fmt.Errorf("it left, and is %s", info.State)
	}
	var cluster *api.Cluster
	if err := await("it serves", func() error {
		r, err := m.ctl.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_CLUSTER})
		if err == nil && len(r.Objects) == 1 {
			cluster = r.Objects[0].GetCluster()
			return nil
		}
		return errors.Join(err, errors.New("no cluster"))
	}); err != nil {
		return err
	}
	r, err := m.ctl.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_ZONE})
	if err != nil {
		return err
	}
	for _, o := range r.Objects {
		zones = slices.DeleteFunc(zones, func(name string) bool { return name == o.GetZone().GetName() })
	}
	if len(zones) > 0 {
		return fmt.Errorf("zones %q are gone", zones)
	}
	if err := m.zone("after"); err != nil {
		return err
	}
	return m.lockIs(cluster.UnlockKeyId, cluster.DekGeneration)
}

func isOfACluster(note string) bool { return strings.HasPrefix(note, "zone ") }

// isLeaving reports whether it may have left, though that is not acknowledged.
func isLeaving(notes []string) bool { return slices.Equal(notes, []string{"zone zb"}) }

// zonesOf returns the zones that were acknowledged.
func zonesOf(notes []string) (zones []string) {
	for _, n := range notes {
		if name, ok := strings.CutPrefix(n, "zone "); ok {
			zones = append(zones, name)
		}
	}
	return zones
}

// followed returns the last stage that the manager's keys followed.
func followed(notes []string) (stage int) {
	for _, n := range notes {
		_, _ = fmt.Sscanf(n, "followed %d", &stage)
	}
	return stage
}

// readNotes returns the notes that live was given.
func readNotes(base string) (notes []string, err error) {
	b, err := os.ReadFile(filepath.Join(base, "notes"))
	if err == nil {
		err = json.Unmarshal(b, &notes)
	}
	return notes, err
}

// liveBy returns a check that runs in a process of its own.
func liveBy(sequence string) func(base string, notes []string) error {
	return func(base string, notes []string) error { return live(sequence, base, notes) }
}

func live(sequence, base string, notes []string) error {
	b, err := json.Marshal(notes)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(base, "notes"), b, 0o600); err != nil {
		return err
	}
	told, err := json.Marshal(child{sequence, base})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), childVar+"="+string(told), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) } // it says where it is
	cmd.WaitDelay = limit
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return private(base)
}

// checkManager opens what a manager left, as its daemon does, without starting it: the key file is as the notes want it, opens log and
// snapshots, and they hold all zones that were acknowledged; nothing is left under a DEK that was replaced.
func checkManager(base string, notes []string) error {
	if err := private(base); err != nil {
		return err
	}
	stage, id, err := readIdentity(base)
	if errors.Is(err, fs.ErrNotExist) && (slices.Contains(notes, "left") || len(notes) == 0 || isLeaving(notes)) {
		_, marked := os.Lstat(filepath.Join(state(base), "unfinished"))
		_, logged := os.Lstat(filepath.Join(state(base), "raft", "log.db"))
		if marked != nil && logged == nil {
			return errors.New("a state without its key file, and nothing says that it may go")
		}
		return nil
	}
	if err != nil {
		return err
	}
	if slices.Contains(notes, "left") {
		return errors.New("it left, and the key file is there")
	}
	f := followed(notes)
	if stage == stageClear && f >= stageRotated {
		stage = stageOff
	}
	if stage != f && stage != f+1 {
		return fmt.Errorf("the key file is of stage %d, followed was %d", stage, f)
	}
	for old := range f {
		if old != stageRotated || f != stageOff { // autolock off rotates nothing
			if err := gone(base, old); err != nil {
				return err
			}
		}
	}
	zones, err := zonesOnDisk(base, id)
	if err != nil {
		return err
	}
	for _, z := range zonesOf(notes) {
		if !slices.Contains(zones, z) {
			return fmt.Errorf("zone %s was acknowledged, found are %q", z, zones)
		}
	}
	return nil
}

// gone wants no file to hold what was sealed under the DEK of a stage.
func gone(base string, stage int) error {
	mark, err := os.ReadFile(filepath.Join(base, fmt.Sprintf("mark%d", stage)))
	if err != nil {
		return err
	}
	return filepath.WalkDir(state(base), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b, mark) {
			err = fmt.Errorf("%s holds what is sealed under the DEK of stage %d", path, stage)
		}
		return err
	})
}

// zonesOnDisk returns the names of all zones that the log or the newest snapshot makes.
func zonesOnDisk(base string, id autolock.Identity) (zones []string, err error) {
	logger := slog.New(slog.DiscardHandler)
	sn, err := sealedlog.OpenSnapshots(raftDir(base), id.ClusterID, id.NodeID, id.Keyring, 2, logger)
	if err != nil {
		return nil, err
	}
	list, err := sn.List()
	if err != nil {
		return nil, err
	}
	for _, m := range list {
		_, r, err := sn.Open(m.ID)
		if err != nil {
			return nil, err
		}
		s, err := store.ReadState(r)
		r.Close()
		if err != nil {
			return nil, err
		}
		for _, z := range s.View().Zones() {
			zones = append(zones, z.GetName())
		}
	}
	l, err := sealedlog.Open(raftDir(base), id.ClusterID, id.NodeID, id.Keyring, logger)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	first, err1 := l.FirstIndex()
	last, err2 := l.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	covered := uint64(0)
	if len(list) > 0 {
		covered = list[0].Index
	}
	if first > covered+1 {
		return nil, fmt.Errorf("the log begins at %d, the newest snapshot ends at %d", first, covered)
	}
	for i := max(first, 1); i <= last; i++ {
		var e raft.Log
		if err := l.GetLog(i, &e); err != nil {
			return nil, err
		}
		var c api.Command
		if e.Type != raft.LogCommand {
			continue
		}
		if err := proto.Unmarshal(e.Data, &c); err != nil {
			return nil, err
		}
		for _, o := range c.Operations {
			if z := o.GetPut().GetObject().GetZone(); z != nil {
				zones = append(zones, z.GetName())
			}
		}
	}
	return zones, nil
}

// prepareBy runs a sequence unharmed.
func prepareBy(sequence string) func(*testing.T, string) {
	return func(t *testing.T, base string) {
		s := &scene{t: t, attack: attack{isOwnNetwork: true}}
		s.trace(sequence, base, 0, nil)
	}
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: each daemon has a network of its own")
	}
}

// TestInit: wherever the making of a cluster is cut, there is none, or all of it.
func TestInit(t *testing.T) {
	needRoot(t)
	attack{sequence: "init", check: checkManager, live: liveBy("live"), kills: 6, lives: 4, isOwnNetwork: true}.run(t)
}

// TestRotations: wherever autolock is cut as it is turned on, as its key is rotated with the DEK and the node's leaf, and as it is turned off,
// the manager opens its state with the unlock key of before or the one after, goes on, and loses nothing.
func TestRotations(t *testing.T) {
	needRoot(t)
	attack{sequence: "rotations", prepare: prepareBy("init"), check: checkManager, live: liveBy("live"), kills: 8, losses: 200, lives: 6, isOwnNetwork: true}.run(t)
}

// TestLeave: wherever leaving is cut, the node is a manager that works, or nobody.
func TestLeave(t *testing.T) {
	needRoot(t)
	attack{sequence: "leave", prepare: prepareBy("init"), check: checkManager, live: liveBy("live"), kills: 6, lives: 4, isOwnNetwork: true}.run(t)
}
