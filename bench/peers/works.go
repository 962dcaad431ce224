package main

import (
	"context"
	"fmt"
	"time"
)

// work is one measurement of a contestant: it gives one value for each of its rows that this contestant is in.
type work struct {
	name string
	by   []string // the contestants
	rows []row
	do   func(ctx context.Context, by, dir string, add func(row int, value float64)) error
}

// row is one line of the table: Warden and one other.
type row struct {
	what, unit string
	more       bool   // the more the better
	against    string // the other contestant
}

// titles are the contestants' names: products, and ways to have containers run on a Docker Engine.
var titles = map[string]string{"warden": "Warden", "swarmkit": "SwarmKit", "swarmkit2": "SwarmKit, ElectionTick 2", "swarm": "swarm mode", "run1": "docker run, 1 client", "run20": "docker run, 20 clients"}

const first = "warden" // the contestant that all others are compared with

// sizes say how much work each measurement is.
type sizes struct {
	warm, nodes, agents, small, large, secrets, containers int
	joins                                                  [3]int // nodes, by one client, by some, by many
	writes                                                 [2]int // by one client, by many
	settle                                                 time.Duration
}

var (
	full  = sizes{warm: 50, nodes: 100, agents: 500, small: 1000, large: 10_000, secrets: 1000, containers: 20, joins: [3]int{100, 500, 1000}, writes: [2]int{300, 3000}, settle: 10 * time.Second}
	quick = sizes{warm: 5, nodes: 10, agents: 50, small: 100, large: 500, secrets: 50, containers: 4, joins: [3]int{20, 50, 100}, writes: [2]int{50, 300}, settle: time.Second}
)

// clients of each part of a measurement.
var (
	joinClients  = [3]int{1, 16, 128}
	writeClients = [2]int{1, 64}
)

// works returns all measurements. k is looked at when one begins.
func works(s sizes, k *kit) (all []work) {
	var joins []row
	for i, n := range joinClients {
		joins = append(joins, row{what: fmt.Sprintf("%s nodes join, %s at a time", commas(s.joins[i]), commas(n)), unit: "joins/s", more: true})
	}
	writes := func(managers string) (rows []row) {
		for i, n := range writeClients {
			rows = append(rows, row{what: fmt.Sprintf("%s secrets committed, %s, %s at a time", commas(s.writes[i]), managers, commas(n)), unit: "writes/s", more: true})
		}
		return rows
	}
	created := func(n int) []row {
		return []row{{what: fmt.Sprintf("service of %s tasks runs on %d nodes", commas(n), s.nodes), unit: "s"}}
	}
	restarted := func(how string) row {
		return row{what: fmt.Sprintf("locked manager of %s tasks %s and restarted", commas(s.large), how), unit: "s"}
	}
	all = []work{
		{name: "join", rows: joins, do: s.join},
		{name: "create1k", rows: created(s.small), do: s.create(s.small)},
		{name: "create10k", rows: created(s.large), do: s.create(s.large)},
		{name: "failover", rows: []row{{what: "leader of 3 killed: another takes a write", unit: "s"}}, do: failover},
		{name: "secret", rows: []row{{what: fmt.Sprintf("secret created and with a task on each of %d nodes", s.nodes), unit: "s"}}, do: s.secret},
		{name: "write1", rows: writes("1 manager"), do: s.write(1)},
		{name: "write3", rows: writes("3 managers"), do: s.write(3)},
		{name: "restart", rows: []row{restarted("killed"), restarted("stopped")}, do: s.restart},
		{name: "memory", rows: []row{{what: fmt.Sprintf("memory of an idle agent, of %d", s.agents), unit: "KiB"}}, do: s.memory},
	}
	for i := range all {
		all[i].by = []string{first, "swarmkit"}
		for j := range all[i].rows {
			all[i].rows[j].against = "swarmkit"
		}
		if all[i].name == "failover" {
			other := all[i].rows[0]
			other.against = "swarmkit2"
			all[i].by, all[i].rows = append(all[i].by, other.against), append(all[i].rows, other)
		}
	}
	containers := work{name: dockerWork, by: []string{first}, do: s.docker(k)}
	for _, other := range []string{"swarm", "run1", "run20"} {
		containers.by = append(containers.by, other)
		containers.rows = append(containers.rows, row{what: fmt.Sprintf("%d containers run on a Docker Engine", s.containers), unit: "s", against: other})
	}
	return append(all, containers)
}

// dockerWork is the one that needs a kit.
const dockerWork = "docker20"

// docker has containers run on a real engine. Warden's value is in all rows.
func (s sizes) docker(k *kit) func(context.Context, string, string, func(int, float64)) error {
	return func(ctx context.Context, by, dir string, add func(int, float64)) error {
		took, err := runLab(ctx, k, by, dir, s.containers)
		if err != nil {
			return err
		}
		for i, other := range []string{"swarm", "run1", "run20"} {
			if by == first || by == other {
				add(i, took.Seconds())
			}
		}
		return nil
	}
}

func (s sizes) join(ctx context.Context, product, dir string, add func(int, float64)) error {
	c, err := newCluster(ctx, product, dir, 1)
	if err != nil {
		return err
	}
	defer c.close()
	if _, err := c.join(ctx, s.warm, 16); err != nil { // warm
		return err
	}
	for i, nodes := range s.joins {
		took, err := c.join(ctx, nodes, joinClients[i])
		if err != nil {
			return err
		}
		add(i, float64(nodes)/took.Seconds())
	}
	return nil
}

// inhabited makes a cluster of one manager and of nodes that have their sessions.
func (s sizes) inhabited(ctx context.Context, product, dir string) (*cluster, error) {
	c, err := newCluster(ctx, product, dir, 1)
	if err != nil {
		return nil, err
	}
	if _, err = c.join(ctx, s.nodes, 16); err == nil {
		err = c.open(ctx)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (s sizes) create(tasks int) func(context.Context, string, string, func(int, float64)) error {
	return func(ctx context.Context, product, dir string, add func(int, float64)) error {
		c, err := s.inhabited(ctx, product, dir)
		if err != nil {
			return err
		}
		defer c.close()
		id, _, err := c.service(ctx, "warm", s.small, "")
		if err != nil {
			return err
		}
		if err := c.removeService(ctx, id); err != nil {
			return err
		}
		_, took, err := c.service(ctx, "measured", tasks, "")
		if err != nil {
			return err
		}
		add(0, took.Seconds())
		return nil
	}
}

func (s sizes) secret(ctx context.Context, product, dir string, add func(int, float64)) error {
	c, err := s.inhabited(ctx, product, dir)
	if err != nil {
		return err
	}
	defer c.close()
	both := func(name string) (string, time.Duration, error) {
		start := time.Now()
		secret, err := c.op().write(ctx, name)
		if err != nil {
			return "", 0, err
		}
		id, _, err := c.service(ctx, name, s.nodes, secret)
		return id, time.Since(start), err
	}
	id, _, err := both("warm")
	if err != nil {
		return err
	}
	if err := c.removeService(ctx, id); err != nil {
		return err
	}
	_, took, err := both("measured")
	if err != nil {
		return err
	}
	add(0, took.Seconds())
	return nil
}

func (s sizes) write(managers int) func(context.Context, string, string, func(int, float64)) error {
	return func(ctx context.Context, product, dir string, add func(int, float64)) error {
		c, err := newCluster(ctx, product, dir, managers)
		if err != nil {
			return err
		}
		defer c.close()
		if _, err := c.write(ctx, "warm", 200, 16); err != nil {
			return err
		}
		for i, writes := range s.writes {
			took, err := c.write(ctx, fmt.Sprint("measured-", i), writes, writeClients[i])
			if err != nil {
				return err
			}
			add(i, float64(writes)/took.Seconds())
		}
		switch now, err := c.op().state(ctx); {
		case err != nil:
			return err
		case now.leader != c.managers[0].cfg.Hostname: // a follower passes writes on, which is more work
			return fmt.Errorf("%s leads, and not the first manager any more", now.leader)
		}
		return nil
	}
}

// restart measures a manager's restart on its disk after kill -9, then after an order to stop. The nodes are gone by then, so that
// only the manager is at work; no manager takes them for lost as soon as this.
func (s sizes) restart(ctx context.Context, product, dir string, add func(int, float64)) error {
	c, err := s.inhabited(ctx, product, dir)
	if err != nil {
		return err
	}
	defer c.close()
	key, err := c.op().autolock(ctx)
	if err != nil {
		return err
	}
	if err := c.awaitSealed(ctx); err != nil {
		return err
	}
	if _, err := c.write(ctx, "state", s.secrets, 64); err != nil {
		return err
	}
	id, _, err := c.service(ctx, "state", s.large, "")
	if err != nil {
		return err
	}
	c.managers[0].kill()
	c.nodes.stop()
	for i, end := range []func(){func() {}, func() { c.managers[0].stop() }} {
		end()
		took, err := c.restart(ctx, 0, key, fmt.Sprint("measured-", i))
		if err != nil {
			return err
		}
		running, err := c.op().running(ctx, id)
		if err != nil {
			return err
		}
		n, err := c.op().secrets(ctx)
		if err != nil {
			return err
		}
		if running != s.large || n != s.secrets+1+i {
			return fmt.Errorf("after a restart %d tasks run, want %d, and there are %d secrets, want %d", running, s.large, n, s.secrets+1+i)
		}
		add(i, took.Seconds())
	}
	return nil
}

func (s sizes) memory(ctx context.Context, product, dir string, add func(int, float64)) error {
	c, err := newCluster(ctx, product, dir, 1)
	if err != nil {
		return err
	}
	defer c.close()
	memory := func() (n float64, err error) {
		err = c.nodes.client.Call("Nodes.Memory", 0, &n)
		return n, err
	}
	before, err := memory()
	if err != nil {
		return err
	}
	if _, err := c.join(ctx, s.agents, 16); err != nil {
		return err
	}
	if err := c.open(ctx); err != nil {
		return err
	}
	select {
	case <-time.After(s.settle): // what joining and opening needed for a moment goes
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := memory()
	if err != nil {
		return err
	}
	add(0, (after-before)/float64(s.agents)/1024)
	return nil
}

func failover(ctx context.Context, product, dir string, add func(int, float64)) error {
	c, err := newCluster(ctx, product, dir, 3)
	if err != nil {
		return err
	}
	defer c.close()
	took, err := c.failover(ctx)
	if err != nil {
		return err
	}
	for i, other := range []string{"swarmkit", "swarmkit2"} {
		if product == first || product == other {
			add(i, took.Seconds())
		}
	}
	return nil
}
