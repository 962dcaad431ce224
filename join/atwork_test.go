package join

import (
	"net/netip"
	"testing"
	"time"

	"warden"
)

// TestProvenAttemptsAreBounded: in total, whatever their addresses; one that ends makes room.
func TestProvenAttemptsAreBounded(t *testing.T) {
	l, ip, now := NewLimiter(), netip.MustParseAddr("192.0.2.1"), time.Now()
	attempt := func() error {
		if err := l.begin(ip, now); err != nil {
			t.Fatal(err)
		}
		return l.proven(ip)
	}
	for n := range provenInTotal {
		if err := attempt(); err != nil {
			t.Fatalf("attempt %d: %v", n, err)
		}
	}
	err := attempt()
	if warden.CodeOf(err) != warden.CodeLimited || warden.HintOf(err) == "" {
		t.Errorf("one more = %v, want [limited] with a hint", err)
	}
	l.end(ip, now, false, false)
	l.end(ip, now, true, false)
	if err := attempt(); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
	for range provenInTotal {
		l.end(ip, now, true, false)
	}
	if l.atWork != 0 || l.total.pending != 0 || l.entry(ip).pending != 0 {
		t.Errorf("%d at work, %d and %d pending after all have ended", l.atWork, l.total.pending, l.entry(ip).pending)
	}
}
