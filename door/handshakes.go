package door

import (
	"container/list"
	"context"
	"net/netip"
	"sync"
)

// handshakesMax bounds handshakes under way, of all addresses together: a fleet of a thousand nodes behind one address may
// come at once. One that says nothing costs a goroutine, a descriptor and some 20 KiB, for as long as it is let.
const handshakesMax = 1024

// handshakes holds the connections whose handshake is under way, oldest first. Where there is no room, one goes for each
// that comes: the oldest of the newcomer's own address (IPv6: /64) where that has its fair share, else the oldest of an
// address that has more than that, else the oldest of all. An honest handshake takes milliseconds; one that is held open to
// keep others out is the one that goes, and who holds many open loses his own. Safe for concurrent use.
type handshakes struct {
	mu     sync.Mutex // guards all below; closing a connection under it does not block
	order  list.List  // of *shaking; front: oldest
	at     map[*Conn]*list.Element
	shares map[netip.Prefix]*share
}

// shaking is a connection in the list.
type shaking struct {
	c  *Conn
	of *share
}

// share is how many handshakes an address has under way.
type share struct {
	key netip.Prefix
	n   int
}

// begin enters c, and closes another where there is no room.
func (h *handshakes) begin(c *Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.at == nil {
		h.at, h.shares = map[*Conn]*list.Element{}, map[netip.Prefix]*share{}
	}
	key := network(c.Remote)
	own := h.shares[key]
	if own == nil {
		own = &share{key: key}
		h.shares[key] = own
	}
	if h.order.Len() >= handshakesMax {
		old := h.victim(own)
		h.remove(old)
		old.Close()
		h.shares[key] = own // remove may have dropped the last of this address
	}
	h.at[c] = h.order.PushBack(&shaking{c, own})
	own.n++
}

// victim returns whose turn it is to go for a newcomer from own. The list is full. h.mu is held.
func (h *handshakes) victim(own *share) *Conn {
	fair := max(1, handshakesMax/len(h.shares))
	for e := h.order.Front(); e != nil; e = e.Next() {
		switch s := e.Value.(*shaking); {
		case own.n >= fair && s.of != own:
		case own.n >= fair || s.of.n > fair:
			return s.c
		}
	}
	return h.order.Front().Value.(*shaking).c
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
	of := e.Value.(*shaking).of
	if of.n--; of.n == 0 {
		delete(h.shares, of.key)
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

// turn is that of one handshake to use the processor. There are as many at once as there are processors: of hundreds that could go on, the
// rest wait here and not before what else this manager has to run, which would be late with its heartbeats. Not for concurrent use.
type turn struct {
	ctx   context.Context // of the handshake
	slots chan struct{}
	held  bool
}

// begin waits for the turn. Errors: of the end of the handshake's time.
func (t *turn) begin() error {
	if t.held {
		return nil
	}
	select {
	case t.slots <- struct{}{}:
		t.held = true
		return nil
	case <-t.ctx.Done():
		return t.ctx.Err()
	}
}

// end gives the turn to the next, if it was begun.
func (t *turn) end() {
	if t.held {
		t.held = false
		<-t.slots
	}
}
