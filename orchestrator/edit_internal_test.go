package orchestrator

import (
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"warden/api"
)

// A field that edit forgets would be lost by the next change of a task.
func TestEditCopiesEveryField(t *testing.T) {
	full := &api.Task{}
	fill(full.ProtoReflect(), 2)
	newer := protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 7) // a field of a newer version
	full.ProtoReflect().SetUnknown(newer)
	full.Status.ProtoReflect().SetUnknown(newer)
	got := edit(full)
	if !proto.Equal(got, full) {
		t.Fatalf("edit(%v) = %v", full, got)
	}
	got.Status.Message = "other"
	if full.Status.Message == "other" {
		t.Error("the status is shared")
	}
}

// fill sets every field of the message, and of those in it, depth levels down.
func fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		switch f := fields.Get(i); {
		case f.IsList(), f.IsMap():
		case f.Kind() == protoreflect.MessageKind:
			if depth > 0 {
				fill(m.Mutable(f).Message(), depth-1)
			}
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString("x"))
		case f.Kind() == protoreflect.EnumKind:
			m.Set(f, protoreflect.ValueOfEnum(f.Enum().Values().Get(1).Number()))
		case f.Kind() == protoreflect.Int64Kind:
			m.Set(f, protoreflect.ValueOfInt64(7))
		case f.Kind() == protoreflect.Int32Kind:
			m.Set(f, protoreflect.ValueOfInt32(7))
		case f.Kind() == protoreflect.Uint64Kind:
			m.Set(f, protoreflect.ValueOfUint64(7))
		case f.Kind() == protoreflect.Uint32Kind:
			m.Set(f, protoreflect.ValueOfUint32(7))
		default:
			panic("a field of a kind that the test does not know: " + string(f.Name()))
		}
	}
}
