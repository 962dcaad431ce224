package fuzz_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
)

// method is one method of the API to FuzzControl.
type method struct {
	weight  int // how often it is drawn
	name    string
	request func(c *controlled) proto.Message

	// check is what holds after a call that was done, whose request ID is new; nil: nothing.
	check func(c *controlled, k *call, before, after *store.View)
	// may reports that nothing forbids the request: a refusal is wrong. It knows the plain cases only.
	may func(v *store.View, req proto.Message) bool
}

func never(*store.View, proto.Message) bool { return false }

var (
	methods []method
	drawn   []*method // each as often as it weighs
)

func init() {
	methods = []method{
		{2, "CreateZone", createZone, checkCreateZone, mayCreateZone},
		{2, "RemoveZone", reference(api.Kind_KIND_ZONE), checkRemoved(api.Kind_KIND_ZONE), mayRemoveZone},
		{4, "CreateSecret", createSecret, checkCreateSecret, mayCreateSecret},
		{4, "RotateSecret", rotateSecret, checkRotateSecret, mayRotateSecret},
		{3, "RemoveSecret", removeSecret, checkRemoveSecret, mayRemoveSecret},
		{6, "CreateService", createService, checkCreateService, never},
		{5, "UpdateService", updateService, checkUpdateService, never},
		{2, "ScaleService", scaleService, checkScaleService, mayScaleService},
		{2, "RemoveService", reference(api.Kind_KIND_SERVICE), checkRemoved(api.Kind_KIND_SERVICE), mayFind(api.Kind_KIND_SERVICE)},
		{3, "CreateToken", createToken, checkCreateToken, never},
		{1, "RevokeToken", reference(api.Kind_KIND_TOKEN), checkRevokeToken, mayFind(api.Kind_KIND_TOKEN)},
		{4, "UpdateNode", updateNode, checkUpdateNode, never},
		{2, "RemoveNode", removeNode, checkRemoveNode, never},
		{2, "UpdateCluster", updateCluster, nil, never},
		{1, "RotateUnlockKey", rotateUnlockKey, nil, never},
		{1, "RotateDEK", rotateDEK, checkRotateDEK, always},
		{1, "RotateIssuing", rotateIssuing, checkRotateIssuing, always},
		{2, "List", list, nil, never},
		{1, "Status", func(*controlled) proto.Message { return &api.StatusRequest{} }, nil, never},
	}
	for i := range methods {
		for range methods[i].weight {
			drawn = append(drawn, &methods[i])
		}
	}
}

func always(*store.View, proto.Message) bool { return true }

// name returns one of few, so that they collide; some are none.
func (c *controlled) name() string {
	names := []string{"a", "b", "c", "a", "b", "c", "a", "b", "a", "b", "pci", "default", "", "A b", strings.Repeat("n", 300)}
	return names[c.in.pick(len(names))]
}

func (c *controlled) zone() string {
	zones := []string{"", "default", "pci", "default", "pci", "a"}
	return zones[c.in.pick(len(zones))]
}

// ref returns what mostly means something of the kind: a name, an ID, a prefix of one.
func (c *controlled) ref(kind api.Kind) string {
	v := c.store.View()
	var refs [][2]string // ID and name
	switch kind {
	case api.Kind_KIND_ZONE:
		for _, z := range v.Zones() {
			refs = append(refs, [2]string{z.Id, z.Name})
		}
	case api.Kind_KIND_SECRET:
		for _, s := range v.Secrets() {
			refs = append(refs, [2]string{s.Id, s.Name})
		}
	case api.Kind_KIND_SERVICE:
		for _, s := range v.Services() {
			refs = append(refs, [2]string{s.Id, s.Spec.Name})
		}
	case api.Kind_KIND_TOKEN:
		for _, t := range v.Tokens() {
			refs = append(refs, [2]string{t.Id, t.Id})
		}
	case api.Kind_KIND_NODE:
		for _, n := range v.Nodes() {
			refs = append(refs, [2]string{n.Id, n.Hostname})
		}
		for _, n := range v.Tombstones() {
			refs = append(refs, [2]string{n.Id, n.Hostname})
		}
	}
	how := c.in.pick(8)
	if how == 7 || len(refs) == 0 {
		return c.name()
	}
	one := refs[c.in.pick(len(refs))]
	switch how {
	case 0, 1:
		return one[0]
	case 2, 3:
		return one[0][:c.in.pick(len(one[0])+1)]
	}
	return one[1]
}

func reference(kind api.Kind) func(*controlled) proto.Message {
	return func(c *controlled) proto.Message { return &api.ReferenceRequest{Reference: c.ref(kind)} }
}

// meant returns the ID that the request's reference meant.
func meant(v *store.View, kind api.Kind, req proto.Message) (string, bool) {
	id, err := v.Resolve(kind, req.(interface{ GetReference() string }).GetReference())
	return id, err == nil
}

func mayFind(kind api.Kind) func(*store.View, proto.Message) bool {
	return func(v *store.View, req proto.Message) bool {
		_, found := meant(v, kind, req)
		return found
	}
}

func checkRemoved(kind api.Kind) func(*controlled, *call, *store.View, *store.View) {
	return func(c *controlled, k *call, before, after *store.View) {
		if id, found := meant(before, kind, k.req); !found || after.Object(kind, id) != nil || k.reply.(*api.ChangeReply).Id != id {
			c.t.Fatalf("%s(%v) = %v, and it is there", k.method, k.req, k.reply)
		}
	}
}

func createZone(c *controlled) proto.Message { return &api.CreateZoneRequest{Name: c.name()} }

func checkCreateZone(c *controlled, k *call, before, after *store.View) {
	name := k.req.(*api.CreateZoneRequest).Name
	if before.Zone(name) != nil || after.Zone(name).GetId() != k.reply.(*api.ChangeReply).Id {
		c.t.Fatalf("CreateZone(%s) = %v", name, k.reply)
	}
}

func mayCreateZone(v *store.View, req proto.Message) bool {
	name := req.(*api.CreateZoneRequest).Name
	return warden.CheckName("zone", name) == nil && v.Zone(name) == nil
}

func mayRemoveZone(v *store.View, req proto.Message) bool {
	id, found := meant(v, api.Kind_KIND_ZONE, req)
	if !found {
		return false
	}
	name := v.Object(api.Kind_KIND_ZONE, id).GetZone().GetName()
	return name != warden.DefaultZone &&
		!slices.ContainsFunc(v.Nodes(), func(n *api.Node) bool { return n.Zone == name }) &&
		!slices.ContainsFunc(v.Secrets(), func(s *api.Secret) bool { return slices.Contains(s.Zones, name) }) &&
		!slices.ContainsFunc(v.Services(), func(s *api.Service) bool { return s.Spec.Task.Zone == name })
}

// value returns a secret's value, which is different each time.
func (c *controlled) value() []byte {
	if c.in.pick(16) == 15 {
		return nil
	}
	return fmt.Append(nil, hidden, c.n)
}

func createSecret(c *controlled) proto.Message {
	r := &api.CreateSecretRequest{Name: c.name(), Data: c.value()}
	for range c.in.pick(3) {
		r.Zones = append(r.Zones, c.zone())
	}
	return r
}

func checkCreateSecret(c *controlled, k *call, before, after *store.View) {
	r, id := k.req.(*api.CreateSecretRequest), k.reply.(*api.ChangeReply).Id
	if before.SecretByName(r.Name) != nil || after.SecretByName(r.Name).GetId() != id || after.Secret(id).GetCurrentVersion() != 1 {
		c.t.Fatalf("CreateSecret(%s) = %v", r.Name, k.reply)
	}
	c.values[store.SecretVersionID(id, 1)] = string(r.Data)
}

func mayCreateSecret(v *store.View, req proto.Message) bool {
	r := req.(*api.CreateSecretRequest)
	return warden.CheckName("secret", r.Name) == nil && v.SecretByName(r.Name) == nil && len(r.Data) > 0 &&
		!slices.ContainsFunc(r.Zones, func(z string) bool { return v.Zone(z) == nil })
}

func rotateSecret(c *controlled) proto.Message {
	return &api.RotateSecretRequest{Reference: c.ref(api.Kind_KIND_SECRET), Data: c.value()}
}

func checkRotateSecret(c *controlled, k *call, before, after *store.View) {
	reply := k.reply.(*api.RotateSecretReply)
	if n := after.Secret(reply.Id).GetCurrentVersion(); n != reply.Version || n != before.Secret(reply.Id).GetCurrentVersion()+1 {
		c.t.Fatalf("RotateSecret(%v) = %v, the current version is %d", k.req, reply, n)
	}
	c.values[store.SecretVersionID(reply.Id, reply.Version)] = string(k.req.(*api.RotateSecretRequest).Data)
}

func mayRotateSecret(v *store.View, req proto.Message) bool {
	id, found := meant(v, api.Kind_KIND_SECRET, req)
	return found && len(req.(*api.RotateSecretRequest).Data) > 0 && len(v.SecretVersions(id)) < warden.SecretVersionsMax
}

func removeSecret(c *controlled) proto.Message {
	ref := c.ref(api.Kind_KIND_SECRET)
	if n := c.in.pick(6); n > 1 {
		ref += []string{"@1", "@2", "@3", "@0"}[n-2]
	}
	return &api.ReferenceRequest{Reference: ref}
}

// secretMeant returns what a request to remove a secret means; version 0 is all of it.
func secretMeant(v *store.View, req proto.Message) (secret *api.Secret, version uint64) {
	ref, n, one := strings.Cut(req.(*api.ReferenceRequest).Reference, "@")
	id, err := v.Resolve(api.Kind_KIND_SECRET, ref)
	if err != nil {
		return nil, 0
	}
	if one {
		if version, err = strconv.ParseUint(n, 10, 64); err != nil || v.SecretVersion(id, version) == nil {
			return nil, 0
		}
	}
	return v.Secret(id), version
}

func checkRemoveSecret(c *controlled, k *call, before, after *store.View) {
	s, version := secretMeant(before, k.req)
	if s == nil || inUse(before, s, version) || version == 0 && after.Secret(s.Id) != nil || after.SecretVersion(s.Id, max(version, 1)) != nil {
		c.t.Fatalf("RemoveSecret(%v) = %v", k.req, k.reply)
	}
}

func mayRemoveSecret(v *store.View, req proto.Message) bool {
	s, version := secretMeant(v, req)
	return s != nil && !inUse(v, s, version)
}

// inUse reports whether a service or a task that has not ended has the version, or any where it is 0.
func inUse(v *store.View, s *api.Secret, version uint64) bool {
	has := func(refs []*api.SecretReference) bool {
		return slices.ContainsFunc(refs, func(r *api.SecretReference) bool {
			return r.SecretId == s.Id && (version == 0 || r.Version == version)
		})
	}
	return version == s.CurrentVersion ||
		slices.ContainsFunc(v.Services(), func(sv *api.Service) bool { return has(sv.Spec.Task.Secrets) }) ||
		slices.ContainsFunc(v.Tasks(), func(t *api.Task) bool { return !t.Status.State.Ended() && has(t.Spec.Secrets) })
}

// spec returns what a service may be, or nearly.
func (c *controlled) spec() *api.ServiceSpec {
	s := &api.ServiceSpec{Name: c.name(), Replicas: uint64(c.in.pick(4)), Task: &api.TaskSpec{Image: "host", Zone: c.zone()}}
	for range c.in.pick(3) {
		s.Task.Secrets = append(s.Task.Secrets, &api.SecretReference{SecretName: c.ref(api.Kind_KIND_SECRET),
			Version: uint64(max(0, c.in.pick(6)-2)), Target: []string{"", "", "", "k", "k", "../k"}[c.in.pick(6)]})
	}
	switch c.in.pick(64) {
	case 0:
		s.Task.Image = ""
	case 1:
		s.Task.Constraints = []string{"node.labels.a == b"}
	case 2:
		s.Task.Constraints = []string{"no constraint"}
	case 3:
		s.Task.Env = []string{"A=b", "B=c=d"}
	case 4:
		s.Task.Env = []string{"=x"}
	case 5:
		s.Task.Resources = &api.Resources{ReserveNanoCpus: 1e9, LimitNanoCpus: 2e9}
	case 6:
		s.Task.Resources = &api.Resources{ReserveNanoCpus: -1}
	case 7:
		s.Task.Resources = &api.Resources{ReserveMemoryBytes: 1 << 62}
	case 8:
		s.Update = &api.UpdatePolicy{Parallelism: 2, DelayNs: 1e9}
	case 9:
		s.Update = &api.UpdatePolicy{DelayNs: -1}
	case 10:
		s.Task.Restart = api.RestartCondition(c.in.pick(6))
	case 11:
		s.Task.Command = []string{"sleep", "1\x00"}
	case 12:
		s.Labels = map[string]string{"": "x"}
	case 13:
		s.Task.Labels = map[string]string{"k": "v\n"}
	case 14:
		s.Replicas = warden.ReplicasMax + 1
	case 15:
		s.Task.StopGraceNs, s.Task.RestartDelayNs = 1, -1
	case 16:
		s.Task = nil
	}
	return s
}

func createService(c *controlled) proto.Message { return &api.CreateServiceRequest{Spec: c.spec()} }

func checkCreateService(c *controlled, k *call, before, after *store.View) {
	name, reply := k.req.(*api.CreateServiceRequest).Spec.Name, k.reply.(*api.ChangeReply)
	if sv := after.ServiceByName(name); before.ServiceByName(name) != nil || sv.GetId() != reply.Id || sv.GetSpecVersion() != 1 || reply.Version != 1 {
		c.t.Fatalf("CreateService(%v) = %v", k.req, reply)
	}
}

func updateService(c *controlled) proto.Message {
	r := &api.UpdateServiceRequest{Reference: c.ref(api.Kind_KIND_SERVICE)}
	v := c.store.View()
	id, err := v.Resolve(api.Kind_KIND_SERVICE, r.Reference)
	if err != nil {
		r.Spec, r.Version = c.spec(), 1
		return r
	}
	now := v.Service(id)
	r.Version = now.Meta.Version
	switch c.in.pick(8) {
	case 0:
		r.Version++
	case 1:
		r.Version--
	}
	r.Spec = api.Clone(now.Spec)
	switch c.in.pick(6) {
	case 0:
		r.Spec.Task.Force++
	case 1:
		r.Spec.Task.Zone = c.zone()
	case 2:
		r.Spec = c.spec()
	case 3, 4:
		name := r.Spec.Name
		r.Spec = c.spec()
		r.Spec.Name = name
	}
	return r
}

func checkUpdateService(c *controlled, k *call, before, after *store.View) {
	r, reply := k.req.(*api.UpdateServiceRequest), k.reply.(*api.ChangeReply)
	was, is := before.Service(reply.Id), after.Service(reply.Id)
	if was == nil || is == nil || was.Meta.Version != r.Version || is.Meta.Version != reply.Version || reply.Version > r.Version+1 ||
		is.Spec.Replicas != r.Spec.Replicas || is.Spec.Task.Force != r.Spec.Task.Force || is.Spec.Name != was.Spec.Name {
		c.t.Fatalf("UpdateService(%v) = %v, and made %v", r, reply, is)
	}
}

func scaleService(c *controlled) proto.Message {
	replicas := []uint64{0, 1, 5, warden.ReplicasMax, warden.ReplicasMax + 1, 1<<64 - 1}
	return &api.ScaleServiceRequest{Reference: c.ref(api.Kind_KIND_SERVICE), Replicas: replicas[c.in.pick(len(replicas))]}
}

func checkScaleService(c *controlled, k *call, _, after *store.View) {
	if is := after.Service(k.reply.(*api.ChangeReply).Id); is.GetSpec().GetReplicas() != k.req.(*api.ScaleServiceRequest).Replicas {
		c.t.Fatalf("ScaleService(%v) made %v", k.req, is)
	}
}

func mayScaleService(v *store.View, req proto.Message) bool {
	_, found := meant(v, api.Kind_KIND_SERVICE, req)
	return found && req.(*api.ScaleServiceRequest).Replicas <= warden.ReplicasMax
}

func createToken(c *controlled) proto.Message {
	r := &api.CreateTokenRequest{Role: api.Role(1 + c.in.pick(2)), Rotate: c.in.pick(3) == 2, UsesMax: uint64(c.in.pick(3)), Zone: c.zone()}
	switch c.in.pick(8) {
	case 0:
		r.Role = api.Role(3 * c.in.pick(2))
	case 1:
		r.TtlNs = []int64{int64(time.Hour), -1, 1, 1 << 62}[c.in.pick(4)]
	case 2:
		r.Hostname = []string{"n0", "a b"}[c.in.pick(2)]
	case 3:
		r.Cidr = []string{"10.0.0.0/8", "10.0.0.1/8", "x"}[c.in.pick(3)]
	}
	return r
}

func checkCreateToken(c *controlled, k *call, before, after *store.View) {
	r, reply := k.req.(*api.CreateTokenRequest), k.reply.(*api.CreateTokenReply)
	token, is := c.tokenOf(), after.Token(reply.Id)
	key, root := token.Key(), sha256.Sum256(after.Cluster().RootCert)
	if before.Token(reply.Id) != nil || token.ID != reply.Id || !bytes.Equal(is.GetKey(), key[:]) || token.RootHash != root ||
		is.Role != r.Role || is.Zone != r.Zone || is.UsesMax != r.UsesMax || is.Uses != 0 || is.RevokedNs != 0 || is.Cidr != r.Cidr || is.Hostname != r.Hostname {
		c.t.Fatalf("CreateToken(%v) = %v, and made %v", r, reply, is)
	}
	for _, o := range after.Tokens() {
		if r.Rotate && o.Id != reply.Id && o.Role == r.Role && o.RevokedNs == 0 && (o.UsesMax == 0 || o.Uses < o.UsesMax) {
			c.t.Fatalf("CreateToken(%v) left token %s", r, o.Id)
		}
		if was := before.Token(o.Id); was != nil && was.RevokedNs == 0 && o.RevokedNs != 0 && !r.Rotate {
			c.t.Fatalf("CreateToken(%v) revoked token %s", r, o.Id)
		}
	}
}

func checkRevokeToken(c *controlled, k *call, _, after *store.View) {
	if t := after.Token(k.reply.(*api.ChangeReply).Id); t.GetRevokedNs() == 0 {
		c.t.Fatalf("RevokeToken(%v) left %s", k.req, t.GetId())
	}
}

func updateNode(c *controlled) proto.Message {
	r := &api.UpdateNodeRequest{Reference: c.ref(api.Kind_KIND_NODE)}
	switch c.in.pick(8) {
	case 0:
		r.Availability = api.Availability(c.in.pick(5))
	case 1:
		r.LabelsAdd = map[string]string{c.name(): "x"}
	case 2:
		r.LabelsRemove = []string{c.name(), "a"}
	case 3:
		r.Zone = c.zone()
	case 4:
		r.Role, r.Zone = api.Role(c.in.pick(4)), c.zone()
	default:
		r.Role = api.Role(1 + c.in.pick(2))
	}
	return r
}

func checkUpdateNode(c *controlled, k *call, _, after *store.View) {
	r, n := k.req.(*api.UpdateNodeRequest), after.Node(k.reply.(*api.ChangeReply).Id)
	if n == nil || r.Zone != "" && n.Zone != r.Zone || r.Role != 0 && n.DesiredRole != r.Role ||
		r.Availability != 0 && n.Availability != r.Availability {
		c.t.Fatalf("UpdateNode(%v) made %v", r, n)
	}
}

func removeNode(c *controlled) proto.Message {
	return &api.RemoveNodeRequest{Reference: c.ref(api.Kind_KIND_NODE), Force: c.in.pick(2) == 1, Compromised: c.in.pick(4) == 3}
}

func checkRemoveNode(c *controlled, k *call, before, after *store.View) {
	reply := k.reply.(*api.RemoveNodeReply)
	n, tomb := before.Node(reply.Id), after.Tombstone(reply.Id)
	if n == nil || after.Node(reply.Id) != nil || tomb == nil || len(after.NodesByKey(n.KeyHash)) > 0 || after.TombstoneByKey(n.KeyHash) == nil {
		c.t.Fatalf("RemoveNode(%v) = %v", k.req, reply)
	}
	for _, t := range after.Tokens() {
		if n.WasManager && t.RevokedNs == 0 && (t.UsesMax == 0 || t.Uses < t.UsesMax) {
			c.t.Fatalf("RemoveNode(%v) of a manager left token %s", k.req, t.Id)
		}
	}
	if n.WasManager && !reply.AllSecrets {
		c.t.Fatalf("RemoveNode(%v) of a manager = %v", k.req, reply)
	}
	if n.WasManager || k.req.(*api.RemoveNodeRequest).Compromised {
		for _, e := range before.ExposuresByNode(n.Id) {
			if !slices.ContainsFunc(reply.Exposures, func(o *api.Exposure) bool { return o.Id == e.Id }) && after.Secret(e.SecretId) != nil {
				c.t.Fatalf("RemoveNode(%v) says nothing of %v", k.req, e)
			}
		}
	}
}

// recipient returns the public half of some key, or what is none.
func (c *controlled) recipient() []byte {
	switch n := c.in.pick(8); n {
	case 0:
		return nil
	case 1:
		return make([]byte, 32)
	default:
		return commandHash(n)
	}
}

func updateCluster(c *controlled) proto.Message {
	r := &api.UpdateClusterRequest{LeafTtlNs: []int64{0, int64(warden.LeafTTLMin), int64(warden.LeafTTLMax), 0, 0, 1, -1, 1<<63 - 1}[c.in.pick(8)]}
	if n := c.in.pick(4); n < 3 {
		r.Autolock, r.UnlockRecipient = proto.Bool(n > 0), c.recipient()
	}
	return r
}

func rotateUnlockKey(c *controlled) proto.Message {
	return &api.RotateUnlockKeyRequest{UnlockRecipient: c.recipient()}
}

func rotateDEK(*controlled) proto.Message { return &api.RotateDEKRequest{} }

func checkRotateDEK(c *controlled, _ *call, before, after *store.View) {
	if after.Cluster().DekGeneration != before.Cluster().DekGeneration+1 {
		c.t.Fatal("RotateDEK made no other generation")
	}
}

func rotateIssuing(*controlled) proto.Message { return &api.RotateIssuingRequest{} }

func checkRotateIssuing(c *controlled, _ *call, before, after *store.View) {
	if after.Cluster().IssuingGeneration != before.Cluster().IssuingGeneration+1 {
		c.t.Fatal("RotateIssuing made no other generation")
	}
}

func list(c *controlled) proto.Message {
	r := &api.ListRequest{Kind: api.Kind(c.in.pick(12)), Local: c.in.pick(2) == 1}
	for range c.in.pick(3) {
		r.References = append(r.References, c.ref(r.Kind))
	}
	return r
}
