package manager

import (
	"crypto"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/join"
)

// TestCrowdJoinsByOneToken: more hosts than a token has uses join at once from one address. As many nodes come to be as it
// has uses, each once, and each of the others is told why not; who repeats its join is the same node, also then.
func TestCrowdJoinsByOneToken(t *testing.T) {
	c := newCluster(t)
	const hosts, uses = 150, 100
	token := c.mint(api.Role_ROLE_WORKER, func(r *api.Token) { r.UsesMax = uses })
	var keys [hosts]crypto.Signer
	for i := range keys {
		keys[i] = must[crypto.Signer](t)(ca.NewKey())
	}
	attempt := func(key crypto.Signer) (string, error) {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			grant, err := join.Join(t.Context(), c.first.address, token, join.Request{Key: key, Hostname: "node"}, nil)
			if err == nil || !api.Transient(err) && warden.CodeOf(err) != warden.CodeLimited {
				return grant.GetNodeId(), err
			}
			<-tick.C
		}
	}
	var ids [hosts]string
	var mu sync.Mutex // guards ids
	var refused atomic.Int64
	var wg sync.WaitGroup
	for i, key := range keys {
		for range 2 { // each host says it twice, as after a lost reply
			wg.Go(func() {
				id, err := attempt(key)
				switch {
				case warden.CodeOf(err) == warden.CodeUsedUp:
					refused.Add(1)
				case err != nil:
					t.Errorf("a join: %v", err)
				default:
					mu.Lock()
					defer mu.Unlock()
					if ids[i] != "" && ids[i] != id {
						t.Errorf("one host became nodes %s and %s", ids[i], id)
					}
					ids[i] = id
				}
			})
		}
	}
	wg.Wait()
	v, nodes := c.first.m.store.View(), map[string]bool{}
	for i, id := range ids {
		if id == "" {
			continue
		}
		nodes[id] = true
		if n := v.Node(id); n == nil || n.TokenId != token.ID {
			t.Errorf("the node %s has the record %v", id, n)
		}
		if again, err := attempt(keys[i]); err != nil || again != id {
			t.Errorf("the join of %s repeated: %q, %v", id, again, err)
		}
	}
	if n := v.Token(token.ID).Uses; len(nodes) != uses || n != uses || len(v.Nodes()) != uses+1 {
		t.Errorf("%d nodes, %d uses taken, %d records; want %d", len(nodes), n, len(v.Nodes()), uses)
	}
	if n := refused.Load(); n != 2*(hosts-uses) {
		t.Errorf("%d refused as used up, want all of the others and none of those that are in", n)
	}
}
