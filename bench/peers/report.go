package main

import (
	"fmt"
	"html"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// report is all that was measured.
type report struct {
	machine string
	runs    int
	quick   bool
	began   time.Time
	others  float64 // the largest share of the machine that others took during one measurement
	results []result
}

// result is the values of one row by contestant.
type result struct {
	row
	values map[string][]float64
}

// loaded is the share of the machine above which others spoil a measurement.
const loaded = 0.05

// head says where and when, and whether the figures may be believed.
func (r report) head() string { return r.place() + "; " + r.trust() }

func (r report) place() string {
	return r.began.UTC().Format("2006-01-02 15:04 UTC") + "; " + r.machine
}

func (r report) trust() string {
	s := fmt.Sprintf("%d runs in turns; others took up to %.0f%% of the machine", r.runs, r.others*100)
	if r.others > loaded {
		s += ": LOADED, not to be published"
	}
	if r.quick {
		s += "; QUICK, not to be published"
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

// verdict says how Warden's median stands to the other's.
func (r result) verdict() string {
	if len(r.values[first]) == 0 || len(r.values[r.against]) == 0 {
		return ""
	}
	a, _, _ := stats(r.values[first])
	b, _, _ := stats(r.values[r.against])
	switch ratio := r.better(a, b); {
	case ratio >= 1.05:
		return fmt.Sprintf("%.1f times better", ratio)
	case ratio <= 1/1.05:
		return fmt.Sprintf("%.1f times worse", 1/ratio)
	}
	return "the same"
}

// cells are a contestant's median and spread. Values that are missing are told.
func (r report) cells(values []float64) (median, spread string) {
	if len(values) == 0 {
		return "failed", ""
	}
	m, least, most := stats(values)
	spread = number(least) + "–" + number(most)
	if missing := r.runs - len(values); missing > 0 {
		spread += fmt.Sprintf(", %d of %d failed", missing, r.runs)
	}
	return number(m), spread
}

// number writes a value with at least two digits that count.
func number(v float64) string {
	switch {
	case v >= 100:
		return commas(int(v + 0.5))
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.4f", v)
}

// commas writes a whole number that is not negative with a comma after the thousands.
func commas(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// lines are the table's: what each column is, then one line a row.
func (r report) lines() [][]string {
	all := [][]string{{"", "unit", titles[first], "least–most", "against", "", "least–most", titles[first] + " is"}}
	for _, res := range r.results {
		median, spread := r.cells(res.values[first])
		other, otherSpread := r.cells(res.values[res.against])
		all = append(all, []string{res.what, res.unit, median, spread, titles[res.against], other, otherSpread, res.verdict()})
	}
	return all
}

// table is the report as text.
func (r report) table() string {
	var b strings.Builder
	fmt.Fprintln(&b, r.head())
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, line := range r.lines() {
		fmt.Fprintln(w, strings.Join(line, "\t"))
	}
	w.Flush()
	return b.String()
}

// markdown is the report as Markdown.
func (r report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s.\n\n", r.head())
	for i, line := range r.lines() {
		for j := range line {
			line[j] = strings.ReplaceAll(line[j], "|", `\|`)
		}
		fmt.Fprintf(&b, "| %s |\n", strings.Join(line, " | "))
		if i == 0 {
			b.WriteString("|" + strings.Repeat("---|", len(line)) + "\n")
		}
	}
	return b.String()
}

// style is the chart's, for light and for dark pages: it brings no background of its own.
const style = `<style>
text{font:12px system-ui,sans-serif;fill:#1f2328}.small{font-size:11px;fill:#59636e}.value{font-variant-numeric:tabular-nums}
.warden{fill:#0969da}.other{fill:#8c959f}.engine{fill:#bc8f2f}.spread{stroke:#1f2328;stroke-width:1.5}.rule{stroke:#d1d9e0}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.warden{fill:#4493f8}.other{fill:#6e7681}.engine{fill:#9e7a2d}.spread{stroke:#e6edf3}.rule{stroke:#3d444d}}
</style>
`

// chart is the report as SVG. Each row has its own scale: a bar for each contestant's median, a line from the least to the most value,
// and both in numbers.
func (r report) chart() string {
	const (
		left, wide, right   = 380, 320, 320
		bar, gap, top, tail = 18, 14, 76, 4
	)
	var b strings.Builder
	text := func(x float64, y int, class, anchor, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" class="%s" text-anchor="%s">%s</text>`+"\n", x, y, class, anchor, html.EscapeString(s))
	}
	height := top + len(r.results)*(2*bar+gap) + tail
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`+"\n", left+wide+right, height, left+wide+right, height)
	fmt.Fprintf(&b, "<title>%s</title>\n%s", html.EscapeString(titles[first]+" and others at the same work"), style)
	text(8, 16, "small", "start", r.place())
	text(8, 33, "small", "start", r.trust())
	text(8, 50, "small", "start", "Bar: median. Line: least to most. Each row has a scale of its own.")
	y := top
	for _, res := range r.results {
		fmt.Fprintf(&b, `<line x1="8" x2="%d" y1="%d" y2="%d" class="rule"/>`+"\n", left+wide+right-8, y-gap/2, y-gap/2)
		hint := res.unit + ", less is better"
		if res.more {
			hint = res.unit + ", more is better"
		}
		if verdict := res.verdict(); verdict != "" {
			hint += "; " + titles[first] + " is " + verdict
		}
		text(8, y+13, "", "start", res.what)
		text(8, y+bar+12, "small", "start", hint)
		scale := 0.0
		for _, by := range []string{first, res.against} {
			if len(res.values[by]) > 0 {
				_, _, most := stats(res.values[by])
				scale = max(scale, most)
			}
		}
		for i, by := range []string{first, res.against} {
			class := []string{"warden", "other"}[i]
			if strings.HasPrefix(by, "run") {
				class = "engine"
			}
			label, end := titles[by]+": failed", float64(left)
			if v := res.values[by]; len(v) > 0 {
				median, least, most := stats(v)
				px := func(v float64) float64 { return left + v/scale*wide }
				fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" rx="2" class="%s"/>`, left, y+1, max(1, median/scale*wide), bar-4, class)
				fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" class="spread"/>`+"\n", px(least), px(most), y+bar/2-1, y+bar/2-1)
				m, spread := r.cells(v)
				label, end = fmt.Sprintf("%s: %s (%s)", titles[by], m, spread), px(most)
			}
			text(end+7, y+bar-5, "value", "start", label)
			y += bar
		}
		y += gap
	}
	b.WriteString("</svg>\n")
	return b.String()
}
