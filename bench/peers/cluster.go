package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// cluster is the processes of one product's cluster.
type cluster struct {
	product  string
	dir      string // on a disk
	managers []*managerProcess
	nodes    *nodesProcess
	token    string // of workers
	joined   int
}

// newCluster starts so many managers, one after the other, each a process of its own, and one process for the nodes.
func newCluster(ctx context.Context, product, dir string, managers int) (c *cluster, err error) {
	c = &cluster{product: product}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.dir, err = os.MkdirTemp(dir, "peers"); err != nil {
		return c, err
	}
	for i := range managers {
		cfg := managerConfig{Product: product, Dir: filepath.Join(c.dir, fmt.Sprint("m", i)), Hostname: fmt.Sprint("m", i)}
		cfg.Socket = filepath.Join(cfg.Dir, "sock")
		if err := os.Mkdir(cfg.Dir, 0o700); err != nil {
			return c, err
		}
		if cfg.Listen, err = freePort(); err != nil {
			return c, err
		}
		if i > 0 {
			cfg.Join = c.managers[0].cfg.Listen
			if cfg.Token, err = c.op().token(ctx, true); err != nil {
				return c, err
			}
		}
		m, err := startManager(ctx, cfg)
		if err != nil {
			return c, err
		}
		c.managers = append(c.managers, m)
		if err := await(ctx, "the manager is one of the cluster's", 50*time.Millisecond, func(ctx context.Context) (bool, error) {
			s, err := c.op().state(ctx)
			return s.managers == i+1 && s.leader != "", err
		}); err != nil {
			return c, err
		}
	}
	if c.token, err = c.op().token(ctx, false); err != nil {
		return c, err
	}
	c.nodes, err = startNodes(filepath.Base(c.dir))
	return c, err
}

// close ends all processes and removes what they wrote.
func (c *cluster) close() {
	if c.nodes != nil {
		c.nodes.stop()
	}
	for _, m := range c.managers {
		m.kill()
	}
	if c.dir != "" {
		os.RemoveAll(c.dir)
	}
}

// op is the first manager's operator.
func (c *cluster) op() operator { return c.managers[0].op }

// join has so many more nodes join, and returns how long it took.
func (c *cluster) join(ctx context.Context, nodes, clients int) (took time.Duration, err error) {
	args := JoinArgs{Product: c.product, Address: c.managers[0].cfg.Listen, Token: c.token, Dir: c.nodes.dir, Nodes: nodes, Clients: clients}
	call := c.nodes.client.Go("Nodes.Join", args, &took, nil)
	select {
	case <-call.Done:
		c.joined += nodes
		return took, call.Error
	case <-ctx.Done():
		return 0, errors.Join(errors.New("nodes joining"), ctx.Err())
	}
}

// open starts the agents of all nodes and waits until the leader knows of a live session of each.
func (c *cluster) open(ctx context.Context) error {
	if err := c.nodes.client.Call("Nodes.Open", 0, new(int)); err != nil {
		return err
	}
	return await(ctx, "all nodes are ready", 100*time.Millisecond, func(ctx context.Context) (bool, error) {
		s, err := c.op().state(ctx)
		return s.workers == c.joined, err
	})
}

// awaitTasks waits until so many tasks run on the nodes, which costs the managers nothing.
func (c *cluster) awaitTasks(ctx context.Context, want int) error {
	return await(ctx, fmt.Sprintf("%d tasks run on the nodes", want), pollPeriod, func(context.Context) (bool, error) {
		var n int
		err := c.nodes.client.Call("Nodes.Tasks", 0, &n)
		return n == want, err
	})
}

// service makes a service and returns how long it took until a manager said that all its tasks were running. It is asked only once
// they are: to count ten thousand takes it long.
func (c *cluster) service(ctx context.Context, name string, replicas int, secret string) (id string, took time.Duration, err error) {
	start := time.Now()
	if id, err = c.op().create(ctx, name, replicas, secret); err != nil {
		return "", 0, err
	}
	if err := c.awaitTasks(ctx, replicas); err != nil {
		return "", 0, err
	}
	err = await(ctx, fmt.Sprintf("a manager says that %d tasks are running", replicas), pollPeriod, func(ctx context.Context) (bool, error) {
		n, err := c.op().running(ctx, id)
		return n == replicas, err
	})
	return id, time.Since(start), err
}

// pollPeriod is how often something is looked at that is waited for, and so how exact the answer is.
const pollPeriod = 10 * time.Millisecond

// removeService removes it and waits until no task of it is left.
func (c *cluster) removeService(ctx context.Context, id string) error {
	if err := c.op().remove(ctx, id); err != nil {
		return err
	}
	if err := c.awaitTasks(ctx, 0); err != nil {
		return err
	}
	return await(ctx, "no record of a task is left", 200*time.Millisecond, func(ctx context.Context) (bool, error) {
		n, err := c.op().tasks(ctx)
		return n == 0, err
	})
}

// failover kills the leader and returns how long it took until one of the others had committed a write.
func (c *cluster) failover(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.op().state(ctx)
	if err != nil {
		return 0, err
	}
	var others []*managerProcess
	var leader *managerProcess
	for _, m := range c.managers {
		if m.cfg.Hostname == s.leader {
			leader = m
		} else {
			others = append(others, m)
		}
	}
	if leader == nil {
		return 0, fmt.Errorf("%q leads, which is none of the managers", s.leader)
	}
	for i, m := range others { // warm: their connections and their way to the leader
		if _, err := m.op.write(ctx, fmt.Sprint("warm", i)); err != nil {
			return 0, err
		}
	}
	start := time.Now()
	leader.cmd.Process.Kill()
	won := make(chan time.Duration, 1)
	tick := time.NewTicker(pollPeriod)
	defer tick.Stop()
	for i := 0; ; i++ { // a try may hang on the dead leader: the next one does not wait for it
		for k, m := range others {
			go func() {
				ctx, cancel := context.WithTimeout(ctx, tryTime)
				defer cancel()
				if _, err := m.op.write(ctx, fmt.Sprintf("try-%d-%d", k, i)); err == nil {
					select {
					case won <- time.Since(start):
					default:
					}
				}
			}()
		}
		select {
		case took := <-won:
			return took, nil
		case <-ctx.Done():
			return 0, errors.Join(errors.New("waited in vain: another manager takes a write"), ctx.Err())
		case <-tick.C:
		}
	}
}

// tryTime is how long one try may take, so that a manager without a leader does not have ever more of them to look after.
const tryTime = 500 * time.Millisecond

// write has so many clients commit so many secrets together, on the first manager, and returns how long it took.
func (c *cluster) write(ctx context.Context, name string, writes, clients int) (time.Duration, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range clients {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(writes); i = next.Add(1) {
				if _, err := c.op().write(ctx, fmt.Sprintf("%s-%d", name, i)); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return time.Since(start), context.Cause(ctx)
}

// restart starts a manager that has ended again, on what it left on its disk, and returns how long it took from the start of the process
// until it had committed a write: by then it has opened its state with the unlock key, leads, and has applied all that was there.
func (c *cluster) restart(ctx context.Context, i int, key []byte, name string) (time.Duration, error) {
	p, cfg := products[c.product], c.managers[i].cfg
	cfg.Again = true
	if p.unlock == nil {
		cfg.UnlockKey = key
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	start := time.Now()
	m, said, err := spawnManager(cfg)
	if err != nil {
		return 0, err
	}
	c.managers[i] = m
	go func() { // ends with the process
		if line := <-said; line != "ready" {
			cancel(fmt.Errorf("the manager: %s", line))
		}
	}()
	soon := func(what string, ok func(context.Context) error) error {
		if err != nil {
			return err
		}
		err = await(ctx, what, restartPeriod, func(ctx context.Context) (bool, error) { err := ok(ctx); return err == nil, err })
		return errors.Join(err, context.Cause(ctx))
	}
	err = soon("the manager listens on its socket", func(context.Context) error {
		conn, err := net.Dial("unix", cfg.Socket) // gRPC's own tries would come a second apart
		if err == nil {
			conn.Close()
		}
		return err
	})
	if err == nil {
		err = m.dial()
	}
	if p.unlock != nil {
		err = soon("the manager takes the unlock key", func(ctx context.Context) error { return p.unlock(ctx, m.cc, key) })
	}
	try := 0
	err = soon("the manager takes a write", func(ctx context.Context) error {
		try++
		_, err := m.op.write(ctx, fmt.Sprintf("%s-%d", name, try))
		return err
	})
	return time.Since(start), err
}

// restartPeriod is how often a manager that starts is asked whether it is there.
const restartPeriod = 2 * time.Millisecond

// awaitSealed waits until the first manager's node key is not readable on its disk.
func (c *cluster) awaitSealed(ctx context.Context) error {
	path := filepath.Join(c.managers[0].cfg.Dir, products[c.product].keyFile)
	return await(ctx, "the node key is sealed", 20*time.Millisecond, func(context.Context) (bool, error) {
		b, err := os.ReadFile(path)
		return len(b) > 0 && !bytes.Contains(b, []byte("BEGIN PRIVATE KEY")) && !bytes.Contains(b, []byte("BEGIN EC PRIVATE KEY")), err
	})
}
