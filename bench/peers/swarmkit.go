package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	swarmagent "github.com/moby/swarmkit/v2/agent"
	"github.com/moby/swarmkit/v2/agent/exec"
	swarmapi "github.com/moby/swarmkit/v2/api"
	swarmca "github.com/moby/swarmkit/v2/ca"
	"github.com/moby/swarmkit/v2/connectionbroker"
	swarmnode "github.com/moby/swarmkit/v2/node"
	"github.com/moby/swarmkit/v2/remotes"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc"
)

func swarmManage(electionTicks uint32) func(context.Context, managerConfig, func()) error {
	return func(ctx context.Context, cfg managerConfig, ready func()) error {
		return swarmRun(ctx, cfg, electionTicks, ready)
	}
}

// swarmRun runs a node that is a manager, as the engine does.
func swarmRun(ctx context.Context, cfg managerConfig, electionTicks uint32, ready func()) error {
	n, err := swarmnode.New(&swarmnode.Config{
		Hostname: cfg.Hostname, StateDir: filepath.Join(cfg.Dir, "state"), ListenControlAPI: cfg.Socket, ListenRemoteAPI: cfg.Listen, AdvertiseRemoteAPI: cfg.Listen,
		JoinAddr: cfg.Join, JoinToken: cfg.Token, Executor: newSwarmNoop(cfg.Hostname), Availability: swarmapi.NodeAvailabilityDrain, UnlockKey: cfg.UnlockKey,
		ElectionTick: electionTicks,
	})
	if err != nil {
		return err
	}
	background := context.Background()
	if err := n.Start(background); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- n.Err(background) }()
	select {
	case <-n.Ready():
		select {
		case err := <-ended: // closed both
			return fmt.Errorf("the node ended: %w", err)
		default:
			ready()
		}
	case err := <-ended:
		return fmt.Errorf("the node ended: %w", err)
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return fmt.Errorf("the node ended: %w", err)
	case <-ctx.Done():
		return n.Stop(background)
	}
}

type swarmOp struct {
	ctl swarmapi.ControlClient
	ca  swarmapi.CAClient
}

func swarmOperator(cc *grpc.ClientConn) operator {
	return swarmOp{ctl: swarmapi.NewControlClient(cc), ca: swarmapi.NewCAClient(cc)}
}

func (o swarmOp) cluster(ctx context.Context) (*swarmapi.Cluster, error) {
	reply, err := o.ctl.ListClusters(ctx, &swarmapi.ListClustersRequest{})
	if err != nil {
		return nil, err
	}
	if len(reply.Clusters) != 1 {
		return nil, fmt.Errorf("%d clusters", len(reply.Clusters))
	}
	return reply.Clusters[0], nil
}

func (o swarmOp) token(ctx context.Context, manager bool) (string, error) {
	c, err := o.cluster(ctx)
	if err != nil {
		return "", err
	}
	all := c.RootCA.JoinTokens
	if manager {
		return all.Manager, nil
	}
	return all.Worker, nil
}

func (o swarmOp) state(ctx context.Context) (s clusterState, err error) {
	reply, err := o.ctl.ListNodes(ctx, &swarmapi.ListNodesRequest{})
	if err != nil {
		return s, err
	}
	for _, n := range reply.Nodes {
		switch m := n.ManagerStatus; {
		case m == nil:
			if n.Status.State == swarmapi.NodeStatus_READY {
				s.workers++
			}
		default:
			if m.Reachability == swarmapi.RaftMemberStatus_REACHABLE {
				s.managers++
			}
			if m.Leader && n.Description != nil {
				s.leader = n.Description.Hostname
			}
		}
	}
	return s, nil
}

func (o swarmOp) create(ctx context.Context, name string, replicas int, secret string) (string, error) {
	var refs []*swarmapi.SecretReference
	if secret != "" {
		refs = append(refs, &swarmapi.SecretReference{SecretID: secret, SecretName: name,
			Target: &swarmapi.SecretReference_File{File: &swarmapi.FileTarget{Name: "secret", Mode: 0o400}}})
	}
	reply, err := o.ctl.CreateService(ctx, &swarmapi.CreateServiceRequest{Spec: &swarmapi.ServiceSpec{
		Annotations: swarmapi.Annotations{Name: name},
		Mode:        &swarmapi.ServiceSpec_Replicated{Replicated: &swarmapi.ReplicatedService{Replicas: uint64(replicas)}},
		Task: swarmapi.TaskSpec{Runtime: &swarmapi.TaskSpec_Container{Container: &swarmapi.ContainerSpec{
			Image: "busybox", Command: []string{"/bin/sleep", "1000"}, Env: []string{"A=b"}, Secrets: refs,
		}}},
	}})
	if err != nil {
		return "", err
	}
	return reply.Service.ID, nil
}

func (o swarmOp) running(ctx context.Context, id string) (int, error) {
	reply, err := o.ctl.ListServiceStatuses(ctx, &swarmapi.ListServiceStatusesRequest{Services: []string{id}})
	if err != nil || len(reply.Statuses) != 1 {
		return 0, err
	}
	return int(reply.Statuses[0].RunningTasks), nil
}

func (o swarmOp) remove(ctx context.Context, id string) error {
	_, err := o.ctl.RemoveService(ctx, &swarmapi.RemoveServiceRequest{ServiceID: id})
	return err
}

func (o swarmOp) tasks(ctx context.Context) (int, error) {
	reply, err := o.ctl.ListTasks(ctx, &swarmapi.ListTasksRequest{})
	if err != nil {
		return 0, err
	}
	return len(reply.Tasks), nil
}

func (o swarmOp) write(ctx context.Context, name string) (string, error) {
	data := make([]byte, secretSize)
	rand.Read(data)
	reply, err := o.ctl.CreateSecret(ctx, &swarmapi.CreateSecretRequest{Spec: &swarmapi.SecretSpec{Annotations: swarmapi.Annotations{Name: name}, Data: data}})
	if err != nil {
		return "", err
	}
	return reply.Secret.ID, nil
}

func (o swarmOp) secrets(ctx context.Context) (int, error) {
	reply, err := o.ctl.ListSecrets(ctx, &swarmapi.ListSecretsRequest{})
	if err != nil {
		return 0, err
	}
	return len(reply.Secrets), nil
}

func (o swarmOp) autolock(ctx context.Context) ([]byte, error) {
	c, err := o.cluster(ctx)
	if err != nil {
		return nil, err
	}
	spec := c.Spec
	spec.EncryptionConfig.AutoLockManagers = true
	if _, err := o.ctl.UpdateCluster(ctx, &swarmapi.UpdateClusterRequest{ClusterID: c.ID, Spec: &spec, ClusterVersion: &c.Meta.Version}); err != nil {
		return nil, err
	}
	reply, err := o.ca.GetUnlockKey(ctx, &swarmapi.GetUnlockKeyRequest{})
	if err != nil {
		return nil, err
	}
	return reply.UnlockKey, nil
}

// swarmNode is one simulated node.
type swarmNode struct {
	dir, hostname string
	broker        *connectionbroker.Broker
	security      *swarmca.SecurityConfig
}

// swarmJoin does what node.Node does: it fetches the root by the token's digest, and then a certificate.
func swarmJoin(address, token, dir string, number, _ int) (member, error) {
	ctx := context.Background()
	paths := swarmca.NewConfigPaths(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	n := &swarmNode{dir: dir, hostname: fmt.Sprint("w", number), broker: connectionbroker.New(remotes.NewRemotes(swarmapi.Peer{Addr: address}))}
	root, err := swarmca.DownloadRootCA(ctx, paths.RootCA, token, n.broker)
	if err != nil {
		return nil, err
	}
	n.security, _, err = root.CreateSecurityConfig(ctx, swarmca.NewKeyReadWriter(paths.Node, nil, nil), swarmca.CertificateRequestConfig{Token: token, ConnBroker: n.broker})
	return n, err
}

func (n *swarmNode) open() error {
	db, err := bbolt.Open(filepath.Join(n.dir, "tasks.db"), 0o600, nil)
	if err != nil {
		return err
	}
	issuer := n.security.IssuerInfo()
	changes := make(chan *swarmagent.NodeChanges, 1)
	go func() {
		for range changes { // what node.Node does with them, change of role and of root, does not happen here
		}
	}()
	a, err := swarmagent.New(&swarmagent.Config{
		Hostname: n.hostname, ConnBroker: n.broker, Executor: newSwarmNoop(n.hostname), DB: db, Credentials: n.security.ClientTLSCreds, NotifyNodeChange: changes,
		NodeTLSInfo: &swarmapi.NodeTLSInfo{TrustRoot: n.security.RootCA().Certs, CertIssuerPublicKey: issuer.PublicKey, CertIssuerSubject: issuer.Subject},
	})
	if err != nil {
		return err
	}
	return a.Start(context.Background())
}

// swarmNoop is an executor whose tasks "run" from their start until they are stopped.
type swarmNoop struct {
	exec.DependencyManager
	hostname string
}

func newSwarmNoop(hostname string) *swarmNoop {
	return &swarmNoop{DependencyManager: swarmagent.NewDependencyManager(nil), hostname: hostname}
}

func (e *swarmNoop) Describe(context.Context) (*swarmapi.NodeDescription, error) {
	return &swarmapi.NodeDescription{Hostname: e.hostname, Platform: &swarmapi.Platform{OS: "linux", Architecture: "amd64"},
		Resources: &swarmapi.Resources{NanoCPUs: 1000e9, MemoryBytes: 1 << 40}}, nil
}
func (e *swarmNoop) Configure(context.Context, *swarmapi.Node) error         { return nil }
func (e *swarmNoop) SetNetworkBootstrapKeys([]*swarmapi.EncryptionKey) error { return nil }
func (e *swarmNoop) Controller(t *swarmapi.Task) (exec.Controller, error) {
	return &swarmTask{secrets: swarmagent.Restrict(e, t).Secrets(), refs: t.Spec.GetContainer().Secrets, ended: make(chan struct{})}, nil
}

type swarmTask struct {
	secrets exec.SecretGetter
	refs    []*swarmapi.SecretReference
	once    sync.Once
	started sync.Once
	ended   chan struct{}
}

func (t *swarmTask) end() error {
	t.once.Do(func() {
		neverStarted := false
		t.started.Do(func() { neverStarted = true })
		if !neverStarted {
			live.Add(-1)
		}
		close(t.ended)
	})
	return nil
}

func (t *swarmTask) Update(context.Context, *swarmapi.Task) error { return nil }
func (t *swarmTask) Prepare(context.Context) error                { return nil }
func (t *swarmTask) Start(context.Context) error {
	for _, ref := range t.refs {
		secret, err := t.secrets.Get(ref.SecretID)
		if err != nil {
			return err
		}
		if err := wantSecret(secret.Spec.Data); err != nil {
			return err
		}
	}
	t.started.Do(func() { live.Add(1) })
	return nil
}
func (t *swarmTask) Wait(ctx context.Context) error {
	select {
	case <-t.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
func (t *swarmTask) Shutdown(context.Context) error  { return t.end() }
func (t *swarmTask) Terminate(context.Context) error { return t.end() }
func (t *swarmTask) Remove(context.Context) error    { return t.end() }
func (t *swarmTask) Close() error                    { return t.end() }
