package bed_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"warden/internal/leaktest"
	"warden/internal/testcluster"
	"warden/test/bed"
)

func TestMain(m *testing.M) {
	bed.Main()
	if len(os.Args) > 1 && os.Args[1] == probeVerb {
		if err := probe(os.Args[2:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	leaktest.Main(m)
}

// limit is how long a test waits for what takes moments on a quiet machine.
const limit = time.Minute

const (
	probeVerb = "bed-probe"
	port      = "4000"
)

// probe is what tests run in hosts to see how the network is.
func probe(args []string) error {
	switch args[0] {
	case "receive": // N SECONDS: how many datagrams come, up to N
		want, _ := strconv.Atoi(args[1])
		seconds, _ := strconv.Atoi(args[2])
		c, err := net.ListenPacket("udp4", ":"+port)
		if err != nil {
			return err
		}
		got := 0
		for err = c.SetReadDeadline(time.Now().Add(time.Duration(seconds) * time.Second)); err == nil && got < want; got++ {
			if _, _, err = c.ReadFrom(make([]byte, 64)); err != nil {
				got--
			}
		}
		fmt.Print(got)
		return nil
	case "send": // IP N: sends so many datagrams
		n, _ := strconv.Atoi(args[2])
		c, err := net.Dial("udp4", net.JoinHostPort(args[1], port))
		for ; err == nil && n > 0; n-- {
			if _, err = c.Write([]byte("datagram")); errors.Is(err, syscall.ECONNREFUSED) {
				err = nil // nobody listens yet
			}
		}
		return err
	case "connect": // ADDRESS: connects and sends nothing
		c, err := net.DialTimeout("tcp4", args[1], 20*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	case "drain": // reads one connection to its end
		l, err := net.Listen("tcp4", ":"+port)
		if err != nil {
			return err
		}
		c, err := l.Accept()
		if err != nil {
			return err
		}
		n, err := io.Copy(io.Discard, c)
		fmt.Print(n)
		return err
	case "pour": // IP BYTES: sends so many by TCP
		n, _ := strconv.Atoi(args[2])
		var c net.Conn
		err := errors.New("no attempt")
		for stop := time.Now().Add(20 * time.Second); err != nil && time.Now().Before(stop); {
			c, err = net.Dial("tcp4", net.JoinHostPort(args[1], port))
		}
		if err != nil {
			return err
		}
		if _, err := c.Write(make([]byte, n)); err != nil {
			return err
		}
		return c.Close()
	case "echo": // SECONDS: until nobody has called for so long
		return echo(args[1])
	case "ping": // IP N: the shortest and the longest of so many round trips, in microseconds
		return ping(args[1], args[2])
	}
	return fmt.Errorf("no probe %q", args)
}

func run(h *bed.Host, args ...string) (string, error) {
	return h.Run(append([]string{"/proc/self/exe", probeVerb}, args...)...)
}

// received returns how many of n datagrams from one host reach the other, at least one being sent while it listens.
func received(t *testing.T, from, to *bed.Host, n, seconds int) int {
	t.Helper()
	done := make(chan int, 1)
	go func() {
		out, err := run(to, "receive", strconv.Itoa(n), strconv.Itoa(seconds))
		got, aerr := strconv.Atoi(out)
		if err = errors.Join(err, aerr); err != nil {
			t.Errorf("receiving at %s: %v", to.Name, err)
		}
		done <- got
	}()
	for {
		if _, err := run(from, "send", to.IP, strconv.Itoa(n)); err != nil {
			t.Fatalf("sending from %s: %v", from.Name, err)
		}
		select {
		case got := <-done:
			return got
		default:
		}
	}
}

// reaches says what came of a TCP connection to the daemon.
func reaches(from, to *bed.Host) error {
	_, err := run(from, "connect", to.Address())
	return err
}

// TestPartition cuts paths between hosts in all the ways that there are, and heals.
func TestPartition(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	x, y, z := b.Host("x"), b.Host("y"), b.Host("z")
	check := func(when string, want map[[2]*bed.Host]bool) {
		t.Helper()
		for p, open := range want {
			seconds := 30
			if !open {
				seconds = 1
			}
			if got := received(t, p[0], p[1], 1, seconds); (got == 1) != open {
				t.Errorf("%s: %d datagrams go from %s to %s, want open = %v", when, got, p[0].Name, p[1].Name, open)
			}
		}
	}
	type way = [2]*bed.Host
	check("at first", map[way]bool{{x, y}: true, {y, x}: true, {z, x}: true})
	b.Cut([]*bed.Host{x}, []*bed.Host{y})
	check("one way", map[way]bool{{x, y}: false, {y, x}: true, {x, z}: true})
	b.Partition([]*bed.Host{x}, []*bed.Host{z})
	check("both ways", map[way]bool{{x, z}: false, {z, x}: false, {x, y}: false, {y, z}: true})
	b.Heal()
	check("healed", map[way]bool{{x, y}: true, {x, z}: true, {z, x}: true})
	b.Isolate(z)
	check("isolated", map[way]bool{{z, x}: false, {y, z}: false, {x, y}: true})
}

var dropped = regexp.MustCompile(`numgen random mod 100 < 50 counter packets (\d+) `)

// TestLossyPath loses about half of what goes over it.
func TestLossyPath(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	x, y := b.Host("x"), b.Host("y")
	b.Lose(50, []*bed.Host{x}, []*bed.Host{y})
	if _, err := run(x, "send", y.IP, "1000"); err != nil {
		t.Fatal(err)
	}
	testcluster.Await(t, limit, func() error { // the last may be under way
		out, err := y.Run("nft", "list", "ruleset")
		if m := dropped.FindStringSubmatch(out); m != nil {
			if n, _ := strconv.Atoi(m[1]); n > 300 && n < 700 {
				return nil
			}
		}
		return fmt.Errorf("of 1000 datagrams over a path that loses half, dropped: %v\n%s", err, out)
	})
	if got := received(t, x, y, 20, 30); got != 20 {
		t.Errorf("%d of 20 datagrams come over a path that loses half, however many are sent", got)
	}
}

// TestSlowPath carries all, in no less time than its rate allows: after the burst 1.75 s.
func TestSlowPath(t *testing.T) {
	t.Parallel()
	const rate, size = 512, 1536 // KiB
	b := bed.New(t)
	x, y := b.Host("x"), b.Host("y")
	b.Limit(rate, []*bed.Host{x}, []*bed.Host{y})
	poured := make(chan error, 1)
	start := time.Now()
	go func() {
		_, err := run(x, "pour", y.IP, strconv.Itoa(size<<10))
		poured <- err
	}()
	out, err := run(y, "drain")
	if err := errors.Join(err, <-poured); err != nil || out != strconv.Itoa(size<<10) {
		t.Fatalf("%s of %d bytes arrived: %v", out, size<<10, err)
	}
	if d := time.Since(start); d < 1500*time.Millisecond {
		t.Errorf("%d KiB took %s over a path of %d KiB/s", size, d, rate)
	}
}

// TestPauseAndKill: a paused daemon answers nobody and goes on where it was; a killed one starts again from its disk, and finds
// its task.
func TestPauseAndKill(t *testing.T) {
	t.Parallel()
	b := bed.New(t)
	all := b.Hosts([]string{"m1", "x"})
	m, x := all[0], all[1]
	m.Ctl("swarm", "init", "--availability", "active")
	m.Ctl("service", "create", "--name", "app", "host", "sleep", "31536000")
	testcluster.AwaitRunning(t, m, "app", 1)

	m.Pause()
	if states := threads(t, m, "warden\x00run"); strings.Trim(states, "T") != "" {
		t.Errorf("the threads of a paused daemon are %s, want all T, stopped", states)
	}
	if _, stderr, code := m.Try("version", "--timeout", "1s"); code == 0 {
		t.Errorf("a paused daemon answers: %s", stderr)
	}
	if err := reaches(x, m); err != nil {
		t.Errorf("the kernel takes no connection for a paused daemon: %v", err)
	}
	m.Resume()
	m.Ctl("zone", "create", "after-the-pause")

	m.Kill()
	if err := reaches(x, m); err == nil {
		t.Error("a killed daemon takes connections")
	}
	if n := len(processes(t, m, "sleep\x0031536000")); n != 1 {
		t.Errorf("%d processes of the task after its daemon was killed, want 1", n)
	}
	m.Start()
	testcluster.Await(t, limit, func() error {
		out, stderr, _ := m.Try("zone", "ls")
		if !strings.Contains(out, "after-the-pause") {
			return fmt.Errorf("zone ls after the restart: %s%s", out, stderr)
		}
		return nil
	})
	testcluster.AwaitRunning(t, m, "app", 1)
	m.Stop()
	m.Start()
}

// threads returns the state of each thread, a letter (proc(5)), of the processes of a host whose command line begins with the mark.
func threads(t *testing.T, h *bed.Host, mark string) (states string) {
	t.Helper()
	for _, dir := range processes(t, h, mark) {
		found, _ := filepath.Glob(filepath.Join(dir, "task/[0-9]*/stat"))
		for _, path := range found {
			if b, err := os.ReadFile(path); err == nil {
				_, after, _ := strings.Cut(string(b), ") ")
				states += after[:1]
			}
		}
	}
	if states == "" {
		t.Fatalf("%s runs no %q", h.Name, mark)
	}
	return states
}

// processes returns the folders in /proc of the processes of a host whose command line begins with the mark.
func processes(t *testing.T, h *bed.Host, mark string) (dirs []string) {
	t.Helper()
	found, _ := filepath.Glob(filepath.Join(h.Root(), "proc/[0-9]*/cmdline"))
	if len(found) == 0 {
		t.Fatalf("%s has no processes", h.Name)
	}
	for _, path := range found {
		if b, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(b), mark) {
			dirs = append(dirs, filepath.Dir(path))
		}
	}
	return dirs
}
