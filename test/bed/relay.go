package bed

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Delay lets packets from these hosts to those take so much longer, one way. Their order stays. A path as far as a satellite's has
// packets on their way that Cut and Lose, which work where packets arrive, still take. ARP is not delayed.
func (b *Bed) Delay(d time.Duration, from, to []*Host) {
	b.t.Helper()
	b.note("delay %s > %s by %s", names(from), names(to), d)
	b.change(from, to, func(f *fault) { f.delay = d })
}

// Jitter lets each packet from these hosts to those take up to so much longer, drawn by no seed, on top of Delay. Their order stays.
func (b *Bed) Jitter(d time.Duration, from, to []*Host) {
	b.t.Helper()
	b.note("jitter %s > %s up to %s", names(from), names(to), d)
	b.change(from, to, func(f *fault) { f.jitter = d })
}

// relay puts a relay between the bridge and each of the hosts from which a path takes longer, and takes away what is not needed
// any more. b.mu is held.
func (b *Bed) relay(hosts []*Host) {
	b.t.Helper()
	for _, h := range hosts {
		r := Relay{Port: h.port, Tap: "far" + h.port, Delays: map[string]Latency{}}
		for p, f := range b.faults {
			if p.from == h && (f.delay > 0 || f.jitter > 0) {
				r.Delays[p.to.IP] = Latency{f.delay, f.jitter}
			}
		}
		var err error
		switch {
		case len(r.Delays) > 0 && !h.isRelayed:
			h.isRelayed = true
			if err = b.wire.client.Call("Holder.Relay", r, nil); err == nil {
				_, err = b.wire.run(fmt.Sprintf("link set %s nomaster\nlink set %s addrgenmode none\nlink set %s master bridge0 up\n", r.Port, r.Tap, r.Tap), "ip", "-batch", "-")
			}
		case len(r.Delays) > 0:
			err = b.wire.client.Call("Holder.Relay", r, nil)
		case h.isRelayed:
			h.isRelayed = false
			if err = b.wire.client.Call("Holder.EndRelay", r.Port, nil); err == nil {
				_, err = b.wire.run(fmt.Sprintf("link set %s master bridge0\n", r.Port), "ip", "-batch", "-")
			}
		}
		if err != nil {
			b.t.Fatalf("changing the delays from %s: %v", h.Name, err)
		}
	}
}

// What follows runs in the holder of the bridge.

// Relay is how late what comes from a host's port is passed on, by the address where it goes, to a tap that the relay makes.
// Without a delay it goes on at once.
type Relay struct {
	Port, Tap string
	Delays    map[string]Latency
}

// Latency is how long a packet takes at least, and up to how much more.
type Latency struct{ Delay, Jitter time.Duration }

// relay passes frames on between a port and a tap. Each frame comes with the header that says what the sending kernel has left to
// do, checksums and segments, and goes on with it.
type relay struct {
	port, tap *os.File
	quit      chan struct{} // closed to let what waits go at once
	senders   sync.WaitGroup

	mu     sync.Mutex // guards delays and queues
	delays map[[4]byte]Latency
	queues map[[4]byte]chan late // one for each address that had a delay once: it keeps the order
}

type late struct {
	due   time.Time
	frame []byte
}

const (
	vnetHeader  = 10
	ipv4At      = vnetHeader + 14 // after the Ethernet header
	frameMax    = 1 << 17
	queueFrames = 4096    // of one path; more are lost
	portBuffer  = 8 << 20 // what the kernel keeps while the relay does not run
)

// Relay makes a relay, or changes its delays.
func (h *Holder) Relay(r Relay, _ *int) error {
	delays := map[[4]byte]Latency{}
	for ip, l := range r.Delays {
		delays[[4]byte(net.ParseIP(ip).To4())] = l
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.relays[r.Port]; old != nil {
		old.mu.Lock()
		defer old.mu.Unlock()
		old.delays = delays
		return nil
	}
	port, err := openPort(r.Port)
	if err != nil {
		return fmt.Errorf("opening %s: %w", r.Port, err)
	}
	tap, err := openTap(r.Tap)
	if err != nil {
		port.Close()
		return fmt.Errorf("making tap %s: %w", r.Tap, err)
	}
	n := &relay{port: port, tap: tap, quit: make(chan struct{}), delays: delays, queues: map[[4]byte]chan late{}}
	h.relays[r.Port] = n
	go n.pass(port, n.later)                                        // these two end when end closes what they read
	go n.pass(tap, func(frame []byte) { _, _ = port.Write(frame) }) // what can't be sent is lost, as on a wire
	return nil
}

// EndRelay ends a relay: what is on its way arrives at once, and the tap is gone.
func (h *Holder) EndRelay(port string, _ *int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := h.relays[port]
	if n == nil {
		return fmt.Errorf("no relay at %s", port)
	}
	delete(h.relays, port)
	n.port.Close() // first, so that nothing comes any more
	close(n.quit)
	n.mu.Lock()
	for _, q := range n.queues {
		close(q)
	}
	n.queues = nil
	n.mu.Unlock()
	n.senders.Wait()
	return n.tap.Close()
}

// pass reads frames until the file is closed. A frame is the caller's only until to returns.
func (n *relay) pass(from *os.File, to func(frame []byte)) {
	buf := make([]byte, frameMax)
	for {
		size, err := from.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err == nil { // else the link is down, for now
			to(buf[:size])
		}
	}
}

// later sends a frame when it is due.
func (n *relay) later(frame []byte) {
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	var to [4]byte
	if len(frame) >= ipv4At+20 && frame[ipv4At-2] == 0x08 && frame[ipv4At-1] == 0x00 {
		to = [4]byte(frame[ipv4At+16:])
	}
	l, far := n.delays[to]
	q := n.queues[to]
	switch {
	case n.queues == nil: // ended
		return
	case q == nil && !far:
		_, _ = n.tap.Write(frame)
		return
	case q == nil:
		q = make(chan late, queueFrames)
		n.queues[to] = q
		n.senders.Go(func() { n.send(q) }) // ends when end closes the queue
	}
	due := now.Add(l.Delay)
	if l.Jitter > 0 {
		due = due.Add(rand.N(l.Jitter))
	}
	select {
	case q <- late{due, append([]byte(nil), frame...)}:
	default:
	}
}

func (n *relay) send(q <-chan late) {
	for f := range q {
		timer := time.NewTimer(time.Until(f.due))
		select {
		case <-timer.C:
		case <-n.quit:
			timer.Stop()
		}
		_, _ = n.tap.Write(f.frame)
	}
}

// openPort returns what reads all that comes out of a link, and sends into it.
func openPort(name string) (*os.File, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // big endian
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, portBuffer),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openTap makes a link that is there until it is closed.
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("open /dev/net/tun", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
