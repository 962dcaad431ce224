package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"warden"
	"warden/api"
	"warden/control"
	"warden/policy"
)

// listenSocket opens the local socket, 0660, group warden where that exists. A socket that nobody answers at is replaced.
func listenSocket(path string) (net.Listener, error) {
	op := "opening the socket " + path
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, warden.Hint(warden.Errorf(warden.CodeInUse, op, "another daemon answers there"), "stop it, or choose another with --socket")
	} else if fi, serr := os.Lstat(path); serr == nil && errors.Is(err, unix.ECONNREFUSED) && fi.Mode().Type() == os.ModeSocket {
		os.Remove(path) // any other file gives that error, too, and is not ours to remove
	}
	old := unix.Umask(0o117)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	if g, err := user.LookupGroup("warden"); err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil {
			os.Chown(path, -1, gid) // only who may open the socket depends on it: root alone where it fails
		}
	}
	return l, nil
}

// peerCredentials are gRPC transport credentials for a Unix socket: the kernel says who calls (SO_PEERCRED).
type peerCredentials struct{}

type socketCaller struct {
	credentials.CommonAuthInfo
	uid uint32
}

func (socketCaller) AuthType() string { return "peercred" }

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("not a Unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, nil, err
	}
	if cerr != nil {
		return nil, nil, cerr
	}
	return c, socketCaller{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, uid: cred.Uid}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server side only")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }
func (peerCredentials) OverrideServerName(string) error           { return nil }

// actorOf names the caller of a call on the local socket.
func (d *Daemon) actorOf(ctx context.Context) (*api.Actor, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, warden.Errorf(warden.CodeDenied, "authenticating caller", "no peer")
	}
	c, ok := p.AuthInfo.(socketCaller)
	if !ok {
		return nil, warden.Errorf(warden.CodeDenied, "authenticating caller", "no credentials")
	}
	a := &api.Actor{Kind: "uid", Name: strconv.FormatUint(uint64(c.uid), 10)}
	d.mu.Lock()
	if d.identity != nil {
		id, _ := d.identity.now()
		a.Via = id.NodeID
	}
	d.mu.Unlock()
	return a, nil
}

// socketServer serves Local, and Control by whatever manager runs at the time of the call.
func (d *Daemon) socketServer() *grpc.Server {
	s := grpc.NewServer(grpc.Creds(peerCredentials{}), grpc.MaxRecvMsgSize(warden.MessageMax), grpc.MaxSendMsgSize(warden.MessageMax),
		grpc.UnaryInterceptor(d.decide))
	api.RegisterLocalServer(s, &local{d: d})
	desc := api.Control_ServiceDesc
	desc.HandlerType = (*any)(nil)
	desc.Methods = append([]grpc.MethodDesc(nil), desc.Methods...)
	for k, m := range desc.Methods {
		desc.Methods[k].Handler = func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			c, ctx, err := d.controlFor(ctx)
			if err != nil {
				return nil, api.Error(err)
			}
			return m.Handler(c, ctx, dec, c.Intercept)
		}
	}
	desc.Streams = append([]grpc.StreamDesc(nil), desc.Streams...)
	for k, m := range desc.Streams {
		desc.Streams[k].Handler = func(_ any, stream grpc.ServerStream) error {
			c, ctx, err := d.controlFor(stream.Context())
			if err != nil {
				return api.Error(err)
			}
			return m.Handler(c, actedStream{stream, ctx})
		}
	}
	s.RegisterService(&desc, nil)
	return s
}

// decide asks the policy for the calls of Local. Those of Control are decided by package control.
func (d *Daemon) decide(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	a, err := d.actorOf(ctx)
	if err == nil {
		err = policy.Decide(policy.Subject{Kind: a.Kind, Name: a.Name}, info.FullMethod, "").Err("calling " + info.FullMethod)
	}
	if err != nil {
		return nil, api.Error(err)
	}
	return handler(ctx, req)
}

type actedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s actedStream) Context() context.Context { return s.ctx }

// controlFor returns the running manager's Control service, and the context with the caller in it.
func (d *Daemon) controlFor(ctx context.Context) (*control.Server, context.Context, error) {
	actor, err := d.actorOf(ctx)
	if err != nil {
		return nil, nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	const op = "asking this manager"
	switch {
	case d.manager != nil:
		return d.manager.Control(), control.WithActor(ctx, actor), nil
	case d.state == StateLocked:
		return nil, nil, warden.Hint(warden.Errorf(warden.CodeLocked, op, "it is locked and needs unlock key %s", d.locked.KeyID), "run `wardenctl swarm unlock`")
	case d.identity != nil:
		return nil, nil, warden.Hint(warden.Errorf(warden.CodeNotManager, op, "this node is a worker"), "run the command on a manager")
	}
	return nil, nil, warden.Hint(warden.Errorf(warden.CodeUninitialized, op, "this node belongs to no cluster"),
		"start one with `wardenctl swarm init`, or join one with `wardenctl swarm join`")
}
