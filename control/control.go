// Package control is the operator's API as every manager serves it: who asked is known, what they may do is decided, and
// what changes is one command that carries the author (I12).
//
// Changes and reads run on the leader. Another manager forwards the call there for the caller that it authenticated; List
// with local, Status, Logs and Events answer from the replica that was asked. Nothing secret leaves: keys, token secrets and
// secret values are cut out of every record before it goes. The package holds no state of its own but a log; quorum,
// liveness and keys are asked of Config.Cluster. What it checks here for a good message, the apply checks again.
package control

import (
	"context"
	"log/slog"
	"strconv"
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
	"warden/secrets"
	"warden/store"
)

// Cluster is what only the running manager knows or can do.
type Cluster interface {
	NodeStates(ids []string) []*api.NodeState
	AwaitManagers(ctx context.Context, index uint64) (silent []string)
	CanRemoveManager(id string) error
	Reachable(id string) bool
	StepDown(ctx context.Context) error
	RotateKeys(ctx context.Context, actor *api.Actor) (done, todo []string, err error)
	Keyset() (*secrets.Keyset, error)
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
	Logger            *slog.Logger
}

// Server implements api.ControlServer. Safe for concurrent use.
type Server struct {
	api.UnimplementedControlServer
	cfg    Config
	verify verifier
}

// New returns a Server.
func New(cfg Config) *Server { return &Server{cfg: cfg, verify: verifier{store: cfg.Store}} }

// forwardFor is how long a call waits for a leader.
const forwardFor = 10 * time.Second

// attemptsMax is how often a change is tried again on fresh state after a conflict.
const attemptsMax = 20

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

// requestID is the caller's own, where it sent one, so that a call that is made again has its effect once.
func requestID(ctx context.Context) string {
	if id, ok := ctx.Value(requestKey{}).(string); ok && id != "" {
		return id
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		if v := md.Get("warden-request-id"); len(v) == 1 && v[0] != "" && len(v[0]) <= warden.RequestIDMax-4 {
			return v[0]
		}
	}
	return warden.NewID()
}

// decide authorises one call. The action is the method; denied calls are logged with the reason.
func (s *Server) decide(ctx context.Context, method string, req any) error {
	a, err := actorOf(ctx)
	if err != nil {
		return err
	}
	resource := ""
	if r, ok := req.(interface{ GetReference() string }); ok {
		resource = r.GetReference()
	}
	d := policy.Decide(policy.Subject{Kind: a.Kind, Name: a.Name}, method, resource)
	if !d.Allow {
		s.cfg.Logger.Warn("denied a call", "subject", a.Kind+":"+a.Name, "via", a.Via, "action", method, "resource", resource, "reason", d.Reason)
		return warden.Errorf(warden.CodeDenied, "calling "+method, "%s", d.Reason)
	}
	return nil
}

// here reports whether a call is answered by the manager that was asked, whoever leads.
func here(method string, req any) bool {
	if l, ok := req.(*api.ListRequest); ok {
		return l.Local
	}
	return method == api.Control_Status_FullMethodName
}

// Intercept is a grpc.UnaryServerInterceptor for calls from the local socket: it decides, and runs the call on the leader.
// While there is no leader it tries again for up to forwardFor.
func (s *Server) Intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := s.decide(ctx, info.FullMethod, req); err != nil {
		return nil, api.Error(err)
	}
	if here(info.FullMethod, req) {
		return handler(ctx, req)
	}
	id := requestID(ctx)
	ctx = context.WithValue(ctx, requestKey{}, id)
	stop := time.Now().Add(forwardFor)
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		reply, err := s.onLeader(ctx, id, req, info, handler)
		switch warden.CodeOf(err) {
		case "":
			return reply, nil
		case warden.CodeNoLeader, warden.CodeNotLeader, warden.CodeUnavailable:
		default:
			return nil, api.Error(err)
		}
		if ctx.Err() != nil || time.Now().Add(wait).After(stop) {
			return nil, api.Error(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
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
	f, err := s.cfg.Forward(ctx, &api.ForwardRequest{Method: info.FullMethod, Request: raw, Caller: actor, RequestId: id})
	if err != nil {
		return nil, err
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
// call. Errors: CodeNotLeader where this manager does not lead, CodeUnsupported for a method that can't be forwarded.
func (s *Server) Run(ctx context.Context, method string, request []byte, caller *api.Actor, id string) ([]byte, error) {
	const op = "running a forwarded call"
	if !s.cfg.Store.IsLeader() {
		return nil, warden.Errorf(warden.CodeNotLeader, op, "another manager leads")
	}
	if len(id) > warden.RequestIDMax-4 || id == "" {
		return nil, warden.Errorf(warden.CodeInvalid, op, "the request ID has %d bytes", len(id))
	}
	name, found := strings.CutPrefix(method, "/"+api.Control_ServiceDesc.ServiceName+"/")
	if !found {
		return nil, warden.Errorf(warden.CodeUnsupported, op, "no method %q", method)
	}
	ctx = context.WithValue(WithActor(ctx, caller), requestKey{}, id)
	for _, m := range api.Control_ServiceDesc.Methods {
		if m.MethodName != name {
			continue
		}
		reply, err := m.Handler(s, ctx, func(into any) error {
			if err := proto.Unmarshal(request, into.(proto.Message)); err != nil {
				return warden.Recode(warden.CodeInvalid, op, err)
			}
			return s.decide(ctx, method, into)
		}, nil)
		if err != nil {
			return nil, api.FromError(err)
		}
		return proto.Marshal(reply.(proto.Message))
	}
	return nil, warden.Errorf(warden.CodeUnsupported, op, "no method %q", method)
}

// verifier lets one check of leadership serve every read that waits for one.
type verifier struct {
	store *store.Store
	mu    sync.Mutex // guards next; not held across the check
	next  *verification
}

type verification struct {
	once sync.Once
	err  error
}

// leader returns when this manager has proved, after the call began, that it still leads.
func (v *verifier) leader(ctx context.Context) error {
	v.mu.Lock()
	if v.next == nil {
		v.next = &verification{}
	}
	mine := v.next
	v.mu.Unlock()
	mine.once.Do(func() {
		v.mu.Lock()
		v.next = nil // who comes from here on waits for the next one
		v.mu.Unlock()
		mine.err = v.store.VerifyLeader(context.WithoutCancel(ctx))
	})
	return mine.err
}

// change is one attempt: operations made from a view, and the object that the reply names.
type change struct {
	ops    []*api.Operation
	id     string
	action string
	name   string
}

// commit makes a change on the leader and tries again on fresh state where somebody else was faster.
func (s *Server) commit(ctx context.Context, plan func(v *store.View) (change, error)) (*api.ChangeReply, error) {
	actor, err := actorOf(ctx)
	if err != nil {
		return nil, err
	}
	id := requestID(ctx)
	for attempt := range attemptsMax {
		c, err := plan(s.cfg.Store.View())
		if err != nil {
			return nil, err
		}
		rid := id
		if attempt > 0 {
			rid = id + "#" + strconv.Itoa(attempt)
		}
		res, err := s.cfg.Store.Propose(ctx, &api.Command{Actor: actor, RequestId: rid, Operations: c.ops})
		if warden.CodeOf(err) == warden.CodeConflict {
			continue
		}
		s.cfg.Logger.Info("changed by request", "subject", actor.Kind+":"+actor.Name, "via", actor.Via, "action", c.action, "resource", c.id,
			"name", c.name, "request_id", rid, "code", string(warden.CodeOf(err)))
		if err != nil {
			return nil, err
		}
		reply := &api.ChangeReply{Id: c.id, Index: res.Index}
		for _, v := range res.Versions {
			if v != 0 {
				reply.Version = v
				break
			}
		}
		return reply, nil
	}
	return nil, warden.Hint(warden.Errorf(warden.CodeConflict, "changing the state", "others changed the same object %d times meanwhile", attemptsMax), "try again")
}

func put(o *api.Object, expect uint64) *api.Operation {
	return &api.Operation{Of: &api.Operation_Put{Put: &api.Put{Object: o, Expect: expect}}}
}

func remove(kind api.Kind, id string, expect uint64) *api.Operation {
	return &api.Operation{Of: &api.Operation_Delete{Delete: &api.Delete{Kind: kind, Id: id, Expect: expect}}}
}
