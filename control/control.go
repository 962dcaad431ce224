// Package control is the operator's API as every manager serves it: who asked is known, what they may do is decided, and
// what changes is one command that carries the author (I12).
//
// Changes and reads run on the leader. Another manager forwards the call there for the caller that it authenticated; List
// with local, Status, Logs and Events answer from the replica that was asked. Nothing secret leaves: keys, token secrets and
// secret values are cut out of every record before it goes. The package holds no state of its own; quorum and liveness are
// asked of Config.Cluster. What it checks here for a good message, the apply checks again.
//
// A call that is made again with the same request ID, after a lost reply or a change of leader, has its effect once: the
// results of commands are kept by request ID in the replicated state, and the ID of what a call creates follows from its
// request ID (change.go). It trusts whoever sets the actor (WithActor) and the managers that forward.
package control

import (
	"context"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"warden"
	"warden/api"
	"warden/policy"
	"warden/store"
)

// Cluster is what only the running manager knows or can do.
type Cluster interface {
	NodeStates(ids []string) []*api.NodeState
	AwaitManagers(ctx context.Context, index uint64) (silent []string)
	CanRemoveManager(id string) error
	StepDown(ctx context.Context) error
	RoleLost() <-chan struct{} // closed when this manager ends because its node is a worker now
	RotateKeys(ctx context.Context, actor *api.Actor, since uint64) (done, todo []string, err error)
	NextIssuing(c *api.Cluster) error // puts a new issuing CA into the record
	Managers() *api.ManagerList
	RelayLogs(ctx context.Context, nodeID string, req *api.LogsRequest, send func(*api.LogChunk) error) error
}

// Config is what a Server needs. All fields are required.
type Config struct {
	NodeID, ClusterID string
	Store             *store.Store
	Forward           func(ctx context.Context, req *api.ForwardRequest) (*api.ForwardReply, error) // to the leader
	Cluster           Cluster
	Address           func(advertise, seen string) (string, error) // completes an advertised address
	Facts             func() *api.Facts                            // of this daemon, for Status; nil: none
	Logger            *slog.Logger
}

// Server implements api.ControlServer. Safe for concurrent use.
type Server struct {
	api.UnimplementedControlServer
	cfg      Config
	managers sync.Mutex // held from the check that a manager can go to the commit: two checks at once would both pass
}

// New returns a Server.
func New(cfg Config) *Server { return &Server{cfg: cfg} }

// forwardFor is how long a call waits for a leader.
const forwardFor = 10 * time.Second

type actorKey struct{}
type requestKey struct{}

// WithActor says who calls, as whoever authenticated the caller found. Without it every call is denied.
func WithActor(ctx context.Context, a *api.Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, a)
}

func actorOf(ctx context.Context) (*api.Actor, error) {
	if a, ok := ctx.Value(actorKey{}).(*api.Actor); ok && a != nil {
		return a, nil
	}
	return nil, warden.Errorf(warden.CodeDenied, "authenticating caller", "nobody says who calls")
}

// requestIDMax leaves room for the number of an attempt.
const requestIDMax = warden.RequestIDMax - 4

var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._:-]+$`)

func checkRequestID(id string) error {
	if len(id) > requestIDMax || !requestIDPattern.MatchString(id) {
		return warden.Errorf(warden.CodeInvalid, "reading the request ID", "want 1 to %d characters of A-Z, a-z, 0-9, '.', '_', ':', '-'", requestIDMax)
	}
	return nil
}

// requestID is the caller's own, where it sent one, so that a call that is made again has its effect once.
func requestID(ctx context.Context) (string, error) {
	if id, ok := ctx.Value(requestKey{}).(string); ok {
		return id, nil
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		if v := md.Get("warden-request-id"); len(v) > 0 {
			return v[0], checkRequestID(v[0])
		}
	}
	return warden.NewID(), nil
}

// withRequestID returns requestID, and a context of which it stays that.
func withRequestID(ctx context.Context) (context.Context, string, error) {
	id, err := requestID(ctx)
	if err != nil {
		return ctx, "", err
	}
	return context.WithValue(ctx, requestKey{}, id), id, nil
}

// decide authorises one call. The action is the method; denied calls are logged with the reason.
func (s *Server) decide(ctx context.Context, method string, req any) error {
	a, err := actorOf(ctx)
	if err != nil {
		return err
	}
	resource := resourceOf(req)
	d := policy.Decide(policy.Subject{Kind: a.Kind, Name: a.Name}, method, resource)
	if !d.Allow {
		s.cfg.Logger.Warn("denied a call", "subject", a.Kind+":"+a.Name, "via", a.Via, "action", method, "resource", resource, "reason", d.Reason)
		return warden.Errorf(warden.CodeDenied, "calling "+method, "%s", d.Reason)
	}
	return nil
}

// resourceOf names what a request is about, for the decision and the log.
func resourceOf(req any) string {
	switch r := req.(type) {
	case interface{ GetReference() string }:
		return r.GetReference()
	case interface{ GetName() string }:
		return r.GetName()
	case *api.CreateServiceRequest:
		return r.GetSpec().GetName()
	}
	return ""
}

// here reports whether a call is answered by the manager that was asked, whoever leads.
func here(method string, req any) bool {
	if l, ok := req.(*api.ListRequest); ok {
		return l.Local
	}
	return method == api.Control_Status_FullMethodName
}

// Intercept is a grpc.UnaryServerInterceptor for calls from the local socket: it decides, and runs the call on the leader.
// While there is no leader, or one goes away over the call, it tries again for up to forwardFor: the request ID makes that
// safe. It wipes a secret's value in req.
func (s *Server) Intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	switch r := req.(type) {
	case *api.CreateSecretRequest:
		defer func() { clear(r.Data) }()
	case *api.RotateSecretRequest:
		defer func() { clear(r.Data) }()
	}
	if err := s.decide(ctx, info.FullMethod, req); err != nil {
		return nil, api.Error(err)
	}
	if here(info.FullMethod, req) {
		return handler(ctx, req)
	}
	ctx, id, err := withRequestID(ctx)
	if err != nil {
		return nil, api.Error(err)
	}
	lost, stop := s.itself(req)
	for wait := 25 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) { // a try costs little while there is no leader
		reply, err := s.onLeader(ctx, id, req, info, handler)
		switch warden.CodeOf(err) {
		case "":
			return reply, nil
		case warden.CodeNoLeader, warden.CodeNotLeader, warden.CodeUnavailable, warden.CodeTimeout:
		default:
			return nil, api.Error(err)
		}
		if ctx.Err() != nil || time.Now().Add(wait).After(stop) {
			return nil, api.Error(err)
		}
		select {
		case <-ctx.Done():
		case <-lost:
			return &api.ChangeReply{Id: s.cfg.NodeID, Warnings: []string{"the leader's answer could not reach this node any more: it is a worker now"}}, nil
		case <-time.After(wait):
		}
	}
}

// itself looks whether a call ends this manager's own role, over which the leader's answer is cut off: then the node's change
// of role, seen here, is the answer.
func (s *Server) itself(req any) (lost <-chan struct{}, stop time.Time) {
	stop = time.Now().Add(forwardFor)
	r, ok := req.(*api.UpdateNodeRequest)
	if !ok || r.Role != api.Role_ROLE_WORKER {
		return nil, stop
	}
	if id, err := s.cfg.Store.View().Resolve(api.Kind_KIND_NODE, r.Reference); err != nil || id != s.cfg.NodeID {
		return nil, stop
	}
	return s.cfg.Cluster.RoleLost(), stop.Add(warden.LeaseHold)
}

func (s *Server) onLeader(ctx context.Context, id string, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if s.cfg.Store.IsLeader() {
		reply, err := handler(ctx, proto.Clone(req.(proto.Message)))
		return reply, api.FromError(err)
	}
	actor, err := actorOf(ctx)
	if err != nil {
		return nil, err
	}
	raw, err := proto.Marshal(req.(proto.Message))
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "forwarding", err)
	}
	defer clear(raw) // it may hold a secret's value
	f, err := s.cfg.Forward(ctx, &api.ForwardRequest{Method: info.FullMethod, Request: raw, Caller: actor, RequestId: id})
	if err != nil {
		return nil, api.FromError(err)
	}
	reply, err := newReply(info.FullMethod)
	if err != nil {
		return nil, err
	}
	return reply, warden.Recode(warden.CodeCorrupt, "reading the leader's reply", proto.Unmarshal(f.Reply, reply))
}

// newReply returns an empty message of the method's reply type.
func newReply(fullMethod string) (proto.Message, error) {
	const op = "forwarding"
	name := fullMethod[strings.LastIndexByte(fullMethod, '/')+1:]
	m := api.File_control_proto.Services().ByName("Control").Methods().ByName(protoreflect.Name(name))
	if m == nil {
		return nil, warden.Errorf(warden.CodeUnsupported, op, "no method %q", name)
	}
	t, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	return t.New().Interface(), nil
}

// Run is the leader's side of Forward: it decides again, by the caller that the other manager vouches for, and runs the
// call. It wipes request. Errors: CodeNotLeader where this manager does not lead, CodeDenied without a caller or by policy,
// CodeUnsupported for what is no method or can't be forwarded: streams, and Status, which is each manager's own.
func (s *Server) Run(ctx context.Context, method string, request []byte, caller *api.Actor, id string) ([]byte, error) {
	const op = "running a forwarded call"
	defer clear(request)
	if !s.cfg.Store.IsLeader() {
		return nil, warden.Errorf(warden.CodeNotLeader, op, "another manager leads")
	}
	if err := checkRequestID(id); err != nil {
		return nil, warden.Wrap(op, err)
	}
	name, _ := strings.CutPrefix(method, "/"+api.Control_ServiceDesc.ServiceName+"/")
	k := slices.IndexFunc(api.Control_ServiceDesc.Methods, func(m grpc.MethodDesc) bool { return m.MethodName == name })
	if k < 0 || name == method || method == api.Control_Status_FullMethodName {
		return nil, warden.Errorf(warden.CodeUnsupported, op, "%q can't be forwarded", clip(method))
	}
	ctx = context.WithValue(WithActor(ctx, caller), requestKey{}, id)
	reply, err := api.Control_ServiceDesc.Methods[k].Handler(s, ctx, func(into any) error {
		if err := proto.Unmarshal(request, into.(proto.Message)); err != nil {
			return warden.Errorf(warden.CodeInvalid, op, "the request does not parse")
		}
		return s.decide(ctx, method, into)
	}, nil)
	if err != nil {
		return nil, api.FromError(err)
	}
	raw, err := proto.Marshal(reply.(proto.Message))
	return raw, warden.Recode(warden.CodeInternal, op, err)
}

func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}
