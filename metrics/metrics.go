// Package metrics shows the facts of a daemon to Prometheus: one page over HTTP, made anew for each scrape.
//
// It counts nothing itself: what it shows is api.Facts, which is also what `wardenctl status --json` prints, so that the two
// cannot differ. It has a registry of its own, so that no library adds to the page, and serves nothing but GET /metrics: no
// profiles, no variables. There is neither TLS nor authentication: the address is loopback unless another host is named.
//
// Invariants: no label has a value that grows with use: no IDs of tasks, no names of secrets or services, no addresses of peers.
// Nothing in the facts is secret, and nothing else is shown. What it reads of the network is bounded in size, time and number.
package metrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"warden/api"
)

// family is one metric: its name, what it says, its labels, and where its values are in the facts.
type family struct {
	name, help string
	kind       prometheus.ValueType // 0: a histogram
	labels     []string
	read       func(f *api.Facts, set func(value float64, labels ...string))
	histogram  func(f *api.Facts) *api.Histogram
}

// words that a state metric has one series for each of, so that an alert sees 0 and not nothing.
var (
	nodeStates = []string{"uninitialized", "locked", "running", "evicted"}
	lockStates = []string{"locked", "old-key", "resealing", "unlocked"}
)

// labelMax bounds the value of a label, in bytes.
const labelMax = 128

// Collector is a prometheus.Collector of the facts that a function gives.
type Collector struct {
	facts func() *api.Facts
	descs []*prometheus.Desc // in the order of families
}

var _ prometheus.Collector = (*Collector)(nil)

// NewCollector returns a collector that asks facts once per scrape. facts must be safe for concurrent use.
func NewCollector(facts func() *api.Facts) *Collector {
	c := &Collector{facts: facts}
	for _, f := range families {
		c.descs = append(c.descs, prometheus.NewDesc(f.name, f.help, f.labels, nil))
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		out <- d
	}
}

// Collect implements prometheus.Collector. A part of the facts that is absent, as the leader's on a follower, has no series.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	facts := c.facts()
	for i, f := range families {
		desc := c.descs[i]
		if f.histogram != nil {
			if h := f.histogram(facts); h != nil {
				out <- histogram(desc, h)
			}
			continue
		}
		f.read(facts, func(value float64, labels ...string) {
			for i, l := range labels {
				labels[i] = label(l)
			}
			m, err := prometheus.NewConstMetric(desc, f.kind, value, labels...)
			if err != nil {
				m = prometheus.NewInvalidMetric(desc, err)
			}
			out <- m
		})
	}
}

// label makes s fit for a label's value.
func label(s string) string { return strings.ToValidUTF8(s[:min(len(s), labelMax)], "") }

func histogram(desc *prometheus.Desc, h *api.Histogram) prometheus.Metric {
	buckets := make(map[float64]uint64, len(h.Bounds)) // cumulative
	var sum uint64
	for i, bound := range h.Bounds {
		if i < len(h.Counts) {
			sum += h.Counts[i]
		}
		buckets[bound] = sum
	}
	m, err := prometheus.NewConstHistogram(desc, h.Count, h.SumSeconds, buckets)
	if err != nil {
		return prometheus.NewInvalidMetric(desc, err)
	}
	return m
}
