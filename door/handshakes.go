package door

import (
	"container/list"
	"net/netip"
	"sync"
)

// Bounds of handshakes under way.
const (
	handshakesMax        = 512 // in total
	handshakesPerAddress = 128 // of one IPv4 address or IPv6 /64
)

// handshakes holds the connections whose handshake is under way, oldest first. Where there is no room, the oldest makes it:
// the oldest from the newcomer's own address where that has its share, else the oldest of all. An honest handshake takes
// milliseconds; one that is held open to keep others out is the one that goes. Safe for concurrent use.
type handshakes struct {
	mu    sync.Mutex // guards all below; closing a connection under it does not block
	order list.List  // of *Conn; front: oldest
	at    map[*Conn]*list.Element
	count map[netip.Prefix]int
}

// begin enters c, and closes another where there is no room.
func (h *handshakes) begin(c *Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.at == nil {
		h.at, h.count = map[*Conn]*list.Element{}, map[netip.Prefix]int{}
	}
	key := network(c.Remote)
	own := h.count[key] >= handshakesPerAddress
	if own || h.order.Len() >= handshakesMax {
		for e := h.order.Front(); e != nil; e = e.Next() {
			old := e.Value.(*Conn)
			if own && network(old.Remote) != key {
				continue
			}
			h.remove(old)
			old.Close()
			break
		}
	}
	h.at[c] = h.order.PushBack(c)
	h.count[key]++
}

// end takes c out, if it is there.
func (h *handshakes) end(c *Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remove(c)
}

// remove is end with h.mu held.
func (h *handshakes) remove(c *Conn) {
	e, ok := h.at[c]
	if !ok {
		return
	}
	h.order.Remove(e)
	delete(h.at, c)
	key := network(c.Remote)
	if h.count[key]--; h.count[key] == 0 {
		delete(h.count, key)
	}
}

// network is what an address counts as.
func network(ip netip.Addr) netip.Prefix {
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	p, _ := ip.WithZone("").Prefix(bits) // the zero Prefix for the zero Addr
	return p
}
