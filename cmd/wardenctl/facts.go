package main

import (
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"

	"warden/api"
)

// factsView is the facts as inspect shows records: names in Docker's spelling, times of Unix nanoseconds as stamps, what is absent as
// null, empty lists as such. A field that is added to the message shows by itself. Nil where the daemon gave none.
func factsView(f *api.Facts) object {
	if f == nil {
		return nil
	}
	return messageView(f.ProtoReflect())
}

func messageView(m protoreflect.Message) object {
	o := object{}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		name, isTime := strings.CutSuffix(string(f.Name()), "_ns")
		v := m.Get(f)
		var shown any
		switch {
		case f.IsList() && f.Message() != nil:
			list := make([]object, v.List().Len())
			for i := range list {
				list[i] = messageView(v.List().Get(i).Message())
			}
			shown = list
		case f.IsList():
			list := make([]any, v.List().Len())
			for i := range list {
				list[i] = v.List().Get(i).Interface()
			}
			shown = list
		case f.Message() != nil && !m.Has(f):
			shown = object(nil)
		case f.Message() != nil:
			shown = messageView(v.Message())
		case isTime:
			shown = stamp(v.Int())
		default:
			shown = v.Interface()
		}
		o = append(o, member{fieldName(name), shown})
	}
	return o
}

// fieldName makes "UnlockKeyID" of "unlock_key_id".
func fieldName(name string) string {
	var b strings.Builder
	for word := range strings.SplitSeq(name, "_") {
		switch word {
		case "id", "dek":
			b.WriteString(strings.ToUpper(word))
		default:
			b.WriteString(strings.ToUpper(word[:1]) + word[1:])
		}
	}
	return b.String()
}
