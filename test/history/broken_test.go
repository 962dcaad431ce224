package history

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/anishathalye/porcupine"

	"warden"
)

// event is one call of a history that a test writes down: from and to are its begin and end.
type event struct {
	from, to int64
	call     call
	reply    reply
}

// TestChecker gives the checker histories that are right, and others that are wrong in one thing.
func TestChecker(t *testing.T) {
	done, saw := reply{}, func(state any) reply { return reply{State: state} }
	refused := func(c warden.Code) reply { return reply{Code: c} }
	made := func(version uint64) reply { return reply{Version: version} }
	unknown := reply{Unknown: true}
	create, rotate := func(tag uint64) call { return call{Verb: "create", Tag: tag} }, func(tag uint64) call { return call{Verb: "rotate", Tag: tag} }
	look, rm := call{Verb: read}, call{Verb: "rm"}
	one, two := secretState{1, "1:1 "}, secretState{2, "1:1 2:2 "}
	join := func(tag uint64) call { return call{Verb: "join", Tag: tag} }
	mint := func(uses uint64) call { return call{Verb: "mint", Number: uses} }
	worker := nodeState{"active", "worker"}
	open := lockModel(lockState{DEK: 1})
	crowd := []event{{1, 2, mint(6), done}, {3, 4, look, saw(tokenState{Max: 6})}} // of joins without an answer, none of which was one
	for i := range int64(9) {
		crowd = append(crowd, event{5 + i, math.MaxInt64, join(uint64(i + 1)), unknown})
	}
	crowd = append(crowd, event{20, 21, call{Verb: "purge"}, done})
	for i := range int64(6) {
		crowd = append(crowd, event{30 + 2*i, 31 + 2*i, look, saw(tokenState{Max: 6, Revoked: true})})
	}
	zone, bind, unbind := call{Verb: "create"}, call{Verb: "bind", Tag: 1}, call{Verb: "unbind", Tag: 1}

	for _, c := range []struct {
		name   string
		model  porcupine.Model
		events []event
		want   bool
	}{
		{"nothing", secretModel, nil, true},
		{"one after the other", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, rotate(2), made(2)}, {5, 6, look, saw(two)}}, true},
		{"lost write", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, rotate(2), made(2)}, {5, 6, look, saw(one)}}, false},
		{"a read at the same time sees it", secretModel, []event{{1, 2, create(1), made(1)}, {3, 8, rotate(2), made(2)}, {4, 5, look, saw(two)}}, true},
		{"a read at the same time does not", secretModel, []event{{1, 2, create(1), made(1)}, {3, 8, rotate(2), made(2)}, {4, 5, look, saw(one)}}, true},
		{"stale read", secretModel, []event{{1, 2, create(1), made(1)}, {3, 9, rotate(2), made(2)}, {4, 5, look, saw(two)}, {6, 7, look, saw(one)}}, false},
		{"a read of what nobody wrote", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, look, saw(secretState{1, "1:7 "})}}, false},
		{"a secret comes back", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, rm, done}, {5, 6, look, saw(one)}}, false},
		{"two of one name", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, create(2), made(1)}}, false},
		{"two of one name at once", secretModel, []event{{1, 4, create(1), made(1)}, {2, 3, create(2), made(1)}}, false},
		{"one of two at once", secretModel, []event{{1, 4, create(1), made(1)}, {2, 3, create(2), refused(warden.CodeExists)}}, true},
		{"refused, though nothing was there", secretModel, []event{{1, 2, create(1), refused(warden.CodeExists)}}, false},
		{"two rotations to one version", secretModel, []event{{1, 2, create(1), made(1)}, {3, 6, rotate(2), made(2)}, {4, 5, rotate(3), made(2)}}, false},
		{"a rotation is not there, then is", secretModel, []event{{1, 2, create(1), made(1)}, {3, math.MaxInt64, rotate(2), unknown}, {4, 5, look, saw(one)}, {6, 7, look, saw(two)}}, true},
		{"a rotation never comes", secretModel, []event{{1, 2, create(1), made(1)}, {3, math.MaxInt64, rotate(2), unknown}, {4, 5, look, saw(one)}}, true},
		{"a rotation is there, then not", secretModel, []event{{1, 2, create(1), made(1)}, {3, math.MaxInt64, rotate(2), unknown}, {4, 5, look, saw(two)}, {6, 7, look, saw(one)}}, false},
		{"an effect before the call", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, look, saw(two)}, {5, math.MaxInt64, rotate(2), unknown}}, false},
		{"a call has its effect twice", secretModel, []event{{1, 2, create(1), made(1)}, {3, math.MaxInt64, rotate(2), unknown}, {4, 5, look, saw(secretState{3, "1:1 2:2 3:2 "})}}, false},
		{"refused, and done all the same", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, rotate(2), refused(warden.CodeNotFound)}, {5, 6, look, saw(two)}}, false},
		{"one version goes", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, rotate(2), made(2)}, {5, 6, call{Verb: "rm-version", Version: 1}, done}, {7, 8, look, saw(secretState{2, "2:2 "})}}, true},
		{"the current version goes", secretModel, []event{{1, 2, create(1), made(1)}, {3, 4, call{Verb: "rm-version", Version: 1}, done}}, false},

		{"update from what was read", serviceModel, []event{{1, 2, call{Verb: "create", Tag: 1, Number: 2}, made(1)}, {3, 4, call{Verb: "update", Tag: 2, Version: 1}, made(2)}, {5, 6, look, saw(serviceState{2, 2, 0})}}, true},
		{"lost update", serviceModel, []event{{1, 2, call{Verb: "create", Tag: 1}, made(1)}, {3, 6, call{Verb: "update", Tag: 2, Version: 1}, made(2)}, {4, 5, call{Verb: "update", Tag: 3, Version: 1}, made(2)}}, false},
		{"update of an old version", serviceModel, []event{{1, 2, call{Verb: "create", Tag: 1}, made(1)}, {3, 4, call{Verb: "scale", Number: 3}, made(2)}, {5, 6, call{Verb: "update", Tag: 3, Version: 1}, made(3)}}, false},
		{"conflict without another", serviceModel, []event{{1, 2, call{Verb: "create", Tag: 1}, made(1)}, {3, 4, call{Verb: "update", Tag: 2, Version: 1}, refused(warden.CodeConflict)}}, false},
		{"a version that is not its own", serviceModel, []event{{1, 2, call{Verb: "create", Tag: 1}, made(1)}, {3, 8, call{Verb: "scale", Number: 3}, made(3)}, {4, 5, call{Verb: "scale", Number: 4}, made(3)}}, false},

		{"two uses for two", tokenModel, []event{{1, 2, mint(2), done}, {3, 6, join(1), done}, {4, 5, join(2), done}, {7, 8, join(3), refused(warden.CodeUsedUp)}, {9, 10, look, saw(tokenState{Max: 2, Uses: 2})}}, true},
		{"double use", tokenModel, []event{{1, 2, mint(1), done}, {3, 6, join(1), done}, {4, 5, join(2), done}}, false},
		{"a join again is the same join", tokenModel, []event{{1, 2, mint(1), done}, {3, math.MaxInt64, join(1), unknown}, {4, 5, join(1), done}, {6, 7, look, saw(tokenState{Max: 1, Uses: 1})}}, true},
		{"a join again takes another use", tokenModel, []event{{1, 2, mint(2), done}, {3, 4, join(1), done}, {5, 6, join(1), done}, {7, 8, look, saw(tokenState{Max: 2, Uses: 2})}}, false},
		{"a use is lost", tokenModel, []event{{1, 2, mint(2), done}, {3, 4, join(1), done}, {5, 6, look, saw(tokenState{Max: 2})}}, false},
		{"used up by a join that got no answer", tokenModel, []event{{1, 2, mint(1), done}, {3, math.MaxInt64, join(1), unknown}, {4, 5, join(2), refused(warden.CodeUsedUp)}}, true},
		{"used up by nobody", tokenModel, []event{{1, 2, mint(1), done}, {3, 4, join(2), refused(warden.CodeUsedUp)}}, false},
		{"a crowd of joins without an answer", tokenModel, crowd, true},
		{"join after the revocation", tokenModel, []event{{1, 2, mint(0), done}, {3, 4, call{Verb: "revoke"}, done}, {5, 6, join(1), done}}, false},
		{"the same join after the revocation", tokenModel, []event{{1, 2, mint(0), done}, {3, 4, join(1), done}, {5, 6, call{Verb: "revoke"}, done}, {7, 8, join(1), done}}, true},
		{"used up, and revoked", tokenModel, []event{{1, 2, mint(1), done}, {3, 4, join(1), done}, {5, 6, call{Verb: "revoke"}, done}, {7, 8, join(2), refused(warden.CodeUsedUp)}}, true},
		{"revoked, and not used up", tokenModel, []event{{1, 2, mint(1), done}, {5, 6, call{Verb: "revoke"}, done}, {7, 8, join(2), refused(warden.CodeUsedUp)}}, false},
		{"a purge revokes what has a use left", tokenModel, []event{{1, 2, mint(2), done}, {3, 4, join(1), done}, {5, 6, call{Verb: "purge"}, done}, {7, 8, look, saw(tokenState{Max: 2, Uses: 1, Revoked: true})}}, true},
		{"a purge leaves one as it is", tokenModel, []event{{1, 2, mint(0), done}, {5, 6, call{Verb: "purge"}, done}, {7, 8, join(1), done}}, false},
		{"a purge leaves what is used up", tokenModel, []event{{1, 2, mint(1), done}, {3, 4, join(1), done}, {5, 6, call{Verb: "purge"}, done}, {7, 8, look, saw(tokenState{Max: 1, Uses: 1})}}, true},

		{"removed, and there again", nodeModel(worker), []event{{1, 2, rm, done}, {3, 4, look, saw(worker)}}, false},
		{"removed twice", nodeModel(worker), []event{{1, 2, rm, done}, {3, 4, rm, done}}, false},
		{"drained, and active again", nodeModel(worker), []event{{1, 2, call{Verb: "availability", Word: "drain"}, done}, {3, 4, look, saw(worker)}}, false},
		{"promoted", nodeModel(worker), []event{{1, 2, call{Verb: "role", Word: "manager"}, done}, {3, 4, look, saw(nodeState{"active", "manager"})}}, true},
		{"not promoted", nodeModel(worker), []event{{1, 2, call{Verb: "role", Word: "manager"}, refused(warden.CodeNoQuorum)}, {3, 4, look, saw(nodeState{"active", "manager"})}}, false},

		{"locked twice", open, []event{{1, 2, call{Verb: "on", Word: "k1"}, done}, {3, 4, call{Verb: "on", Word: "k2"}, done}}, false},
		{"locked and rotated", open, []event{{1, 2, call{Verb: "on", Word: "k1"}, done}, {3, 4, call{Verb: "rotate", Word: "k2"}, done}, {5, 6, look, saw(lockState{true, "k2", 3})}}, true},
		{"rotated back", open, []event{{1, 2, call{Verb: "on", Word: "k1"}, done}, {3, 4, call{Verb: "rotate", Word: "k2"}, done}, {5, 6, look, saw(lockState{true, "k1", 3})}}, false},
		{"rotated while off", open, []event{{1, 2, call{Verb: "rotate", Word: "k2"}, done}}, false},
		{"locked without new keys", open, []event{{1, 2, call{Verb: "on", Word: "k1"}, done}, {5, 6, look, saw(lockState{true, "k1", 1})}}, false},
		{"new keys twice", open, []event{{1, 2, call{Verb: "rotate-dek"}, done}, {5, 6, look, saw(lockState{DEK: 3})}}, false},

		{"lost rotation", issuingModel(1), []event{{1, 2, call{Verb: "rotate-issuing"}, done}, {3, 4, look, saw(uint64(1))}}, false},
		{"rotation, and one by a removal", issuingModel(1), []event{{1, 2, call{Verb: "rotate-issuing"}, done}, {3, 4, look, saw(uint64(3))}}, true},
		{"an old issuing CA comes back", issuingModel(1), []event{{1, 2, look, saw(uint64(3))}, {3, 4, look, saw(uint64(2))}}, false},

		{"declared, named, empty again and gone", zoneModel, []event{{1, 2, zone, done}, {3, 4, bind, done}, {5, 6, rm, refused(warden.CodeInUse)}, {7, 8, unbind, done}, {9, 10, rm, done}, {11, 12, look, saw(zoneState{})}}, true},
		{"a zone goes in use", zoneModel, []event{{1, 2, zone, done}, {3, 4, bind, done}, {5, 6, rm, done}}, false},
		{"a zone stays without use", zoneModel, []event{{1, 2, zone, done}, {3, 4, rm, refused(warden.CodeInUse)}}, false},
		{"a zone that nobody declared", zoneModel, []event{{1, 2, bind, done}}, false},
		{"at once, and the zone was first", zoneModel, []event{{1, 2, zone, done}, {3, 6, rm, done}, {4, 5, bind, refused(warden.CodeNotFound)}}, true},
		{"at once, and both", zoneModel, []event{{1, 2, zone, done}, {3, 6, rm, done}, {4, 5, bind, done}}, false},
		{"a zone goes while something may come", zoneModel, []event{{1, 2, zone, done}, {3, math.MaxInt64, bind, unknown}, {4, 5, rm, done}}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, dir := newHistory(), t.TempDir()
			h.object("it", c.model)
			for i, e := range c.events {
				h.calls["it"] = append(h.calls["it"], porcupine.Operation{ClientId: i, Input: e.call, Call: e.from, Output: e.reply, Return: e.to})
			}
			bad, err := h.check(dir)
			if err != nil {
				t.Fatal(err)
			}
			if got := len(bad) == 0; got != c.want {
				t.Errorf("the checker takes it: %v, want %v: %v", got, c.want, c.events)
			}
			if fi, err := os.Stat(filepath.Join(dir, "history-it.html")); (err == nil && fi.Size() > 0) == c.want {
				t.Errorf("a page of a history that is right = %v: %v", c.want, err)
			}
			if err := h.list(filepath.Join(dir, "history")); err != nil {
				t.Error(err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "history")); err != nil || strings.Count(string(b), "\n") != len(c.events) {
				t.Errorf("the list has %q, want %d calls: %v", b, len(c.events), err)
			}
		})
	}
}

// TestNeedles finds each value wherever it is, and nothing else.
func TestNeedles(t *testing.T) {
	n := newNeedles(map[string]string{"abcdef": "one", "abcxyz": "two", "\x00\x01\x02": "three"})
	for in, want := range map[string][]string{
		"": nil, "ab": nil, "abc": nil, "abcde": nil, "abcdef": {"one"}, "..abcdef": {"one"}, "ababcdef.": {"one"}, "abcabcxyz": {"two"},
		"abcxyzabcdefabcdef": {"two", "one"}, "\xff\x00\x01\x02": {"three"}, "abcdeabcde": nil,
	} {
		if got := n.in([]byte(in)); !slices.Equal(got, want) {
			t.Errorf("in(%q) = %q, want %q", in, got, want)
		}
	}
}
