package dispatcher

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// However much nodes say of themselves, a report of the claims fits into a message, and every node's description gets its turn.
func TestDescriptionsTakeTurns(t *testing.T) {
	d := New(Config{})
	said := map[string]string{}
	for i := range warden.LabelsMax {
		said[fmt.Sprint(i, strings.Repeat("k", warden.LabelKeyMax-10))] = strings.Repeat("v", warden.LabelValueMax)
	}
	loud, quiet := &api.NodeDescription{Hostname: "n", EngineLabels: said}, &api.NodeDescription{Hostname: "n"}
	for i := range warden.NodesMax {
		id := fmt.Sprintf("%025d", i)
		s := &session{id: warden.NewID(), peer: Peer{NodeID: id, IP: "2001:db8:1234:5678:9abc:def0:1234:5678"}, seen: time.Now(), description: quiet}
		if i%50 == 0 {
			s.description = loud
		}
		s.stored = i%50 > 1
		d.sessions[id] = s
	}
	named, most := map[string]int{}, 0
	for range 10 {
		claims := d.Claims()
		if len(claims) != warden.NodesMax || !slices.IsSortedFunc(claims, func(a, b *api.SessionClaim) int { return strings.Compare(a.NodeId, b.NodeId) }) {
			t.Fatalf("%d claims, or out of order", len(claims))
		}
		most = max(most, proto.Size(&api.ReportRequest{Claims: claims}))
		for _, c := range claims {
			if c.Description != nil {
				named[c.NodeId]++
			}
		}
	}
	if most > warden.MessageMax*3/4 {
		t.Errorf("a report of claims has %d bytes", most)
	}
	want := warden.NodesMax / 50 * 2
	if times := slices.Sorted(maps.Values(named)); len(times) != want || times[len(times)-1]-times[0] > 1 {
		t.Errorf("%d nodes were described, %d to %d times, want %d as often", len(times), times[0], times[len(times)-1], want)
	}
}

func TestTakeTurns(t *testing.T) {
	one := &api.NodeDescription{Hostname: "twenty bytes in all"}
	size := proto.Size(one)
	for _, c := range []struct {
		turn       string
		n          int // descriptions that fit
		want, next string
	}{
		{"", 2, "ac", "c"},
		{"a", 2, "cd", "d"},
		{"b", 2, "cd", "d"},
		{"d", 2, "ae", "a"},
		{"e", 9, "acde", "e"},
		{"z", 1, "a", "a"},
		{"b", 0, "", "b"},
	} {
		var claims []*api.SessionClaim
		for _, id := range []string{"a", "b", "c", "d", "e"} {
			claim := &api.SessionClaim{NodeId: id, Description: one}
			if id == "b" {
				claim.Description = nil // as the record says
			}
			claims = append(claims, claim)
		}
		next, got := takeTurns(claims, c.turn, c.n*size), ""
		for _, claim := range claims {
			if claim.Description != nil {
				got += claim.NodeId
			}
		}
		if got != c.want || next != c.next {
			t.Errorf("takeTurns(%q, %d) = %q, describes %q, want %q, %q", c.turn, c.n, next, got, c.next, c.want)
		}
	}
}
