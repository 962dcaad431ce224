package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/executor"
	"warden/executor/confine"
)

// TestFollowAcrossRotation: a follower sees each line once and in order, however often the writer goes over to a new file.
func TestFollowAcrossRotation(t *testing.T) {
	dir := t.TempDir()
	w, err := newLogWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	pad := strings.Repeat("x", warden.LogLineMax-10)
	const lines = 3 * warden.TaskLogMax / warden.LogLineMax
	ended, written := make(chan struct{}), make(chan struct{}, 1)
	go func() { // ends when all is written: a burst each time that the reader has caught up
		defer close(ended)
		for n := range lines {
			w.copy(strings.NewReader(fmt.Sprintf("%d %s\n", n, pad)), 'o')
			if n%250 == 249 {
				<-written
			}
		}
	}()
	next := 0
	err = readLogs(t.Context(), dir, executor.LogOptions{Follow: true, Tail: -1}, ended, func(l executor.Line) error {
		if number, _, _ := strings.Cut(string(l.Data), " "); number != strconv.Itoa(next) {
			return fmt.Errorf("line %s, want %d", number, next)
		}
		if next++; next%250 == 0 {
			written <- struct{}{}
		}
		return nil
	})
	if err != nil || next != lines {
		t.Errorf("readLogs(Follow) = %d lines of %d, %v", next, lines, err)
	}
	var size int64
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if len(entries) != 2 || size > warden.TaskLogMax {
		t.Errorf("%d files with %d bytes are kept", len(entries), size)
	}
}

// TestReaderMissesRotations: a reader that is two files behind goes on with the older one that is kept.
func TestReaderMissesRotations(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name+".new"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, name+".new"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	collect := func(l executor.Line) error { got = append(got, string(l.Data)); return nil }
	r := &logReader{ctx: t.Context(), dir: dir}
	defer r.close()
	if err := r.drain(collect); err != nil || got != nil {
		t.Fatalf("drain() without files = %q, %v", got, err)
	}
	write(logFile, "1 o a\n")
	if err := r.drain(collect); err != nil {
		t.Fatal(err)
	}
	write(oldLogFile, "2 o b\n")
	write(logFile, "3 e c\n4 o torn")
	if err := r.drain(collect); err != nil || strings.Join(got, "") != "abc" {
		t.Errorf("drain() = %q, %v, want a b c", got, err)
	}
}

func TestParseRecord(t *testing.T) {
	for text, want := range map[string]string{
		"1 o a": "a", "1 e ": "", "1 o  b c": " b c",
		"": "none", "o a": "none", "1": "none", "1 o": "none", "1 x a": "none", "x o a": "none", "99999999999999999999 o a": "none",
	} {
		line, ok := parseRecord([]byte(text))
		if got := string(line.Data); ok != (want != "none") || ok && got != want {
			t.Errorf("parseRecord(%q) = %q, %v, want %q", text, got, ok, want)
		}
	}
}

// TestCopySplits: lines come out as they went in, whatever pieces they are read in.
func TestCopySplits(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []string
	}{
		{"", nil}, {"a", []string{"a"}}, {"a\n", []string{"a"}}, {"\n\na\n", []string{"", "", "a"}}, {"a\nb", []string{"a", "b"}},
		{strings.Repeat("x", warden.LogLineMax) + "\n", []string{strings.Repeat("x", warden.LogLineMax)}},
		{strings.Repeat("x", warden.LogLineMax+1) + "\ny", []string{strings.Repeat("x", warden.LogLineMax), "x", "y"}},
	} {
		for _, piece := range []int{1, 7, 1 << 20} {
			dir := t.TempDir()
			w, err := newLogWriter(dir)
			if err != nil {
				t.Fatal(err)
			}
			w.copy(&pieces{r: strings.NewReader(c.in), n: piece}, 'e')
			var got []string
			err = readLogs(context.Background(), dir, executor.LogOptions{Tail: -1}, nil, func(l executor.Line) error {
				got = append(got, string(l.Data))
				return nil
			})
			if err != nil || len(got) != len(c.want) || strings.Join(got, "\n") != strings.Join(c.want, "\n") {
				t.Errorf("copy(%d bytes by %d) = %.50q, %v, want %.50q", len(c.in), piece, got, err, c.want)
			}
		}
	}
}

// TestFloodOfOutput: a program that writes nothing but line ends costs its supervisor no more than logRate.
func TestFloodOfOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, err := newLogWriter(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		start, written := time.Now(), 0
		for range 2 {
			w.copy(strings.NewReader(strings.Repeat("\n", 1<<20)), 'o')
			written += 23 << 20 // a record without text: 19 digits, two spaces, the stream, the end
		}
		if took, least := time.Since(start), time.Duration(written/logRate-2)*time.Second; took < least {
			t.Errorf("%d bytes of records were written in %v, want %v at least", written, took, least)
		}
	})
}

// pieces reads at most n bytes at a time.
type pieces struct {
	r io.Reader
	n int
}

func (p *pieces) Read(b []byte) (int, error) { return p.r.Read(b[:min(p.n, len(b))]) }

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	if err := writeFrame(&b, report{Code: warden.CodeInvalid, Cause: "x", Hint: "y"}); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	for n := range whole {
		var r report
		if err := readFrame(bytes.NewReader(whole[:n]), &r); err == nil {
			t.Errorf("readFrame(first %d bytes) = nil", n)
		}
	}
	var r report
	if err := readFrame(bytes.NewReader(whole), &r); err != nil || warden.CodeOf(r.err()) != warden.CodeInvalid || warden.HintOf(r.err()) != "y" {
		t.Errorf("readFrame() = %+v, %v", r, err)
	}
	if err := readFrame(bytes.NewReader([]byte{0xff, 0xff, 0xff, 0xff}), &r); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("readFrame(4 GiB) = %v", err)
	}
}

// TestCgroupSettings holds what is written where, also on a hierarchy that this machine does not have.
func TestCgroupSettings(t *testing.T) {
	l := limits{NanoCPUs: 250_000_000, MemoryBytes: 64 << 20}
	for _, c := range []struct {
		controller string
		v2         bool
		l          limits
		want       string
	}{
		{"cpu", false, l, "[[cpu.cfs_period_us 100000] [cpu.cfs_quota_us 25000]]"},
		{"cpu", true, l, "[[cpu.max 25000 100000]]"},
		{"cpu", true, limits{NanoCPUs: 1}, "[[cpu.max 1000 100000]]"},
		{"cpu", true, limits{}, "[]"},
		{"memory", false, l, "[[memory.limit_in_bytes 67108864] [memory.memsw.limit_in_bytes? 67108864]]"},
		{"memory", true, l, "[[memory.max 67108864] [memory.swap.max? 0]]"},
		{"memory", false, limits{}, "[]"},
		{"pids", true, limits{}, "[[pids.max 512]]"},
	} {
		if got := fmt.Sprint(settings(c.controller, c.v2, c.l)); got != c.want {
			t.Errorf("settings(%s, v2 %v) = %s, want %s", c.controller, c.v2, got, c.want)
		}
	}
	err := cgroup{parent: "p", task: "t"}.create(l)
	if warden.CodeOf(err) != warden.CodeUnsupported || warden.HintOf(err) == "" {
		t.Errorf("create(limits that nothing enforces) = %v", err)
	}
	if err := (cgroup{parent: "p", task: "t"}).create(limits{}); err != nil {
		t.Errorf("create(no limits) = %v", err)
	}
}

// TestClaimIDs: slots are not given twice, nor those of users of the host.
func TestClaimIDs(t *testing.T) {
	all := int64(confine.IDSlots) * confine.IDsPerTask
	e := &Executor{tasks: map[string]*task{}, claimed: map[uint32]bool{}, foreign: []confine.Range{{First: 0, Count: confine.IDFirst + 1}, {First: confine.IDFirst + 3*confine.IDsPerTask - 1, Count: all}}}
	seen := map[uint32]bool{}
	if base := e.claimIDs(); base != confine.IDFirst+confine.IDsPerTask { // of the slots 0 to 2 only this is nobody's
		t.Errorf("claimIDs() = %d, want %d", base, confine.IDFirst+confine.IDsPerTask)
	} else {
		e.unclaimIDs(base)
	}
	e.foreign = []confine.Range{{First: confine.IDFirst + 8*confine.IDsPerTask, Count: all}}
	for range 8 {
		base := e.claimIDs()
		if base < confine.IDFirst || base >= confine.IDFirst+8*confine.IDsPerTask || base%confine.IDsPerTask != 0 {
			t.Errorf("claimIDs() = %d", base)
		}
		seen[base] = true
	}
	if len(seen) != 8 {
		t.Errorf("8 claims gave %d slots", len(seen))
	}
}
