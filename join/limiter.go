package join

import (
	"container/list"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"warden"
)

// Bounds of attempts at the join door. A cluster behind one address can still join as a whole; the secret of a token has
// 128 bits, so what is bounded is work, not guessing.
const (
	failuresPerAddress = 128 // at once, then failureRate each second
	failureRate        = 2
	failuresInTotal    = 1024
	failureRateTotal   = 20
	pendingPerAddress  = 128 // under way at once, and not proven yet
	pendingInTotal     = 1024
	provenInTotal      = 2048 // under way at once, with a token that is proven
	addressesMax       = 4096 // remembered; more than pendingInTotal
)

// Limiter bounds the failed and the unfinished attempts to join, per address and in total, in bounded memory: the address
// that was seen longest ago, and has nothing under way, is forgotten first. An attempt that has proven its token counts no
// more for its address: it waits for this manager, not this manager for it, and a rack behind one address has many of them at
// once. IPv6 addresses count by their /64. The time is an argument. Safe for concurrent use.
type Limiter struct {
	mu      sync.Mutex // guards all below; held across nothing
	total   bucket
	atWork  int                            // proven attempts under way
	entries map[netip.Prefix]*list.Element // of *entry
	order   *list.List                     // front: seen last
}

type entry struct {
	key netip.Prefix
	bucket
}

// bucket counts the attempts of one address, or of all.
type bucket struct {
	failures *rate.Limiter
	pending  int
}

// NewLimiter returns a limiter that has seen nothing.
func NewLimiter() *Limiter {
	return &Limiter{
		total:   bucket{failures: rate.NewLimiter(failureRateTotal, failuresInTotal)},
		entries: map[netip.Prefix]*list.Element{},
		order:   list.New(),
	}
}

// Allow reports whether an attempt from ip may begin: nil, or CodeLimited with a hint. It counts nothing, and is cheap: for
// the door to ask before the handshake.
func (l *Limiter) Allow(ip netip.Addr, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.allow(ip, now)
}

// Failed counts an attempt that failed before Serve had it: a handshake that broke off. Serve counts its own.
func (l *Limiter) Failed(ip netip.Addr, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail(ip, now)
}

// begin is Allow, and counts the attempt as under way until end.
func (l *Limiter) begin(ip netip.Addr, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.allow(ip, now); err != nil {
		return err
	}
	l.entry(ip).pending++
	l.total.pending++
	return nil
}

// proven says that an attempt under way has proven its token. Errors: CodeLimited.
func (l *Limiter) proven(ip netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.atWork >= provenInTotal {
		return warden.Hint(warden.Errorf(warden.CodeLimited, "limiting attempts to join", "too many nodes join at this manager"), "try another manager, or again in a second")
	}
	l.entry(ip).pending--
	l.total.pending--
	l.atWork++
	return nil
}

func (l *Limiter) end(ip netip.Addr, now time.Time, proven, failed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if proven {
		l.atWork--
	} else {
		l.entry(ip).pending--
		l.total.pending--
	}
	if failed {
		l.fail(ip, now)
	}
}

func (l *Limiter) fail(ip netip.Addr, now time.Time) {
	l.entry(ip).failures.AllowN(now, 1)
	l.total.failures.AllowN(now, 1)
}

func (l *Limiter) allow(ip netip.Addr, now time.Time) error {
	const op = "limiting attempts to join"
	if l.total.failures.TokensAt(now) < 1 || l.total.pending >= pendingInTotal {
		return warden.Hint(warden.Errorf(warden.CodeLimited, op, "too many attempts at this manager"), "try another manager, or again in a minute")
	}
	e, ok := l.entries[keyOf(ip)]
	if !ok {
		return nil
	}
	if b := e.Value.(*entry); b.failures.TokensAt(now) < 1 || b.pending >= pendingPerAddress {
		return warden.Hint(warden.Errorf(warden.CodeLimited, op, "too many attempts from this address"), "try again in a minute")
	}
	return nil
}

// entry returns the entry of ip, seen now, and makes room for it.
func (l *Limiter) entry(ip netip.Addr) *entry {
	key := keyOf(ip)
	if e, ok := l.entries[key]; ok {
		l.order.MoveToFront(e)
		return e.Value.(*entry)
	}
	for e := l.order.Back(); e != nil && l.order.Len() >= addressesMax; {
		before := e.Prev()
		if old := e.Value.(*entry); old.pending == 0 {
			l.order.Remove(e)
			delete(l.entries, old.key)
		}
		e = before
	}
	b := &entry{key: key, bucket: bucket{failures: rate.NewLimiter(failureRate, failuresPerAddress)}}
	l.entries[key] = l.order.PushFront(b)
	return b
}

func keyOf(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	p, _ := ip.Prefix(bits) // the zero Prefix for the zero Addr
	return p
}
