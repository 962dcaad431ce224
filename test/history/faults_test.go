package history

import (
	"context"
	"errors"
	"fmt"
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
}

// faults are all that there are; a short run does each once, in an order that is drawn.
var faults = []fault{
	{"kill the leader", func(c *client) {
		l := c.leader()
		defer c.burst(l)()
		c.killed(l)
	}},
	{"kill a majority", func(c *client) { c.killed(c.drawn(c.managers, 2)...) }},
	{"kill all managers", func(c *client) { c.killed(c.managers...) }},
	{"kill a worker", func(c *client) { c.killed(c.drawn(c.workers, 1)...) }},
	{"stop a manager", func(c *client) {
		m := c.drawn(c.managers, 1)[0]
		m.Stop()
		m.isDown = true
		c.hold(c.while())
		c.start(m)
	}},
	{"pause the leader", func(c *client) { c.paused(c.leader()) }},
	{"pause a manager", func(c *client) { c.paused(c.drawn(c.managers, 1)[0]) }},
	{"isolate the leader", func(c *client) {
		c.bed.Isolate(c.leader().Host)
		c.healed()
	}},
	{"the leader is not heard", func(c *client) {
		l := c.leader()
		c.bed.Cut([]*bed.Host{l.Host}, c.bed.Others(l.Host))
		c.healed()
	}},
	{"the leader hears nothing", func(c *client) {
		l := c.leader()
		c.bed.Cut(c.bed.Others(l.Host), []*bed.Host{l.Host})
		c.healed()
	}},
	{"split", func(c *client) {
		all := hosts(c.drawn(c.members, len(c.members)))
		k := 1 + c.rand.IntN(len(all)-1)
		c.bed.Partition(all[:k], all[k:])
		c.healed()
	}},
	{"lossy network", func(c *client) {
		all := hosts(c.members)
		c.bed.Lose(10+c.rand.IntN(20), all, all)
		c.healed()
	}},
	{"slow network", func(c *client) {
		all := hosts(c.managers)
		c.bed.Limit(64, all, all)
		c.healed()
	}},
	{"far network", func(c *client) {
		all := hosts(c.managers)
		c.bed.Delay(time.Duration(20+c.rand.IntN(80))*time.Millisecond, all, all)
		c.bed.Jitter(time.Duration(c.rand.IntN(50))*time.Millisecond, all, all)
		c.healed()
	}},
	{"clocks differ", func(c *client) { // by less than what a manager refuses to work with
		for _, m := range c.members {
			m.Skew(time.Duration(c.rand.IntN(8000)-4000) * time.Millisecond)
		}
		c.hold(c.while())
		c.skewed(0, c.members...)
	}},
	{"a clock is out", func(c *client) { // while commands are ahead of the others' clocks they refuse, then go on
		m := c.drawn(c.managers, 1)[0]
		c.skewed(time.Duration(c.rand.IntN(2)*30-15)*time.Second, m)
		c.hold(c.while())
		c.skewed(0, m)
	}},
	{"full disk", func(c *client) {
		m := c.drawn(c.managers, 1)[0]
		c.diskFull.Store(true)
		m.Fill()
		c.hold(c.while())
		m.Free()
		c.hold(time.Second)
		c.diskFull.Store(false)
	}},
	{"promote and demote", func(c *client) {
		n := c.nodeOf(c.workers[0])
		c.setRole(c.up(), n, api.Role_ROLE_MANAGER)
		c.hold(c.while())
		c.demoted(n)
	}},
	{"evict a worker", func(c *client) { c.evicted(c.workers[1+c.rand.IntN(2)]) }},
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

// evicted evicts a worker, often while it is cut off: once it hears of it, it has to stop all, wipe, and be served nothing (I4).
// Then it joins as another node.
func (c *client) evicted(m *member) {
	n := c.nodeOf(m)
	cut := c.rand.IntN(2) == 0
	if cut {
		c.bed.Isolate(m.Host)
	}
	testcluster.Await(c.t, limit, func() error {
		c.remove(c.up(), n)
		if !n.isGone.Load() {
			return fmt.Errorf("node %s is not removed", n.id)
		}
		return nil
	})
	if cut {
		c.hold(c.while() / 2)
		c.bed.Heal()
	}
	testcluster.Await(c.t, limit, func() error {
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		defer cancel()
		info, err := m.local.Info(ctx, &api.InfoRequest{})
		if err != nil || info.State == "running" || len(info.Tasks) > 0 {
			return fmt.Errorf("I4: %s was evicted: %q with %d tasks, %v", m.Name, info.GetState(), len(info.GetTasks()), err)
		}
		if left := secretsOn(m); len(left) > 0 {
			return fmt.Errorf("I7: %s was evicted and still has %v", m.Name, left)
		}
		return nil
	})
	var token string
	testcluster.Await(c.t, limit, func() error {
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		defer cancel()
		reply, err := c.up().control.CreateToken(ctx, &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER, UsesMax: 1, Zone: m.zone})
		token = reply.GetToken()
		return err
	})
	at := []string{}
	for _, o := range c.managers {
		at = append(at, o.Address())
	}
	var joined *api.LocalJoinReply
	testcluster.Await(c.t, limit, func() (err error) {
		ctx, cancel := context.WithTimeout(c.t.Context(), longPatience)
		defer cancel()
		joined, err = m.local.Join(ctx, &api.LocalJoinRequest{Token: token, Addresses: at})
		return err
	})
	if joined.NodeId == n.id || joined.Zone != m.zone || joined.Role != api.Role_ROLE_WORKER {
		c.violated("I1", "%s, once node %s, joined by a worker's token for zone %s as node %s, %s of zone %s", m.Name, n.id, m.zone, joined.NodeId, joined.Role.Word(), joined.Zone)
	}
	m.id = joined.NodeId
	c.nodes.add(&node{id: joined.NodeId, zone: m.zone, object: "node/" + joined.NodeId}, c.history, nodeState{"active", "worker"})
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
	testcluster.Await(c.t, limit, func() error {
		for _, m := range c.members {
			ctx, cancel := context.WithTimeout(c.t.Context(), patience)
			info, err := m.local.Info(ctx, &api.InfoRequest{Facts: true})
			cancel()
			isManager := slices.Contains(c.managers, m)
			if err != nil || info.State != "running" || (info.Role == api.Role_ROLE_MANAGER) != isManager {
				return fmt.Errorf("%s is %s as %s: %v", m.Name, info.GetState(), info.GetRole().Word(), err)
			}
			if isManager && (!info.Facts.Manager.Ready || info.Facts.Manager.Raft.Voters != uint64(len(c.managers))) {
				return fmt.Errorf("%s: %v", m.Name, info.Facts.Manager)
			}
		}
		return nil
	})
}

// code is that of an error of a call.
func code(err error) warden.Code { return warden.CodeOf(api.FromError(err)) }
