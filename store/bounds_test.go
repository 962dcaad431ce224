package store_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// I1: whatever a leader proposes, a new node has the role and zone of a token that it takes a use of.
func TestI1RoleAndZoneComeFromTheToken(t *testing.T) {
	roles := []api.Role{api.Role_ROLE_WORKER, api.Role_ROLE_MANAGER}
	for _, tokenRole := range roles {
		for _, tokenZone := range []string{"", "default", "pci"} {
			for _, role := range roles {
				for _, desired := range roles {
					for _, zone := range []string{"default", "pci"} {
						w := newWorld(t)
						token := storetest.Token(tokenRole)
						token.Zone = tokenZone
						w.ok(store.Put(token, 0))
						n := storetest.Node("w9", token)
						n.Role, n.DesiredRole, n.Zone = role, desired, zone
						r := w.apply(storetest.Join(n)...)
						want := role == tokenRole && desired == tokenRole && (zone == tokenZone || zone == "default" && tokenZone == "")
						if (r.Code == "") != want {
							t.Errorf("token %s %q, node %s, %s, %q: [%s]", tokenRole.Word(), tokenZone, role.Word(), desired.Word(), zone, r.Code)
						}
					}
				}
			}
		}
	}
}

func TestBounds(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n) }
	many := func(n int) map[string]string {
		m := map[string]string{}
		for i := range n {
			m[fmt.Sprint(i)] = ""
		}
		return m
	}
	service := func(change func(s *api.ServiceSpec)) func(w *world) ops {
		return func(w *world) ops {
			s := storetest.Service("fresh", "default")
			change(s.Spec)
			return ops{store.Put(s, 0)}
		}
	}
	task := func(change func(s *api.TaskSpec)) func(w *world) ops {
		return service(func(s *api.ServiceSpec) { change(s.Task) })
	}
	references := func(change func(r *api.SecretReference)) func(w *world) ops {
		return func(w *world) ops {
			r := storetest.Reference(w.open)
			change(r)
			return task(func(s *api.TaskSpec) { s.Secrets = []*api.SecretReference{r} })(w)
		}
	}
	node := func(change func(n *api.Node)) func(w *world) ops {
		return func(w *world) ops { return ops{put(w.s.View().Node(w.worker.Id), change)} }
	}
	for name, c := range map[string]struct {
		want warden.Code
		ops  func(w *world) ops
	}{
		"labels":             {warden.CodeTooLarge, service(func(s *api.ServiceSpec) { s.Labels = many(warden.LabelsMax + 1) })},
		"labels, at most":    {"", service(func(s *api.ServiceSpec) { s.Labels = many(warden.LabelsMax) })},
		"label key":          {warden.CodeTooLarge, service(func(s *api.ServiceSpec) { s.Labels = map[string]string{long(warden.LabelKeyMax + 1): ""} })},
		"label value":        {warden.CodeTooLarge, service(func(s *api.ServiceSpec) { s.Labels = map[string]string{"a": long(warden.LabelValueMax + 1)} })},
		"label with newline": {warden.CodeInvalid, service(func(s *api.ServiceSpec) { s.Labels = map[string]string{"a": "b\nc"} })},
		"name":               {warden.CodeInvalid, service(func(s *api.ServiceSpec) { s.Name = long(warden.NameMax + 1) })},
		"image":              {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Image = long(513) })},
		"constraints":        {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Constraints = make([]string, warden.ConstraintsMax+1) })},
		"constraint":         {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Constraints = []string{long(warden.ConstraintMax + 1)} })},
		"words":              {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Command = make([]string, warden.CommandArgsMax+1) })},
		"command":            {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Command = []string{long(warden.CommandBytesMax + 1)} })},
		"zero in a word":     {warden.CodeInvalid, task(func(s *api.TaskSpec) { s.Command = []string{"a\x00"} })},
		"variables":          {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Env = make([]string, warden.EnvMax+1) })},
		"variable":           {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Env = []string{"A=" + long(warden.EnvBytesMax)} })},
		"resources":          {warden.CodeInvalid, task(func(s *api.TaskSpec) { s.Resources.LimitMemoryBytes = 1<<50 + 1 })},
		"restart":            {warden.CodeInvalid, task(func(s *api.TaskSpec) { s.Restart = 0 })},
		"stop grace":         {warden.CodeInvalid, task(func(s *api.TaskSpec) { s.StopGraceNs = int64(warden.StopGraceMax) + 1 })},
		"restart delay":      {warden.CodeInvalid, task(func(s *api.TaskSpec) { s.RestartDelayNs = -1 })},
		"references":         {warden.CodeTooLarge, task(func(s *api.TaskSpec) { s.Secrets = make([]*api.SecretReference, warden.SecretRefsMax+1) })},
		"mode":               {warden.CodeInvalid, references(func(r *api.SecretReference) { r.Mode = 0o1000 })},
		"reference ID":       {warden.CodeInvalid, references(func(r *api.SecretReference) { r.SecretId = "x" })},
		"reference name":     {warden.CodeNotFound, references(func(r *api.SecretReference) { r.SecretName = "card" })},
		"target":             {warden.CodeInvalid, references(func(r *api.SecretReference) { r.Target = long(256) })},
		"leaf":               {warden.CodeInvalid, node(func(n *api.Node) { n.Leaf = make([]byte, warden.CertBytesMax+1) })},
		"leaf role":          {warden.CodeInvalid, node(func(n *api.Node) { n.LeafRole = 9 })},
		"address":            {warden.CodeTooLarge, node(func(n *api.Node) { n.Address = long(301) })},
		"described CPUs":     {warden.CodeInvalid, node(func(n *api.Node) { n.Description.NanoCpus = -1 })},
		"tombstone hashes": {warden.CodeInvalid, func(w *world) ops {
			return ops{store.Put(&api.Tombstone{Id: w.pci.Id, Role: 1, KeyHashes: make([][]byte, 17)}, 0)}
		}},
		"tombstone hash": {warden.CodeInvalid, func(w *world) ops {
			return ops{store.Put(&api.Tombstone{Id: w.pci.Id, Role: 1, KeyHashes: [][]byte{{1}}}, 0)}
		}},
		"zones of a secret": {warden.CodeTooLarge, func(w *world) ops {
			return ops{put(w.s.View().Secret(w.open.Id), func(s *api.Secret) { s.Zones = make([]string, warden.ZonesMax+1) })}
		}},
		"zones": {warden.CodeTooLarge, func(w *world) (o ops) {
			for i := range warden.ZonesMax - 1 {
				o = append(o, store.Put(storetest.Zone(fmt.Sprint("z", i)), 0))
			}
			return o
		}},
		"outstanding tokens": {warden.CodeTooLarge, func(w *world) (o ops) {
			used := storetest.Token(api.Role_ROLE_WORKER)
			used.UsesMax = 1
			w.ok(store.Put(used, 0), storetest.UseToken(used.Id)) // does not count
			for range warden.TokensMax - 2 {
				o = append(o, store.Put(storetest.Token(api.Role_ROLE_WORKER), 0))
			}
			w.ok(o...)
			return ops{store.Put(storetest.Token(api.Role_ROLE_WORKER), 0)}
		}},
		"secrets of a task": {warden.CodeTooLarge, func(w *world) (o ops) {
			var refs []*api.SecretReference
			for i := range 9 {
				s := storetest.Secret(fmt.Sprint("s", i))
				v := storetest.SecretVersion(s, 1)
				v.SizeBytes = warden.SecretBytesMax
				w.ok(store.Put(s, 0), store.Put(v, 0))
				refs = append(refs, storetest.Reference(s))
			}
			return ops{store.Put(storetest.Service("fresh", "default", refs...), 0)}
		}},
		"keyset generation": {warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().SecretVersion(w.open.Id, 1), func(v *api.SecretVersion) { v.KeysetGeneration = 0 })}
		}},
		"root key": {warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().Cluster(), func(c *api.Cluster) { c.SealedRootKey = make([]byte, 9<<10) })}
		}},
		"distrusted issuers": {warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().Cluster(), func(c *api.Cluster) { c.DistrustedIssuers = make([]byte, 33) })}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if r := w.apply(c.ops(w)...); warden.Code(r.Code) != c.want {
				t.Fatalf("apply = %q [%s], want [%s]", r.Text, r.Code, c.want)
			}
		})
	}
}

func TestNodeHoldsAtMostItsTasks(t *testing.T) {
	w := newWorld(t)
	for held := 1; held < warden.AssignTasksMax; {
		var fresh, placed ops
		for range min(500, warden.AssignTasksMax-held) {
			task := storetest.Task(w.web, 1)
			fresh, placed = append(fresh, store.Put(task, 0)), append(placed, store.Put(storetest.Placed(task, w.worker.Id), 1))
			held++
		}
		w.ok(fresh...)
		w.ok(placed...)
	}
	if r := w.apply(store.Put(storetest.Placed(w.webTask, w.worker.Id), 1)); r.Code != string(warden.CodeNoFit) {
		t.Fatalf("one more: [%s]", r.Code)
	}
}

func TestNameLookups(t *testing.T) {
	w := newWorld(t)
	v := w.s.View()
	if v.ServiceByName("web").GetId() != w.web.Id || v.SecretByName("card").GetId() != w.card.Id || v.Zone("pci") == nil || v.Cluster().GetId() != w.cluster {
		t.Fatal("a name finds another record")
	}
	if v.ServiceByName("we") != nil || v.SecretByName("") != nil || v.Zone("x") != nil || v.Node("x") != nil || v.Tombstone("x") != nil ||
		v.Token("x") != nil || v.Task("x") != nil || v.SecretVersion(w.open.Id, 9) != nil || len(v.Tombstones()) != 0 {
		t.Fatal("what is not there is found")
	}
}

// Damage on disk is told at the start, and where it is.
func TestOpenRefusesADamagedLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dir string
		change := onDisk(t)
		c := newCluster(t, 1, func(cfg *store.Config) { change(cfg); dir = cfg.Dir })
		id := c.ids[0]
		c.kill(id)
		path := filepath.Join(dir, "log.db")
		b, err := os.ReadFile(path)
		c.must(err)
		foreign := c.configs[id]
		foreign.Sealer = newSealer(t)
		_, foreign.Transport = raft.NewInmemTransport(raft.ServerAddress(id))
		if _, err := store.Open(foreign); err == nil {
			t.Fatal("opened with another key")
		}
		for j := range b { // enough to hit what is used
			if j%64 == 0 {
				b[j] ^= 1
			}
		}
		c.must(os.WriteFile(path, b, 0o600))
		cfg := c.config(id)
		_, err = store.Open(cfg)
		if warden.CodeOf(err) != warden.CodeCorrupt || !strings.Contains(err.Error(), path) {
			t.Fatalf("Open = %v, want [corrupt] and the file's name", err)
		}
		delete(c.networks, id)
	})
}

// raft's log comes out as ours, without what raft calls informative, and without Go's ways of formatting.
func TestRaftLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))
		c := newCluster(t, 1, func(cfg *store.Config) { cfg.Logger = logger })
		c.kill(c.ids[0])
		time.Sleep(time.Second)
		text := b.String()
		for _, want := range []string{`level=DEBUG msg="heard from raft" event="initial configuration"`, `event="entering leader state"`} {
			if !strings.Contains(text, want) {
				t.Errorf("the log lacks %s:\n%s", want, text)
			}
		}
		if strings.Contains(text, "level=INFO") || strings.Contains(text, "BADKEY") {
			t.Errorf("the log has what it should not:\n%s", text)
		}
	})
}

func TestProposeEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3, nil)
		leader := c.leader()
		for id, s := range c.up {
			if s != leader {
				c.disconnect(id)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := leader.Propose(ctx, storetest.Command()); warden.CodeOf(err) != warden.CodeTimeout {
			t.Fatalf("Propose = %v, want [timeout]", err)
		}
		if leader.Term() == 0 {
			t.Fatal("no term")
		}
	})
}
