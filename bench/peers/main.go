// Command peers has Warden and SwarmKit do the same work on the same machine, in turns, and prints one table of both.
//
// Each measurement is with processes of its own: one for each manager, one for all nodes. The times are taken by this program, by what
// operators have: the managers' local sockets. README.md says what each row measures, and what differs between the two. It is a module
// of its own, so that Warden does not depend on what it is measured against.
package main

import (
	"context"
	"errors"
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
	"golang.org/x/sys/unix"
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
	case "lab":
		serveLab()
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "peers: error:", err)
		os.Exit(1)
	}
}

// options are the command line's.
type options struct {
	runs          int
	only, dir     string
	svg, markdown string
	quick         bool
	again         int
	timeout       time.Duration
	within        time.Duration
	watch         func() func() float64 // watchLoad
	log           io.Writer
}

func run(ctx context.Context) error {
	o := options{watch: watchLoad, log: os.Stderr}
	flag.IntVar(&o.runs, "runs", 0, "how often each is measured, in turns (default: 5, with -quick 1)")
	flag.StringVar(&o.only, "only", "", "comma-separated names of what is measured (default: all)")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "folder on a disk for what managers and engines keep; a short path, since sockets are in it")
	flag.StringVar(&o.svg, "svg", "", "file for the chart")
	flag.StringVar(&o.markdown, "md", "", "file for the table as Markdown")
	flag.BoolVar(&o.quick, "quick", false, "a little of everything, to see that it works: no figures to be published")
	flag.IntVar(&o.again, "again", 0, "how often a measurement is taken again while others take more than 5% of the machine")
	flag.DurationVar(&o.within, "within", 0, "begin no run that would not end within this time from the start (default: no bound)")
	flag.DurationVar(&o.timeout, "timeout", 5*time.Minute, "for one measurement")
	flag.Parse()
	if o.runs == 0 {
		o.runs = 5
		if o.quick {
			o.runs = 1
		}
	}
	if o.runs < 0 || flag.NArg() > 0 {
		return errors.New("want -runs 1 or more, and no arguments: see -h")
	}
	if err := onDisk(o.dir); err != nil {
		return err
	}
	r := report{machine: fmt.Sprintf("%s, %d cores, %s", cpuModel(), runtime.NumCPU(), runtime.Version()), quick: o.quick, began: time.Now()}
	s := full
	if o.quick {
		s = quick
	}
	var k kit
	chosen, err := choose(works(s, &k), o.only)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(chosen, func(w work) bool { return w.name == dockerWork }) {
		defer k.remove()
		if err := k.build(ctx, o.dir); ctx.Err() != nil {
			return errInterrupted
		} else if err != nil {
			return fmt.Errorf("preparing %s, which -only can leave out: %w", dockerWork, err)
		}
	}
	err = o.measure(ctx, chosen, &r)
	if r.runs > 0 {
		fmt.Print(r.table())
		if o.svg != "" {
			err = errors.Join(err, os.WriteFile(o.svg, []byte(r.chart()), 0o644))
		}
		if o.markdown != "" {
			err = errors.Join(err, os.WriteFile(o.markdown, []byte(r.markdown()), 0o644))
		}
	}
	return err
}

var errInterrupted = errors.New("interrupted")

// choose returns those of all that only names, or all.
func choose(all []work, only string) (chosen []work, err error) {
	if only == "" {
		return all, nil
	}
	names := strings.Split(only, ",")
	for _, w := range all {
		if i := slices.Index(names, w.name); i >= 0 {
			chosen, names = append(chosen, w), slices.Delete(names, i, i+1)
		}
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("-only: there is no %s", strings.Join(names, ", "))
	}
	return chosen, nil
}

// measure takes all measurements again and again, and adds each run's to the report when it is whole. A measurement that fails is told, and
// the others go on. An interrupt ends it, and so does within: no run begins that would not end in time, taken as long as the longest.
func (o options) measure(ctx context.Context, chosen []work, r *report) (failed error) {
	for _, w := range chosen {
		for _, row := range w.rows {
			r.results = append(r.results, result{row: row, values: map[string][]float64{}})
		}
	}
	var longest time.Duration
	for i := range o.runs {
		began := time.Now()
		others, k := 0.0, 0
		var whole []func()
		for _, w := range chosen {
			results := r.results[k : k+len(w.rows)]
			k += len(w.rows)
			for _, by := range turn(w.by, i) {
				values, load, err := o.once(ctx, w, by, i)
				if ctx.Err() != nil {
					return errors.Join(failed, errInterrupted)
				}
				failed = errors.Join(failed, err)
				others = max(others, load)
				whole = append(whole, func() {
					for row, v := range values {
						results[row].values[by] = append(results[row].values[by], v)
					}
				})
			}
		}
		for _, add := range whole {
			add()
		}
		r.runs, r.others = r.runs+1, max(r.others, others)
		longest = max(longest, time.Since(began))
		if o.within > 0 && time.Since(r.began)+longest > o.within {
			break
		}
	}
	return failed
}

// once takes one measurement and returns its values by row, and which share of the machine others took meanwhile. Where that is too much
// it is taken again, whatever it gave, if there are tries left.
func (o options) once(ctx context.Context, w work, by string, run int) (values map[int]float64, others float64, err error) {
	for try := 0; ; try++ {
		unix.Sync() // what others wrote is not written while this is measured
		values = map[int]float64{}
		start, load := time.Now(), o.watch()
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, o.timeout)
			defer cancel()
			return w.do(ctx, by, o.dir, func(row int, v float64) { values[row] = v })
		}()
		others = load()
		fmt.Fprintf(o.log, "%s run %d: %s by %s: %.0f s, others %.0f%%\n", time.Now().UTC().Format(time.TimeOnly), run+1, w.name, titles[by], time.Since(start).Seconds(), others*100)
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("run %d: %s by %s: %w", run+1, w.name, titles[by], err)
			fmt.Fprintln(o.log, err)
		}
		if err != nil || others <= loaded || try == o.again {
			return values, others, err
		}
	}
}

// turn returns who comes when in a run: each comes first as often as any other, and the order turns around, so that nobody always has
// the same one before.
func turn(by []string, run int) []string {
	k := run / 2 % len(by)
	t := slices.Concat(by[k:], by[:k])
	if run%2 == 1 {
		slices.Reverse(t)
	}
	return t
}
