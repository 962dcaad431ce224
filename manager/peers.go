package manager

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/door"
)

// peers keeps one connection to each other manager's peer door, for as long as its record is a manager's: the doors cut what
// comes in, this what goes out.
type peers struct {
	m  *Manager
	mu sync.Mutex // guards to; not held across I/O
	to map[string]*grpc.ClientConn
}

func newPeers(m *Manager) *peers { return &peers{m: m, to: map[string]*grpc.ClientConn{}} }

// client returns a client for the manager. Errors: CodeUnavailable where the node is no manager any more.
func (p *peers) client(id string) (api.PeerClient, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.may(id); err != nil {
		return nil, err
	}
	if c, ok := p.to[id]; ok {
		return api.NewPeerClient(c), nil
	}
	c, err := grpc.NewClient("passthrough:///"+id,
		grpc.WithTransportCredentials(door.Credentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			i, err := p.m.manager(id)
			if err == nil {
				err = p.may(id)
			}
			if err != nil {
				return nil, err
			}
			return door.Dial(ctx, i.Address, warden.DoorPeer, p.m.cfg.Certificate(), Expect(p.m.cfg.Root, i, p.m.distrustedBytes(), false))
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: warden.HandshakeTimeout,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(warden.MessageMax), grpc.MaxCallSendMsgSize(warden.MessageMax)),
	)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "connecting to manager "+id, err)
	}
	p.to[id] = c
	return api.NewPeerClient(c), nil
}

// may refuses a node that the state says is no manager, or none any more. Where the replica is still empty it says nothing.
func (p *peers) may(id string) error {
	v := p.m.store.View()
	if n := v.Node(id); v.Tombstone(id) == nil && (n == nil || n.EffectiveRole() == api.Role_ROLE_MANAGER) {
		return nil
	}
	return warden.Errorf(warden.CodeUnavailable, "connecting to manager "+id, "it is no manager any more")
}

// rejudge closes the connections to nodes that are managers no more, and ends the calls that wait there.
func (p *peers) rejudge() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, c := range p.to {
		if p.may(id) != nil {
			delete(p.to, id)
			go c.Close() // it may wait a few seconds for a peer that does not read
		}
	}
}

// leader returns a client for the leader. Errors: CodeNoLeader, CodeNotLeader where this manager itself leads.
func (p *peers) leader() (api.PeerClient, error) {
	id := p.m.store.Leader()
	switch id {
	case "":
		return nil, warden.Hint(warden.Errorf(warden.CodeNoLeader, "asking the leader", "the managers have no leader"),
			"a majority of the managers must be up and unlocked: see `wardenctl status` on each")
	case p.m.cfg.NodeID:
		return nil, warden.Errorf(warden.CodeNotLeader, "asking the leader", "this manager is about to lead")
	}
	return p.client(id)
}

func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.to {
		c.Close()
	}
}

// propose commits a command, here where this manager leads, else on the leader. It tries again while there is no leader,
// until ctx ends; the request ID makes that safe.
func (m *Manager) propose(ctx context.Context, cmd *api.Command) (*api.Result, error) {
	for {
		res, err := m.proposeOnce(ctx, cmd)
		switch warden.CodeOf(err) {
		case warden.CodeNotLeader, warden.CodeNoLeader, warden.CodeUnavailable:
		default:
			return res, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (m *Manager) proposeOnce(ctx context.Context, cmd *api.Command) (*api.Result, error) {
	if m.store.IsLeader() {
		return m.store.Propose(ctx, cmd)
	}
	client, err := m.peers.leader()
	if err != nil {
		return nil, err
	}
	res, err := client.Propose(ctx, cmd)
	return res, api.FromError(err)
}

// forward is control's Config.Forward: run one call on the leader, for a caller that this manager authenticated.
func (m *Manager) forward(ctx context.Context, req *api.ForwardRequest) (*api.ForwardReply, error) {
	client, err := m.peers.leader()
	if err != nil {
		return nil, err
	}
	reply, err := client.Forward(ctx, req)
	return reply, api.FromError(err)
}

// peerService is what this manager serves other managers.
type peerService struct {
	api.UnimplementedPeerServer
	m *Manager
}

// caller returns who calls, if it is still a manager: the cut of its connection may be a moment behind the commit that said
// otherwise. Errors: CodeDenied; CodeUnavailable, since a manager that only has a new key comes back at once.
func (s *peerService) caller(ctx context.Context) (ca.Identity, error) {
	id, err := door.CallerOf(ctx)
	if err != nil {
		return id, err
	}
	err = judge(s.m.store.View(), warden.DoorPeer, id, true, true)
	s.m.counts.refusal(warden.DoorPeer, err)
	return id, warden.Recode(warden.CodeUnavailable, "", err)
}

// peerCallsMax bounds the calls of a manager at once. Calls beyond it wait; logs that are followed hold one each.
const peerCallsMax = 4096

// peerStats counts the calls that gRPC refuses before a method has them: too large, or not to be read.
type peerStats struct{ m *Manager }

func (peerStats) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (peerStats) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (peerStats) HandleConn(context.Context, stats.ConnStats)                       {}
func (p peerStats) HandleRPC(_ context.Context, s stats.RPCStats) {
	end, ok := s.(*stats.End)
	if !ok || end.Error == nil {
		return
	}
	switch st, _ := status.FromError(end.Error); {
	case len(st.Details()) > 0: // a method's own word
	case st.Code() == codes.ResourceExhausted:
		p.m.counts.refusal(warden.DoorPeer, warden.Errorf(warden.CodeTooLarge, "", ""))
	case st.Code() == codes.Internal:
		p.m.counts.refusal(warden.DoorPeer, warden.Errorf(warden.CodeInvalid, "", ""))
	}
}

// Forward runs a call here. The calling manager vouches for the caller, whom it names; it is on record as the way.
func (s *peerService) Forward(ctx context.Context, req *api.ForwardRequest) (*api.ForwardReply, error) {
	id, err := s.caller(ctx)
	if err != nil {
		return nil, api.Error(err)
	}
	caller := req.GetCaller()
	if caller == nil {
		return nil, api.Error(warden.Errorf(warden.CodeInvalid, "forwarding", "no caller named"))
	}
	caller.Via = id.NodeID
	reply, err := s.m.control.Run(ctx, req.Method, req.Request, caller, req.RequestId)
	if err != nil {
		return nil, api.Error(err)
	}
	return &api.ForwardReply{Reply: reply}, nil
}

func (s *peerService) Report(ctx context.Context, req *api.ReportRequest) (*api.ReportReply, error) {
	id, err := s.caller(ctx)
	if err != nil {
		return nil, api.Error(err)
	}
	reply, err := s.m.takeReport(ctx, id.NodeID, req)
	return reply, api.Error(err)
}

func (s *peerService) Propose(ctx context.Context, cmd *api.Command) (*api.Result, error) {
	id, err := s.caller(ctx)
	if err != nil {
		return nil, api.Error(err)
	}
	if cmd.GetActor() == nil {
		return nil, api.Error(warden.Errorf(warden.CodeInvalid, "proposing", "no actor named"))
	}
	cmd.Actor.Via = id.NodeID
	res, err := s.m.store.Propose(ctx, cmd)
	return res, api.Error(err)
}

// Recipient says how a manager's keys are to be sealed, as far as this one knows.
func (s *peerService) Recipient(ctx context.Context, _ *api.RecipientRequest) (*api.LockState, error) {
	if _, err := s.caller(ctx); err != nil {
		return nil, api.Error(err)
	}
	return LockStateOf(s.m.store.View().Cluster()), nil // there is one: the door is shut until this replica has caught up
}

func (s *peerService) Relay(req *api.LogsRequest, stream grpc.ServerStreamingServer[api.LogChunk]) error {
	if _, err := s.caller(stream.Context()); err != nil {
		return api.Error(err)
	}
	t := s.m.store.View().Task(req.GetTaskId())
	if t == nil {
		return api.Error(warden.Errorf(warden.CodeNotFound, "relaying logs", "no task %s", req.GetTaskId()))
	}
	return api.Error(s.m.dispatcher.Logs(stream.Context(), t.NodeId, req, stream.Send))
}
