package history

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"warden"
	"warden/api"
	"warden/test/bed"
)

const (
	patience     = 3 * time.Second  // of a client with a call: shorter than some pauses, so that calls begin in one
	longPatience = 20 * time.Second // with a call that waits for managers
)

// connection is one to a daemon's socket.
type connection struct {
	*grpc.ClientConn
	control api.ControlClient
	local   api.LocalClient
}

// connect connects as a user, who is the author of what is asked there.
func (r *run) connect(h *bed.Host, uid int) connection {
	path := filepath.Join(r.bed.Dir, h.Name, "sock")
	cc, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialAs(ctx, uid, path) }),
		grpc.WithUnaryInterceptor(r.authors.note(h, uid)),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: patience, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 100 * time.Millisecond}}))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { cc.Close() })
	return connection{cc, api.NewControlClient(cc), api.NewLocalClient(cc)}
}

// client makes one call after the other, most of them at one manager, so that all others go on where that one is away.
type client struct {
	*run
	n    int
	rand *rand.Rand
	seen map[string]*api.Service // as last read, which updates are made from
}

// loop makes calls until ctx ends, a few milliseconds apart.
func (c *client) loop(ctx context.Context) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		wait := time.Duration(c.rand.IntN(20)) * time.Millisecond
		if !c.step() {
			wait += 50 * time.Millisecond
		}
		pause.Reset(wait)
	}
}

// step makes one call. It reports false where there was no daemon to take it.
func (c *client) step() bool {
	at := c.managers[c.n%len(c.managers)]
	if c.rand.IntN(8) == 0 {
		at = c.managers[c.rand.IntN(len(c.managers))]
	}
	if c.n%2 == 1 {
		at = at.asOther()
	}
	switch n := c.rand.IntN(100); {
	case n < 53:
		return c.secret(at)
	case n < 66:
		return c.service(at)
	case n < 81:
		return c.token(at)
	case n < 91:
		return c.node(at)
	case n < 97:
		return c.zone(at)
	default:
		return c.cluster(at)
	}
}

// outcome says what a call's error means. sent is false where no manager has taken the call.
func (r *run) outcome(err error) (out reply, sent bool) {
	if err == nil {
		return reply{}, true
	}
	dialled := len(status.Convert(err).Details()) > 0 || !strings.Contains(err.Error(), "while dialing") // a daemon's own errors have details, also those about others
	err = api.FromError(err)
	text := err.Error()
	if strings.Contains(text, r.canary) {
		r.violated("I10", "a canary is in an error: %s", strings.ReplaceAll(text, r.canary, "CANARY"))
	}
	switch code := warden.CodeOf(err); code {
	case warden.CodeLocked, warden.CodeNotManager, warden.CodeUnsupported, warden.CodeUninitialized:
		return reply{}, false
	case warden.CodeUnavailable, warden.CodeTimeout, warden.CodeNoLeader, warden.CodeNotLeader, warden.CodeEvicted, warden.CodeClock, warden.CodeInternal:
		if !dialled {
			return reply{}, false
		}
		if code == warden.CodeInternal && !r.diskFull.Load() && time.Since(time.Unix(0, r.diskFreed.Load())) > patience {
			r.violated("I11", "a call failed for no reason that an operator could act on: %s", text)
		}
		return reply{Unknown: true}, true
	default:
		if code == warden.CodeConflict && strings.Contains(text, "had its effect") { // at some moment: others have undone it
			return reply{Unknown: true}, true
		}
		if code == warden.CodeNotFound && strings.Contains(text, "secret") && strings.Contains(text, "service") {
			code = noSecret
		}
		return reply{Code: code}, true
	}
}

// mayBeIdle are the calls that change nothing, and that no request ID is kept of, where all is as they ask already: made again later, such a
// call may have its effect then.
var mayBeIdle = map[string]bool{"scale": true, "availability": true, "role": true, "ttl": true, "on": true, "off": true, "revoke": true}

// record makes a call and writes it down for an object. A change whose answer was lost is often made again, and so are others that were
// done: all of them by one request ID, so that there is one effect, which is what is written down.
func (c *client) record(object string, what call, wait time.Duration, send func(ctx context.Context) (version uint64, state any, err error)) (reply, bool) {
	id := warden.NewID()
	once := func() (reply, bool) {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		defer cancel()
		if what.Verb != read {
			ctx = metadata.AppendToOutgoingContext(ctx, requestIDKey, id)
		}
		version, state, err := send(ctx)
		out, sent := c.outcome(err)
		out.Version, out.State = version, state
		return out, sent
	}
	began := c.history.now()
	out, sent := once()
	if !sent {
		return out, false
	}
	again := what.Verb != read && wait == patience
	if again && out.Unknown && c.rand.IntN(2) == 0 {
		if second, sent := once(); sent && second.Code == "" && !second.Unknown { // a refusal says nothing of the first
			out = second
		}
	}
	c.history.add(c.n, object, what, began, out)
	if again && !out.Unknown && out.Code == "" && !mayBeIdle[what.Verb] && c.rand.IntN(5) == 0 {
		if second, sent := once(); sent && !second.Unknown && second.Code == "" && second.Version != out.Version {
			c.violated("requests", "%s %v made version %d, and by the same request ID version %d", object, what, out.Version, second.Version)
		}
	}
	return out, true
}

// secret makes a call on a secret.
func (c *client) secret(at *member) bool {
	p := c.secrets.pick(c.rand.IntN)
	object := "secret/" + p.name
	write := func(verb string, send func(ctx context.Context, tag uint64) (uint64, error)) bool {
		tag := c.secrets.tag(p.name)
		_, sent := c.record(object, call{Verb: verb, Tag: tag}, patience, func(ctx context.Context) (uint64, any, error) {
			version, err := send(ctx, tag)
			return version, nil, err
		})
		return sent
	}
	switch n := c.rand.IntN(100); {
	case n < 35:
		return c.readSecrets(at, p.name)
	case n < 42:
		return c.readSecrets(at)
	case n < 62:
		return write("create", func(ctx context.Context, tag uint64) (uint64, error) {
			reply, err := at.control.CreateSecret(ctx, &api.CreateSecretRequest{Name: p.name, Zones: p.zones, Data: c.value(p.name, tag)})
			return reply.GetVersion(), err
		})
	case n < 87:
		return write("rotate", func(ctx context.Context, tag uint64) (uint64, error) {
			reply, err := at.control.RotateSecret(ctx, &api.RotateSecretRequest{Reference: p.name, Data: c.value(p.name, tag)})
			return reply.GetVersion(), err
		})
	case n < 94:
		_, sent := c.record(object, call{Verb: "rm"}, patience, func(ctx context.Context) (uint64, any, error) {
			_, err := at.control.RemoveSecret(ctx, &api.ReferenceRequest{Reference: p.name})
			return 0, nil, err
		})
		return sent
	default:
		version := 1 + c.rand.Uint64N(4)
		_, sent := c.record(object, call{Verb: "rm-version", Version: version}, patience, func(ctx context.Context) (uint64, any, error) {
			_, err := at.control.RemoveSecret(ctx, &api.ReferenceRequest{Reference: fmt.Sprintf("%s@%d", p.name, version)})
			return 0, nil, err
		})
		return sent
	}
}

// readSecrets reads the named ones, each, or by one list all that clients use now.
func (c *client) readSecrets(at *member, names ...string) bool {
	return readAll(c, at, api.Kind_KIND_SECRET, "secret/", names, c.secrets, func(reply *api.ListReply) map[string]any {
		states, names := map[string]any{}, map[string]string{}
		for _, o := range reply.Objects {
			names[o.GetSecret().GetId()] = o.GetSecret().GetName()
			states[o.GetSecret().GetName()] = secretState{Current: o.GetSecret().GetCurrentVersion()}
		}
		for _, u := range reply.Uses {
			s := states[names[u.SecretId]].(secretState)
			s.Versions += versionText(u.Version, u.SizeBytes-valueBytes)
			states[names[u.SecretId]] = s
		}
		return states
	}, secretState{})
}

// readAll reads objects by their names, or where none is named by one list all of the pool; none is the state of what is not there.
func readAll(c *client, at *member, kind api.Kind, prefix string, names []string, p *pool, states func(*api.ListReply) map[string]any, none any) bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	all := names
	if len(names) == 0 {
		all = p.names()
	}
	began := c.history.now()
	reply, err := at.control.List(ctx, &api.ListRequest{Kind: kind, References: names})
	if warden.CodeOf(api.FromError(err)) == warden.CodeNotFound && len(names) == 1 {
		reply, err = new(api.ListReply), nil
	}
	if err != nil {
		_, sent := c.outcome(err)
		return sent
	}
	seen := states(reply)
	for _, name := range all {
		state, ok := seen[name]
		if !ok {
			state = none
		}
		c.history.add(c.n, prefix+name, call{Verb: read}, began, result(state))
	}
	return true
}

func result(state any) reply { return reply{State: state} }

// service makes a call on a service.
func (c *client) service(at *member) bool {
	p := c.services.pick(c.rand.IntN)
	object := "service/" + p.name
	forbidden := ""
	write := func(what call, send func(ctx context.Context) (*api.ChangeReply, error)) bool {
		out, sent := c.record(object, what, patience, func(ctx context.Context) (uint64, any, error) {
			reply, err := send(ctx)
			return reply.GetVersion(), nil, err
		})
		if forbidden != "" && sent && !out.Unknown && out.Code == "" {
			c.violated("I6", "service %s of zone %s was let have secret %s", p.name, p.zones[0], forbidden)
		}
		return sent
	}
	switch n := c.rand.IntN(100); {
	case n < 40:
		return c.readServices(at, p.name)
	case n < 45:
		return c.readServices(at)
	case n < 65:
		var spec *api.ServiceSpec
		spec, forbidden = c.spec(p)
		spec.Replicas = c.rand.Uint64N(3)
		tag := c.services.tag(p.name)
		spec.Labels = map[string]string{"tag": fmt.Sprint(tag)}
		return write(call{Verb: "create", Tag: tag, Number: spec.Replicas}, func(ctx context.Context) (*api.ChangeReply, error) {
			return at.control.CreateService(ctx, &api.CreateServiceRequest{Spec: spec})
		})
	case n < 80:
		now := c.seen[p.name]
		if now == nil {
			return c.readServices(at, p.name)
		}
		spec := api.Clone(now).Spec
		tag := c.services.tag(p.name)
		spec.Labels = map[string]string{"tag": fmt.Sprint(tag)}
		if c.rand.IntN(3) == 0 {
			var other *api.ServiceSpec
			other, forbidden = c.spec(p)
			spec.Task.Secrets = other.Task.Secrets
		}
		return write(call{Verb: "update", Tag: tag, Version: now.Meta.Version, Number: spec.Replicas}, func(ctx context.Context) (*api.ChangeReply, error) {
			return at.control.UpdateService(ctx, &api.UpdateServiceRequest{Reference: p.name, Version: now.Meta.Version, Spec: spec})
		})
	case n < 92:
		replicas := c.rand.Uint64N(3)
		return write(call{Verb: "scale", Number: replicas}, func(ctx context.Context) (*api.ChangeReply, error) {
			return at.control.ScaleService(ctx, &api.ScaleServiceRequest{Reference: p.name, Replicas: replicas})
		})
	default:
		_, sent := c.record(object, call{Verb: "rm"}, patience, func(ctx context.Context) (uint64, any, error) {
			_, err := at.control.RemoveService(ctx, &api.ReferenceRequest{Reference: p.name})
			return 0, nil, err
		})
		return sent
	}
}

// spec draws what a service runs: a process that waits, with up to two secrets. forbidden names one that may not enter its zone, which
// is tried now and then.
func (c *client) spec(p place) (spec *api.ServiceSpec, forbidden string) {
	task := &api.TaskSpec{Image: "host", Command: []string{"sleep", "31536000"}, Zone: p.zones[0], StopGraceNs: int64(time.Second)}
	give := func(s place) {
		task.Secrets = append(task.Secrets, &api.SecretReference{SecretName: s.name, Target: fmt.Sprintf("%s.%d", s.name, len(task.Secrets))})
	}
	for range c.rand.IntN(3) {
		if s := c.secrets.pick(c.rand.IntN); s.mayEnter(p.zones[0]) {
			give(s)
		}
	}
	for try := c.rand.IntN(4) == 0; try && forbidden == ""; {
		if s := c.secrets.pick(c.rand.IntN); !s.mayEnter(p.zones[0]) {
			give(s)
			forbidden = s.name
		}
	}
	return &api.ServiceSpec{Name: p.name, Task: task}, forbidden
}

func (c *client) readServices(at *member, names ...string) bool {
	return readAll(c, at, api.Kind_KIND_SERVICE, "service/", names, c.services, func(reply *api.ListReply) map[string]any {
		states := map[string]any{}
		for _, o := range reply.Objects {
			s := o.GetService()
			var tag uint64
			fmt.Sscan(s.GetSpec().GetLabels()["tag"], &tag)
			states[s.GetSpec().GetName()] = serviceState{s.GetMeta().GetVersion(), tag, s.GetSpec().GetReplicas()}
			c.seen[s.GetSpec().GetName()] = s
		}
		return states
	}, serviceState{})
}

// cluster reads or changes the lock of the cluster, its keys, or the life of certificates: each change has managers or all nodes make
// new keys and get new leaves.
func (c *client) cluster(at *member) bool {
	change := func(object string, what call, send func(ctx context.Context) error) bool {
		_, sent := c.record(object, what, patience, func(ctx context.Context) (uint64, any, error) { return 0, nil, send(ctx) })
		return sent
	}
	switch what := c.changeOfCluster(c.rand); what {
	case "off":
		off := false
		return change("cluster/lock", call{Verb: what}, func(ctx context.Context) error {
			_, err := at.control.UpdateCluster(ctx, &api.UpdateClusterRequest{Autolock: &off})
			return err
		})
	case "on":
		on := true
		id, recipient := c.newUnlockKey()
		return change("cluster/lock", call{Verb: what, Word: id}, func(ctx context.Context) error {
			_, err := at.control.UpdateCluster(ctx, &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: recipient})
			return err
		})
	case "rotate":
		id, recipient := c.newUnlockKey()
		return change("cluster/lock", call{Verb: what, Word: id}, func(ctx context.Context) error {
			_, err := at.control.RotateUnlockKey(ctx, &api.RotateUnlockKeyRequest{UnlockRecipient: recipient})
			return err
		})
	case "rotate-dek":
		return change("cluster/lock", call{Verb: what}, func(ctx context.Context) error {
			_, err := at.control.RotateDEK(ctx, &api.RotateDEKRequest{})
			return err
		})
	case "rotate-issuing":
		return change("cluster/issuing", call{Verb: what}, func(ctx context.Context) error {
			_, err := at.control.RotateIssuing(ctx, &api.RotateIssuingRequest{})
			return err
		})
	case "ttl":
		ttl := leafTTLs[c.rand.IntN(len(leafTTLs))]
		return change("cluster/ttl", call{Verb: what, Number: uint64(ttl)}, func(ctx context.Context) error {
			_, err := at.control.UpdateCluster(ctx, &api.UpdateClusterRequest{LeafTtlNs: int64(ttl)})
			return err
		})
	}
	return c.readCluster(at)
}

// leafTTLs are lives of certificates: under the shorter ones nodes renew theirs several times in a run.
var leafTTLs = []time.Duration{20 * time.Second, 40 * time.Second, time.Hour}

func (c *client) readCluster(at *member) bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began := c.history.now()
	reply, err := at.control.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_CLUSTER})
	if err != nil {
		_, sent := c.outcome(err)
		return sent
	}
	o := reply.Objects[0].GetCluster()
	c.history.add(c.n, "cluster/lock", call{Verb: read}, began, result(lockState{o.Autolock, o.UnlockKeyId, o.DekGeneration}))
	c.history.add(c.n, "cluster/issuing", call{Verb: read}, began, result(o.IssuingGeneration))
	c.history.add(c.n, "cluster/ttl", call{Verb: read}, began, result(uint64(o.LeafTtlNs)))
	return true
}
