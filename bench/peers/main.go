// Command peers has Warden and SwarmKit do the same work on the same machine, in turns, and prints one table of both.
//
// Each measurement is with processes of its own: one for each manager, one for all nodes. The times are taken by this program, by what
// operators have: the managers' local sockets. README.md says what each row measures, and what differs between the two. It is a module
// of its own, so that Warden does not depend on what it is measured against.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/grpclog"
)

func main() {
	// Neither logs: SwarmKit's packages have all of gRPC's events formatted, which Warden in this program would pay for too.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	logrus.SetLevel(logrus.PanicLevel)
	logrus.SetOutput(io.Discard)
	switch os.Getenv(childEnv) {
	case "manager":
		serveManager()
		return
	case "nodes":
		serveNodes()
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "peers: error:", err)
		os.Exit(1)
	}
}

// work is one measurement of a product: it gives one value for each of its rows.
type work struct {
	name string
	rows []row
	do   func(ctx context.Context, product, dir string, add func(row int, value float64)) error
}

// row is one line of the table.
type row struct {
	what, unit string
	more       bool // the more the better
}

var works = []work{
	{name: "join", rows: []row{
		{what: "nodes joining, 1 client", unit: "joins/s", more: true},
		{what: "nodes joining, 16 clients", unit: "joins/s", more: true},
		{what: "nodes joining, 128 clients", unit: "joins/s", more: true},
	}, do: doJoin},
	{name: "create1k", rows: []row{{what: "service of 1,000 tasks running on 100 nodes", unit: "s"}}, do: doCreate(1000)},
	{name: "create10k", rows: []row{{what: "service of 10,000 tasks running on 100 nodes", unit: "s"}}, do: doCreate(10_000)},
	{name: "failover", rows: []row{{what: "leader of 3 killed until a write is taken", unit: "s"}}, do: doFailover},
	{name: "secret", rows: []row{{what: "secret created and with a task on each of 100 nodes", unit: "s"}}, do: doSecret},
	{name: "write1", rows: []row{
		{what: "secrets committed, 1 manager, 1 client", unit: "writes/s", more: true},
		{what: "secrets committed, 1 manager, 64 clients", unit: "writes/s", more: true},
	}, do: doWrite(1)},
	{name: "write3", rows: []row{
		{what: "secrets committed, 3 managers, 1 client", unit: "writes/s", more: true},
		{what: "secrets committed, 3 managers, 64 clients", unit: "writes/s", more: true},
	}, do: doWrite(3)},
	{name: "restart", rows: []row{
		{what: "locked manager killed and started until a write is taken", unit: "s"},
		{what: "locked manager stopped and started until a write is taken", unit: "s"},
	}, do: doRestart},
	{name: "memory", rows: []row{{what: "memory of an idle agent, of 500", unit: "KiB"}}, do: doMemory},
}

func doJoin(ctx context.Context, product, dir string, add func(int, float64)) error {
	c, err := newCluster(ctx, product, dir, 1)
	if err != nil {
		return err
	}
	defer c.close()
	if _, err := c.join(ctx, 50, 16); err != nil { // warm
		return err
	}
	for i, s := range []struct{ clients, nodes int }{{1, 100}, {16, 500}, {128, 1000}} {
		took, err := c.join(ctx, s.nodes, s.clients)
		if err != nil {
			return err
		}
		add(i, float64(s.nodes)/took.Seconds())
	}
	return nil
}

func doCreate(tasks int) func(context.Context, string, string, func(int, float64)) error {
	return func(ctx context.Context, product, dir string, add func(int, float64)) error {
		c, err := newCluster(ctx, product, dir, 1)
		if err != nil {
			return err
		}
		defer c.close()
		if _, err := c.join(ctx, 100, 16); err != nil {
			return err
		}
		if err := c.open(ctx); err != nil {
			return err
		}
		id, _, err := c.service(ctx, "warm", 1000, "")
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

func doSecret(ctx context.Context, product, dir string, add func(int, float64)) error {
	const nodes = 100
	c, err := newCluster(ctx, product, dir, 1)
	if err != nil {
		return err
	}
	defer c.close()
	if _, err := c.join(ctx, nodes, 16); err != nil {
		return err
	}
	if err := c.open(ctx); err != nil {
		return err
	}
	both := func(name string) (string, time.Duration, error) {
		start := time.Now()
		secret, err := c.op().write(ctx, name)
		if err != nil {
			return "", 0, err
		}
		id, _, err := c.service(ctx, name, nodes, secret)
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

func doWrite(managers int) func(context.Context, string, string, func(int, float64)) error {
	return func(ctx context.Context, product, dir string, add func(int, float64)) error {
		c, err := newCluster(ctx, product, dir, managers)
		if err != nil {
			return err
		}
		defer c.close()
		if _, err := c.write(ctx, "warm", 200, 16); err != nil {
			return err
		}
		for i, s := range []struct{ clients, writes int }{{1, 300}, {64, 3000}} {
			took, err := c.write(ctx, fmt.Sprint("measured-", s.clients), s.writes, s.clients)
			if err != nil {
				return err
			}
			add(i, float64(s.writes)/took.Seconds())
		}
		switch s, err := c.op().state(ctx); {
		case err != nil:
			return err
		case s.leader != c.managers[0].cfg.Hostname: // a follower passes writes on, which is more work
			return fmt.Errorf("%s leads, and not the first manager any more", s.leader)
		}
		return nil
	}
}

// doRestart measures a manager's restart on its disk after kill -9, then after an order to stop. The nodes are gone by then, so that
// only the manager is at work; no manager takes them for lost as soon as this.
func doRestart(ctx context.Context, product, dir string, add func(int, float64)) error {
	const nodes, tasks, secrets = 100, 10_000, 1000
	c, err := newCluster(ctx, product, dir, 1)
	if err != nil {
		return err
	}
	defer c.close()
	if _, err := c.join(ctx, nodes, 16); err != nil {
		return err
	}
	if err := c.open(ctx); err != nil {
		return err
	}
	key, err := c.op().autolock(ctx)
	if err != nil {
		return err
	}
	if err := c.awaitSealed(ctx); err != nil {
		return err
	}
	if _, err := c.write(ctx, "state", secrets, 64); err != nil {
		return err
	}
	id, _, err := c.service(ctx, "state", tasks, "")
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
		if running != tasks || n != secrets+1+i {
			return fmt.Errorf("after a restart %d tasks run, want %d, and there are %d secrets, want %d", running, tasks, n, secrets+1+i)
		}
		add(i, took.Seconds())
	}
	return nil
}

func doMemory(ctx context.Context, product, dir string, add func(int, float64)) error {
	const nodes = 500
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
	if _, err := c.join(ctx, nodes, 16); err != nil {
		return err
	}
	if err := c.open(ctx); err != nil {
		return err
	}
	select {
	case <-time.After(10 * time.Second): // what joining and opening needed for a moment goes
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := memory()
	if err != nil {
		return err
	}
	add(0, (after-before)/nodes/1024)
	return nil
}

func doFailover(ctx context.Context, product, dir string, add func(int, float64)) error {
	c, err := newCluster(ctx, product, dir, 3)
	if err != nil {
		return err
	}
	defer c.close()
	took, err := c.failover(ctx)
	if err != nil {
		return err
	}
	add(0, took.Seconds())
	return nil
}

func run(ctx context.Context) error {
	runs := flag.Int("runs", 5, "how often each is measured, in turns")
	only := flag.String("only", "", "comma-separated names of what is measured (default: all)")
	dir := flag.String("dir", os.TempDir(), "folder on a disk for what the managers keep")
	svg := flag.String("svg", "peers.svg", "file for the chart; empty: none")
	timeout := flag.Duration("timeout", 3*time.Minute, "for one measurement")
	flag.Parse()
	chosen := works
	if *only != "" {
		names := strings.Split(*only, ",")
		chosen = nil
		for _, w := range works {
			if i := slices.Index(names, w.name); i >= 0 {
				chosen, names = append(chosen, w), slices.Delete(names, i, i+1)
			}
		}
		if len(names) > 0 {
			return fmt.Errorf("-only: there is no %s", strings.Join(names, ", "))
		}
	}
	if *runs < 1 {
		return fmt.Errorf("-runs: want 1 or more")
	}
	if err := onDisk(*dir); err != nil {
		return err
	}
	r := report{machine: fmt.Sprintf("%s, %d cores, %s", cpuModel(), runtime.NumCPU(), runtime.Version()), runs: *runs, began: time.Now()}
	for _, w := range chosen {
		results := make([]result, len(w.rows))
		for i := range results {
			results[i] = result{row: w.rows[i], values: map[string][]float64{}}
		}
		for i := range *runs {
			turn := slices.Clone(order)
			if i%2 == 1 {
				slices.Reverse(turn)
			}
			for _, p := range turn {
				load := watchLoad()
				err := func() error {
					ctx, cancel := context.WithTimeout(ctx, *timeout)
					defer cancel()
					return w.do(ctx, p, *dir, func(row int, v float64) { results[row].values[p] = append(results[row].values[p], v) })
				}()
				if err != nil {
					return fmt.Errorf("%s of %s: %w", w.name, products[p].title, err)
				}
				r.others = max(r.others, load())
				fmt.Fprintf(os.Stderr, "%s: %s, %d of %d\n", w.name, products[p].title, i+1, *runs)
			}
		}
		r.results = append(r.results, results...)
	}
	fmt.Print(r.table())
	if *svg == "" {
		return nil
	}
	return os.WriteFile(*svg, []byte(r.chart()), 0o644)
}
