package fuzz_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// commandID returns the same ID each time, so that the corpus keeps its meaning.
func commandID(n int) string { return fmt.Sprintf("%025d", n) }

func commandHash(n int) []byte {
	h := sha256.Sum256(fmt.Append(nil, n))
	return h[:]
}

// commands is a history that makes something of every kind; each applies to the state that those before it made.
var commands = sync.OnceValue(func() [][]byte {
	token := &api.Token{Id: "000000000001", Role: api.Role_ROLE_WORKER, ExpiresNs: 1e15, UsesMax: 3, Key: commandHash(1), RootHash: commandHash(2)}
	manager := storetest.Manager(commandID(1))
	manager.KeyHash = commandHash(3)
	worker := storetest.Node("w", token)
	worker.Id, worker.KeyHash, worker.JoinKeyHash = commandID(2), commandHash(4), commandHash(4)
	zone := &api.Zone{Id: commandID(3), Name: warden.DefaultZone}
	secret := &api.Secret{Id: commandID(4), Name: "s", CurrentVersion: 1, Zones: []string{"default"}}
	service := storetest.Service("web", "default", storetest.Reference(secret))
	service.Id = commandID(5)
	task := storetest.Task(service, 1)
	task.Id = commandID(6)
	placed := storetest.Placed(task, worker.Id)
	rotated := api.Clone(secret)
	rotated.Meta, rotated.CurrentVersion = &api.Meta{Version: 1}, 2
	updated := api.Clone(service)
	updated.Meta, updated.Spec.Task.Secrets[0].Version = &api.Meta{Version: 1}, 0
	updated.Spec.Update = &api.UpdatePolicy{Parallelism: 2, DelayNs: 1e9}
	first := storetest.SecretVersion(secret, 1)
	first.Meta = &api.Meta{Version: 1}
	removed := api.Clone(worker)
	removed.Meta = &api.Meta{Version: 2}
	var out [][]byte
	for i, ops := range [][]*api.Operation{
		{store.Put(storetest.Cluster(commandID(0)), 0), store.Put(zone, 0), store.Put(manager, 0)},
		{store.Put(token, 0)},
		storetest.Join(worker),
		{store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0)},
		{store.Put(service, 0), store.Put(task, 0)},
		{store.Put(placed, 1)},
		{storetest.Report(placed, api.TaskState_TASK_RUNNING),
			{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: worker.Id, Description: &api.NodeDescription{Os: "linux"}, Ip: "10.0.0.1"}}}},
		{store.Put(rotated, 1), store.Put(storetest.SecretVersion(secret, 2), 0)},
		{store.Put(updated, 1)},
		{storetest.Report(placed, api.TaskState_TASK_COMPLETE)},
		{store.Delete(first)},
		{store.Put(&api.Tombstone{Id: worker.Id, Role: worker.Role}, 0), store.Delete(removed)},
	} {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&api.Command{Actor: &api.Actor{Kind: "system"}, RequestId: fmt.Sprint("r", i),
			TimeNs: int64(i) * 1e9, Operations: ops})
		if err != nil {
			panic(err)
		}
		out = append(out, b)
	}
	return out
})

// replay applies the first n commands of the history.
func replay(t testing.TB, n int) *store.State {
	s := store.NewState()
	for i, b := range commands()[:n] {
		if r, _ := s.Apply(uint64(i+1), b); r.GetCode() != "" {
			t.Fatalf("command %d of the history: %s [%s]", i, r.GetText(), r.GetCode())
		}
	}
	return s
}

func stateBytes(t testing.TB, s *store.State) []byte {
	var b bytes.Buffer
	if err := s.View().Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// FuzzCommand applies any bytes as a committed command, at every point of a history, to a state and to one restored from its
// snapshot: no panic, the same result, the same state; a refusal says why and changes no record.
func FuzzCommand(f *testing.F) {
	replay(f, len(commands())) // the seeds are valid, or this fails
	for i, b := range commands() {
		f.Add(uint8(i), b)
	}
	f.Fuzz(func(t *testing.T, at uint8, data []byte) {
		s := replay(t, int(at)%(len(commands())+1))
		before := s.View()
		twin, err := store.ReadState(bytes.NewReader(stateBytes(t, s)))
		if err != nil {
			t.Fatal(err)
		}
		index := before.Index() + 1
		r, keys := s.Apply(index, data)
		r2, _ := twin.Apply(index, data)
		if !proto.Equal(r, r2) {
			t.Fatalf("results differ: %v and %v", r, r2)
		}
		if (r.GetCode() == "") != (r.GetText() == "") || r.GetCode() != "" && len(keys) > 0 {
			t.Fatalf("result %v changed %v", r, keys)
		}
		if s.View().Time() < before.Time() || s.View().Index() != index {
			t.Fatal("time or index fell")
		}
		if !bytes.Equal(stateBytes(t, s), stateBytes(t, twin)) {
			t.Fatal("states differ")
		}
		for _, k := range keys {
			if before.Object(k.Kind, k.ID) == nil && s.View().Object(k.Kind, k.ID) == nil && len(r.GetVersions()) < 2 {
				t.Fatalf("%v changed, and is neither before nor after", k)
			}
		}
	})
}

// FuzzSnapshot restores any bytes: no panic, and what is accepted is written again as it is meant: reading that gives the
// same bytes.
func FuzzSnapshot(f *testing.F) {
	for n := range len(commands()) + 1 {
		b := stateBytes(f, replay(f, n))
		if _, err := store.ReadState(bytes.NewReader(b)); err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := store.ReadState(bytes.NewReader(data))
		if err != nil {
			if code := warden.CodeOf(err); code != warden.CodeCorrupt && code != warden.CodeUnsupported {
				t.Fatalf("refused with [%s]: %v", code, err)
			}
			return
		}
		once := stateBytes(t, s)
		again, err := store.ReadState(bytes.NewReader(once))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(once, stateBytes(t, again)) {
			t.Fatal("a restored state is written in two ways")
		}
		again.Apply(again.View().Index()+1, commands()[0])
	})
}
