package history

import (
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"warden"
)

// call is what a client asked of one object.
type call struct {
	Verb    string
	Tag     uint64 // what the call wrote or made is known by it
	Version uint64 // that the call names
	Number  uint64 // replicas, uses
	Word    string // availability, role, unlock key
}

func (c call) String() string {
	s := c.Verb
	if c.Tag > 0 {
		s += fmt.Sprintf(" #%d", c.Tag)
	}
	if c.Version > 0 {
		s += fmt.Sprintf(" @%d", c.Version)
	}
	if c.Number > 0 {
		s += fmt.Sprintf(" %d", c.Number)
	}
	if c.Word != "" {
		s += " " + c.Word
	}
	return s
}

// reply is what came of a call.
type reply struct {
	Unknown bool        // whether it had its effect, or will have it yet, nobody knows
	Code    warden.Code // "": done
	Version uint64      // that it made; 0: it does not say
	State   any         // what a read saw
}

func (r reply) String() string {
	switch {
	case r.Unknown:
		return "?"
	case r.Code != "":
		return "[" + string(r.Code) + "]"
	case r.State != nil:
		return fmt.Sprintf("%+v", r.State)
	case r.Version > 0:
		return fmt.Sprintf("done, version %d", r.Version)
	}
	return "done"
}

// read is the verb of a call that changes nothing and says the whole state.
const read = "read"

// model returns the checker's model of an object: apply is its sequential specification, what a call makes of a state, the version
// that it gives, and why it is refused; outside are codes of refusals for reasons that lie in other objects, which change nothing.
// A call of unknown outcome has its effect at some moment after its begin; that may be after all others, when nobody sees it.
func model[S comparable](init S, apply func(S, call) (next S, version uint64, code warden.Code), outside ...warden.Code) porcupine.Model {
	return porcupine.Model{
		Init: func() any { return init },
		Step: func(state, input, output any) (bool, any) {
			s, c, r := state.(S), input.(call), output.(reply)
			if c.Verb == read {
				return r.State == any(s), s
			}
			next, version, code := apply(s, c)
			switch {
			case r.Unknown && code == "":
				return true, next
			case r.Unknown, slices.Contains(outside, r.Code):
				return true, s
			case r.Code != "" || code != "":
				return r.Code == code, s
			}
			return r.Version == 0 || r.Version == version, next
		},
		DescribeOperation: func(input, output any) string { return fmt.Sprintf("%v: %v", input, output) },
		DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
	}
}

// secretState is a secret by its name; its zero value is none.
type secretState struct {
	Current  uint64
	Versions string // "1:17 2:18 ", by version: the tag of the call that made it
}

func versionText(version, tag uint64) string { return fmt.Sprintf("%d:%d ", version, tag) }

var secretModel = model(secretState{}, func(s secretState, c call) (secretState, uint64, warden.Code) {
	switch {
	case c.Verb == "create" && s.Current > 0:
		return s, 0, warden.CodeExists
	case c.Verb == "create":
		return secretState{1, versionText(1, c.Tag)}, 1, ""
	case s.Current == 0:
		return s, 0, warden.CodeNotFound
	case c.Verb == "rotate":
		return secretState{s.Current + 1, s.Versions + versionText(s.Current+1, c.Tag)}, s.Current + 1, ""
	case c.Verb == "rm":
		return secretState{}, 0, ""
	case c.Verb == "rm-version" && c.Version == s.Current:
		return s, 0, warden.CodeInUse
	case c.Verb == "rm-version":
		var left strings.Builder
		prefix := fmt.Sprintf("%d:", c.Version)
		for _, v := range strings.Fields(s.Versions) {
			if !strings.HasPrefix(v, prefix) {
				left.WriteString(v + " ")
			}
		}
		if left.Len() == len(s.Versions) {
			return s, 0, warden.CodeNotFound
		}
		return secretState{s.Current, left.String()}, 0, ""
	}
	panic(c.Verb)
}, warden.CodeInUse)

// serviceState is a service by its name; its zero value is none.
type serviceState struct{ Version, Tag, Replicas uint64 }

var serviceModel = model(serviceState{}, func(s serviceState, c call) (serviceState, uint64, warden.Code) {
	next := serviceState{s.Version + 1, s.Tag, s.Replicas}
	switch {
	case c.Verb == "create" && s.Version > 0:
		return s, 0, warden.CodeExists
	case c.Verb == "create":
		return serviceState{1, c.Tag, c.Number}, 1, ""
	case s.Version == 0:
		return s, 0, warden.CodeNotFound
	case c.Verb == "update" && c.Version != s.Version:
		return s, 0, warden.CodeConflict
	case c.Verb == "update":
		next.Tag, next.Replicas = c.Tag, c.Number
		return next, next.Version, ""
	case c.Verb == "scale" && c.Number == s.Replicas:
		return s, s.Version, ""
	case c.Verb == "scale":
		next.Replicas = c.Number
		return next, next.Version, ""
	case c.Verb == "rm":
		return serviceState{}, 0, ""
	}
	panic(c.Verb)
}, noSecret, warden.CodeWrongZone)

// noSecret is the code not-found where it means a secret that a service names.
const noSecret warden.Code = "not-found: secret"

// tokenState is a token by its ID, once it was minted.
type tokenState struct {
	Max, Uses uint64
	Revoked   bool
	keys      string // " 17 18 ", sorted tags of the keys that joined: in whatever order, it is one state; no read sees it
}

// tokenModel is model but for reads, which see less than there is, and for joins at managers that are behind: these admit and refuse
// by what they know, and change nothing. A key that joined gets its node again, and takes no use.
var tokenModel = func() porcupine.Model {
	m := model(tokenState{}, func(s tokenState, c call) (tokenState, uint64, warden.Code) {
		key := fmt.Sprintf(" %d ", c.Tag)
		switch {
		case c.Verb == "mint":
			return tokenState{Max: c.Number}, 0, ""
		case c.Verb == "purge": // of all tokens that still admit somebody
			s.Revoked = s.Revoked || s.Max == 0 || s.Uses < s.Max
			return s, 0, ""
		case c.Verb == "revoke":
			s.Revoked = true
			return s, 0, ""
		case c.Verb == "join" && s.Revoked:
			return s, 0, warden.CodeRevoked
		case c.Verb == "join" && strings.Contains(s.keys, key):
			return s, 0, ""
		case c.Verb == "join" && s.Max > 0 && s.Uses >= s.Max:
			return s, 0, warden.CodeUsedUp
		case c.Verb == "join":
			s.Uses++
			keys := append(strings.Fields(s.keys), strings.TrimSpace(key))
			slices.Sort(keys)
			s.keys = " " + strings.Join(keys, " ") + " "
			return s, 0, ""
		}
		panic(c.Verb)
	})
	step := m.Step
	m.Step = func(state, input, output any) (bool, any) {
		s, c, r := state.(tokenState), input.(call), output.(reply)
		switch {
		case c.Verb == read:
			seen := s
			seen.keys = ""
			return r.State == any(seen), s
		case c.Verb == "join" && s.Revoked && r.Code == warden.CodeUsedUp: // a manager that has not heard of the revocation
			return s.Max > 0 && s.Uses >= s.Max, s
		case c.Verb == "join" && s.Revoked && r.Code == "" && !r.Unknown: // … and gives a key its node once more
			return strings.Contains(s.keys, fmt.Sprintf(" %d ", c.Tag)), s
		}
		return step(state, input, output)
	}
	return m
}()

// nodeState is a node by its ID, once it has joined. "removed" is for ever.
type nodeState struct{ Availability, Role string }

const removed = "removed"

// nodeModel begins with the states that a join gives; roles may be refused for what other nodes are.
func nodeModel(init nodeState) porcupine.Model {
	return model(init, func(s nodeState, c call) (nodeState, uint64, warden.Code) {
		switch {
		case s.Availability == removed:
			return s, 0, warden.CodeNotFound
		case c.Verb == "availability":
			s.Availability = c.Word
		case c.Verb == "role":
			s.Role = c.Word
		case c.Verb == "rm":
			return nodeState{Availability: removed}, 0, ""
		default:
			panic(c.Verb)
		}
		return s, 0, ""
	}, warden.CodeNoQuorum, warden.CodeConflict, warden.CodeInUse, warden.CodeInvalid)
}

// lockState is the lock of the cluster, and the generation of the keys that managers seal their state with.
type lockState struct {
	On    bool
	KeyID string
	DEK   uint64
}

// lockModel begins with the state that the cluster was made with.
func lockModel(init lockState) porcupine.Model {
	return model(init, func(s lockState, c call) (lockState, uint64, warden.Code) {
		switch {
		case c.Verb == "on" && s.On:
			return s, 0, warden.CodeExists
		case c.Verb == "rotate" && !s.On:
			return s, 0, warden.CodeInvalid
		case c.Verb == "on", c.Verb == "rotate":
			return lockState{true, c.Word, s.DEK + 1}, 0, ""
		case c.Verb == "rotate-dek":
			s.DEK++
			return s, 0, ""
		case c.Verb == "off":
			return lockState{DEK: s.DEK}, 0, ""
		}
		panic(c.Verb)
	}, warden.CodeConflict)
}

// issuingModel is the generation of the issuing CA: it never falls, each rotation raises it, and so does the removal of a manager, which
// is written down nowhere.
func issuingModel(init uint64) porcupine.Model {
	m := model(init, func(s uint64, c call) (uint64, uint64, warden.Code) { return s + 1, 0, "" }, warden.CodeConflict)
	step := m.Step
	m.Step = func(state, input, output any) (bool, any) {
		if input.(call).Verb == read {
			seen := output.(reply).State.(uint64)
			return seen >= state.(uint64), seen
		}
		return step(state, input, output)
	}
	return m
}

// ttlModel is the life of certificates.
func ttlModel(init uint64) porcupine.Model {
	return model(init, func(_ uint64, c call) (uint64, uint64, warden.Code) { return c.Number, 0, "" }, warden.CodeConflict)
}

// history is what all clients did, by object. Safe for concurrent use.
type history struct {
	start  time.Time
	mu     sync.Mutex // guards all below
	models map[string]porcupine.Model
	calls  map[string][]porcupine.Operation
	doubts map[string]int // calls of unknown outcome
	atEnd  bool           // reads are recorded in any case
}

func newHistory() *history {
	return &history{start: time.Now(), models: map[string]porcupine.Model{}, calls: map[string][]porcupine.Operation{}, doubts: map[string]int{}}
}

// object says which model an object has; what is recorded of objects without one is not checked.
func (h *history) object(name string, m porcupine.Model) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.models[name] = m
}

// now is the time of calls and replies.
func (h *history) now() int64 { return int64(time.Since(h.start)) }

// readsMax bounds what is recorded of one object for reads' sake, but for those at the end: some live as long as the run.
const readsMax = 500

// add records a call that began at the time and has just ended. What a read was refused says nothing.
func (h *history) add(client int, object string, c call, began int64, r reply) {
	if c.Verb == read && (r.Unknown || r.Code != "") {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.Verb == read && len(h.calls[object]) >= readsMax && !h.atEnd {
		return
	}
	ended := h.now()
	if r.Unknown {
		ended = math.MaxInt64
		h.doubts[object]++
	}
	h.calls[object] = append(h.calls[object], porcupine.Operation{ClientId: client, Input: c, Call: began, Output: r, Return: ended})
}

// size says how many calls were recorded of an object, and of how many nobody knows the outcome: both make the check slow.
func (h *history) size(object string) (calls, doubts int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.calls[object]), h.doubts[object]
}

// checkFor bounds the check of one object. What takes longer counts as failed: the calls on one object are few enough.
const checkFor = 30 * time.Second

// check looks for an order of the calls on each object. What has none, or is not found in time, it returns with the reason, and writes
// to dir as pages to look at.
func (h *history) check(dir string) (bad map[string]porcupine.CheckResult, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	bad = map[string]porcupine.CheckResult{}
	for _, object := range slices.Sorted(maps.Keys(h.calls)) {
		m, ok := h.models[object]
		if !ok {
			return nil, fmt.Errorf("%s has no model", object)
		}
		end := int64(0)
		for _, op := range h.calls[object] {
			if op.Return < math.MaxInt64 {
				end = max(end, op.Call, op.Return)
			}
		}
		ops := slices.Clone(h.calls[object])
		for i := range ops { // a page with an end that is so far off shows nothing
			if ops[i].Return == math.MaxInt64 {
				ops[i].Return = max(end, ops[i].Call) + int64(time.Second)
			}
		}
		result, info := porcupine.CheckOperationsVerbose(m, ops, checkFor)
		if result == porcupine.Ok {
			continue
		}
		bad[object] = result
		page := filepath.Join(dir, "history-"+strings.ReplaceAll(object, "/", "-")+".html")
		if err := porcupine.VisualizePath(m, info, page); err != nil {
			return nil, err
		}
	}
	return bad, nil
}

// list writes all calls, by object and time.
func (h *history) list(path string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	at := func(ns int64) string {
		if ns == math.MaxInt64 {
			return "?"
		}
		return h.start.Add(time.Duration(ns)).UTC().Format("15:04:05.000000")
	}
	for _, object := range slices.Sorted(maps.Keys(h.calls)) {
		ops := slices.Clone(h.calls[object])
		slices.SortFunc(ops, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
		for _, op := range ops {
			if _, err := fmt.Fprintf(f, "%s %s %s client %d %v: %v\n", object, at(op.Call), at(op.Return), op.ClientId, op.Input, op.Output); err != nil {
				return err
			}
		}
	}
	return f.Close()
}

// wantLinear fails the test for each object without an order, and says where to look.
func (h *history) wantLinear(t *testing.T, dir string) {
	t.Helper()
	bad, err := h.check(dir)
	if err != nil {
		t.Error(err)
	}
	for object, result := range bad {
		t.Errorf("%s: the calls have no order that the model allows (%s): see history-*.html and history in %s", object, result, dir)
	}
}

// end has all reads recorded from now on.
func (h *history) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.atEnd = true
}

// total says how many calls were recorded.
func (h *history) total() (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, ops := range h.calls {
		n += len(ops)
	}
	return n
}

// summary counts the calls by kind of object, verb and outcome.
func (h *history) summary() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	counts := map[string]map[string]int{}
	for object, ops := range h.calls {
		kind, _, _ := strings.Cut(object, "/")
		for _, op := range ops {
			c, r := op.Input.(call), op.Output.(reply)
			key := kind + " " + c.Verb
			if counts[key] == nil {
				counts[key] = map[string]int{}
			}
			switch {
			case r.Unknown:
				counts[key]["?"]++
			case r.Code != "":
				counts[key]["["+string(r.Code)+"]"]++
			default:
				counts[key]["done"]++
			}
		}
	}
	var b strings.Builder
	for _, key := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(&b, "%s: %v\n", key, counts[key])
	}
	return b.String()
}
