package adversary

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/internal/testcluster"
	"warden/internal/thief"
)

// descriptions: a worker opens one session after the other, at one manager after the other, and says something else of itself each time, as
// much as it may. That makes a few entries in the log, and what it says last is known in the end.
func (a *arena) descriptions(t *testing.T) {
	node, err := a.join("", a.token, "chatterbox")
	if err != nil {
		t.Fatal(err)
	}
	m := a.leader(t)
	limited, term, last := a.refusals(m, "node", warden.CodeLimited), a.value(m, "warden_raft_term"), a.value(m, "warden_raft_last_index")
	begin := time.Now()
	const sessions = 120
	for i := range sessions {
		ag := thief.NewAgent()
		ag.Says = &api.NodeDescription{Hostname: "chatterbox", Os: "linux", Arch: "amd64", EngineLabels: map[string]string{"said": fmt.Sprint(i)}}
		for l := range warden.LabelsMax - 1 {
			ag.Says.EngineLabels[fmt.Sprint(l, strings.Repeat("k", warden.LabelKeyMax-10))] = strings.Repeat(fmt.Sprint(i%10), warden.LabelValueMax)
		}
		testcluster.Await(t, 30*time.Second, func() error { // it may have to wait for the end of its earlier sessions, and know that by the first read only
			conn, err := node.Dial(t.Context(), "", a.m[i/10%3].Address, warden.DoorNode)
			if err != nil {
				return err
			}
			ended := ag.Serve(t, conn)
			ag.Await(t, "its assignment: what it says is known to the manager", func(g thief.Got) bool {
				select {
				case <-ended:
					return true
				default:
					return len(g.Calls) > 0
				}
			})
			if len(ag.Got().Calls) == 0 {
				return errors.New("its connection was ended")
			}
			return nil
		})
	}
	took := time.Since(begin)
	entries, elections := a.value(m, "warden_raft_last_index")-last, a.value(m, "warden_raft_term")-term
	t.Logf("%d sessions in %s made %v entries in the log; %v elections", sessions, took.Round(time.Millisecond), entries, elections)
	// The first few and one each period, each with a nudge of the followers, and what the join and the cluster itself do meanwhile. A new leader begins anew.
	if most := (elections+1)*2*(4+float64(took/warden.DescribePeriod)) + 20; entries > most {
		t.Errorf("%v entries in the log, want %v at most", entries, most)
	}
	if elections == 0 {
		a.counted(t, m, "node", warden.CodeLimited, limited, sessions/2)
	}
	a.still(t)
	testcluster.Await(t, 2*warden.DescribePeriod, func() error {
		if out := m.Ctl("node", "ls", "-q", "--no-trunc", "--filter", fmt.Sprint("label=said=", sessions-1)); strings.TrimSpace(out) != node.NodeID {
			return errors.New("what the node says is not known yet")
		}
		return nil
	})
	m.Ctl("node", "rm", "--force", node.NodeID)
}
