package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"warden"
	"warden/agent"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/daemon"
	"warden/door"
	"warden/executor"
	"warden/internal/collector"
	"warden/internal/courier"
	"warden/join"
	"warden/manager"
	"warden/tokens"
)

// wardenManage runs the daemon, as `warden run` does, and has it init or join, as wardenctl does.
func wardenManage(ctx context.Context, cfg managerConfig, ready func()) error {
	collector.Tune(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- daemon.Run(ctx, daemon.Config{
			StateDir: filepath.Join(cfg.Dir, "state"), Listen: cfg.Listen, Socket: cfg.Socket, Hostname: cfg.Hostname, Version: "peers",
			Executor: &wardenNoop{}, Logger: slog.New(slog.DiscardHandler),
		})
	}()
	begun := make(chan error, 1)
	go func() { begun <- wardenBegin(ctx, cfg) }()
	select {
	case err := <-ended:
		return err
	case err := <-begun:
		if err != nil {
			return err
		}
		ready()
	}
	return <-ended
}

func wardenBegin(ctx context.Context, cfg managerConfig) error {
	cc, err := dialSocket(cfg.Socket, insecure.NewCredentials())
	if err != nil {
		return err
	}
	defer cc.Close()
	local := api.NewLocalClient(cc)
	switch {
	case cfg.Again:
	case cfg.Join == "":
		_, err = local.Init(ctx, &api.InitRequest{Advertise: cfg.Listen})
	default:
		_, err = local.Join(ctx, &api.LocalJoinRequest{Token: cfg.Token, Addresses: []string{cfg.Join}, Advertise: cfg.Listen,
			Availability: api.Availability_AVAILABILITY_DRAIN})
	}
	return err
}

// wardenUnlock does what `wardenctl swarm unlock` does.
func wardenUnlock(ctx context.Context, cc *grpc.ClientConn, key []byte) error {
	local := api.NewLocalClient(cc)
	info, err := local.Info(ctx, &api.InfoRequest{})
	if err != nil {
		return err
	}
	if len(info.UnlockInbox) == 0 {
		return fmt.Errorf("the manager is %s, and wants no unlock key", info.State)
	}
	sealed, err := courier.Seal(info.UnlockInbox, key)
	if err == nil {
		_, err = local.Unlock(ctx, &api.UnlockRequest{SealedKey: sealed})
	}
	return err
}

type wardenOp struct {
	local api.LocalClient
	ctl   api.ControlClient
}

func wardenOperator(cc *grpc.ClientConn) operator {
	return wardenOp{local: api.NewLocalClient(cc), ctl: api.NewControlClient(cc)}
}

func (o wardenOp) token(ctx context.Context, manager bool) (string, error) {
	role := api.Role_ROLE_WORKER
	if manager {
		role = api.Role_ROLE_MANAGER
	}
	reply, err := o.ctl.CreateToken(ctx, &api.CreateTokenRequest{Role: role})
	return reply.GetToken(), err
}

func (o wardenOp) state(ctx context.Context) (clusterState, error) {
	reply, err := o.ctl.Status(ctx, &api.StatusRequest{})
	return clusterState{workers: int(reply.GetWorkersReady()), managers: int(reply.GetManagersReachable()), leader: reply.GetLeaderHostname()}, err
}

func (o wardenOp) create(ctx context.Context, name string, replicas int, secret string) (string, error) {
	var refs []*api.SecretReference
	if secret != "" {
		refs = append(refs, &api.SecretReference{SecretId: secret, Target: "secret", Mode: 0o400})
	}
	reply, err := o.ctl.CreateService(ctx, &api.CreateServiceRequest{Spec: &api.ServiceSpec{Name: name, Replicas: uint64(replicas), Update: &api.UpdatePolicy{},
		Task: &api.TaskSpec{Image: "busybox", Command: []string{"/bin/sleep", "1000"}, Env: []string{"A=b"}, Zone: warden.DefaultZone, Secrets: refs}}})
	return reply.GetId(), err
}

// running counts the tasks of all services: there is only one at a time.
func (o wardenOp) running(ctx context.Context, _ string) (int, error) {
	reply, err := o.local.Info(ctx, &api.InfoRequest{Facts: true})
	for _, c := range reply.GetFacts().GetCluster().GetTasks() {
		if c.State == "running" {
			return int(c.Count), err
		}
	}
	return 0, err
}

func (o wardenOp) remove(ctx context.Context, id string) error {
	_, err := o.ctl.RemoveService(ctx, &api.ReferenceRequest{Reference: id})
	return err
}

func (o wardenOp) tasks(ctx context.Context) (n int, err error) {
	reply, err := o.local.Info(ctx, &api.InfoRequest{Facts: true})
	for _, c := range reply.GetFacts().GetCluster().GetTasks() {
		n += int(c.Count)
	}
	return n, err
}

func (o wardenOp) write(ctx context.Context, name string) (string, error) {
	data := make([]byte, secretSize)
	rand.Read(data)
	reply, err := o.ctl.CreateSecret(ctx, &api.CreateSecretRequest{Name: name, Data: data})
	return reply.GetId(), err
}

func (o wardenOp) secrets(ctx context.Context) (int, error) {
	reply, err := o.ctl.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_SECRET})
	return len(reply.GetObjects()), err
}

func (o wardenOp) autolock(ctx context.Context) (text []byte, err error) {
	key, err := autolock.NewUnlockKey()
	if err != nil {
		return nil, err
	}
	on, to := true, key.Recipient()
	if _, err := o.ctl.UpdateCluster(ctx, &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: to[:]}); err != nil {
		return nil, err
	}
	err = key.Text().Use(func(b []byte) error { text = slices.Clone(b); return nil })
	return text, err
}

// wardenNode is one simulated node.
type wardenNode struct {
	id, zone string
	cert     *tls.Certificate
	root     *x509.Certificate
	managers atomic.Pointer[api.ManagerList]
}

// wardenJoin joins from a loopback address of the client's own, since a manager bounds what it does for one address.
func wardenJoin(address, text, _ string, number, client int) (member, error) {
	token, err := tokens.Parse(text)
	if err != nil {
		return nil, err
	}
	key, err := ca.NewKey()
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 80, byte(client/250), byte(client%250+1))}}
	grant, err := join.Join(context.Background(), address, token, join.Request{Key: key, Hostname: fmt.Sprint("w", number)},
		func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) })
	if err != nil {
		return nil, err
	}
	root, err := x509.ParseCertificate(grant.Chain[len(grant.Chain)-1])
	if err != nil {
		return nil, err
	}
	n := &wardenNode{id: grant.NodeId, zone: grant.Zone, root: root, cert: &tls.Certificate{Certificate: grant.Chain, PrivateKey: crypto.Signer(key)}}
	n.managers.Store(grant.Managers)
	return n, nil
}

var errNoRenewal = errors.New("a benchmark renews nothing")

func (n *wardenNode) open() error {
	a := agent.New(agent.Config{
		NodeID: n.id, Zone: func() string { return n.zone }, Executor: &wardenNoop{}, Dial: n.dial,
		Describe: func() *api.NodeDescription {
			return &api.NodeDescription{Hostname: "w", Os: "linux", Arch: "amd64", NanoCpus: 1000e9, MemoryBytes: 1 << 40, Version: "peers", Executor: "noop", SecretMounts: "detached"}
		},
		Renew: func() ([]byte, error) { return nil, errNoRenewal }, Install: func(*api.InstallRequest) error { return errNoRenewal },
		SetManagers: func(l *api.ManagerList) { n.managers.Store(l) }, Evicted: func(*api.EvictRequest) {}, Logger: slog.New(slog.DiscardHandler),
	})
	go a.Run(context.Background())
	return nil
}

// dials bounds the handshakes at once: all nodes dial from one address here, and a manager takes 128 of one.
var dials = make(chan struct{}, 64)

func (n *wardenNode) dial(ctx context.Context) (net.Conn, string, error) {
	dials <- struct{}{}
	defer func() { <-dials }()
	l := n.managers.Load()
	info := l.Managers[mathrand.IntN(len(l.Managers))]
	conn, err := door.Dial(ctx, info.Address, warden.DoorNode, n.cert, manager.Expect(n.root, info, l.DistrustedIssuers, false))
	return conn, info.NodeId, err
}

// wardenNoop is an executor whose tasks "run" from their start until they are stopped.
type wardenNoop struct{}

func (*wardenNoop) Name() string                                   { return "noop" }
func (*wardenNoop) SecretMounts() string                           { return "detached" }
func (*wardenNoop) Adopt(context.Context) ([]executor.Task, error) { return nil, nil }
func (*wardenNoop) Start(_ context.Context, s executor.Spec) (executor.Task, error) {
	for _, f := range s.Secrets {
		if err := f.Data.Use(func(b []byte) error { return wantSecret(b) }); err != nil {
			return nil, err
		}
	}
	live.Add(1)
	return &wardenTask{id: s.TaskID, ended: make(chan struct{})}, nil
}

type wardenTask struct {
	id    string
	once  sync.Once
	ended chan struct{}
}

func (t *wardenTask) ID() string { return t.id }

func (t *wardenTask) Wait(ctx context.Context) (executor.Exit, error) {
	select {
	case <-t.ended:
		return executor.Exit{Code: 143, Signal: "SIGTERM"}, nil
	case <-ctx.Done():
		return executor.Exit{}, ctx.Err()
	}
}

func (t *wardenTask) Stop(context.Context, time.Duration) error {
	t.once.Do(func() { live.Add(-1); close(t.ended) })
	return nil
}

func (t *wardenTask) Logs(context.Context, executor.LogOptions, func(executor.Line) error) error {
	return nil
}

func (t *wardenTask) Remove(ctx context.Context) error { return t.Stop(ctx, 0) }
