package history

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/internal/testcluster"
	"warden/test/bed"
)

// file is one secret as a task has it.
type file struct{ target, value string }

// secretsOn returns the secrets that processes of a host can see, by process: a mount of them shows nowhere else.
func secretsOn(m *member) map[string][]file {
	all := map[string][]file{}
	dirs, _ := filepath.Glob(filepath.Join(m.Root(), "proc/[0-9]*/root"+warden.SecretsDir))
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // it has just ended
		}
		for _, e := range entries {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err == nil {
				all[dir] = append(all[dir], file{e.Name(), string(b)})
			}
		}
	}
	return all
}

// valueOf says of which secret a value is, and which call wrote it.
func (r *run) valueOf(value string) (name string, tag uint64, ok bool) {
	parts := strings.SplitN(value, "/", 4)
	if len(parts) < 4 || parts[0] != r.canary {
		return "", 0, false
	}
	tag, err := strconv.ParseUint(parts[2], 10, 64)
	return parts[1], tag, err == nil && value == string(r.value(parts[1], tag))
}

// observe looks again and again, until ctx ends, at what must hold in each state.
func (r *run) observe(ctx context.Context) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, m := range r.members {
			r.wantOnlySecretsOfZone(m)
			r.wantCleanProcesses(m)
			r.wantNoPorts(m)
		}
		r.wantSoundReplica(ctx, r.managers[n%len(r.managers)])
		r.wantZonesDeclared(ctx, r.managers[n%len(r.managers)])
	}
}

// wantOnlySecretsOfZone: what tasks of a host have are values that somebody wrote, whole, of secrets that may enter its zone (I6).
func (r *run) wantOnlySecretsOfZone(m *member) {
	zones := m.zones.now() // and then those after it: it may be moved meanwhile
	seen := secretsOn(m)
	zones = append(zones, m.zones.now()...)
	places := map[string]place{}
	for _, p := range r.secrets.ever() { // asked last: what a task has was made before
		places[p.name] = p
	}
	for _, files := range seen {
		for _, f := range files {
			name, _, ok := r.valueOf(f.value)
			p, known := places[name]
			switch {
			case !ok || !known:
				r.violated("I7", "a task on %s has as %s what nobody wrote, %d bytes", m.Name, f.target, len(f.value))
			case !slices.ContainsFunc(zones, p.mayEnter):
				r.violated("I6", "a task on %s, of zone %v, has secret %s of %v", m.Name, zones, name, p.zones)
			case !strings.HasPrefix(f.target, name+"."):
				r.violated("I7", "a task on %s has secret %s as %s", m.Name, name, f.target)
			}
		}
	}
}

// wantCleanProcesses: nothing secret is in an argument or in the environment of a process (I10).
func (r *run) wantCleanProcesses(m *member) {
	for _, what := range []string{"cmdline", "environ"} {
		found, _ := filepath.Glob(filepath.Join(m.Root(), "proc/[0-9]*", what))
		for _, path := range found {
			if b, err := os.ReadFile(path); err == nil {
				r.wantClean(b, "the "+what+" of a process on "+m.Name)
			}
		}
	}
}

// wantNoPorts: a worker opens no TCP port (I5). One that is promoted may.
func (r *run) wantNoPorts(m *member) {
	if !slices.Contains(r.workers[1:], m) {
		return
	}
	for _, table := range []string{"tcp", "tcp6"} {
		b, _ := os.ReadFile(strings.TrimSuffix(m.Root(), "root") + "net/" + table)
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" {
				r.violated("I5", "worker %s listens at %s", m.Name, f[1])
			}
		}
	}
}

// wantSoundReplica: what one manager's replica shows at one moment obeys I1 (uses of tokens, zones), I6 (placements) and has each name
// once. Later lists are at least as new as earlier ones while one daemon runs, which their indexes say.
func (r *run) wantSoundReplica(ctx context.Context, m *member) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	lists := map[api.Kind]*api.ListReply{}
	index := uint64(0)
	for _, kind := range []api.Kind{api.Kind_KIND_NODE, api.Kind_KIND_TOKEN, api.Kind_KIND_TASK, api.Kind_KIND_SECRET, api.Kind_KIND_SERVICE} {
		reply, err := m.control.List(ctx, &api.ListRequest{Kind: kind, Local: true})
		if err != nil || reply.Index < index {
			return
		}
		lists[kind], index = reply, reply.Index
	}
	zonesOf := map[string]*whereabouts{}
	for _, n := range r.nodes.ever() {
		zonesOf[n.id] = n.zones
	}
	joined := map[string]uint64{}
	for _, o := range lists[api.Kind_KIND_NODE].Objects {
		n := o.GetNode()
		joined[n.TokenId]++
		if zones, ok := zonesOf[n.Id]; ok && !zones.has(n.Zone) {
			r.violated("I1", "node %s joined or was moved into %v and is in %s", n.Id, zones.now(), n.Zone)
		}
	}
	for _, o := range lists[api.Kind_KIND_TOKEN].Objects {
		t := o.GetToken()
		if t.UsesMax > 0 && (t.Uses > t.UsesMax || joined[t.Id] > t.UsesMax) || joined[t.Id] > t.Uses {
			r.violated("I1", "token %s for %d nodes shows %d uses, %d nodes joined by it", t.Id, t.UsesMax, t.Uses, joined[t.Id])
		}
		if len(t.Key) > 0 {
			r.violated("I10", "a list shows the key of token %s", t.Id)
		}
	}
	places := map[string]place{}
	for _, p := range r.secrets.ever() {
		places[p.name] = p
	}
	for _, o := range lists[api.Kind_KIND_TASK].Objects {
		t := o.GetTask()
		if zones, ok := zonesOf[t.NodeId]; ok && !zones.has(t.Spec.Zone) {
			r.violated("I6", "task %s of zone %s is on node %s of %v", t.Id, t.Spec.Zone, t.NodeId, zones.now())
		}
		for _, s := range t.Spec.Secrets {
			if p, ok := places[s.SecretName]; ok && !p.mayEnter(t.Spec.Zone) {
				r.violated("I6", "task %s of zone %s has secret %s of %v", t.Id, t.Spec.Zone, s.SecretName, p.zones)
			}
		}
	}
	names := map[string]bool{}
	for _, kind := range []api.Kind{api.Kind_KIND_SECRET, api.Kind_KIND_SERVICE} {
		for _, o := range lists[kind].Objects {
			name := o.GetSecret().GetName() + o.GetService().GetSpec().GetName()
			if names[name] {
				r.violated("names", "two objects are called %s", name)
			}
			names[name] = true
		}
	}
}

// wantClean wants nothing that was planted in b.
func (r *run) wantClean(b []byte, where string) {
	for _, what := range r.planted().in(b) {
		r.violated("I10", "%s is in %s", what, where)
	}
}

// needles finds values of at least three bytes, in one pass however many there are.
type needles struct {
	values   map[string]string   // what each is
	byPrefix map[uint32][]string // by their first three bytes
	has      []uint64            // one bit for each such prefix
}

func newNeedles(values map[string]string) *needles {
	n := &needles{values, map[uint32][]string{}, make([]uint64, 1<<24/64)}
	for value := range values {
		p := uint32(value[0])<<16 | uint32(value[1])<<8 | uint32(value[2])
		n.byPrefix[p] = append(n.byPrefix[p], value)
		n.has[p/64] |= 1 << (p % 64)
	}
	return n
}

// in returns what is in b. It looks at each byte of all disks, which the race detector would make ten times as long.
//
//go:norace
func (n *needles) in(b []byte) (found []string) {
	p := uint32(0)
	for i, c := range b {
		p = (p<<8 | uint32(c)) & (1<<24 - 1)
		if i < 2 || n.has[p/64]&(1<<(p%64)) == 0 {
			continue
		}
		for _, value := range n.byPrefix[p] {
			if bytes.HasPrefix(b[i-2:], []byte(value)) && !slices.Contains(found, n.values[value]) {
				found = append(found, n.values[value])
			}
		}
	}
	return found
}

// plantEncoded plants what the canary of secrets looks like in the usual encodings: base64 shows all but its edges, by where it begins.
func (r *run) plantEncoded() {
	r.plant("the value of a secret, in hex", hex.EncodeToString([]byte(r.canary)))
	for shift := range 3 {
		text := base64.RawStdEncoding.EncodeToString([]byte("..."[:shift] + r.canary))
		r.plant("the value of a secret, in base64", text[4:len(text)-4])
	}
}

// readEverything reads at each manager all that clients ever used: what was acknowledged is still there.
func (c *client) readEverything() {
	c.history.end()
	for _, at := range c.managers {
		for _, p := range c.secrets.ever() {
			c.must(func() bool { return c.readSecrets(at, p.name) })
		}
		for _, p := range c.services.ever() {
			c.must(func() bool { return c.readServices(at, p.name) })
		}
		for _, t := range c.tokens.ever() {
			c.must(func() bool { return c.readToken(at, t) })
		}
		for _, n := range c.nodes.ever() {
			c.must(func() bool { return c.readNodes(at, n) })
		}
		c.must(func() bool { return c.readZones(at) })
		c.must(func() bool { return c.readCluster(at) })
	}
}

// must repeats a read until it was recorded: the history has to have it.
func (c *client) must(read func() bool) {
	testcluster.Await(c.t, limit, func() error {
		before := c.history.total()
		if read(); c.history.total() == before {
			return errors.New("a read at the end gets no answer")
		}
		return nil
	})
}

// wantSameReplicas waits until all managers show the same state at one index, and wants them to.
func (r *run) wantSameReplicas() {
	kinds := []api.Kind{api.Kind_KIND_CLUSTER, api.Kind_KIND_NODE, api.Kind_KIND_TOMBSTONE, api.Kind_KIND_ZONE, api.Kind_KIND_TOKEN, api.Kind_KIND_SERVICE, api.Kind_KIND_TASK,
		api.Kind_KIND_SECRET, api.Kind_KIND_SECRET_VERSION, api.Kind_KIND_EXPOSURE}
	testcluster.Await(r.t, limit, func() error {
		var states [][]*api.ListReply
		var indexes []uint64
		for _, m := range r.managers {
			var state []*api.ListReply
			for _, kind := range kinds {
				reply, err := m.control.List(r.t.Context(), &api.ListRequest{Kind: kind, Local: true})
				if err != nil {
					return err
				}
				reply.Nodes = nil // what the leader knows in memory
				state, indexes = append(state, reply), append(indexes, reply.Index)
			}
			states = append(states, state)
		}
		if slices.Min(indexes) != slices.Max(indexes) {
			return fmt.Errorf("the state does not come to rest: indexes %v", indexes)
		}
		for i, state := range states[1:] {
			for k, reply := range state {
				if !proto.Equal(reply, states[0][k]) {
					r.violated("replicas", "%s and %s show different lists of %s at index %d:\n%.2000v\n%.2000v", r.managers[0].Name, r.managers[i+1].Name, kinds[k], indexes[0], states[0][k], reply)
				}
			}
		}
		return nil
	})
}

// wantSecretsOfTasks waits until on each host the processes see the secrets of the tasks that the state has running there, and no others.
func (r *run) wantSecretsOfTasks() {
	tags := func(at *member) (map[string]uint64, error) { // "secret ID@version": tag
		reply, err := at.control.List(r.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_SECRET})
		out := map[string]uint64{}
		for _, u := range reply.GetUses() {
			out[fmt.Sprintf("%s@%d", u.SecretId, u.Version)] = u.SizeBytes - valueBytes
		}
		return out, err
	}
	testcluster.Await(r.t, limit, func() error {
		at := r.managers[0]
		tagOf, err := tags(at)
		if err != nil {
			return err
		}
		services, err := at.control.List(r.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_SERVICE})
		if err != nil {
			return err
		}
		reply, err := at.control.List(r.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_TASK})
		if err != nil {
			return err
		}
		wanted, running := uint64(0), uint64(0)
		for _, o := range services.Objects {
			wanted += o.GetService().Spec.Replicas
		}
		want := map[string]map[file]bool{}
		for _, o := range reply.Objects {
			t := o.GetTask()
			if t.Status.State.Ended() {
				continue
			}
			if t.Status.State != api.TaskState_TASK_RUNNING || t.DesiredState != api.TaskState_TASK_RUNNING {
				return fmt.Errorf("task %s is %s, to be %s: %s", t.Id, t.Status.State.Word(), t.DesiredState.Word(), t.Status.Message)
			}
			running++
			for _, s := range t.Spec.Secrets {
				if want[t.NodeId] == nil {
					want[t.NodeId] = map[file]bool{}
				}
				tag := tagOf[fmt.Sprintf("%s@%d", s.SecretId, s.Version)]
				want[t.NodeId][file{s.Target, string(r.value(s.SecretName, tag))}] = true
			}
		}
		if wanted != running {
			return fmt.Errorf("%d tasks run, %d are wanted", running, wanted)
		}
		for _, m := range r.members {
			got := map[file]bool{}
			for _, files := range secretsOn(m) {
				for _, f := range files {
					got[f] = true
				}
			}
			if len(got) != len(want[m.id]) || !maps.Equal(got, want[m.id]) && len(got) > 0 {
				return fmt.Errorf("I6, I7: on %s processes see %s, its tasks have %s", m.Name, show(got), show(want[m.id]))
			}
		}
		return nil
	})
}

func show(files map[file]bool) []string {
	var out []string
	for f := range files {
		parts := strings.SplitN(f.value, "/", 4)
		out = append(out, f.target+" = "+strings.Join(parts[1:min(3, len(parts))], "/"))
	}
	slices.Sort(out)
	return out
}

// wantLocked: with autolock on, a manager that was killed opens with the present unlock key alone, and serves nothing before; its key
// file holds no key in clear (I9). All managers are killed at once: what was acknowledged is on their disks.
func (c *client) wantLocked() {
	on, off := true, false
	old, oldRecipient := c.newUnlockKey()
	id, recipient := c.newUnlockKey()
	for _, step := range []struct {
		what call
		send func(ctx context.Context, at *member) error
	}{
		{call{Verb: "off"}, func(ctx context.Context, at *member) error {
			_, err := at.control.UpdateCluster(ctx, &api.UpdateClusterRequest{Autolock: &off})
			return err
		}},
		{call{Verb: "on", Word: old}, func(ctx context.Context, at *member) error {
			_, err := at.control.UpdateCluster(ctx, &api.UpdateClusterRequest{Autolock: &on, UnlockRecipient: oldRecipient})
			return err
		}},
		{call{Verb: "rotate", Word: id}, func(ctx context.Context, at *member) error {
			_, err := at.control.RotateUnlockKey(ctx, &api.RotateUnlockKeyRequest{UnlockRecipient: recipient})
			return err
		}},
	} {
		testcluster.Await(c.t, limit, func() error {
			out, sent := c.record("cluster/lock", step.what, patience, func(ctx context.Context) (uint64, any, error) { return 0, nil, step.send(ctx, c.up()) })
			if !sent || out.Unknown || out.Code != "" && out.Code != warden.CodeExists {
				return fmt.Errorf("%v: %v", step.what, out)
			}
			return nil
		})
		if step.what.Word != "" {
			c.awaitSealed(step.what.Word)
		}
	}
	for _, m := range c.managers {
		m.Kill()
		m.isDown = true
		path := filepath.Join(m.State(), "identity/node.key")
		b, err := os.ReadFile(path)
		if err != nil {
			c.t.Fatal(err)
		}
		for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
			if strings.HasSuffix(block.Type, "PRIVATE KEY") && !strings.Contains(block.Type, "SEALED") && !strings.Contains(block.Type, "ENCRYPTED") {
				c.violated("I9", "%s holds a block %q while autolock is on", path, block.Type)
			}
		}
	}
	for _, m := range c.managers {
		c.wantAuthors(m)
		m.Start()
		m.isDown = false
		info := c.awaitAnswer(m)
		if info.State != "locked" || info.UnlockKeyId != id {
			c.violated("I9", "%s was killed while autolock was on under key %s, and is %q under %q", m.Name, id, info.State, info.UnlockKeyId)
			continue
		}
		ctx, cancel := context.WithTimeout(c.t.Context(), limit)
		if reply, err := m.control.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_SECRET, Local: true}); err == nil {
			c.violated("I9", "%s is locked and lists %d secrets", m.Name, len(reply.Objects))
		}
		c.mu.Lock()
		key := c.keys[old]
		c.mu.Unlock()
		if err := unlockWith(ctx, m, info, key); code(err) != warden.CodeWrongUnlock {
			c.violated("I9", "%s opens with the unlock key of before the rotation: %v", m.Name, err)
		}
		cancel()
	}
	for _, m := range c.managers {
		c.unlock(m)
	}
}

// awaitSealed waits until all managers are sealed under the unlock key.
func (r *run) awaitSealed(id string) {
	testcluster.Await(r.t, limit, func() error {
		reply, err := r.managers[0].control.List(r.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
		for i, n := range reply.GetNodes() {
			if reply.Objects[i].GetNode().Role == api.Role_ROLE_MANAGER && (n.LockState != "unlocked" || n.UnlockKeyId != id) {
				err = errors.Join(err, fmt.Errorf("%s is %s under %s, want %s", reply.Objects[i].GetNode().Hostname, n.LockState, n.UnlockKeyId, id))
			}
		}
		return err
	})
}

// wantGuestsServed: a manager talks to a guest that has joined; to one that was evicted it says that, at most, and hangs up (I4).
func (c *client) wantGuestsServed() {
	var live, dead []*guest
	for _, t := range c.tokens.ever() {
		for _, g := range t.guests {
			g.mu.Lock()
			switch {
			case g.grant != nil && g.gone:
				dead = append(dead, g)
			case g.grant != nil && !g.leaving:
				live = append(live, g)
			}
			g.mu.Unlock()
		}
	}
	from := c.workers[0].Host
	for _, g := range dead[max(0, len(dead)-3):] {
		root, err := x509.ParseCertificate(g.grant.Chain[len(g.grant.Chain)-1])
		if err != nil {
			c.t.Fatal(err)
		}
		for _, at := range c.managers {
			c.wantToldOnly(at, g.grant.NodeId, from, tls.Certificate{Certificate: g.grant.Chain, PrivateKey: g.key}, root)
		}
	}
	for _, s := range c.stolen {
		c.wantShut(s, c.managers...)
	}
	for _, g := range live[max(0, len(live)-1):] { // which proves that the above can fail; and a session ends with the eviction
		at := c.managers[c.rand.IntN(len(c.managers))]
		var s *session
		var ended <-chan struct{}
		var stop func()
		testcluster.Await(c.t, limit, func() (err error) {
			if s, ended, stop, err = g.open(from, at.Host); err != nil {
				err = fmt.Errorf("I4: node %s has joined, and %s lets it open no session: %w", g.grant.NodeId, at.Name, err)
			}
			return err
		})
		testcluster.Await(c.t, limit, func() error {
			if s.asked.Load() == 0 {
				return fmt.Errorf("%s does not ask node %s anything", at.Name, g.grant.NodeId)
			}
			return nil
		})
		all := c.nodes.ever()
		n := all[slices.IndexFunc(all, func(n *node) bool { return n.guest == g })]
		testcluster.Await(c.t, limit, func() error {
			if c.remove(c.up(), n); !n.isGone.Load() {
				return fmt.Errorf("node %s is not removed", n.id)
			}
			return nil
		})
		select {
		case <-ended:
		case <-time.After(warden.LeaseHold):
			c.violated("I4", "%s keeps the session of node %s beyond its eviction", at.Name, n.id)
		}
		stop()
	}
}

// wantNewLeaves waits until all hosts have a leaf of the present issuing CA, and managers present it: rotations come to an end, and what
// expired meanwhile was renewed.
func (c *client) wantNewLeaves() {
	testcluster.Await(c.t, limit, func() error {
		at := c.managers[0]
		cluster, err := at.control.List(c.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_CLUSTER})
		if err != nil {
			return err
		}
		nodes, err := at.control.List(c.t.Context(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
		if err != nil {
			return err
		}
		want := cluster.Objects[0].GetCluster()
		for _, o := range nodes.Objects {
			n := o.GetNode()
			i := slices.IndexFunc(c.members, func(m *member) bool { return m.id == n.Id })
			if i >= 0 && (n.LeafGeneration != want.IssuingGeneration || n.LeafNotAfterNs < time.Now().UnixNano()) {
				return fmt.Errorf("%s has a leaf of issuing CA %d until %s, want %d", n.Hostname, n.LeafGeneration, time.Unix(0, n.LeafNotAfterNs), want.IssuingGeneration)
			}
		}
		return nil
	})
}

// wantToldOnly: a manager asks a node that was removed nothing, and hangs up.
func (r *run) wantToldOnly(at *member, nodeID string, from *bed.Host, cert tls.Certificate, root *x509.Certificate) {
	s, ended, stop, err := openSession(from, at.Host, cert, root)
	if err != nil {
		return // refused in the handshake
	}
	select {
	case <-ended:
	case <-time.After(limit):
		r.violated("I4", "%s keeps a session with node %s, which was removed", at.Name, nodeID)
	}
	stop()
	if n := s.asked.Load(); n > 0 {
		r.violated("I4", "%s asks node %s, which was removed, what it is, %d times", at.Name, nodeID, n)
	}
}

// removeServices removes all services, and waits until nothing of their tasks is left on any host (I7).
func (c *client) removeServices() {
	for _, p := range c.services.ever() {
		testcluster.Await(c.t, limit, func() error {
			out, sent := c.record("service/"+p.name, call{Verb: "rm"}, patience, func(ctx context.Context) (uint64, any, error) {
				_, err := c.managers[0].control.RemoveService(ctx, &api.ReferenceRequest{Reference: p.name})
				return 0, nil, err
			})
			if !sent || out.Unknown {
				return fmt.Errorf("removing %s: %v", p.name, out)
			}
			return nil
		})
	}
	testcluster.Await(c.t, limit, func() error {
		for _, m := range c.members {
			if left := secretsOn(m); len(left) > 0 {
				return fmt.Errorf("I7: all services are removed, and on %s %d processes still have secrets", m.Name, len(left))
			}
			found, _ := filepath.Glob(filepath.Join(m.Root(), "proc/[0-9]*/cmdline"))
			for _, path := range found {
				if b, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(b), "sleep\x0031536000") {
					return fmt.Errorf("all services are removed, and on %s a task still runs: %s", m.Name, path)
				}
			}
		}
		return nil
	})
}

// wantNothingLeft searches, when all daemons have ended, every byte that is left: logs, disks, and all that is in memory as files (I8, I10),
// and for the keys of nodes elsewhere than where they belong (I3).
func (r *run) wantNothingLeft() {
	r.plantEncoded()
	for _, m := range r.members {
		own := filepath.Join(m.State(), "identity/node.key")
		b, err := os.ReadFile(own)
		if err != nil {
			r.t.Fatal(err)
		}
		for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
			if strings.HasSuffix(block.Type, "PRIVATE KEY") && len(block.Bytes) > 64 {
				r.plant("I3: the node key of "+m.Name, string(block.Bytes[len(block.Bytes)/2-24:len(block.Bytes)/2+24]))
			}
		}
	}
	searched := map[uint64]bool{} // devices: hosts show what the machine has mounted, too
	for _, m := range r.members {
		r.search(filepath.Dir(m.Log), m.Host)
		r.search(m.State(), m.Host)
		searched[device(m.State())] = true
		mounts, err := os.ReadFile(strings.TrimSuffix(m.Root(), "root") + "mounts")
		if err != nil {
			r.t.Fatal(err)
		}
		for line := range strings.Lines(string(mounts)) {
			f := strings.Fields(line)
			if len(f) > 2 && (f[2] == "tmpfs" || f[2] == "ramfs") {
				if f[1] == warden.SecretsDir {
					r.violated("I7", "a mount of secrets shows on %s: %s", m.Name, line)
				}
				if root := filepath.Join(m.Root(), f[1]); !searched[device(root)] {
					searched[device(root)] = true
					r.search(root, m.Host)
				}
			}
		}
	}
}

// searchMax bounds the files of a mount that are searched: larger ones are of others on this machine.
const searchMax = 256 << 20

// search searches all files of a directory that are on its device.
func (r *run) search(dir string, h *bed.Host) {
	here := device(dir)
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && device(path) != here {
			return fs.SkipDir
		}
		if err != nil || !d.Type().IsRegular() {
			return nil // gone meanwhile
		}
		if fi, err := d.Info(); err != nil || fi.Size() > searchMax {
			return nil
		}
		if b, err := os.ReadFile(path); err == nil {
			r.wantClean(b, path+" of "+h.Name)
		}
		return nil
	})
}

// device says on which device a file is; 0 where it is gone.
func device(path string) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Dev
}
