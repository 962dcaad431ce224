package bed_test

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"warden/internal/testcluster"
	"warden/test/bed"
)

// echoPort is where the probe echo listens.
const echoPort = "4001"

// echo answers datagrams until it has none for so many seconds.
func echo(seconds string) error {
	n, err := strconv.Atoi(seconds)
	if err != nil {
		return err
	}
	c, err := net.ListenPacket("udp4", ":"+echoPort)
	if err != nil {
		return err
	}
	b := make([]byte, 64)
	for {
		if err := c.SetReadDeadline(time.Now().Add(time.Duration(n) * time.Second)); err != nil {
			return err
		}
		size, from, err := c.ReadFrom(b)
		if err != nil {
			return nil
		}
		if _, err := c.WriteTo(b[:size], from); err != nil {
			return err
		}
	}
}

// ping prints the shortest and the longest of n round trips to echo, in microseconds.
func ping(ip, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	c, err := net.Dial("udp4", net.JoinHostPort(ip, echoPort))
	if err != nil {
		return err
	}
	shortest, longest := time.Hour, time.Duration(0)
	for attempt, stop := 0, time.Now().Add(30*time.Second); n > 0; attempt++ {
		if time.Now().After(stop) {
			return errors.New("no echo")
		}
		sent := []byte(strconv.Itoa(attempt))
		start := time.Now()
		b := make([]byte, 64)
		_, err := c.Write(sent)
		if err == nil {
			err = c.SetReadDeadline(start.Add(time.Second))
		}
		size := 0
		for err == nil && !slices.Equal(b[:size], sent) { // what comes late is of an attempt before
			size, err = c.Read(b)
		}
		if err == nil { // else it was lost, or nobody listens yet
			took := time.Since(start)
			shortest, longest = min(shortest, took), max(longest, took)
			n--
		}
	}
	fmt.Print(shortest.Microseconds(), " ", longest.Microseconds())
	return nil
}

// roundTrips returns the shortest and the longest of some round trips from one host to another, at which echo runs.
func roundTrips(t *testing.T, from, to *bed.Host) (shortest, longest time.Duration) {
	t.Helper()
	out, err := run(from, "ping", to.IP, "10")
	if err == nil {
		_, err = fmt.Sscan(out, &shortest, &longest)
	}
	if err != nil {
		t.Fatalf("from %s to %s: %v %s", from.Name, to.Name, err, out)
	}
	return shortest * time.Microsecond, longest * time.Microsecond
}

// TestDelay: a path takes as much longer as it was told to, one way, and carries all; the others take no longer, and neither
// does it when healed.
func TestDelay(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	x, y, z := b.Host("x"), b.Host("y"), b.Host("z")
	at := func(h ...*bed.Host) []*bed.Host { return h }
	for _, h := range []*bed.Host{x, y, z} {
		go func() { _, _ = run(h, "echo", "600") }() // until the bed ends
	}
	near, _ := roundTrips(t, x, y)
	const slack = 20 * time.Millisecond // the machine may be busy
	check := func(when string, from, to *bed.Host, want time.Duration) {
		t.Helper()
		testcluster.Await(t, limit, func() error {
			got, _ := roundTrips(t, from, to)
			if got < want || got > want+near+slack {
				return fmt.Errorf("%s: the shortest round trip from %s to %s takes %s, want %s and at most %s more", when, from.Name, to.Name, got, want, near+slack)
			}
			t.Logf("%s, %s and back to %s: %s, want %s", when, from.Name, to.Name, got, want)
			return nil
		})
	}
	b.Delay(50*time.Millisecond, at(x), at(y))
	check("one way", x, y, 50*time.Millisecond)
	check("one way", y, x, 50*time.Millisecond)
	check("one way", x, z, 0)
	check("one way", y, z, 0)
	b.Delay(25*time.Millisecond, at(y), at(x))
	check("both ways", x, y, 75*time.Millisecond)
	b.Delay(10*time.Millisecond, at(x), at(y, z))
	check("changed", x, y, 35*time.Millisecond)
	check("changed", x, z, 10*time.Millisecond)
	b.Jitter(200*time.Millisecond, at(x), at(y))
	if shortest, longest := roundTrips(t, x, y); shortest < 35*time.Millisecond || longest < 65*time.Millisecond { // a draw of ten below 15 %: never
		t.Errorf("with jitter, a round trip takes %s to %s, want 35ms and up to 200ms more", shortest, longest)
	}
	b.Jitter(0, at(x), at(y))
	check("without jitter", x, y, 35*time.Millisecond)

	const size = 4 << 20 // in packets larger than a link carries
	poured := make(chan error, 1)
	go func() {
		_, err := run(x, "pour", y.IP, strconv.Itoa(size))
		poured <- err
	}()
	out, err := run(y, "drain")
	if err := errors.Join(err, <-poured); err != nil || out != strconv.Itoa(size) {
		t.Errorf("%s of %d bytes arrived over a long path: %v", out, size, err)
	}

	b.Cut(at(x), at(y))
	if got := received(t, x, y, 1, 1); got != 0 {
		t.Error("a path that is far and cut carries a datagram")
	}
	b.Heal()
	check("healed", x, y, 0)
	check("healed", z, y, 0)
	b.Delay(30*time.Millisecond, at(x), at(y))
	check("again", x, y, 30*time.Millisecond)
	b.Heal()
}

// TestFarManagers: a cluster whose managers are 50 ms from each other keeps its leader and commits in a round trip or a few.
func TestFarManagers(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	m, _ := b.Cluster(3, 0)
	b.Delay(50*time.Millisecond, m, m)
	const changes = 5
	n := 0
	testcluster.Await(t, limit, func() error { // a machine that is busy enough costs any leader its lead, once
		lead := awaitLeader(t, m[0], m)
		start := time.Now()
		for range changes {
			n++
			if _, stderr, code := lead.Try("zone", "create", fmt.Sprintf("far-%d", n)); code != 0 {
				return errors.New(stderr)
			}
		}
		took := time.Since(start) / changes
		t.Logf("a change takes %s where a round trip takes 100ms", took)
		if took < 100*time.Millisecond {
			t.Errorf("a change takes %s, less than the round trip that it needs", took)
		}
		if now, err := leader(lead, m); err != nil || now != lead {
			return fmt.Errorf("the leader changed over a long path: %w", err)
		}
		return nil
	})
	b.Heal()
	for _, h := range m {
		testcluster.Await(t, limit, func() error {
			out, stderr, _ := h.Try("zone", "ls", "--local")
			if !strings.Contains(out, fmt.Sprintf("far-%d", n)) {
				return fmt.Errorf("%s: %s%s", h.Name, out, stderr)
			}
			return nil
		})
	}
}
