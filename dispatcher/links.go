package dispatcher

import (
	"context"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"

	"warden"
)

// links is one gRPC client for the connections of all nodes: a client of its own for each would cost a session some 20 KiB.
// Each connection is a sub-connection under an address that exists once; a call goes over the one that its context names (with),
// and over no other. TLS is the connection's own matter, and judging it the caller's. Safe for concurrent use.
type links struct {
	cc    *grpc.ClientConn
	id    string
	built chan struct{} // closed when balancer is set
	once  sync.Once
	under balancer.ClientConn // what makes sub-connections; set before built is closed

	mu  sync.Mutex // guards all; held for map access only
	all map[string]*link
}

// link is one connection.
type link struct {
	of    *links
	id    string
	conn  net.Conn      // nil once gRPC has taken it
	ready chan struct{} // closed when HTTP/2 is up
	sub   balancer.SubConn
}

// linkKey is the context's key of the link that its calls go over.
type linkKey struct{}

// windowSize is how much a node may send on a stream that is not read. It is fixed: to estimate what the path takes, gRPC would
// answer each message with a ping, which made a heartbeat three messages each way.
const windowSize = 256 << 10

func newLinks() (*links, error) {
	l := &links{id: warden.NewID(), built: make(chan struct{}), all: map[string]*link{}}
	byTarget.Store(l.id, l)
	var err error
	l.cc, err = grpc.NewClient("passthrough:///"+l.id,
		grpc.WithContextDialer(l.dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"`+policyName+`":{}}]}`),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(emptyMessageMax), grpc.MaxCallSendMsgSize(warden.MessageMax)),
		grpc.WithMaxHeaderListSize(8<<10),
		grpc.WithStaticStreamWindowSize(windowSize), grpc.WithStaticConnWindowSize(2*windowSize),
		grpc.WithReadBufferSize(512), // TLS has a buffer of its own
		grpc.WithWriteBufferSize(4<<10),
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableHealthCheck(),
		grpc.WithNoProxy(),
		grpc.WithIdleTimeout(0),
	)
	if err != nil {
		byTarget.Delete(l.id)
		return nil, err
	}
	l.cc.Connect()
	return l, nil
}

// close ends all that uses the links.
func (l *links) close() {
	byTarget.Delete(l.id)
	l.cc.Close()
}

// open returns a link over conn, once HTTP/2 is up there: until then it waits for ctx at most. The caller closes conn, and the link.
func (l *links) open(ctx context.Context, conn net.Conn) (*link, error) {
	select {
	case <-l.built:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	k := &link{of: l, id: warden.NewID(), conn: conn, ready: make(chan struct{})}
	var err error
	//lint:ignore SA1019 staticcheck: it is the only way, and is deprecated for several addresses, where we give one
	k.sub, err = l.under.NewSubConn([]resolver.Address{{Addr: k.id}}, balancer.NewSubConnOptions{StateListener: func(s balancer.SubConnState) {
		if s.ConnectivityState == connectivity.Ready {
			close(k.ready) // once: the connection is given out once
		}
	}})
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.all[k.id] = k
	l.mu.Unlock()
	k.sub.Connect()
	select {
	case <-k.ready:
		return k, nil
	case <-ctx.Done():
		k.close()
		return nil, context.Cause(ctx)
	}
}

// with returns ctx for calls over the link.
func (k *link) with(ctx context.Context) context.Context { return context.WithValue(ctx, linkKey{}, k) }

// close ends the link. Closing its connection ends the calls.
func (k *link) close() {
	k.of.mu.Lock()
	delete(k.of.all, k.id)
	k.of.mu.Unlock()
	k.sub.Shutdown()
}

// dial gives out the link's connection, once.
func (l *links) dial(_ context.Context, id string) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := l.all[id]; k != nil && k.conn != nil {
		conn := k.conn
		k.conn = nil
		return conn, nil
	}
	return nil, net.ErrClosed
}

// Pick implements balancer.Picker.
func (l *links) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	k, _ := info.Ctx.Value(linkKey{}).(*link)
	if k == nil || k.of != l {
		return balancer.PickResult{}, warden.Errorf(warden.CodeInternal, "calling a node", "the call names no connection")
	}
	return balancer.PickResult{SubConn: k.sub}, nil
}

// policyName is that of the load balancing policy that does what links want of one.
const policyName = "warden_links"

// byTarget finds the links that a policy is built for.
var byTarget sync.Map // links.id to *links

func init() { balancer.Register(linkPolicy{}) }

// linkPolicy builds the balancer of links.
type linkPolicy struct{}

// Name implements balancer.Builder.
func (linkPolicy) Name() string { return policyName }

// Build implements balancer.Builder.
func (linkPolicy) Build(cc balancer.ClientConn, o balancer.BuildOptions) balancer.Balancer {
	l, _ := byTarget.Load(o.Target.Endpoint())
	b := &linkBalancer{cc: cc}
	b.links, _ = l.(*links)
	return b
}

// linkBalancer gives links what makes sub-connections; all else they do themselves.
type linkBalancer struct {
	cc    balancer.ClientConn
	links *links
}

// UpdateClientConnState implements balancer.Balancer.
func (b *linkBalancer) UpdateClientConnState(balancer.ClientConnState) error {
	if b.links == nil {
		return balancer.ErrBadResolverState
	}
	b.cc.UpdateState(balancer.State{ConnectivityState: connectivity.Ready, Picker: b.links})
	b.links.once.Do(func() {
		b.links.under = b.cc
		close(b.links.built)
	})
	return nil
}

// ResolverError implements balancer.Balancer.
func (*linkBalancer) ResolverError(error) {}

// UpdateSubConnState implements balancer.Balancer.
func (*linkBalancer) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}

// Close implements balancer.Balancer.
func (*linkBalancer) Close() {}

// ExitIdle implements balancer.Balancer.
func (*linkBalancer) ExitIdle() {}
