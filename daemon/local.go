package daemon

import (
	"context"
	"math/rand/v2"
	"net"
	"path/filepath"
	"time"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/internal/courier"
	"warden/internal/durable"
	"warden/join"
	"warden/manager"
	"warden/tokens"
)

// local is the Local service: what a daemon does for itself, whatever its state.
type local struct {
	api.UnimplementedLocalServer
	d *Daemon
}

// fresh refuses where this node belongs to a cluster already. d.op is held.
func (d *Daemon) fresh(op string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state == StateLocked || d.identity != nil {
		return warden.Hint(warden.Errorf(warden.CodeInitialized, op, "this node belongs to a cluster already"),
			"leave it first with `wardenctl swarm leave`")
	}
	return nil
}

// Init makes a cluster with this node as its first manager. The key file is written last: a crash before leaves nothing
// that counts. Of the unlock key, which the caller made, only the public half comes here (I9).
func (l *local) Init(ctx context.Context, r *api.InitRequest) (*api.InitReply, error) {
	reply, err := l.d.init(ctx, r)
	return reply, api.Error(err)
}

func (d *Daemon) init(ctx context.Context, r *api.InitRequest) (*api.InitReply, error) {
	const op = "initialising a cluster"
	d.op.Lock()
	defer d.op.Unlock()
	if err := d.fresh(op); err != nil {
		return nil, err
	}
	actor, err := d.actorOf(ctx)
	if err != nil {
		return nil, err
	}
	ttl := time.Duration(r.LeafTtlNs)
	if ttl == 0 {
		ttl = warden.LeafTTLDefault
	}
	if ttl < warden.LeafTTLMin || ttl > warden.LeafTTLMax {
		return nil, warden.Errorf(warden.CodeInvalid, op, "a life of %s for certificates is outside %s to %s", ttl, warden.LeafTTLMin, warden.LeafTTLMax)
	}
	address, err := d.ownAddress(r.Advertise)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := d.portFree(); err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := d.wipe(); err != nil {
		return nil, err
	}
	reply := &api.InitReply{ClusterId: warden.NewID(), NodeId: warden.NewID()}
	now := time.Now()
	maker := manager.Maker{Now: now, LeafTTL: ttl}
	var recipient *autolock.Recipient
	if r.Autolock {
		if recipient, err = recipientOf(&api.LockState{Autolock: true, Recipient: r.UnlockRecipient}); err != nil {
			return nil, warden.Wrap(op, err)
		}
		maker.Recipient, maker.KeyID = recipient[:], recipient.KeyID()
		reply.UnlockKeyId = recipient.KeyID()
	}
	cluster, authority, err := manager.NewClusterRecord(reply.ClusterId, maker)
	if err != nil {
		return nil, err
	}
	node := &api.Node{
		Id: reply.NodeId, Hostname: d.cfg.Hostname, Role: api.Role_ROLE_MANAGER, DesiredRole: api.Role_ROLE_MANAGER, Zone: warden.DefaultZone,
		Availability: r.Availability, Address: address, LeafRole: api.Role_ROLE_MANAGER, LeafZone: warden.DefaultZone, LeafGeneration: 1,
		LeafDekGeneration: cluster.DekGeneration,
	}
	if node.Availability == api.Availability_AVAILABILITY_UNSPECIFIED {
		node.Availability = api.Availability_AVAILABILITY_DRAIN
	}
	host, _, _ := net.SplitHostPort(address)
	node.Ip = host
	id, err := firstLeaf(authority, node, ttl, now)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if id.Keyring, err = autolock.NewKeyring(); err != nil {
		return nil, warden.Wrap(op, err)
	}
	id.ClusterID, id.LockGeneration, id.DEKGeneration = reply.ClusterId, cluster.LockGeneration, cluster.DekGeneration
	if err := d.mark(); err != nil {
		return nil, err
	}
	if err := durable.MkdirPrivate(filepath.Join(d.cfg.StateDir, raftDir)); err != nil {
		return nil, err
	}
	put := func(o *api.Object) *api.Operation {
		return &api.Operation{Of: &api.Operation_Put{Put: &api.Put{Object: o}}}
	}
	err = manager.Bootstrap(ctx, manager.Config{
		ClusterID: id.ClusterID, NodeID: id.NodeID, Dir: filepath.Join(d.cfg.StateDir, raftDir), Sealer: id.Keyring, Logger: d.logger,
	}, &api.Command{Actor: actor, RequestId: warden.NewID(), Operations: []*api.Operation{
		put(&api.Object{Of: &api.Object_Cluster{Cluster: cluster}}),
		put(&api.Object{Of: &api.Object_Zone{Zone: &api.Zone{Id: warden.NewID(), Name: warden.DefaultZone}}}),
		put(&api.Object{Of: &api.Object_Node{Node: node}}),
	}})
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := writeIdentity(d.cfg.StateDir, id, recipient); err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := d.unmark(); err != nil {
		return nil, err
	}
	if err := d.start(id, recipient); err != nil {
		if werr := d.wipe(); werr != nil { // the caller drops the unlock key: what is sealed under it is of no use
			d.logger.Error("failed to wipe what a failed init left", "error", werr)
		}
		return nil, warden.Wrap(op, err)
	}
	if err := d.identity.setManagers(&api.ManagerList{Managers: []*api.ManagerInfo{{NodeId: node.Id, Address: address, KeyHashes: [][]byte{node.KeyHash}}}}); err != nil {
		return nil, err
	}
	d.logger.Info("initialised a cluster", "cluster_id", id.ClusterID, "node_id", id.NodeID, "autolock", r.Autolock, "address", address)
	if err := d.awaitReady(ctx); err != nil { // the cluster is there: an error would have the caller drop its unlock key
		d.logger.Warn("started slowly", "error", err)
	}
	return reply, nil
}

// firstLeaf makes this node's key and has the new authority issue for it.
func firstLeaf(authority *ca.Authority, node *api.Node, ttl time.Duration, now time.Time) (autolock.Identity, error) {
	key, err := ca.NewKey()
	if err != nil {
		return autolock.Identity{}, err
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		return autolock.Identity{}, err
	}
	vetted, err := authority.Vet(ca.Request{CSR: csr, NodeID: node.Id, Role: ca.RoleManager, Zone: node.Zone, TTL: ttl}, now)
	if err != nil {
		return autolock.Identity{}, err
	}
	leaf, err := authority.Issue(vetted)
	if err != nil {
		return autolock.Identity{}, err
	}
	hash, err := ca.KeyHash(key.Public())
	if err != nil {
		return autolock.Identity{}, err
	}
	node.KeyHash, node.JoinKeyHash, node.Leaf = hash[:], hash[:], leaf
	node.LeafNotBeforeNs, node.LeafNotAfterNs = now.Add(-warden.LeafBackdate).UnixNano(), now.Add(ttl).UnixNano()
	der, err := keyBytes(key)
	return autolock.Identity{NodeID: node.Id, Role: ca.RoleManager, Key: der, Chain: authority.Chain(leaf)}, err
}

// ownAddress finds where others reach this node. Errors: CodeInvalid where that is not plain.
func (d *Daemon) ownAddress(asked string) (string, error) {
	a := d.advertise(asked)
	host, _, err := net.SplitHostPort(a)
	if err != nil {
		return "", warden.Recode(warden.CodeInvalid, "reading the advertised address", err)
	}
	if host != "" {
		return manager.Address(a, host)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", warden.Recode(warden.CodeInternal, "finding this host's address", err)
	}
	var found []string
	for _, x := range addrs {
		if n, ok := x.(*net.IPNet); ok && n.IP.IsGlobalUnicast() && n.IP.To4() != nil {
			found = append(found, n.IP.String())
		}
	}
	switch len(found) {
	case 0:
		return manager.Address(a, "127.0.0.1")
	case 1:
		return manager.Address(a, found[0])
	}
	return "", warden.Hint(warden.Errorf(warden.CodeInvalid, "finding this host's address", "it has several: %v", found),
		"choose one with --advertise-addr")
}

// portFree refuses early what would fail after the state is made.
func (d *Daemon) portFree() error {
	l, err := net.Listen("tcp", d.cfg.Listen)
	if err != nil {
		return warden.Hint(warden.Recode(warden.CodeUnavailable, "opening the port "+d.cfg.Listen, err), "start the daemon with another --listen")
	}
	return l.Close()
}

// awaitReady waits until the manager serves.
func (d *Daemon) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		d.mu.Lock()
		m := d.manager
		d.mu.Unlock()
		if m != nil && m.Ready() {
			return nil
		}
		select {
		case <-ctx.Done():
			return warden.Recode(warden.CodeTimeout, "waiting for the manager to be ready", ctx.Err())
		case <-tick.C:
		}
	}
}

// Join makes this node a member by a token. Nothing is written before the grant is verified.
func (l *local) Join(ctx context.Context, r *api.LocalJoinRequest) (*api.LocalJoinReply, error) {
	reply, err := l.d.join(ctx, r)
	return reply, api.Error(err)
}

func (d *Daemon) join(ctx context.Context, r *api.LocalJoinRequest) (*api.LocalJoinReply, error) {
	const op = "joining"
	d.op.Lock()
	defer d.op.Unlock()
	if err := d.fresh(op); err != nil {
		return nil, err
	}
	token, err := tokens.Parse(r.Token)
	if err != nil {
		return nil, err
	}
	if len(r.Addresses) == 0 || len(r.Addresses) > warden.ManagersMax {
		return nil, warden.Errorf(warden.CodeInvalid, op, "want 1 to %d addresses of managers, got %d", warden.ManagersMax, len(r.Addresses))
	}
	key, err := ca.NewKey()
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	grant, err := d.askToJoin(ctx, r, token, join.Request{
		Key: key, Hostname: d.cfg.Hostname, Advertise: d.advertise(r.Advertise), Availability: r.Availability, Version: d.cfg.Version,
	})
	if err != nil {
		return nil, err
	}
	id := autolock.Identity{ClusterID: grant.ClusterId, NodeID: grant.NodeId, Role: grant.Role.Word(), Chain: grant.Chain}
	if id.Key, err = keyBytes(key); err != nil {
		return nil, warden.Wrap(op, err)
	}
	var recipient *autolock.Recipient
	if id.Role == ca.RoleManager {
		if recipient, err = recipientOf(grant.Lock); err != nil {
			return nil, warden.Wrap(op, err)
		}
		if id.Keyring, err = autolock.NewKeyring(); err != nil {
			return nil, warden.Wrap(op, err)
		}
		id.LockGeneration, id.DEKGeneration = grant.Lock.GetGeneration(), grant.Lock.GetDekGeneration()
		if err := d.portFree(); err != nil {
			return nil, warden.Wrap(op, err)
		}
	}
	if err := d.wipe(); err != nil {
		return nil, err
	}
	// Where to dial comes first: a key file without it would be a node that reaches nobody.
	if err := writeManagers(d.cfg.StateDir, grant.Managers); err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := writeIdentity(d.cfg.StateDir, id, recipient); err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := d.start(id, recipient); err != nil {
		return nil, warden.Wrap(op, err)
	}
	if id.Role == ca.RoleManager {
		if err := d.awaitReady(ctx); err != nil {
			d.logger.Warn("started slowly", "error", err)
		}
	}
	d.logger.Info("joined", "cluster_id", id.ClusterID, "node_id", id.NodeID, "role", id.Role, "zone", grant.Zone)
	return &api.LocalJoinReply{ClusterId: id.ClusterID, NodeId: id.NodeID, Role: grant.Role, Zone: grant.Zone}, nil
}

// How long a joiner goes on asking managers that do not answer (one may just have started itself), or that have too many
// joins at hand (a whole rack may just have started), and how long it waits in between, at most at first and at most.
const (
	joinPatience  = 5 * time.Second
	crowdPatience = time.Minute
	joinRetryMin  = 200 * time.Millisecond
	joinRetryMax  = 2 * time.Second
)

// askToJoin tries the addresses in turn, with one key: a repeat of a join is the same join. A refusal that every manager
// would give ends it at once; managers that don't answer are asked again for joinPatience, those that limit for crowdPatience.
func (d *Daemon) askToJoin(ctx context.Context, r *api.LocalJoinRequest, token tokens.Token, req join.Request) (*api.JoinGrant, error) {
	var last error
	wait := joinRetryMin
	for began := time.Now(); ; wait = min(2*wait, joinRetryMax) {
		for _, address := range r.Addresses {
			address, err := manager.Address(address, "127.0.0.1")
			if err != nil {
				return nil, err
			}
			grant, err := join.Join(ctx, address, token, req, func(ctx context.Context, address string) (net.Conn, error) {
				return (&net.Dialer{Timeout: warden.HandshakeTimeout}).DialContext(ctx, "tcp", address)
			})
			if err == nil {
				return grant, nil
			}
			if last == nil || !api.Transient(err) {
				last = err
			}
			switch warden.CodeOf(err) {
			case warden.CodeUnknownToken, warden.CodeExpired, warden.CodeUsedUp, warden.CodeRevoked, warden.CodeBinding, warden.CodeInvalid, warden.CodeClock:
				return nil, err
			}
		}
		patience := joinPatience
		if warden.CodeOf(last) == warden.CodeLimited {
			patience = crowdPatience
		} else if !api.Transient(last) {
			return nil, last
		}
		if time.Since(began) > patience {
			return nil, last
		}
		select {
		case <-ctx.Done():
			return nil, last
		case <-time.After(wait/2 + rand.N(wait/2)): // not all of the rack at once
		}
	}
}

// Unlock opens a locked manager with the unlock key, which is forgotten again.
func (l *local) Unlock(_ context.Context, r *api.UnlockRequest) (*api.UnlockReply, error) {
	reply, err := l.d.unlock(r)
	return reply, api.Error(err)
}

func (d *Daemon) unlock(r *api.UnlockRequest) (*api.UnlockReply, error) {
	const op = "unlocking"
	d.op.Lock()
	defer d.op.Unlock()
	d.mu.Lock()
	kf, state, inbox := d.locked, d.state, d.inbox
	d.mu.Unlock()
	if kf == nil {
		if state == StateRunning {
			return nil, warden.Errorf(warden.CodeInvalid, op, "this node is not locked")
		}
		return nil, warden.Errorf(warden.CodeUninitialized, op, "this node belongs to no cluster")
	}
	if len(r.SealedKey) > warden.UnlockKeyTextMax+courier.Overhead {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "an unlock key has at most %d bytes", warden.UnlockKeyTextMax)
	}
	text, err := inbox.Open(r.SealedKey)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	defer text.Wipe()
	var key autolock.UnlockKey
	if err := text.Use(func(b []byte) (err error) { key, err = autolock.ParseUnlockKey(b); return err }); err != nil {
		return nil, err
	}
	defer key.Wipe()
	id, err := kf.Unlock(key)
	if err != nil {
		return nil, err
	}
	recipient := key.Recipient()
	if err := d.start(id, &recipient); err != nil {
		if now, rerr := autolock.ReadKeyFile(filepath.Join(d.cfg.StateDir, keyFile)); rerr == nil && now.Locked {
			d.set(func() { d.locked = now }) // another manager may have had it sealed to another key meanwhile
		}
		return nil, warden.Wrap(op, err)
	}
	d.logger.Info("unlocked", "unlock_key_id", recipient.KeyID())
	return &api.UnlockReply{NodeId: id.NodeID}, nil
}

// Leave stops and wipes everything. A manager is demoted first, unless forced.
func (l *local) Leave(ctx context.Context, r *api.LeaveRequest) (*api.LeaveReply, error) {
	reply, err := l.d.leave(ctx, r)
	return reply, api.Error(err)
}

func (d *Daemon) leave(ctx context.Context, r *api.LeaveRequest) (*api.LeaveReply, error) {
	const op = "leaving"
	d.op.Lock()
	defer d.op.Unlock()
	d.mu.Lock()
	i, kf, a, m := d.identity, d.locked, d.agent, d.manager
	d.mu.Unlock()
	reply := &api.LeaveReply{}
	switch {
	case i == nil && kf == nil:
		return nil, warden.Errorf(warden.CodeUninitialized, op, "this node belongs to no cluster")
	case kf != nil && !r.Force:
		return nil, warden.Hint(warden.Errorf(warden.CodeLocked, op, "this manager is locked, and leaving destroys its copy of the state"),
			"unlock it first, or give --force if its state is not needed any more")
	case m != nil && !r.Force:
		return nil, warden.Hint(warden.Errorf(warden.CodeInUse, op, "this node is a manager"),
			"demote it first with `wardenctl node demote`, or give --force: that counts against the quorum of the managers that remain")
	case m != nil:
		reply.Warnings = append(reply.Warnings, "the cluster still counts this manager: remove it with `wardenctl node rm --force` on another one")
	default:
		reply.Warnings = append(reply.Warnings, "the cluster keeps this node's record as down: remove it with `wardenctl node rm` on a manager")
	}
	if a != nil {
		if err := a.StopAll(ctx); err != nil {
			return nil, warden.Wrap(op, err)
		}
	}
	d.halt()
	d.set(func() { d.state, d.message, d.identity, d.locked = StateUninitialized, "", nil, nil })
	if err := d.wipe(); err != nil {
		return nil, err
	}
	d.logger.Info("left the cluster")
	return reply, nil
}

// Info says what the daemon is. It never fails.
func (l *local) Info(_ context.Context, r *api.InfoRequest) (*api.InfoReply, error) {
	info := l.d.info()
	if r.GetFacts() {
		info.Facts = l.d.facts()
	}
	return info, nil
}

func (d *Daemon) info() *api.InfoReply {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &api.InfoReply{
		State: d.state, Message: d.message, Hostname: d.cfg.Hostname, Version: d.cfg.Version, StateDir: d.cfg.StateDir,
		Executor: d.cfg.Executor.Name(), Address: d.cfg.Listen,
	}
	switch {
	case d.locked != nil:
		r.ClusterId, r.NodeId, r.UnlockKeyId, r.Role = d.locked.ClusterID, d.locked.NodeID, d.locked.KeyID, api.Role_ROLE_MANAGER
		r.UnlockInbox = d.inbox.Public()
		r.Message = "everything it holds is sealed until `wardenctl swarm unlock` gets unlock key " + d.locked.KeyID
	case d.identity != nil:
		id, leaf := d.identity.now()
		r.ClusterId, r.NodeId, r.Zone, r.Role = id.ClusterID, id.NodeID, leaf.Zone, api.Role_ROLE_WORKER
		if id.Role == ca.RoleManager {
			r.Role = api.Role_ROLE_MANAGER
		}
		r.LeafSubject = "CN=" + id.NodeID + ",OU=" + leaf.Role + ",O=" + id.ClusterID
		r.LeafNotBeforeNs, r.LeafNotAfterNs = leaf.NotBefore.UnixNano(), leaf.NotAfter.UnixNano()
		if d.agent != nil {
			r.Tasks = d.agent.Tasks()
			id, since := d.agent.Session()
			if r.SessionManager = id; id != "" {
				r.SessionSinceNs = since.UnixNano()
			}
		}
		if d.manager != nil && !d.manager.Ready() {
			r.Message = "this manager has not caught up with a leader yet"
		} else if d.keeper != nil {
			r.Message = d.keeper.trouble()
		}
	}
	return r
}
