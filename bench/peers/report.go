package main

import (
	"fmt"
	"html"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// report is all that was measured.
type report struct {
	machine string
	runs    int
	began   time.Time
	others  float64 // the largest share of the machine that others took during one measurement
	results []result
}

// result is the values of one row by product.
type result struct {
	row
	values map[string][]float64
}

// loaded is the share of the machine above which others spoil a measurement.
const loaded = 0.05

// head says where and when, and whether the figures may be believed.
func (r report) head() string {
	s := fmt.Sprintf("%s; %s; %d runs in turns; others took up to %.0f%% of the machine",
		r.began.UTC().Format("2006-01-02 15:04 UTC"), r.machine, r.runs, r.others*100)
	if r.others > loaded {
		s += ": LOADED, not to be published"
	}
	return s
}

// stats returns the median and the least and largest value. Of an even number of values the median is the mean of the middle two.
func stats(values []float64) (median, least, most float64) {
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2, v[0], v[n-1]
}

// better returns how many times better the first is.
func (r row) better(a, b float64) float64 {
	if r.more {
		return a / b
	}
	return b / a
}

func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.4f", v)
}

// table has one line a row: median and spread of each product, and how many times better the first product's median is.
func (r report) table() string {
	var b strings.Builder
	fmt.Fprintln(&b, r.head())
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "\tunit")
	for _, p := range order {
		fmt.Fprintf(w, "\t%s\t(least to most)", products[p].title)
	}
	fmt.Fprintf(w, "\t%s is better\n", products[order[0]].title)
	for _, res := range r.results {
		fmt.Fprintf(w, "%s\t%s", res.what, res.unit)
		var medians []float64
		for _, p := range order {
			median, least, most := stats(res.values[p])
			medians = append(medians, median)
			fmt.Fprintf(w, "\t%s\t%s to %s", number(median), number(least), number(most))
		}
		fmt.Fprintf(w, "\t%s times\n", number(res.better(medians[0], medians[1])))
	}
	w.Flush()
	return b.String()
}

// chart is the table as SVG: each row has its own scale, a bar for each product's median and a line from its least to its most value.
func (r report) chart() string {
	const (
		left, wide, right = 330, 420, 210
		bar, gap, top     = 16, 18, 58
	)
	colours := []string{"#1f6feb", "#8b949e"}
	var b strings.Builder
	height := top + len(r.results)*(len(order)*bar+gap) + 10
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", left+wide+right, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	fmt.Fprintf(&b, `<text x="10" y="20" font-size="11">%s</text>`+"\n", html.EscapeString(r.head()))
	x := 10
	for i, p := range order {
		fmt.Fprintf(&b, `<rect x="%d" y="30" width="12" height="12" fill="%s"/><text x="%d" y="40">%s</text>`+"\n", x, colours[i], x+17, html.EscapeString(products[p].title))
		x += 110
	}
	fmt.Fprintf(&b, `<text x="%d" y="40">bar: median; line: least to most; each row has its own scale</text>`+"\n", x)
	y := top
	for _, res := range r.results {
		scale, medians := 0.0, []float64(nil)
		for _, p := range order {
			median, _, most := stats(res.values[p])
			scale, medians = max(scale, most), append(medians, median)
		}
		hint := "less is better"
		if res.more {
			hint = "more is better"
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text><text x="%d" y="%d" text-anchor="end" fill="#57606a" font-size="10">%s; %s</text>`+"\n",
			left-10, y+12, html.EscapeString(res.what), left-10, y+26, html.EscapeString(res.unit), hint)
		for i, p := range order {
			median, least, most := stats(res.values[p])
			px := func(v float64) float64 { return left + v/scale*wide }
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, left, y, median/scale*wide, bar-2, colours[i])
			fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="black"/>`, px(least), y+bar/2-1, px(most), y+bar/2-1)
			label := number(median)
			if i == 0 {
				label += fmt.Sprintf(" (%s times better)", number(res.better(medians[0], medians[1])))
			}
			fmt.Fprintf(&b, `<text x="%.1f" y="%d">%s</text>`+"\n", px(most)+6, y+bar-4, label)
			y += bar
		}
		y += gap
	}
	b.WriteString("</svg>\n")
	return b.String()
}
