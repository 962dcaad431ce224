package history

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"warden"
	"warden/api"
	"warden/internal/testcluster"
	"warden/test/bed"
)

// fault does something to the cluster for some seconds, and undoes it.
type fault struct {
	name string
	do   func(c *client)
	long bool // it takes too long for a short run
}

// faults are all that there are; a short run does each once, in an order that is drawn.
var faults = []fault{
	{name: "kill the leader", do: func(c *client) {
		l := c.leader()
		defer c.burst(l)()
		c.killed(l)
	}},
	{name: "kill a majority", do: func(c *client) { c.killed(c.drawn(c.managers, 2)...) }},
	{name: "kill all managers", do: func(c *client) { c.killed(c.managers...) }},
	{name: "kill a worker", do: func(c *client) { c.killed(c.drawn(c.workers, 1)...) }},
	{name: "stop a manager", do: func(c *client) {
		m := c.drawn(c.managers, 1)[0]
		m.Stop()
		m.isDown = true
		c.hold(c.while())
		c.start(m)
	}},
	{name: "pause the leader", do: func(c *client) { c.paused(c.leader()) }},
	{name: "pause a manager", do: func(c *client) { c.paused(c.drawn(c.managers, 1)[0]) }},
	{name: "isolate the leader", do: func(c *client) {
		c.bed.Isolate(c.leader().Host)
		c.healed()
	}},
	{name: "the leader is not heard", do: func(c *client) {
		l := c.leader()
		c.bed.Cut([]*bed.Host{l.Host}, c.bed.Others(l.Host))
		c.healed()
	}},
	{name: "the leader hears nothing", do: func(c *client) {
		l := c.leader()
		c.bed.Cut(c.bed.Others(l.Host), []*bed.Host{l.Host})
		c.healed()
	}},
	{name: "split", do: func(c *client) {
		all := hosts(c.drawn(c.members, len(c.members)))
		k := 1 + c.rand.IntN(len(all)-1)
		c.bed.Partition(all[:k], all[k:])
		c.healed()
	}},
	{name: "lossy network", do: func(c *client) {
		all := hosts(c.members)
		c.bed.Lose(10+c.rand.IntN(20), all, all)
		c.healed()
	}},
	{name: "slow network", do: func(c *client) {
		all := hosts(c.managers)
		c.bed.Limit(64, all, all)
		c.healed()
	}},
	{name: "far network", do: func(c *client) {
		all := hosts(c.managers)
		c.bed.Delay(time.Duration(20+c.rand.IntN(80))*time.Millisecond, all, all)
		c.bed.Jitter(time.Duration(c.rand.IntN(50))*time.Millisecond, all, all)
		c.healed()
	}},
	{name: "clocks differ", do: func(c *client) { // by less than what a manager refuses to work with
		for _, m := range c.members {
			m.Skew(time.Duration(c.rand.IntN(8000)-4000) * time.Millisecond)
		}
		c.hold(c.while())
		c.skewed(0, c.members...)
	}},
	{name: "a clock is out", do: func(c *client) { // while commands are ahead of the others' clocks they refuse, then go on
		m := c.drawn(c.managers, 1)[0]
		c.skewed(time.Duration(c.rand.IntN(2)*30-15)*time.Second, m)
		c.hold(c.while())
		c.skewed(0, m)
	}},
	{name: "full disk", do: func(c *client) {
		m := c.drawn(c.managers, 1)[0]
		c.diskFull.Store(true)
		m.Fill()
		c.hold(c.while())
		m.Free()
		c.diskFreed.Store(time.Now().UnixNano())
		c.diskFull.Store(false)
	}},
	{name: "promote and demote", do: func(c *client) {
		n := c.nodeOf(c.workers[0])
		c.setRole(c.up(), n, api.Role_ROLE_MANAGER)
		c.hold(c.while())
		c.demoted(n)
	}},
	{name: "replace a manager", do: func(c *client) { c.replaced(c.drawn(c.managers, 1)[0], false) }},
	{name: "replace the leader", do: func(c *client) { c.replaced(c.leader(), false) }},
	{name: "replace a manager that hears of it late", long: true, do: func(c *client) { c.replaced(c.drawn(c.managers, 1)[0], true) }},
	{name: "move a worker", do: func(c *client) { c.moved(c.workers[1]) }},
	{name: "evict a worker", do: func(c *client) { c.evicted(c.workers[1+c.rand.IntN(2)]) }},
}

// while draws how long a fault lasts.
func (c *client) while() time.Duration {
	return time.Second + time.Duration(c.rand.IntN(2000))*time.Millisecond
}

func (c *client) skewed(d time.Duration, members ...*member) {
	for _, m := range members {
		m.Skew(d)
	}
}

func (c *client) healed() {
	c.hold(c.while())
	c.bed.Heal()
}

func hosts(members []*member) (all []*bed.Host) {
	for _, m := range members {
		all = append(all, m.Host)
	}
	return all
}

// drawn returns n of them.
func (c *client) drawn(of []*member, n int) []*member {
	all := slices.Clone(of)
	c.rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:n]
}

// up returns a manager that answers.
func (c *client) up() (m *member) {
	testcluster.Await(c.t, limit, func() error {
		m = c.drawn(c.managers, 1)[0]
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		defer cancel()
		_, err := m.control.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_CLUSTER})
		return err
	})
	return m
}

// leader returns the host that leads.
func (r *run) leader() (leader *member) {
	testcluster.Await(r.t, limit, func() error {
		for _, m := range r.managers {
			ctx, cancel := context.WithTimeout(r.t.Context(), time.Second)
			s, err := m.control.Status(ctx, &api.StatusRequest{})
			cancel()
			if i := slices.IndexFunc(r.members, func(o *member) bool { return o.id == s.GetLeaderId() }); err == nil && i >= 0 {
				leader = r.members[i]
				return nil
			}
		}
		return errors.New("no manager knows a leader")
	})
	return leader
}

// burst begins many calls at once, at other managers than this one, and returns what waits for their end: the answers of some are
// lost when it is killed a moment later, and the managers ask again for them.
func (c *client) burst(but *member) (wait func()) {
	var calls sync.WaitGroup
	for range callsInBurst {
		caller := c.reader()
		at := c.drawn(c.managers, len(c.managers))
		if at[0] == but {
			at = at[1:]
		}
		calls.Go(func() { caller.secret(at[0]) })
	}
	c.hold(time.Duration(c.rand.IntN(20)) * time.Millisecond)
	return calls.Wait
}

const callsInBurst = 40

// killed kills daemons, at once, and starts them again.
func (c *client) killed(members ...*member) {
	for _, m := range members {
		m.Kill()
		m.isDown = true
	}
	c.hold(c.while() / 2)
	for _, m := range members {
		if slices.Contains(c.managers, m) {
			c.wantAuthors(m)
		}
		m.StartOnly()
	}
	for _, m := range members {
		c.awaitAnswer(m)
		m.isDown = false
		c.unlock(m)
	}
}

// paused pauses a daemon for so long that others elect another leader and go on. Many reads wait for the paused one then: it answers
// them at the moment at which it comes back, when it may still take itself for the leader.
func (c *client) paused(m *member) {
	m.Pause()
	c.hold(patience + c.while()/2)
	var waiting sync.WaitGroup
	for range readsInPause {
		reader := c.reader()
		waiting.Go(func() { reader.readSecrets(m, reader.secrets.pick(reader.rand.IntN).name) })
	}
	c.hold(patience / 4)
	m.Resume()
	waiting.Wait()
}

const readsInPause = 30

// awaitAnswer waits until a daemon answers, and returns what it says of itself.
func (r *run) awaitAnswer(m *member) (info *api.InfoReply) {
	testcluster.Await(r.t, limit, func() (err error) {
		ctx, cancel := context.WithTimeout(r.t.Context(), time.Second)
		defer cancel()
		if info, err = m.local.Info(ctx, &api.InfoRequest{}); err != nil {
			return fmt.Errorf("%s does not answer: %w", m.Name, err)
		}
		return nil
	})
	return info
}

func (r *run) nodeOf(m *member) *node {
	all := r.nodes.ever()
	return all[slices.IndexFunc(all, func(n *node) bool { return n.id == m.id })]
}

// demoted makes a node a worker again, for sure.
func (c *client) demoted(n *node) {
	testcluster.Await(c.t, limit, func() error {
		if out, sent := c.setRole(c.up(), n, api.Role_ROLE_WORKER); !sent || out.Unknown || out.Code != "" {
			return fmt.Errorf("demoting node %s: %v", n.id, out)
		}
		return nil
	})
}

// evicted evicts a worker, often while it is cut off. Then it joins as another node.
func (c *client) evicted(m *member) {
	n, home := c.nodeOf(m), m.zones.now()[0]
	cut := c.rand.IntN(2) == 0
	if cut {
		c.bed.Isolate(m.Host)
	}
	c.removed(n)
	if cut {
		c.hold(c.while() / 2)
		c.bed.Heal()
	}
	c.wantOut(m)
	c.rejoined(m, n, api.Role_ROLE_WORKER, home)
}

// removed evicts a node, for sure.
func (c *client) removed(n *node) {
	testcluster.Await(c.t, limit, func() error {
		if c.remove(c.up(), n); !n.isGone.Load() {
			return fmt.Errorf("node %s is not removed", n.id)
		}
		return nil
	})
}

// wantOut: once a host hears that its node was evicted, it stops all that it runs and wipes its keys and its state (I4, I7).
func (c *client) wantOut(m *member) {
	testcluster.Await(c.t, limit, func() error {
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		defer cancel()
		info, err := m.local.Info(ctx, &api.InfoRequest{})
		if err != nil || info.State != "evicted" && info.State != "uninitialized" || len(info.Tasks) > 0 {
			return fmt.Errorf("I4: %s was evicted: %q with %d tasks, %v", m.Name, info.GetState(), len(info.GetTasks()), err)
		}
		if left := secretsOn(m); len(left) > 0 {
			return fmt.Errorf("I7: %s was evicted and still has %v", m.Name, left)
		}
		for _, name := range []string{"identity/node.key", "raft/log.db"} {
			if _, err := os.Lstat(filepath.Join(m.State(), name)); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("I4: %s was evicted and still has %s", m.Name, name)
			}
		}
		return nil
	})
}

// rejoined has a host that was evicted join as another node.
func (c *client) rejoined(m *member, was *node, role api.Role, home string) {
	at := []string{}
	for _, o := range c.managers {
		if o != m {
			at = append(at, o.Address())
		}
	}
	var token string
	tried := false // the token: the answer may have been lost
	var joined *api.LocalJoinReply
	testcluster.Await(c.t, limit, func() error {
		ctx, cancel := context.WithTimeout(c.t.Context(), longPatience)
		defer cancel()
		if token == "" {
			reply, err := c.up().control.CreateToken(ctx, &api.CreateTokenRequest{Role: role, UsesMax: 1, Zone: home})
			if err != nil {
				return err
			}
			token = reply.Token
		}
		reply, err := m.local.Join(ctx, &api.LocalJoinRequest{Token: token, Addresses: at})
		joined = reply
		switch code(err) {
		case warden.CodeUsedUp:
			if !tried {
				c.violated("I1", "a token that nobody has used is used up: %v", err)
			}
			token, tried = "", false
		case warden.CodeRevoked:
			token, tried = "", false
		default:
			tried = true
		}
		return err
	})
	if joined.NodeId == was.id || joined.Zone != home || joined.Role != role {
		c.violated("I1", "%s, once node %s, joined by a token for a %s of zone %s as node %s, %s of zone %s", m.Name, was.id, role.Word(), home, joined.NodeId, joined.Role.Word(), joined.Zone)
	}
	m.id = joined.NodeId
	c.authors.is(m.Name, m.id)
	n, state := &node{id: joined.NodeId, zones: in(home), object: "node/" + joined.NodeId}, nodeState{"active", role.Word()}
	if role == api.Role_ROLE_MANAGER {
		n.wasManager.Store(true)
		state.Availability = "drain"
	}
	c.nodes.add(n, c.history, state)
}

// wantAlive wants each daemon that was not ended to answer: no fault of another may end it.
func (r *run) wantAlive() {
	for _, m := range r.members {
		if !m.isDown {
			r.awaitAnswer(m)
		}
	}
}

// settle undoes all faults and waits until the cluster is whole: all daemons run, unlocked, ready, with the roles of the beginning.
func (c *client) settle() {
	c.bed.Heal()
	for _, m := range c.members {
		if m.isDown {
			c.start(m)
		}
		c.unlock(m)
	}
	for _, m := range c.workers {
		n := c.nodeOf(m)
		if n.wasManager.Load() {
			c.demoted(n)
		}
		testcluster.Await(c.t, limit, func() error {
			if !c.setAvailability(c.up(), n, api.Availability_AVAILABILITY_ACTIVE) {
				return errors.New("no manager")
			}
			return nil
		})
	}
	c.bed.AwaitReady(c.up().Host, len(c.members))
	c.awaitWhole()
}

// awaitWhole waits until all hosts run with the roles of the beginning.
func (r *run) awaitWhole() {
	testcluster.Await(r.t, limit, func() error {
		for _, m := range r.members {
			info, err := r.info(m)
			isManager := slices.Contains(r.managers, m)
			if err != nil || info.State != "running" || (info.Role == api.Role_ROLE_MANAGER) != isManager {
				return fmt.Errorf("%s is %s as %s: %v", m.Name, info.GetState(), info.GetRole().Word(), err)
			}
			if isManager && (!info.Facts.Manager.Ready || info.Facts.Manager.Raft.Voters != uint64(len(r.managers))) {
				return fmt.Errorf("%s: %v", m.Name, info.Facts.Manager)
			}
		}
		return nil
	})
}

// info returns what a daemon says of itself.
func (r *run) info(m *member) (*api.InfoReply, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	return m.local.Info(ctx, &api.InfoRequest{Facts: true})
}

// code is that of an error of a call.
func code(err error) warden.Code { return warden.CodeOf(api.FromError(err)) }
