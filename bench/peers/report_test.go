package main

import (
	"encoding/xml"
	"errors"
	"io"
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
		{row: row{what: "joins & more", unit: "joins/s", more: true}, values: map[string][]float64{"warden": {300, 100}, "swarmkit": {50, 150}}},
		{row: row{what: "fail-over", unit: "s"}, values: map[string][]float64{"warden": {4, 4}, "swarmkit": {2, 2}}},
	}}
}

func TestTable(t *testing.T) {
	got := sample(0).table()
	for _, want := range []string{"joins & more", "100 to 300", "50.0 to 150", "2.00 times", "0.50 times", "2 runs in turns"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "LOADED") {
		t.Errorf("an idle machine is said to be loaded:\n%s", got)
	}
	if got := sample(0.5).table(); !strings.Contains(got, "up to 50% of the machine: LOADED") {
		t.Errorf("a loaded machine is not told:\n%s", got)
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
	for _, want := range []string{"joins &amp; more", "a &lt;machine&gt;", "LOADED", "Warden", "SwarmKit", "2.00 times better"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}
