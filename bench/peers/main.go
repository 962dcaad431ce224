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
	timeout       time.Duration
}

func run(ctx context.Context) error {
	var o options
	flag.IntVar(&o.runs, "runs", 0, "how often each is measured, in turns (default: 5, with -quick 1)")
	flag.StringVar(&o.only, "only", "", "comma-separated names of what is measured (default: all)")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "folder on a disk for what managers and engines keep; a short path, since sockets are in it")
	flag.StringVar(&o.svg, "svg", "", "file for the chart")
	flag.StringVar(&o.markdown, "md", "", "file for the table as Markdown")
	flag.BoolVar(&o.quick, "quick", false, "a little of everything, to see that it works: no figures to be published")
	flag.DurationVar(&o.timeout, "timeout", 3*time.Minute, "for one measurement")
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
	r := report{machine: fmt.Sprintf("%s, %d cores, %s", cpuModel(), runtime.NumCPU(), runtime.Version()), runs: o.runs, quick: o.quick, began: time.Now()}
	err = o.measure(ctx, chosen, &r)
	if len(r.results) > 0 {
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

// measure adds the results of all works to the report. A measurement that fails is told, and the others go on: a row with fewer values
// says so. An interrupt ends it.
func (o options) measure(ctx context.Context, chosen []work, r *report) (failed error) {
	for _, w := range chosen {
		results := make([]result, len(w.rows))
		for i := range results {
			results[i] = result{row: w.rows[i], values: map[string][]float64{}}
		}
		for i := range o.runs {
			for _, by := range turn(w.by, i) {
				unix.Sync() // what others wrote is not written while this is measured
				start, load := time.Now(), watchLoad()
				err := func() error {
					ctx, cancel := context.WithTimeout(ctx, o.timeout)
					defer cancel()
					return w.do(ctx, by, o.dir, func(row int, v float64) { results[row].values[by] = append(results[row].values[by], v) })
				}()
				if ctx.Err() != nil {
					return errors.Join(failed, errInterrupted)
				}
				if err != nil {
					err = fmt.Errorf("%s by %s, %d of %d: %w", w.name, titles[by], i+1, o.runs, err)
					failed = errors.Join(failed, err)
					fmt.Fprintln(os.Stderr, err)
					continue
				}
				r.others = max(r.others, load())
				fmt.Fprintf(os.Stderr, "%s %s by %s, %d of %d, took %.0f s\n", time.Now().UTC().Format(time.TimeOnly), w.name, titles[by], i+1, o.runs, time.Since(start).Seconds())
			}
		}
		r.results = append(r.results, results...)
	}
	return failed
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
