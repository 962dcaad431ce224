package fuzz_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

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

// What a step of FuzzApply does.
const (
	stepRaw     = iota // any bytes: two that say how many, and them
	stepHistory        // a command of the history as it is
	stepChanged        // one with fields that were changed
	stepRestore        // the second replica starts anew from its snapshot
	steps
)

// FuzzApply applies sequences of committed bytes, and of commands of a history with fields changed, to two replicas, one of which
// is restored from a snapshot at the start and wherever the input says: no panic, equal results, equal bytes at the end. A result says
// why where it refuses, names exactly the records that changed, and the laws of the records hold after each.
func FuzzApply(f *testing.F) {
	var starts [][]byte
	for n := range len(commands()) + 1 {
		starts = append(starts, stateBytes(f, replay(f, n)))
	}
	whole := []byte{0}
	for i, b := range commands() {
		f.Add(append([]byte{byte(i), stepRaw, byte(len(b)), byte(len(b) >> 8)}, b...))
		f.Add([]byte{byte(i + 1), stepRestore, stepChanged, byte(i), 1, byte(3 * i), 0, 2, stepChanged, byte(i), 0, byte(5 * i), 0, 1, byte(7 * i), 0, 3, stepRestore})
		whole = append(whole, stepHistory, byte(i), stepRestore)
	}
	f.Add(whole)
	f.Fuzz(func(t *testing.T, data []byte) {
		in := &tape{data}
		at := in.pick(len(commands()) + 1)
		a := replay(t, at)
		b, err := store.ReadState(bytes.NewReader(starts[at]))
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n < 40 && !in.done(); n++ {
			var cmd []byte
			switch in.pick(steps) {
			case stepRaw:
				cmd = in.bytes(in.pick(256) + in.pick(256)<<8)
			case stepHistory:
				cmd = commands()[in.pick(len(commands()))]
			case stepChanged:
				cmd = changed(t, in, a.View(), n)
			case stepRestore:
				if b, err = store.ReadState(bytes.NewReader(stateBytes(t, b))); err != nil {
					t.Fatal(err)
				}
				continue
			}
			applyBoth(t, a, b, cmd)
		}
		if !bytes.Equal(stateBytes(t, a), stateBytes(t, b)) {
			t.Fatal("the states differ")
		}
		restored, err := store.ReadState(bytes.NewReader(stateBytes(t, b)))
		if err != nil || !bytes.Equal(stateBytes(t, a), stateBytes(t, restored)) {
			t.Fatalf("the state is not what its snapshot restores: %v", err)
		}
	})
}

// applyBoth applies the command to both replicas.
func applyBoth(t *testing.T, a, b *store.State, cmd []byte) {
	before := a.View()
	index := before.Index() + 1
	r, keys := a.Apply(index, bytes.Clone(cmd))
	r2, keys2 := b.Apply(index, bytes.Clone(cmd))
	if !proto.Equal(r, r2) || !slices.Equal(keys, keys2) {
		t.Fatalf("results differ: %v, %v and %v, %v", r, keys, r2, keys2)
	}
	if (r.GetCode() == "") != (r.GetText() == "") || r.GetCode() != "" && (len(keys) > 0 || !codes()[warden.Code(r.GetCode())]) {
		t.Fatalf("result %v changed %v", r, keys)
	}
	v := a.View()
	if v.Time() < before.Time() || v.Index() != index {
		t.Fatal("time or index fell")
	}
	was, is := records(before), records(v)
	differ := diff(was, is)
	for _, k := range keys {
		if !differ[k] && is[k] != nil {
			t.Fatalf("%v is said to have changed", k)
		}
		delete(differ, k)
		if r := is[k]; r != nil && r.GetMeta().GetIndex() != index {
			t.Fatalf("%v changed at %d, and says %v", k, index, r.GetMeta())
		}
	}
	if len(differ) > 0 {
		t.Fatalf("%v changed unsaid", differ)
	}
	if r.GetCode() == "" && len(keys) > 0 {
		expected(t, cmd, was)
	}
	storetest.CheckLaws(t, v)
}

// expected wants that a command of one operation, which was applied, expected the version that was there.
func expected(t *testing.T, data []byte, was map[store.Key]store.Record) {
	cmd := &api.Command{}
	if proto.Unmarshal(data, cmd) != nil || len(cmd.Operations) != 1 {
		return
	}
	if p := cmd.Operations[0].GetPut(); p != nil {
		kind, r := store.Unwrap(p.Object)
		if now := versionOf(was[store.Key{Kind: kind, ID: r.GetId()}]); p.Expect != now {
			t.Fatalf("%v was put over version %d", p, now)
		}
	} else if d := cmd.Operations[0].GetDelete(); d != nil {
		if now := versionOf(was[store.Key{Kind: d.Kind, ID: d.Id}]); d.Expect != now {
			t.Fatalf("%v was done to version %d", d, now)
		}
	}
}

// changed returns a command of the history with a request ID of its own, where asked for with the versions that records have now,
// and then with up to three fields changed.
func changed(t *testing.T, in *tape, v *store.View, n int) []byte {
	cmd := &api.Command{}
	if err := proto.Unmarshal(commands()[in.pick(len(commands()))], cmd); err != nil {
		t.Fatal(err)
	}
	choice := in.pick(8)
	cmd.RequestId = fmt.Sprint("c", n)
	if choice&4 == 0 {
		for _, o := range cmd.Operations {
			if p := o.GetPut(); p != nil {
				kind, r := store.Unwrap(p.Object)
				_, now := store.Unwrap(v.Object(kind, r.GetId()))
				p.Expect = versionOf(now)
			} else if d := o.GetDelete(); d != nil {
				_, now := store.Unwrap(v.Object(d.Kind, d.Id))
				d.Expect = versionOf(now)
			}
		}
	}
	for range choice & 3 {
		all := fieldsOf(cmd.ProtoReflect(), nil)
		alter(all[(in.pick(256)+in.pick(256)<<8)%len(all)], in.pick(256))
	}
	out, err := proto.MarshalOptions{Deterministic: true}.Marshal(cmd)
	if err != nil { // text that is no UTF-8 would be one: alter writes none
		t.Fatal(err)
	}
	return out
}

func versionOf(r store.Record) uint64 {
	if r == nil {
		return 0
	}
	return r.GetMeta().GetVersion()
}

// field is one field of one message within a command, set or not.
type field struct {
	m protoreflect.Message
	f protoreflect.FieldDescriptor
}

func fieldsOf(m protoreflect.Message, out []field) []field {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.ContainingOneof() != nil && !m.Has(f) {
			continue
		}
		out = append(out, field{m, f})
		switch {
		case f.IsMap() || f.Message() == nil || !m.Has(f):
		case f.IsList():
			for j := range m.Get(f).List().Len() {
				out = fieldsOf(m.Get(f).List().Get(j).Message(), out)
			}
		default:
			out = fieldsOf(m.Get(f).Message(), out)
		}
	}
	return out
}

// alter gives the field another value, mostly one that means something elsewhere in the history, or an extreme one.
func alter(f field, choice int) {
	if f.f.IsList() && f.m.Get(f.f).List().Len() > 0 && choice%4 > 0 { // twice the first, or one less
		l := f.m.Mutable(f.f).List()
		if choice%4 == 1 {
			l.Truncate(l.Len() - 1)
			return
		}
		first := l.Get(0)
		if f.f.Message() != nil {
			first = protoreflect.ValueOfMessage(proto.Clone(first.Message().Interface()).ProtoReflect())
		}
		l.Append(first)
		return
	}
	if f.f.IsList() || f.f.IsMap() || f.f.Message() != nil || choice == 255 {
		if choice%2 == 0 && f.f.Message() != nil && !f.f.IsList() && !f.f.IsMap() {
			f.m.Mutable(f.f) // there, and empty where it was not
		} else {
			f.m.Clear(f.f)
		}
		return
	}
	ints := []int64{0, 1, 2, 3, -1, 1 << 50, math.MaxInt64, math.MinInt64, 1e9, 1e15}
	i := ints[choice%len(ints)]
	switch f.f.Kind() {
	case protoreflect.BoolKind:
		f.m.Set(f.f, protoreflect.ValueOfBool(choice%2 == 0))
	case protoreflect.EnumKind:
		enums := []int32{0, 1, 2, 3, 10, 20, 30, 70, 80, 110, 120, -1, 1 << 30}
		f.m.Set(f.f, protoreflect.ValueOfEnum(protoreflect.EnumNumber(enums[choice%len(enums)])))
	case protoreflect.Int32Kind:
		f.m.Set(f.f, protoreflect.ValueOfInt32(int32(i)))
	case protoreflect.Int64Kind:
		f.m.Set(f.f, protoreflect.ValueOfInt64(i))
	case protoreflect.Uint32Kind:
		f.m.Set(f.f, protoreflect.ValueOfUint32(uint32(i)))
	case protoreflect.Uint64Kind:
		f.m.Set(f.f, protoreflect.ValueOfUint64(uint64(i)))
	case protoreflect.StringKind:
		texts := []string{"", "x", "s", "web", "default", "pci", "000000000001", strings.Repeat("é", 600), "a\x00b", "/", "..",
			commandID(0), commandID(1), commandID(2), commandID(3), commandID(4), commandID(5), commandID(6), commandID(4) + "@1"}
		f.m.Set(f.f, protoreflect.ValueOfString(texts[choice%len(texts)]))
	case protoreflect.BytesKind:
		bytes := [][]byte{nil, {1}, commandHash(1), commandHash(2), commandHash(3), commandHash(4), commandHash(5), make([]byte, 33), make([]byte, 9<<10)}
		f.m.Set(f.f, protoreflect.ValueOfBytes(bytes[choice%len(bytes)]))
	}
}

// codes returns all that errors may have, as the source declares them.
var codes = sync.OnceValue(func() map[warden.Code]bool {
	src, err := os.ReadFile("../errors.go")
	if err != nil {
		panic(err)
	}
	out := map[warden.Code]bool{}
	for _, m := range regexp.MustCompile(`Code += "([a-z-]+)"`).FindAllSubmatch(src, -1) {
		out[warden.Code(m[1])] = true
	}
	return out
})

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
