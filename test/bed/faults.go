package bed

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// path is the way of packets from one host to another; the way back is another one.
type path struct{ from, to *Host }

// fault is what happens on a path; the zero value is a good one.
type fault struct {
	cut  bool
	loss int // percent
	rate int // KiB a second

	delay, jitter time.Duration
}

// Cut drops all that goes from these hosts to those, and nothing that comes back: what needs an answer does not get one.
func (b *Bed) Cut(from, to []*Host) {
	b.t.Helper()
	b.note("cut %s > %s", names(from), names(to))
	b.change(from, to, func(f *fault) { f.cut = true })
}

// Partition cuts each of the sets off from the others, both ways. Hosts in no set reach all.
func (b *Bed) Partition(sets ...[]*Host) {
	b.t.Helper()
	for i := range sets {
		for j := range sets {
			if i != j {
				b.Cut(sets[i], sets[j])
			}
		}
	}
}

// Isolate cuts each of the hosts off from all others, both ways.
func (b *Bed) Isolate(hosts ...*Host) {
	b.t.Helper()
	for _, h := range hosts {
		b.Partition([]*Host{h}, b.Others(h))
	}
}

// Lose loses so many percent of the packets from these hosts to those. Which ones the kernel draws.
func (b *Bed) Lose(percent int, from, to []*Host) {
	b.t.Helper()
	b.note("lose %d%% of %s > %s", percent, names(from), names(to))
	b.change(from, to, func(f *fault) { f.loss = percent })
}

// Limit drops what goes from each of these hosts to each of those beyond so many KiB a second, and a burst of as many and 128.
func (b *Bed) Limit(kib int, from, to []*Host) {
	b.t.Helper()
	b.note("limit %s > %s to %d KiB/s", names(from), names(to), kib)
	b.change(from, to, func(f *fault) { f.rate = kib })
}

// Heal makes all paths good again. Daemons and disks stay as they are.
func (b *Bed) Heal() {
	b.t.Helper()
	b.note("heal")
	b.mu.Lock()
	defer b.mu.Unlock()
	for p := range b.faults {
		delete(b.faults, p)
	}
	b.apply(b.all)
	b.relay(b.all)
}

// Others returns all hosts but these.
func (b *Bed) Others(but ...*Host) []*Host {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(b.all), func(h *Host) bool { return slices.Contains(but, h) })
}

func names(hosts []*Host) string {
	var all []string
	for _, h := range hosts {
		all = append(all, h.Name)
	}
	return strings.Join(all, ",")
}

func (b *Bed) change(from, to []*Host, change func(*fault)) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range from {
		for _, h := range to {
			if f != h {
				changed := b.faults[path{f, h}]
				change(&changed)
				b.faults[path{f, h}] = changed
			}
		}
	}
	b.apply(to)
	b.relay(from)
}

// apply writes the rules of hosts. They stand where packets arrive: the sender does not learn that they are dropped, as on a
// real network. b.mu is held.
func (b *Bed) apply(hosts []*Host) {
	b.t.Helper()
	for _, h := range hosts {
		var rules []string
		for _, from := range b.all {
			f := b.faults[path{from, h}]
			if f.cut {
				rules = append(rules, fmt.Sprintf("ip saddr %s counter drop", from.IP))
			}
			if f.loss > 0 {
				rules = append(rules, dropLost(from.IP, f.loss))
			}
			if f.rate > 0 {
				rules = append(rules, dropBeyond(from.IP, f.rate))
			}
		}
		if _, err := h.ns.run(table(rules), "nft", "-f", "-"); err != nil {
			b.t.Fatalf("changing the rules of %s: %v", h.Name, err)
		}
	}
}

func dropLost(from string, percent int) string {
	return fmt.Sprintf("ip saddr %s numgen random mod 100 < %d counter drop", from, percent)
}

// The burst of 128 KiB, which the kernel adds to that of a second, holds two packets of the largest size that veths pass on whole.
func dropBeyond(from string, kib int) string {
	return fmt.Sprintf("ip saddr %s limit rate over %d kbytes/second burst 128 kbytes counter drop", from, kib)
}

// table replaces all rules at once.
func table(rules []string) string {
	return "table ip bed\ndelete table ip bed\ntable ip bed {\nchain arriving {\ntype filter hook input priority -300; policy accept;\n" +
		strings.Join(rules, "\n") + "\n}\n}\n"
}

const ballast = "ballast"

// Fill fills the disk of a host WithDisk to its last byte.
func (h *Host) Fill() {
	h.b.t.Helper()
	if !h.hasOwnDisk {
		h.b.t.Fatalf("%s has no disk of its own", h.Name)
	}
	h.b.note("fill %s", h.Name)
	f, err := os.OpenFile(filepath.Join(h.State(), ballast), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.b.t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, zeros{}); !errors.Is(err, syscall.ENOSPC) {
		h.b.t.Fatalf("filling the disk of %s: %v", h.Name, err)
	}
}

// Free undoes Fill.
func (h *Host) Free() {
	h.b.t.Helper()
	h.b.note("free %s", h.Name)
	if err := os.Remove(filepath.Join(h.State(), ballast)); err != nil {
		h.b.t.Fatal(err)
	}
}

// zeros reads as zeros without end.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
