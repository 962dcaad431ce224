package store_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// Random commands over few names, so that they meet. What is applied to one state is applied to a second, and to a third that
// is restored from a snapshot now and then; the three must stay equal, and the laws of the records hold after each command.
func TestLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := &generator{T: t, now: 1_700_000_000_000_000_000}
		a, b, c := store.NewState(), store.NewState(), store.NewState()
		for index := uint64(1); index <= uint64(rapid.IntRange(1, 150).Draw(t, "commands")); index++ {
			cmd := g.command(a.View(), index)
			data, err := proto.MarshalOptions{Deterministic: true}.Marshal(cmd)
			if err != nil {
				t.Fatal(err)
			}
			ra, ka := a.Apply(index, data)
			rb, kb := b.Apply(index, data)
			rc, kc := c.Apply(index, data)
			if !proto.Equal(ra, rb) || !proto.Equal(ra, rc) || !slices.Equal(ka, kb) || !slices.Equal(ka, kc) {
				t.Fatalf("%v gave %v, %v and %v", cmd, ra, rb, rc)
			}
			g.applied(ra)
			laws(t, a.View())
			if rapid.IntRange(0, 9).Draw(t, "restore") == 0 {
				c = restored(t, b)
			}
		}
		if x, y, z := snapshotOf(t, a), snapshotOf(t, b), snapshotOf(t, c); !bytes.Equal(x, y) || !bytes.Equal(x, z) {
			t.Fatal("the states differ")
		}
	})
}

func snapshotOf(t tb, s *store.State) []byte {
	var b bytes.Buffer
	if err := s.View().Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func restored(t tb, s *store.State) *store.State {
	r, err := store.ReadState(bytes.NewReader(snapshotOf(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// laws checks what holds after any sequence of commands, of this generator also what its small world bounds.
func laws(t *rapid.T, v *store.View) {
	storetest.CheckLaws(t, v)
	for _, n := range v.Nodes() {
		var cpus int64
		for _, task := range v.TasksByNode(n.Id) {
			if task.Holds() {
				cpus += task.Spec.Resources.ReserveNanoCpus
			}
		}
		if cpus > 4e9 { // what each node had at the time, at most
			t.Fatalf("node %s holds reservations of %d nano CPUs", n.Id, cpus)
		}
	}
	for _, s := range v.Secrets() {
		if v.SecretVersion(s.Id, s.CurrentVersion) == nil {
			t.Fatalf("secret %s has no current version", s.Id)
		}
	}
}

// generator draws commands that are mostly plausible. It counts what came of them.
type generator struct {
	*rapid.T
	now int64
}

func (g *generator) applied(r *api.Result) { g.Logf("%d: %s", r.Index, r.Code) }

func id(n int) string { return fmt.Sprintf("%025d", n) }

func hash(n int) []byte {
	h := sha256.Sum256(fmt.Append(nil, n))
	return h[:]
}

func (g *generator) pick(n int) int { return rapid.IntRange(0, n-1).Draw(g.T, "pick") }

func (g *generator) command(v *store.View, index uint64) *api.Command {
	g.now += int64(g.pick(3)-1) * 1e9
	c := &api.Command{Actor: &api.Actor{Kind: "system"}, RequestId: id(int(index) - g.pick(2)), TimeNs: g.now}
	if v.Cluster() == nil {
		for _, o := range storetest.Genesis(id(0), id(1)) {
			if n := o.GetPut().GetObject().GetNode(); n != nil {
				n.KeyHash = hash(0)
			}
			if z := o.GetPut().GetObject().GetZone(); z != nil {
				z.Id = id(0)
			}
			c.Operations = append(c.Operations, o)
		}
		return c
	}
	if index == 2 {
		c.RequestId, c.Operations = "prepared", g.prepared()
		return c
	}
	for range 1 + g.pick(4)/2 {
		c.Operations = append(c.Operations, g.operation(v)...)
	}
	return c
}

// prepared makes something of everything, so that random commands have something to meet.
func (g *generator) prepared() (ops []*api.Operation) {
	ops = append(ops, store.Put(&api.Zone{Id: id(1), Name: "pci"}, 0))
	for n, zone := range []string{"default", "pci"} {
		token := storetest.Token(api.Role_ROLE_WORKER)
		token.Id, token.Zone, token.Key, token.RootHash, token.ExpiresNs = fmt.Sprintf("%012d", n), zone, hash(n), hash(n), g.now+3600e9
		node := storetest.Node("h", token)
		node.Id, node.KeyHash, node.JoinKeyHash = id(n+2), hash(100+n), hash(100+n)
		secret := &api.Secret{Id: id(n), Name: fmt.Sprint("s", n), CurrentVersion: 1, Zones: []string{zone}}
		service := storetest.Service(fmt.Sprint("svc", n), zone, storetest.Reference(secret))
		service.Id = id(n)
		service.Spec.Task.Resources.ReserveNanoCpus = 2e9
		token.UsesMax = 3
		ops = append(ops, store.Put(token, 0))
		ops = append(ops, storetest.Join(node)...)
		ops = append(ops, store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0), store.Put(service, 0))
	}
	return ops
}

// place puts the task on a node, mostly one of its zone.
func (g *generator) place(v *store.View, t *api.Task) []*api.Operation {
	nodes := v.Nodes()
	node := nodes[g.pick(len(nodes))]
	if g.pick(4) > 0 {
		for _, n := range nodes {
			if n.Zone == t.Spec.Zone && n.Availability == api.Availability_AVAILABILITY_ACTIVE {
				node = n
			}
		}
	}
	return []*api.Operation{store.Put(storetest.Placed(t, node.Id), t.Meta.Version)}
}

// change puts a changed copy of the record with the ID, or makes it.
func change[T store.Record](g *generator, old T, exists bool, fresh func() T, alter func(T)) []*api.Operation {
	if !exists {
		return []*api.Operation{store.Put(fresh(), 0)}
	}
	next := api.Clone(old)
	alter(next)
	expect := old.GetMeta().GetVersion()
	if g.pick(10) == 0 {
		expect++
	}
	return []*api.Operation{store.Put(next, expect)}
}

func (g *generator) operation(v *store.View) []*api.Operation {
	zones := []string{"default", "pci", "dmz"}
	zone := zones[g.pick(3)]
	n := g.pick(5)
	switch g.pick(19) {
	case 0:
		if z := v.Zone(zone); z != nil {
			return []*api.Operation{store.Delete(z)}
		}
		return []*api.Operation{store.Put(&api.Zone{Id: id(slices.Index(zones, zone)), Name: zone}, 0)}
	case 1:
		tid := fmt.Sprintf("%012d", n)
		tok := v.Token(tid)
		return change(g, tok, tok != nil, func() *api.Token {
			return &api.Token{Id: tid, Role: api.Role(1 + g.pick(2)), Zone: zone, ExpiresNs: g.now + 20e9, UsesMax: uint64(g.pick(3)), Key: hash(n), RootHash: hash(n)}
		}, func(t *api.Token) { t.RevokedNs = g.now })
	case 2, 3, 4:
		node := v.Node(id(n + 2))
		tid := fmt.Sprintf("%012d", g.pick(5))
		role, at := api.Role_ROLE_WORKER, "default"
		if t := v.Token(tid); t != nil {
			role, at = t.Role, t.Zone
		}
		ops := change(g, node, node != nil, func() *api.Node {
			return &api.Node{Id: id(n + 2), Hostname: "h", Role: role, DesiredRole: role, Zone: at, Availability: api.Availability_AVAILABILITY_ACTIVE,
				KeyHash: hash(g.pick(20)), JoinKeyHash: hash(g.pick(20)), TokenId: tid, Description: &api.NodeDescription{NanoCpus: 4e9}}
		}, func(n *api.Node) {
			switch g.pick(4) {
			case 0:
				n.Zone = zone
			case 1:
				n.DesiredRole = api.Role(1 + g.pick(2))
			case 2:
				n.NextKeyHash = hash(g.pick(20))
			case 3:
				n.KeyHash = n.NextKeyHash
			}
		})
		if node == nil {
			ops = append([]*api.Operation{storetest.UseToken(tid)}, ops...)
		}
		return ops
	case 5:
		node := v.Node(id(n + 1))
		if node == nil || g.pick(4) > 0 {
			return nil
		}
		return []*api.Operation{store.Put(&api.Tombstone{Id: node.Id, Role: node.Role, Zone: node.Zone}, 0), store.Delete(node)}
	case 6, 7:
		s := v.Secret(id(n))
		if s != nil && g.pick(6) == 0 {
			return []*api.Operation{store.Delete(s)}
		}
		fresh := &api.Secret{Id: id(n), Name: fmt.Sprint("s", n), CurrentVersion: 1}
		if g.pick(2) == 0 {
			fresh.Zones = []string{zone}
		}
		ops := change(g, s, s != nil, func() *api.Secret { return fresh }, func(s *api.Secret) { s.Zones = []string{zone} })
		if s == nil {
			ops = append(ops, store.Put(storetest.SecretVersion(fresh, 1), 0))
		}
		return ops
	case 8:
		s := v.Service(id(n))
		if s != nil && g.pick(6) == 0 {
			return []*api.Operation{store.Delete(s)}
		}
		return change(g, s, s != nil, func() *api.Service { return g.service(v, n, zone) }, func(s *api.Service) { s.Spec.Task.Zone = zone })
	case 9, 10, 13, 14, 15, 16:
		task := v.Task(id(n))
		if task == nil {
			s := v.Service(id(g.pick(3)))
			if s == nil {
				return nil
			}
			fresh := storetest.Task(s, 1)
			fresh.Id = id(n)
			for _, r := range fresh.Spec.Secrets {
				if r.Version == 0 {
					r.Version = max(1, v.Secret(r.SecretId).CurrentVersion-uint64(g.pick(2)))
				}
			}
			return []*api.Operation{store.Put(fresh, 0)}
		}
		switch g.pick(8) {
		case 0:
			return []*api.Operation{store.Delete(task)}
		case 1:
			return change(g, task, true, nil, func(t *api.Task) { t.DesiredState = api.TaskState_TASK_SHUTDOWN })
		}
		return g.place(v, task)
	case 11:
		if task := v.Task(id(n)); task != nil {
			states := []api.TaskState{api.TaskState_TASK_RUNNING, api.TaskState_TASK_PREPARING, api.TaskState_TASK_FAILED, 77}
			return []*api.Operation{storetest.Report(task, states[g.pick(len(states))])}
		}
		return nil
	case 17, 18:
		secrets := v.Secrets()
		if len(secrets) == 0 {
			return nil
		}
		s := secrets[g.pick(len(secrets))]
		if versions := v.SecretVersions(s.Id); g.pick(2) == 0 { // one goes, mostly refused
			return []*api.Operation{store.Delete(versions[g.pick(len(versions))])}
		}
		next := api.Clone(s)
		next.CurrentVersion++
		return []*api.Operation{store.Put(next, s.Meta.Version), store.Put(storetest.SecretVersion(next, next.CurrentVersion), 0)}
	}
	return []*api.Operation{{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: id(n + 1),
		Description: &api.NodeDescription{NanoCpus: int64(g.pick(5)-1) * 1e9}, Ip: "10.0.0.1"}}}}
}

func (g *generator) service(v *store.View, n int, zone string) *api.Service {
	s := storetest.Service(fmt.Sprint("svc", g.pick(5)), zone)
	s.Id = id(n)
	s.Spec.Task.Resources.ReserveNanoCpus = int64(g.pick(4)) * 1e9
	if secret := v.Secret(id(g.pick(5))); secret != nil {
		r := storetest.Reference(secret)
		r.Version = uint64(g.pick(2)) // pinned, or following
		s.Spec.Task.Secrets = []*api.SecretReference{r}
	}
	return s
}

// The generator must reach what the laws speak of, or they say nothing.
func TestLawsAreReached(t *testing.T) {
	reached := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		g := &generator{T: t, now: 1_700_000_000_000_000_000}
		s := store.NewState()
		for index := uint64(1); index <= 60; index++ {
			data, err := proto.Marshal(g.command(s.View(), index))
			if err != nil {
				t.Fatal(err)
			}
			r, _ := s.Apply(index, data)
			reached["code "+r.Code]++
		}
		v := s.View()
		reached["nodes"] += len(v.Nodes()) - 1
		reached["tombstones"] += len(v.Tombstones())
		reached["exposures"] += len(v.Exposures())
		for _, s := range v.Secrets() {
			if s.CurrentVersion > 1 {
				reached["rotated"]++
			}
			if len(v.SecretVersions(s.Id)) < int(s.CurrentVersion) {
				reached["versions removed"]++
			}
		}
		for _, t := range v.Tasks() {
			if t.NodeId != "" {
				reached["placed"]++
			}
		}
	})
	for _, want := range []string{"nodes", "tombstones", "exposures", "placed", "rotated", "versions removed", "code ", "code " + string(warden.CodeConflict),
		"code " + string(warden.CodeWrongZone), "code " + string(warden.CodeInUse), "code " + string(warden.CodeNoFit)} {
		if reached[want] == 0 {
			t.Errorf("never reached: %s (%v)", want, reached)
		}
	}
	t.Log(reached)
}
