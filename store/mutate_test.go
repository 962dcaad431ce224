package store_test

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"pgregory.net/rapid"

	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// spot is one field of one message within a command.
type spot struct {
	m protoreflect.Message
	f protoreflect.FieldDescriptor
}

// spots lists all fields below m, set or not.
func spots(m protoreflect.Message) []spot {
	var out []spot
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.ContainingOneof() != nil && !m.Has(f) {
			continue
		}
		out = append(out, spot{m, f})
		switch {
		case f.IsMap() || f.Message() == nil || !m.Has(f):
		case f.IsList():
			for j := range m.Get(f).List().Len() {
				out = append(out, spots(m.Get(f).List().Get(j).Message())...)
			}
		default:
			out = append(out, spots(m.Get(f).Message())...)
		}
	}
	return out
}

// mutate sets a random field to an extreme value.
func mutate(t *rapid.T, m protoreflect.Message) {
	all := spots(m)
	s := all[rapid.IntRange(0, len(all)-1).Draw(t, "field")]
	n := rapid.IntRange(0, 5).Draw(t, "value")
	if n == 0 {
		s.m.Clear(s.f)
		return
	}
	if s.f.IsList() || s.f.IsMap() {
		if s.f.IsList() && s.m.Get(s.f).List().Len() > 0 { // twice the last
			l := s.m.Mutable(s.f).List()
			last := l.Get(l.Len() - 1)
			if s.f.Message() != nil {
				last = protoreflect.ValueOfMessage(proto.Clone(last.Message().Interface()).ProtoReflect())
			}
			l.Append(last)
		}
		return
	}
	ints := []int64{0, 1, -1, 3, math.MaxInt64, math.MinInt64}
	texts := []string{"", "x", strings.Repeat("é", 600), "pci", w0, "a\x00b"}
	switch s.f.Kind() {
	case protoreflect.BoolKind:
		s.m.Set(s.f, protoreflect.ValueOfBool(n%2 == 0))
	case protoreflect.EnumKind:
		s.m.Set(s.f, protoreflect.ValueOfEnum(protoreflect.EnumNumber([]int32{0, 1, 2, 70, 110, -1}[n])))
	case protoreflect.Int32Kind:
		s.m.Set(s.f, protoreflect.ValueOfInt32(int32(ints[n])))
	case protoreflect.Int64Kind:
		s.m.Set(s.f, protoreflect.ValueOfInt64(ints[n]))
	case protoreflect.Uint32Kind:
		s.m.Set(s.f, protoreflect.ValueOfUint32(uint32(ints[n])))
	case protoreflect.Uint64Kind:
		s.m.Set(s.f, protoreflect.ValueOfUint64(uint64(ints[n])))
	case protoreflect.StringKind:
		s.m.Set(s.f, protoreflect.ValueOfString(texts[n]))
	case protoreflect.BytesKind:
		s.m.Set(s.f, protoreflect.ValueOfBytes(bytes.Repeat([]byte{byte(n)}, []int{0, 1, 31, 32, 33, 9 << 10}[n])))
	}
}

// Commands that are valid but for a field or two give a result on every replica, the same, and leave a state that can be
// written and read.
func TestMutatedCommands(t *testing.T) {
	base := newWorld(t)
	rapid.Check(t, func(t *rapid.T) {
		w := *base
		w.s = restored(t, base.s)
		v := w.s.View()
		node, tomb := v.Node(w.worker.Id), &api.Tombstone{Id: w.pci.Id, Role: api.Role_ROLE_WORKER, KeyHashes: [][]byte{storetest.Hash()}}
		candidates := [][]*api.Operation{
			storetest.Genesis(w.cluster, w.manager),
			{put(v.Cluster(), func(*api.Cluster) {})},
			{put(node, func(n *api.Node) { n.NextKeyHash = storetest.Hash() })},
			storetest.Join(storetest.Node("w9", w.workers)),
			{store.Put(tomb, 0), store.Delete(v.Node(w.pci.Id))},
			{put(v.Token(w.workers.Id), func(t *api.Token) { t.RevokedNs = 5 })},
			{store.Put(storetest.Token(api.Role_ROLE_MANAGER), 0)},
			{store.Put(storetest.Zone("z"), 0), store.Delete(v.Zone("pci"))},
			{put(v.Service(w.web.Id), func(*api.Service) {})},
			{store.Put(storetest.Placed(w.webTask, w.worker.Id), 1)},
			{put(v.Task(w.running.Id), func(*api.Task) {}), storetest.Report(w.running, api.TaskState_TASK_RUNNING)},
			rotation(&w, w.open, storetest.SecretVersion(w.open, 3)),
			{store.Delete(v.Task(w.webTask.Id)), store.Delete(v.Service(w.vault.Id))},
			{store.Delete(v.SecretVersion(w.card.Id, 1))},
			{{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: w.worker.Id, Description: node.Description, Ip: "10.0.0.1"}}}},
		}
		for range 4 {
			cmd := storetest.Command(candidates[rapid.IntRange(0, len(candidates)-1).Draw(t, "command")]...)
			cmd = api.Clone(cmd)
			cmd.TimeNs = w.now + 1
			for range rapid.IntRange(1, 2).Draw(t, "mutations") {
				mutate(t, cmd.ProtoReflect())
			}
			data, err := proto.Marshal(cmd)
			if err != nil {
				t.Fatal(err)
			}
			twin := restored(t, w.s)
			w.index++
			r, _ := w.s.Apply(w.index, data)
			r2, _ := twin.Apply(w.index, data)
			if !proto.Equal(r, r2) || (r.Code == "") != (r.Text == "") {
				t.Fatalf("%v gave %v and %v", cmd, r, r2)
			}
			if !bytes.Equal(snapshotOf(t, w.s), snapshotOf(t, twin)) {
				t.Fatalf("%v made two states", cmd)
			}
		}
	})
}
