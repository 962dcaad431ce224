package process_test

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor"
	"warden/executor/process"
	"warden/internal/sensitive"
)

// benchSelf is the binary that supervisors and inits of benchmarks are: the helper, run from memory as a daemon of the build does;
// with WARDEN_BENCH_SELF another, such as the daemon itself.
func benchSelf(b *testing.B) string {
	if path := os.Getenv("WARDEN_BENCH_SELF"); path != "" {
		return path
	}
	return process.InMemory(b, process.BuildHelper(b))
}

// pause is between starts where each is to find an idle machine: then the kernel has forgotten that cgroups just changed.
const pause = 200 * time.Millisecond

// BenchmarkStart measures from Start to the program's first words, with a secret, of tasks in a row and of single ones: the program is date(1), which says when it ran by
// the clock that the benchmark goes by, some 0.5 ms of dynamic linking after its first instruction. It reports the median as
// first-ms, the least as first-min-ms, Start's return as start-ms, and as cpu-ms what supervisor, init and program took of the processors,
// which other load on the machine changes little. The mean that Go prints has the removal of tasks in it.
func BenchmarkStart(b *testing.B) {
	b.Run("row", func(b *testing.B) { benchmarkStart(b, 0) })
	b.Run("single", func(b *testing.B) { benchmarkStart(b, pause) })
}

func benchmarkStart(b *testing.B, wait time.Duration) {
	e, err := process.New(filepath.Join(b.TempDir(), "tasks"), benchSelf(b), slog.New(slog.DiscardHandler))
	if err != nil {
		b.Skip(err)
	}
	var first, returned []time.Duration
	before := cpuOfChildren(b)
	for b.Loop() {
		<-time.After(wait)
		begin := time.Now()
		task, err := e.Start(b.Context(), executor.Spec{TaskID: warden.NewID(), Image: process.Image, Command: []string{"date", "+%s%N"},
			Secrets: []executor.SecretFile{{Target: "a", Mode: 0o400, Data: sensitive.New([]byte("value"))}}})
		if err != nil {
			b.Fatal(err)
		}
		returned = append(returned, time.Since(begin))
		if _, err := task.Wait(b.Context()); err != nil {
			b.Fatal(err)
		}
		var said string
		if err := task.Logs(b.Context(), executor.LogOptions{Tail: -1}, func(l executor.Line) error { said += string(l.Data); return nil }); err != nil {
			b.Fatal(err)
		}
		ns, err := strconv.ParseInt(strings.TrimSpace(said), 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		first = append(first, time.Unix(0, ns).Sub(begin))
		if err := task.Remove(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(median(first), "first-ms")
	b.ReportMetric(float64(slices.Min(first))/1e6, "first-min-ms")
	b.ReportMetric(median(returned), "start-ms")
	b.ReportMetric(float64(cpuOfChildren(b)-before)/1e6/float64(len(first)), "cpu-ms")
}

// BenchmarkExec is the share of BenchmarkStart that one re-execution of the binary has, of two: until main.
func BenchmarkExec(b *testing.B) {
	binary := benchSelf(b)
	var took []time.Duration
	for b.Loop() {
		begin := time.Now()
		cmd := exec.Command(binary, "internal-supervise", "x")
		cmd.Env = []string{"GOMAXPROCS=1"}
		_ = cmd.Run() // there is no job: it ends at once
		took = append(took, time.Since(begin))
	}
	b.ReportMetric(median(took), "exec-ms")
}

// cpuOfChildren returns the processor time of all processes that were started and waited for.
func cpuOfChildren(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2]) / 1e6
}
