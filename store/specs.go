package store

import (
	"bytes"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"warden"
	"warden/api"
)

// specs has a spec of each service's tasks, so that all tasks of a service share one: 10,000 tasks that came in commands or from a
// snapshot would have 10,000. What is equal is shared, never changed: records are immutable, and who wants another clones them.
// The zero value is ready. Not safe for concurrent use.
type specs struct {
	known map[string][]knownSpec // by service ID, at most specsPerService each, the newest last
	buf   []byte
}

// specsPerService is how many specs of one service are known: during an update there are two.
const specsPerService = 4

type knownSpec struct {
	spec    *api.TaskSpec
	encoded []byte // deterministic, so that it tells whether another is equal, which costs less than asking protobuf
}

// share replaces the spec of a task that is about to be stored by an equal one; old is what the task was, or nil.
func (s *specs) share(old, next *api.Task) {
	if next.GetSpec() == nil || next.Spec == old.GetSpec() {
		return
	}
	var err error
	if s.buf, err = (proto.MarshalOptions{Deterministic: true}).MarshalAppend(s.buf[:0], next.Spec); err != nil {
		return
	}
	all := s.known[next.GetServiceId()]
	for _, known := range all {
		if bytes.Equal(known.encoded, s.buf) {
			next.Spec = known.spec
			return
		}
	}
	if s.known == nil || len(s.known) >= warden.ServicesMax { // some are of services that are gone
		s.known = map[string][]knownSpec{}
	}
	s.known[next.GetServiceId()] = append(all[max(0, len(all)+1-specsPerService):], knownSpec{next.Spec, bytes.Clone(s.buf)})
}

// shallow returns a copy of a record that shares what its fields point to with it. Those must not be changed, but may be replaced.
func shallow[R Record](r R) R {
	out := r.ProtoReflect().New()
	r.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		out.Set(f, v)
		return true
	})
	out.SetUnknown(r.ProtoReflect().GetUnknown()) // what a newer version has put there stays on all managers
	return out.Interface().(R)
}
