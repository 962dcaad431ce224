package history

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/anishathalye/porcupine"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/internal/testcluster"
	"warden/join"
	"warden/tokens"
)

// zoneState is a zone by its name.
type zoneState struct {
	Declared bool
	users    string // " 17 18 ", tags of what names it; no read sees it
}

// zoneModel: what names a zone comes by a bind, where the zone is declared, and goes by an unbind; until then the zone stays.
var zoneModel = func() porcupine.Model {
	m := model(zoneState{}, func(s zoneState, c call) (zoneState, uint64, warden.Code) {
		user := fmt.Sprintf(" %d ", c.Tag)
		switch {
		case c.Verb == "create" && s.Declared:
			return s, 0, warden.CodeExists
		case c.Verb == "create":
			return zoneState{Declared: true}, 0, ""
		case c.Verb == "unbind" && !strings.Contains(s.users, user), !s.Declared:
			return s, 0, warden.CodeNotFound
		case c.Verb == "rm" && s.users != "":
			return s, 0, warden.CodeInUse
		case c.Verb == "rm":
			return zoneState{}, 0, ""
		case c.Verb == "bind":
			s.users += user
			return s, 0, ""
		case c.Verb == "unbind":
			s.users = strings.Replace(s.users, user, "", 1)
			return s, 0, ""
		}
		panic(c.Verb)
	})
	step := m.Step
	m.Step = func(state, input, output any) (bool, any) {
		if s := state.(zoneState); input.(call).Verb == read {
			return output.(reply).State == any(zoneState{Declared: s.Declared}), s
		}
		return step(state, input, output)
	}
	return m
}()

// zoneUser is what names a zone: a secret, a service or a node.
type zoneUser struct {
	tag    uint64
	doubt  bool // whether it was made nobody knows: it may still be
	remove func(ctx context.Context, at *member) error
}

// zoneUsers is what names zones, by zone. Safe for concurrent use; its zero value is ready.
type zoneUsers struct {
	mu  sync.Mutex // guards all
	all map[string][]zoneUser
}

func (u *zoneUsers) add(zone string, user zoneUser) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.all == nil {
		u.all = map[string][]zoneUser{}
	}
	u.all[zone] = append(u.all[zone], user)
}

func (u *zoneUsers) drop(zone string, tag uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all[zone] = slices.DeleteFunc(u.all[zone], func(o zoneUser) bool { return o.tag == tag })
}

func (u *zoneUsers) of(zone string) []zoneUser {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.all[zone])
}

// zone makes a call on a zone that comes and goes, or on what names it.
func (c *client) zone(at *member) bool {
	zone := c.zones.pick(c.rand.IntN).name
	switch n := c.rand.IntN(100); {
	case n < 15:
		return c.readZones(at)
	case n < 25:
		_, sent := c.declare(at, zone)
		return sent
	case n < 40:
		_, sent := c.removeZone(at, zone)
		return sent
	case n < 70:
		return c.contend(at, zone)
	}
	users := c.users.of(zone)
	if len(users) == 0 {
		return true
	}
	_, sent := c.unbind(at, zone, users[c.rand.IntN(len(users))])
	return sent
}

// contend makes something that names the zone, while another manager is asked to remove it, and asks for that again where it is in use.
func (c *client) contend(at *member, zone string) bool {
	if _, sent := c.declare(at, zone); !sent {
		return false
	}
	other := c.reader()
	var removal sync.WaitGroup
	if c.rand.IntN(2) == 0 {
		elsewhere := c.managers[c.rand.IntN(len(c.managers))]
		removal.Go(func() { other.removeZone(elsewhere, zone) })
	}
	var sent bool
	if c.rand.IntN(3) == 0 {
		sent = c.settlers(at, zone)
	} else {
		_, sent = c.bind(at, zone, c.rand.IntN(2) == 0)
	}
	removal.Wait()
	if sent {
		c.removeZone(at, zone)
	}
	return sent
}

func (c *client) declare(at *member, zone string) (reply, bool) {
	return c.record("zone/"+zone, call{Verb: "create"}, patience, func(ctx context.Context) (uint64, any, error) {
		_, err := at.control.CreateZone(ctx, &api.CreateZoneRequest{Name: zone})
		return 0, nil, err
	})
}

func (c *client) removeZone(at *member, zone string) (reply, bool) {
	return c.record("zone/"+zone, call{Verb: "rm"}, patience, func(ctx context.Context) (uint64, any, error) {
		_, err := at.control.RemoveZone(ctx, &api.ReferenceRequest{Reference: zone})
		return 0, nil, err
	})
}

// bind makes a secret for the zone alone, or a service of it that runs nothing.
func (c *client) bind(at *member, zone string, secret bool) (reply, bool) {
	tag := c.zones.tag(zone)
	name := fmt.Sprintf("of-%s-%d", zone, tag)
	user := zoneUser{tag: tag, remove: func(ctx context.Context, at *member) error {
		_, err := at.control.RemoveService(ctx, &api.ReferenceRequest{Reference: name})
		return err
	}}
	if secret {
		user.remove = func(ctx context.Context, at *member) error {
			_, err := at.control.RemoveSecret(ctx, &api.ReferenceRequest{Reference: name})
			return err
		}
	}
	return c.bound(zone, user, func(ctx context.Context) (err error) {
		if secret {
			_, err = at.control.CreateSecret(ctx, &api.CreateSecretRequest{Name: name, Zones: []string{zone}, Data: c.value(name, tag)})
			return err
		}
		spec := &api.ServiceSpec{Name: name, Task: &api.TaskSpec{Image: "host", Command: []string{"true"}, Zone: zone}}
		_, err = at.control.CreateService(ctx, &api.CreateServiceRequest{Spec: spec})
		return err
	})
}

// bound writes a call down that makes something which names the zone. Where it may have been made, it can be removed from now on.
func (c *client) bound(zone string, user zoneUser, send func(ctx context.Context) error) (reply, bool) {
	out, sent := c.record("zone/"+zone, call{Verb: "bind", Tag: user.tag}, patience, func(ctx context.Context) (uint64, any, error) {
		return 0, nil, send(ctx)
	})
	if user.doubt = out.Unknown; sent && out.Code == "" {
		c.users.add(zone, user)
	}
	return out, sent
}

func (c *client) unbind(at *member, zone string, user zoneUser) (reply, bool) {
	out, sent := c.record("zone/"+zone, call{Verb: "unbind", Tag: user.tag}, patience, func(ctx context.Context) (uint64, any, error) {
		return 0, nil, user.remove(ctx, at)
	})
	if sent && !out.Unknown && (out.Code == "" || out.Code == warden.CodeNotFound && !user.doubt) {
		c.users.drop(zone, user.tag)
	}
	return out, sent
}

// settlers mints a token for the zone, and a node joins by it: a token keeps no zone, so that it may be gone by then.
func (c *client) settlers(at *member, zone string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	minted, err := at.control.CreateToken(ctx, &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER, UsesMax: 1, Zone: zone})
	if err != nil {
		_, sent := c.outcome(err)
		return sent
	}
	parts := strings.Split(minted.Token, "-")
	c.plant("the secret of a token", parts[len(parts)-2])
	token, err := tokens.Parse(minted.Token)
	if err != nil {
		c.violated("I11", "a token that was minted does not parse: %v", err)
		return true
	}
	key, err := ca.NewKey()
	if err != nil {
		c.violated("I11", "making a key: %v", err)
		return true
	}
	tag := c.zones.tag(zone)
	hostname := fmt.Sprintf("settler-%s-%d", zone, tag)
	user := zoneUser{tag: tag, remove: func(ctx context.Context, at *member) error {
		_, err := at.control.RemoveNode(ctx, &api.RemoveNodeRequest{Reference: hostname, Force: true})
		return err
	}}
	_, sent := c.bound(zone, user, func(ctx context.Context) error {
		grant, err := join.Join(ctx, at.Address(), token, join.Request{Key: key, Hostname: hostname}, dialFrom(c.members[c.rand.IntN(len(c.members))]))
		switch code := warden.CodeOf(err); {
		case code == "" && (grant.Zone != zone || grant.Role != api.Role_ROLE_WORKER):
			c.violated("I1", "a token for workers of zone %s let node %s in as %s of zone %s", zone, grant.NodeId, grant.Role.Word(), grant.Zone)
		case code != "" && code != warden.CodeNotFound: // also refusals for what others did: a purge, a rotation of the issuing CA
			return warden.Errorf(warden.CodeTimeout, "joining", "%v", err)
		}
		return err
	})
	return sent
}

func (c *client) readZones(at *member) bool {
	return readAll(c, at, api.Kind_KIND_ZONE, "zone/", nil, c.zones, func(reply *api.ListReply) map[string]any {
		states := map[string]any{}
		for _, o := range reply.Objects {
			states[o.GetZone().GetName()] = zoneState{Declared: true}
		}
		return states
	}, zoneState{})
}

// wantZonesDeclared: what names a zone in one state names one that is declared. Two lists of one index are of one state.
func (r *run) wantZonesDeclared(ctx context.Context, at *member) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, kind := range []api.Kind{api.Kind_KIND_NODE, api.Kind_KIND_SECRET, api.Kind_KIND_SERVICE} {
		users, err := at.control.List(ctx, &api.ListRequest{Kind: kind, Local: true})
		if err != nil {
			return
		}
		zones, err := at.control.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_ZONE, Local: true})
		if err != nil || zones.Index != users.Index {
			continue
		}
		declared := map[string]bool{}
		for _, o := range zones.Objects {
			declared[o.GetZone().Name] = true
		}
		for _, o := range users.Objects {
			named := o.GetSecret().GetZones()
			switch kind {
			case api.Kind_KIND_NODE:
				named = []string{o.GetNode().Zone}
			case api.Kind_KIND_SERVICE:
				named = []string{o.GetService().Spec.Task.Zone}
			}
			for _, zone := range named {
				if !declared[zone] {
					r.violated("zones", "%s shows a %s of zone %s, which is not declared", at.Name, strings.ToLower(strings.TrimPrefix(kind.String(), "KIND_")), zone)
				}
			}
		}
	}
}

// removeZones empties and removes all zones that came and went, after which nothing may name them.
func (c *client) removeZones() {
	for _, p := range c.zones.ever() {
		for _, user := range c.users.of(p.name) {
			c.sure("zone/"+p.name, call{Verb: "unbind", Tag: user.tag}, user.remove, warden.CodeNotFound)
		}
		c.sure("zone/"+p.name, call{Verb: "rm"}, func(ctx context.Context, at *member) error {
			_, err := at.control.RemoveZone(ctx, &api.ReferenceRequest{Reference: p.name})
			return err
		}, warden.CodeNotFound)
	}
}

// moved has a worker in a zone of its own for a while: it loses the secrets of the old zone, gets one of the new, and the zone stays
// while anything is there.
func (c *client) moved(m *member) {
	n, home := c.nodeOf(m), m.zones.now()[0]
	zone := c.zones.more().name
	secret, service := c.secrets.more(zone), c.services.more(zone)
	move := func(to string) func(ctx context.Context, at *member) error {
		return func(ctx context.Context, at *member) error {
			_, err := at.control.UpdateNode(ctx, &api.UpdateNodeRequest{Reference: n.id, Zone: to})
			return err
		}
	}
	arrived := func(to, want string) {
		testcluster.Await(c.t, limit, func() error {
			c.setAvailability(c.up(), n, api.Availability_AVAILABILITY_ACTIVE)
			ctx, cancel := context.WithTimeout(c.t.Context(), patience)
			defer cancel()
			info, err := m.local.Info(ctx, &api.InfoRequest{})
			if err != nil || info.Zone != to {
				return fmt.Errorf("%s was moved to zone %s and is in %q: %v", m.Name, to, info.GetZone(), err)
			}
			got := 0
			for _, files := range secretsOn(m) {
				for _, f := range files {
					name, _, _ := c.valueOf(f.value)
					if got++; to != home && name != secret.name {
						return fmt.Errorf("I6: %s was moved to zone %s and has secret %s", m.Name, to, name)
					}
				}
			}
			if want != "" && got == 0 {
				return fmt.Errorf("%s was moved to zone %s and does not have secret %s", m.Name, to, want)
			}
			return nil
		})
	}

	c.sure("zone/"+zone, call{Verb: "create"}, func(ctx context.Context, at *member) error {
		_, err := at.control.CreateZone(ctx, &api.CreateZoneRequest{Name: zone})
		return err
	}, warden.CodeExists)
	n.zones.set(append(n.zones.now(), zone)...)
	m.zones.set(home, zone)
	tag := c.zones.tag(zone)
	c.sure("zone/"+zone, call{Verb: "bind", Tag: tag}, move(zone))
	value := c.secrets.tag(secret.name)
	c.sure("secret/"+secret.name, call{Verb: "create", Tag: value}, func(ctx context.Context, at *member) error {
		_, err := at.control.CreateSecret(ctx, &api.CreateSecretRequest{Name: secret.name, Zones: secret.zones, Data: c.value(secret.name, value)})
		return err
	}, warden.CodeExists)
	c.sure("service/"+service.name, call{Verb: "create", Number: 1}, func(ctx context.Context, at *member) error {
		task := &api.TaskSpec{Image: "host", Command: []string{"sleep", "31536000"}, Zone: zone, Secrets: []*api.SecretReference{{SecretName: secret.name, Target: secret.name + ".0"}}}
		_, err := at.control.CreateService(ctx, &api.CreateServiceRequest{Spec: &api.ServiceSpec{Name: service.name, Replicas: 1, Task: task}})
		return err
	}, warden.CodeExists)
	arrived(zone, secret.name)
	m.zones.set(zone)
	c.removeZone(c.up(), zone)
	c.sure("service/"+service.name, call{Verb: "rm"}, func(ctx context.Context, at *member) error {
		_, err := at.control.RemoveService(ctx, &api.ReferenceRequest{Reference: service.name})
		return err
	}, warden.CodeNotFound)
	c.sure("secret/"+secret.name, call{Verb: "rm"}, func(ctx context.Context, at *member) error {
		_, err := at.control.RemoveSecret(ctx, &api.ReferenceRequest{Reference: secret.name})
		return err
	}, warden.CodeNotFound)
	c.removeZone(c.up(), zone)
	m.zones.set(zone, home)
	c.sure("zone/"+zone, call{Verb: "unbind", Tag: tag}, move(home))
	arrived(home, "")
	m.zones.set(home)
}

// sure makes a call until it was done, or refused in a way that is fine because it was done before.
func (c *client) sure(object string, what call, send func(ctx context.Context, at *member) error, fine ...warden.Code) {
	testcluster.Await(c.t, limit, func() error {
		at := c.up()
		out, sent := c.record(object, what, patience, func(ctx context.Context) (uint64, any, error) { return 0, nil, send(ctx, at) })
		if !sent || out.Unknown || out.Code != "" && !slices.Contains(fine, out.Code) {
			return fmt.Errorf("%s %v: %v", object, what, out)
		}
		return nil
	})
}

// whereabouts are the zones that a host or node may be in at the moment. Safe for concurrent use.
type whereabouts struct{ all atomic.Pointer[[]string] }

func in(zones ...string) *whereabouts {
	w := new(whereabouts)
	w.set(zones...)
	return w
}

func (w *whereabouts) set(zones ...string) { w.all.Store(&zones) }
func (w *whereabouts) now() []string       { return slices.Clone(*w.all.Load()) }

func (w *whereabouts) has(zone string) bool { return slices.Contains(*w.all.Load(), zone) }
