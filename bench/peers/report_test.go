package main

import (
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

func TestStats(t *testing.T) {
	for _, c := range []struct {
		values              []float64
		median, least, most float64
	}{
		{[]float64{3}, 3, 3, 3},
		{[]float64{4, 1}, 2.5, 1, 4},
		{[]float64{9, 1, 5}, 5, 1, 9},
		{[]float64{8, 2, 4, 6}, 5, 2, 8},
	} {
		if median, least, most := stats(c.values); median != c.median || least != c.least || most != c.most {
			t.Errorf("stats(%v) = %v, %v, %v, want %v, %v, %v", c.values, median, least, most, c.median, c.least, c.most)
		}
	}
}

func TestBetter(t *testing.T) {
	for _, c := range []struct {
		more       bool
		a, b, want float64
	}{{true, 6, 2, 3}, {true, 2, 8, 0.25}, {false, 2, 6, 3}, {false, 8, 2, 0.25}} {
		if got := (row{more: c.more}).better(c.a, c.b); got != c.want {
			t.Errorf("more %v: better(%v, %v) = %v, want %v", c.more, c.a, c.b, got, c.want)
		}
	}
}

func sample(others float64) report {
	return report{machine: "a <machine>", runs: 2, others: others, results: []result{
		{row: row{what: "joins & more", unit: "joins/s", more: true, against: "swarmkit"}, values: map[string][]float64{"warden": {3000, 1000}, "swarmkit": {50, 150}}},
		{row: row{what: "fail-over", unit: "s", against: "swarmkit"}, values: map[string][]float64{"warden": {4, 4}, "swarmkit": {2, 2}}},
		{row: row{what: "containers", unit: "s", against: "run1"}, values: map[string][]float64{"warden": {4, 4}, "run1": {4.1}}},
		{row: row{what: "nothing", unit: "s", against: "swarm"}, values: map[string][]float64{}},
	}}
}

var told = []string{"20.0 times better", "2.0 times worse", "the same", "1,000–3,000", "50.0–150", "4.10–4.10, 1 of 2 failed", "failed", "SwarmKit", "docker run, 1 client", "2 runs in turns"}

func TestTable(t *testing.T) {
	got := sample(0).table()
	for _, want := range append(told, "joins & more") {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "LOADED") || strings.Contains(got, "QUICK") {
		t.Errorf("a good table is not to be published:\n%s", got)
	}
	if got := sample(0.5).table(); !strings.Contains(got, "up to 50% of the machine: LOADED") {
		t.Errorf("a loaded machine is not told:\n%s", got)
	}
	r := sample(0)
	r.quick = true
	if got := r.table(); !strings.Contains(got, "QUICK") {
		t.Errorf("a quick run is not told:\n%s", got)
	}
}

func TestMarkdown(t *testing.T) {
	r := sample(0)
	r.results[0].what = "a | b"
	got := r.markdown()
	for _, want := range append(told, `a \| b`) {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	lines := strings.Split(strings.TrimSpace(got), "\n")
	if len(lines) != 2+2+len(r.results) {
		t.Fatalf("%d lines:\n%s", len(lines), got)
	}
	for _, line := range lines[2:] {
		if n := strings.Count(strings.ReplaceAll(line, `\|`, ""), "|"); n != 9 {
			t.Errorf("%d bars in %q, want 9", n, line)
		}
	}
}

func TestChart(t *testing.T) {
	got := sample(0.5).chart()
	for d := xml.NewDecoder(strings.NewReader(got)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, got)
		}
	}
	for _, want := range append(told, "joins &amp; more", "a &lt;machine&gt;", "LOADED", "Warden", "prefers-color-scheme:dark") {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "NaN") || strings.Contains(got, "Inf") {
		t.Errorf("not a number in\n%s", got)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{1234567.4: "1,234,567", 999.6: "1,000", 123: "123", 12.34: "12.3", 1.234: "1.23", 0.01234: "0.0123"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
}

// TestTurn: in as many runs as there are contestants, twice, each is first as often as any other, and all take part in each run.
func TestTurn(t *testing.T) {
	by := []string{"a", "b", "c", "d"}
	for n := 2; n <= len(by); n++ {
		firsts := map[string]int{}
		for run := range 2 * n {
			got := turn(by[:n], run)
			if !slices.Equal(slices.Sorted(slices.Values(got)), by[:n]) {
				t.Errorf("turn(%q, %d) = %q", by[:n], run, got)
			}
			firsts[got[0]]++
		}
		for _, name := range by[:n] {
			if firsts[name] != 2 {
				t.Errorf("of %d, %s is first %d times, want 2", n, name, firsts[name])
			}
		}
	}
}

func TestChoose(t *testing.T) {
	all := works(quick, nil)
	if got, err := choose(all, ""); err != nil || len(got) != len(all) {
		t.Errorf("choose(all) = %d, %v", len(got), err)
	}
	if got, err := choose(all, "memory,join"); err != nil || len(got) != 2 || got[0].name != "join" || got[1].name != "memory" {
		t.Errorf("choose(memory,join) = %v, %v", got, err)
	}
	if _, err := choose(all, "join,nonsense"); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("choose(join,nonsense) = %v", err)
	}
	for _, w := range all {
		for _, r := range w.rows {
			if w.by[0] != first || !slices.Contains(w.by, r.against) || titles[r.against] == "" {
				t.Errorf("%s: row %q is against %q, of %q", w.name, r.what, r.against, w.by)
			}
		}
	}
}
