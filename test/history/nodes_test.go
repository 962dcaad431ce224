package history

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/door"
	"warden/join"
	"warden/test/bed"
	"warden/tokens"
)

// joinToken is a token that clients join with.
type joinToken struct {
	object, zone string
	token        tokens.Token
	max          uint64
	mu           sync.Mutex // guards all below
	joins        uint64     // that were tried
	guests       []*guest
}

// usedUp reports whether as many joins were tried as it has uses.
func (t *joinToken) usedUp() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.max > 0 && t.joins >= t.max
}

// guest is a node that joined and is no daemon: its key is here.
type guest struct {
	token   *joinToken
	key     crypto.Signer
	tag     uint64
	mu      sync.Mutex     // guards all below
	grant   *api.JoinGrant // nil: not known to have joined
	leaving bool           // somebody removes it
	gone    bool           // for sure
}

// token makes a call on a token, or joins with it.
func (c *client) token(at *member) bool {
	t, ok := c.tokens.pick(c.rand.IntN)
	if ok {
		calls, doubts := c.history.size(t.object)
		ok = calls < callsMax && doubts < doubtsMax
	}
	if !ok {
		return c.mint(at)
	}
	switch n := c.rand.IntN(100); {
	case n < 30:
		return c.joinAtOnce(t)
	case n < 45:
		t.mu.Lock()
		guests := slices.Clone(t.guests)
		t.mu.Unlock()
		if len(guests) == 0 {
			return true
		}
		again := guests[c.rand.IntN(len(guests))]
		again.mu.Lock()
		leaving := again.leaving
		again.mu.Unlock()
		return leaving || c.join(at, t, again)
	case n < 51:
		if t.usedUp() { // nothing would be seen of it
			return c.readToken(at, t)
		}
		_, sent := c.record(t.object, call{Verb: "revoke"}, patience, func(ctx context.Context) (uint64, any, error) {
			_, err := at.control.RevokeToken(ctx, &api.ReferenceRequest{Reference: t.token.ID})
			return 0, nil, err
		})
		return sent && c.joinAtOnce(t) // where it may not be known yet
	case n < 55:
		c.misled(t)
		return true
	case n < 59:
		return c.strayed(at, t)
	default:
		return c.readToken(at, t)
	}
}

// joinAtOnce joins by a token at some managers at the same time: none of them knows what the others let in.
func (c *client) joinAtOnce(t *joinToken) bool {
	var wg sync.WaitGroup
	var taken atomic.Bool
	for _, at := range c.drawn(c.managers, 1+c.rand.IntN(len(c.managers))) {
		joiner := c.reader()
		wg.Go(func() {
			if joiner.join(at, t, nil) {
				taken.Store(true)
			}
		})
	}
	wg.Wait()
	return taken.Load()
}

func (c *client) readToken(at *member, t *joinToken) bool {
	_, sent := c.record(t.object, call{Verb: read}, patience, func(ctx context.Context) (uint64, any, error) {
		reply, err := at.control.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_TOKEN, References: []string{t.token.ID}})
		if err != nil {
			return 0, nil, err
		}
		o := reply.Objects[0].GetToken()
		return 0, tokenState{Max: o.GetUsesMax(), Uses: o.GetUses(), Revoked: o.GetRevokedNs() != 0}, nil
	})
	return sent
}

// mint makes a token; of one whose text was lost nobody can know anything.
func (c *client) mint(at *member) bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	t := &joinToken{zone: zones[c.rand.IntN(len(zones))], max: c.rand.Uint64N(4) * c.rand.Uint64N(3)}
	began := c.history.now()
	minted, err := at.control.CreateToken(ctx, &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER, UsesMax: t.max, Zone: t.zone})
	out, sent := c.outcome(err)
	if !sent || out.Unknown {
		return sent
	}
	if t.token, err = tokens.Parse(minted.GetToken()); err != nil {
		c.violated("I11", "a token that was minted does not parse: %v", err)
		return true
	}
	parts := strings.Split(minted.Token, "-")
	c.plant("the secret of a token", parts[len(parts)-2])
	t.object = "token/" + t.token.ID
	c.history.object(t.object, tokenModel)
	c.history.add(c.n, t.object, call{Verb: "mint", Number: t.max}, began, out)
	c.tokens.add(t)
	if c.mayBePurged(began) {
		c.history.add(c.n, t.object, call{Verb: "purge"}, began, reply{Unknown: true})
	}
	return true
}

// join joins by a token, from the network of any host: with a new key, or once more with that of again.
func (c *client) join(at *member, t *joinToken, again *guest) bool {
	g := again
	if g == nil {
		key, err := ca.NewKey()
		if err != nil {
			c.violated("I11", "making a key: %v", err)
			return true
		}
		g = &guest{token: t, key: key, tag: c.tags.Add(1)}
		t.mu.Lock()
		t.joins++
		t.guests = append(t.guests, g)
		t.mu.Unlock()
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began, dialled := c.history.now(), false
	var dials []string
	dial := dialFrom(c.members[c.rand.IntN(len(c.members))])
	grant, err := join.Join(ctx, at.Address(), t.token, join.Request{Key: g.key, Hostname: fmt.Sprintf("guest%d", g.tag)}, func(ctx context.Context, addr string) (net.Conn, error) {
		dials = append(dials, addr)
		conn, err := dial(ctx, addr)
		dialled = err == nil
		return conn, err
	})
	c.wantOneWay(at, dials)
	out := reply{Code: warden.CodeOf(err)}
	switch out.Code {
	case "", warden.CodeUsedUp, warden.CodeRevoked:
	case warden.CodeWrongRoot, warden.CodeWrongRole, warden.CodeWrongCluster:
		c.violated("I2", "%s is not taken for a manager of the cluster: %v", at.Name, err)
		return true
	default:
		if !dialled || strings.Contains(err.Error(), "shaking hands") {
			return false
		}
		out = reply{Unknown: true} // the outcome is open, or a manager has not followed far enough to know the token
	}
	g.mu.Lock()
	if err != nil && g.leaving { // its node may be gone by now: then it does not get it again
		out = reply{Unknown: true}
	}
	g.mu.Unlock()
	c.history.add(c.n, t.object, call{Verb: "join", Tag: g.tag}, began, out)
	if err == nil {
		c.joined(g, grant)
	}
	return true
}

// joined takes a node in that a token gave: role and zone are the token's, and a key has one node, for ever (I1).
func (r *run) joined(g *guest, grant *api.JoinGrant) {
	if want := g.token.zone; grant.Role != api.Role_ROLE_WORKER || grant.Zone != want {
		r.violated("I1", "a token for workers of zone %s let node %s in as %s of zone %s", want, grant.NodeId, grant.Role.Word(), grant.Zone)
	}
	g.mu.Lock()
	first := g.grant
	g.grant = grant
	g.mu.Unlock()
	switch {
	case first == nil:
		r.nodes.add(&node{id: grant.NodeId, zones: in(grant.Zone), object: "node/" + grant.NodeId, guest: g}, r.history, nodeState{"active", "worker"})
	case first.NodeId != grant.NodeId:
		r.violated("I1", "a key that joined as node %s joined again as node %s", first.NodeId, grant.NodeId)
	}
}

// node is one that calls are made on.
type node struct {
	id, object string
	zones      *whereabouts // all that it was in
	guest      *guest       // nil: a host of the bed
	wasManager atomic.Bool  // or may have been
	isGone     atomic.Bool  // it was removed, for sure
}

// node makes a call on a node.
func (c *client) node(at *member) bool {
	n, ok := c.nodes.pick(c.rand.IntN)
	if !ok {
		return true
	}
	calls, doubts := c.history.size(n.object)
	if n.guest != nil && calls >= callsMax {
		c.nodes.retire(n)
	}
	switch k := c.rand.IntN(100); {
	case k < 30 || doubts >= doubtsMax:
		return c.readNodes(at, n)
	case k < 50:
		return c.readNodes(at)
	case k < 80:
		word := []api.Availability{api.Availability_AVAILABILITY_ACTIVE, api.Availability_AVAILABILITY_PAUSE, api.Availability_AVAILABILITY_DRAIN}[c.rand.IntN(3)]
		return c.setAvailability(at, n, word)
	case n.guest != nil:
		return c.remove(at, n)
	}
	return true
}

func (c *client) setAvailability(at *member, n *node, to api.Availability) bool {
	_, sent := c.record(n.object, call{Verb: "availability", Word: to.Word()}, patience, func(ctx context.Context) (uint64, any, error) {
		_, err := at.control.UpdateNode(ctx, &api.UpdateNodeRequest{Reference: n.id, Availability: to})
		return 0, nil, err
	})
	return sent
}

func (c *client) setRole(at *member, n *node, to api.Role) (reply, bool) {
	n.wasManager.Store(true) // or will be
	return c.record(n.object, call{Verb: "role", Word: to.Word()}, longPatience, func(ctx context.Context) (uint64, any, error) {
		_, err := at.control.UpdateNode(ctx, &api.UpdateNodeRequest{Reference: n.id, Role: to})
		return 0, nil, err
	})
}

// remove evicts.
func (c *client) remove(at *member, n *node) bool {
	if n.guest != nil {
		n.guest.mu.Lock()
		n.guest.leaving = true
		n.guest.mu.Unlock()
	}
	began, before := c.history.now(), c.tokens.ever()
	out, sent := c.record(n.object, call{Verb: "rm"}, longPatience, func(ctx context.Context) (uint64, any, error) {
		_, err := at.control.RemoveNode(ctx, &api.RemoveNodeRequest{Reference: n.id, Force: true})
		return 0, nil, err
	})
	if sent && !out.Unknown && (out.Code == "" || out.Code == warden.CodeNotFound) {
		c.nodes.gone(n)
	}
	if sent && n.wasManager.Load() && (out.Unknown || out.Code == "") {
		c.purged(c, began, out.Unknown, before)
	}
	return sent
}

// readNodes reads one node, or by one list all that clients know.
func (c *client) readNodes(at *member, one ...*node) bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	known, request := c.nodes.known(), &api.ListRequest{Kind: api.Kind_KIND_NODE}
	if len(one) > 0 {
		known, request.References = one, []string{one[0].id}
	}
	began := c.history.now()
	reply, err := at.control.List(ctx, request)
	if warden.CodeOf(api.FromError(err)) == warden.CodeNotFound && len(one) == 1 {
		reply, err = new(api.ListReply), nil
	}
	if err != nil {
		_, sent := c.outcome(err)
		return sent
	}
	seen := map[string]any{}
	for _, o := range reply.Objects {
		seen[o.GetNode().GetId()] = nodeState{o.GetNode().GetAvailability().Word(), o.GetNode().GetDesiredRole().Word()}
	}
	for _, n := range known {
		state, ok := seen[n.id]
		if !ok {
			state = nodeState{Availability: removed}
		}
		c.history.add(c.n, n.object, call{Verb: read}, began, result(state))
	}
	return true
}

// dialFrom dials from the network of a host.
func dialFrom(m *member) func(ctx context.Context, addr string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (conn net.Conn, err error) {
		err = inNetwork(m.Host, func() (err error) {
			conn, err = new(net.Dialer).DialContext(ctx, "tcp", addr)
			return err
		})
		return conn, err
	}
}

// inNetwork calls f in the network of a host. f opens its sockets in its own goroutine.
func inNetwork(h *bed.Host, f func() error) error {
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks it: the thread ends with the goroutine
		ns, err := os.Open(strings.TrimSuffix(h.Root(), "root") + "ns/net")
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err == nil {
			err = f()
		}
		failed <- err
	}()
	return <-failed
}

// session is a guest's own side of the node door. It counts what the manager wants of it.
type session struct {
	api.UnimplementedSessionServer
	asked, evicted atomic.Int32
}

func (s *session) Describe(context.Context, *api.DescribeRequest) (*api.DescribeReply, error) {
	s.asked.Add(1)
	return &api.DescribeReply{TimeNs: time.Now().UnixNano(), Description: &api.NodeDescription{Hostname: "guest", Os: "linux", Arch: "amd64"}}, nil
}

func (s *session) Evict(context.Context, *api.EvictRequest) (*api.EvictReply, error) {
	s.evicted.Add(1)
	return &api.EvictReply{}, nil
}

// single is a listener of one connection.
type single struct {
	conns chan net.Conn
	addr  net.Addr
	once  sync.Once
}

func (l *single) Accept() (net.Conn, error) {
	if c, ok := <-l.conns; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}

func (l *single) Close() error {
	l.once.Do(func() { close(l.conns) })
	return nil
}

func (l *single) Addr() net.Addr { return l.addr }

// watched says when its connection has ended.
type watched struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err != nil {
		w.once.Do(func() { close(w.ended) })
	}
	return n, err
}

func (w *watched) Close() error {
	w.once.Do(func() { close(w.ended) })
	return w.Conn.Close()
}

// open opens a session of the guest with a manager. It ends when the manager closes it, or by stop.
func (g *guest) open(from, at *bed.Host) (s *session, ended <-chan struct{}, stop func(), err error) {
	g.mu.Lock()
	grant := g.grant
	g.mu.Unlock()
	root, err := x509.ParseCertificate(grant.Chain[len(grant.Chain)-1])
	if err != nil {
		return nil, nil, nil, err
	}
	return openSession(from, at, tls.Certificate{Certificate: grant.Chain, PrivateKey: g.key}, root)
}

// openSession opens a session with a manager by a certificate. It ends when the manager closes it, or by stop.
func openSession(from, at *bed.Host, cert tls.Certificate, root *x509.Certificate) (s *session, ended <-chan struct{}, stop func(), err error) {
	var conn net.Conn
	err = inNetwork(from, func() error {
		c, err := door.Dial(context.Background(), at.Address(), warden.DoorNode, &cert, door.Expect{Root: root, Loose: true})
		conn = c
		return err
	})
	if err != nil {
		return nil, nil, nil, err
	}
	s = &session{}
	w := &watched{Conn: conn, ended: make(chan struct{})}
	l := &single{conns: make(chan net.Conn, 1), addr: conn.LocalAddr()}
	l.conns <- w
	server := grpc.NewServer()
	api.RegisterSessionServer(server, s)
	go func() { // ends by stop
		_ = server.Serve(l)
	}()
	return s, w.ended, server.Stop, nil
}
