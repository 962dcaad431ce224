package store_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// tb is what tests and rapid's checks have in common.
type tb interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

// world is a state with something of everything in it, and a clock of its own.
type world struct {
	t     tb
	s     *store.State
	index uint64
	now   int64

	cluster, manager     string
	worker, pci          *api.Node // of zones default and pci
	workers, pciToken    *api.Token
	open, card           *api.Secret // any zone; zone pci only
	web, vault           *api.Service
	webTask, vaultTask   *api.Task // pending
	running              *api.Task // of web, on worker
	lastKeys             []store.Key
	openV, cardV, second *api.SecretVersion
}

func newWorld(t tb) *world {
	w := &world{t: t, s: store.NewState(), now: time.Now().UnixNano(), cluster: warden.NewID(), manager: warden.NewID()}
	w.ok(storetest.Genesis(w.cluster, w.manager)...)
	w.ok(store.Put(storetest.Zone("pci"), 0))
	w.workers, w.pciToken = storetest.Token(api.Role_ROLE_WORKER), storetest.Token(api.Role_ROLE_WORKER)
	w.pciToken.Zone = "pci"
	w.ok(store.Put(w.workers, 0), store.Put(w.pciToken, 0))
	w.worker, w.pci = storetest.Node("w1", w.workers), storetest.Node("p1", w.pciToken)
	w.ok(storetest.Join(w.worker)...)
	w.ok(storetest.Join(w.pci)...)
	w.open, w.card = storetest.Secret("open"), storetest.Secret("card", "pci")
	w.openV, w.cardV, w.second = storetest.SecretVersion(w.open, 1), storetest.SecretVersion(w.card, 1), storetest.SecretVersion(w.open, 2)
	w.ok(store.Put(w.open, 0), store.Put(w.openV, 0), store.Put(w.second, 0), store.Put(w.card, 0), store.Put(w.cardV, 0))
	w.web = storetest.Service("web", "default", storetest.Reference(w.open))
	w.vault = storetest.Service("vault", "pci", storetest.Reference(w.card))
	w.ok(store.Put(w.web, 0), store.Put(w.vault, 0))
	w.webTask, w.vaultTask, w.running = storetest.Task(w.web, 1), storetest.Task(w.vault, 1), storetest.Task(w.web, 2)
	w.ok(store.Put(w.webTask, 0), store.Put(w.vaultTask, 0), store.Put(w.running, 0))
	w.running = storetest.Placed(w.running, w.worker.Id)
	w.ok(store.Put(w.running, 1))
	return w
}

// apply gives the operations to the state as one command, through bytes, a second later.
func (w *world) apply(ops ...*api.Operation) *api.Result {
	return w.command(storetest.Command(ops...))
}

func (w *world) command(c *api.Command) *api.Result {
	w.t.Helper()
	if c.TimeNs == 0 {
		w.now += int64(time.Second)
		c.TimeNs = w.now
	}
	data, err := proto.Marshal(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.index++
	var r *api.Result
	r, w.lastKeys = w.s.Apply(w.index, data)
	return r
}

// ok applies what must succeed.
func (w *world) ok(ops ...*api.Operation) *api.Result {
	w.t.Helper()
	r := w.apply(ops...)
	if r.Code != "" {
		w.t.Fatalf("apply = %s [%s], want it applied", r.Text, r.Code)
	}
	return r
}

// snapshot returns the bytes of the whole state.
func (w *world) snapshot() []byte {
	w.t.Helper()
	var b bytes.Buffer
	if err := w.s.View().Write(&b); err != nil {
		w.t.Fatal(err)
	}
	return b.Bytes()
}

// put returns the put of a changed copy of a record as it is in the state now.
func put[T store.Record](r T, change func(T)) *api.Operation {
	c := api.Clone(r)
	change(c)
	return store.Put(c, r.GetMeta().GetVersion())
}

func remove(r store.Record) *api.Operation { return store.Delete(r) }

type ops = []*api.Operation

func TestRules(t *testing.T) {
	hash := storetest.Hash()
	node := func(w *world, change func(n *api.Node)) ops {
		n := storetest.Node("w9", w.workers)
		change(n)
		return storetest.Join(n)
	}
	service := func(change func(s *api.Service)) ops {
		s := storetest.Service("fresh", "default")
		change(s)
		return ops{store.Put(s, 0)}
	}
	updateCluster := func(change func(c *api.Cluster)) func(w *world) ops {
		return func(w *world) ops { return ops{put(w.s.View().Cluster(), change)} }
	}
	updateWorker := func(change func(n *api.Node)) func(w *world) ops {
		return func(w *world) ops { return ops{put(w.s.View().Node(w.worker.Id), change)} }
	}
	updateRunning := func(change func(t *api.Task)) func(w *world) ops {
		return func(w *world) ops { return ops{put(w.s.View().Task(w.running.Id), change)} }
	}
	place := func(w *world, t *api.Task, node string) ops {
		return ops{store.Put(storetest.Placed(t, node), w.s.View().Task(t.Id).GetMeta().GetVersion())}
	}
	bury := func(w *world, n *api.Node) *api.Operation {
		return store.Put(&api.Tombstone{Id: n.Id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone}, 0)
	}
	for _, c := range []struct {
		name string
		want warden.Code
		ops  func(w *world) ops
	}{
		{"put of nothing", warden.CodeInvalid, func(w *world) ops { return ops{{Of: &api.Operation_Put{Put: &api.Put{}}}} }},
		{"an unknown operation", warden.CodeInvalid, func(w *world) ops { return ops{{}} }},
		{"put over an existing one", warden.CodeExists, func(w *world) ops { return ops{store.Put(api.Clone(w.web), 0)} }},
		{"put of a stale version", warden.CodeConflict, func(w *world) ops { return ops{store.Put(w.web, 7)} }},
		{"put of one that is gone", warden.CodeConflict, func(w *world) ops { return ops{store.Put(storetest.Zone("z"), 3)} }},
		{"removal of one that is gone", warden.CodeNotFound, func(w *world) ops { return ops{remove(storetest.Zone("z"))} }},
		{"removal of a stale version", warden.CodeConflict, func(w *world) ops { return ops{remove(w.web)} }},
		{"removal of an unknown kind", warden.CodeNotFound, func(w *world) ops {
			return ops{{Of: &api.Operation_Delete{Delete: &api.Delete{Kind: 99, Id: "x"}}}}
		}},

		{"cluster: second one", warden.CodeExists, func(w *world) ops { return ops{store.Put(storetest.Cluster(warden.NewID()), 0)} }},
		{"cluster: removed", warden.CodeDenied, func(w *world) ops { return ops{remove(w.s.View().Cluster())} }},
		{"cluster: another root", warden.CodeInvalid, updateCluster(func(c *api.Cluster) { c.RootCert = []byte("other") })},
		{"cluster: apply version falls", warden.CodeInvalid, func(w *world) ops {
			w.ok(updateCluster(func(c *api.Cluster) { c.ApplyVersion = 2 })(w)...)
			return updateCluster(func(c *api.Cluster) { c.ApplyVersion = 1 })(w)
		}},
		{"cluster: life too short", warden.CodeInvalid, updateCluster(func(c *api.Cluster) { c.LeafTtlNs = int64(warden.LeafTTLMin) - 1 })},
		{"cluster: life too long", warden.CodeInvalid, updateCluster(func(c *api.Cluster) { c.LeafTtlNs = int64(warden.LeafTTLMax) + 1 })},
		{"cluster: autolock without a recipient", warden.CodeInvalid, updateCluster(func(c *api.Cluster) { c.Autolock = true })},
		{"cluster: generation falls", warden.CodeInvalid, func(w *world) ops {
			w.ok(updateCluster(func(c *api.Cluster) { c.KeysetGeneration = 2 })(w)...)
			return updateCluster(func(c *api.Cluster) { c.KeysetGeneration = 1 })(w)
		}},
		{"cluster: autolock", "", updateCluster(func(c *api.Cluster) { c.Autolock, c.UnlockRecipient, c.UnlockKeyId = true, hash, "k1" })},

		{"node: joins", "", func(w *world) ops { return node(w, func(*api.Node) {}) }},
		{"node: as a worker with the token of another role", warden.CodeWrongRole, func(w *world) ops {
			return node(w, func(n *api.Node) { n.Role, n.DesiredRole = api.Role_ROLE_MANAGER, api.Role_ROLE_MANAGER })
		}},
		{"node: wants to become more than its token says", warden.CodeWrongRole, func(w *world) ops {
			return node(w, func(n *api.Node) { n.DesiredRole = api.Role_ROLE_MANAGER })
		}},
		{"node: names its own zone", warden.CodeWrongZone, func(w *world) ops { return node(w, func(n *api.Node) { n.Zone = "pci" }) }},
		{"node: in a zone that nobody declared", warden.CodeNotFound, func(w *world) ops { return node(w, func(n *api.Node) { n.Zone = "pcl" }) }},
		{"node: without a token", warden.CodeDenied, func(w *world) ops { return node(w, func(n *api.Node) { n.TokenId = "" })[1:] }},
		{"node: without taking a use", warden.CodeDenied, func(w *world) ops { return node(w, func(*api.Node) {})[1:] }},
		{"node: two for one use", warden.CodeDenied, func(w *world) ops {
			return append(node(w, func(*api.Node) {}), node(w, func(*api.Node) {})[1:]...)
		}},
		{"node: with the use of another token", warden.CodeDenied, func(w *world) ops {
			return ops{storetest.UseToken(w.pciToken.Id), node(w, func(*api.Node) {})[1]}
		}},
		{"node: with a token that is not there", warden.CodeUnknownToken, func(w *world) ops {
			return node(w, func(n *api.Node) { n.TokenId = "000000000000" })
		}},
		{"node: with another node's key", warden.CodeWrongKey, func(w *world) ops { return node(w, func(n *api.Node) { n.KeyHash = w.pci.KeyHash }) }},
		{"node: with another node's first key", warden.CodeWrongKey, func(w *world) ops {
			return node(w, func(n *api.Node) { n.JoinKeyHash = w.pci.JoinKeyHash })
		}},
		{"node: with the key of a removed one", warden.CodeEvicted, func(w *world) ops {
			w.ok(bury(w, w.pci), remove(w.s.View().Node(w.pci.Id)))
			return node(w, func(n *api.Node) { n.KeyHash = w.pci.JoinKeyHash })
		}},
		{"node: comes back", warden.CodeEvicted, func(w *world) ops {
			w.ok(bury(w, w.pci), remove(w.s.View().Node(w.pci.Id)))
			return node(w, func(n *api.Node) { n.Id = w.pci.Id })
		}},
		{"node: changed after its tombstone", warden.CodeEvicted, func(w *world) ops {
			w.ok(bury(w, w.worker))
			return ops{put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.Labels = map[string]string{"a": "b"} })}
		}},
		{"node: labelled", "", updateWorker(func(n *api.Node) { n.Labels = map[string]string{"a": "b"} })},
		{"node: label without a key", warden.CodeInvalid, updateWorker(func(n *api.Node) { n.Labels = map[string]string{"": "b"} })},
		{"node: moved to another zone", "", updateWorker(func(n *api.Node) { n.Zone = "pci" })},
		{"node: another host name", warden.CodeInvalid, updateWorker(func(n *api.Node) { n.Hostname = "other" })},
		{"node: another token", warden.CodeInvalid, updateWorker(func(n *api.Node) { n.TokenId = w0 })},
		{"node: a key that was not announced", warden.CodeWrongKey, updateWorker(func(n *api.Node) { n.KeyHash = hash })},
		{"node: short key hash", warden.CodeInvalid, updateWorker(func(n *api.Node) { n.KeyHash = []byte{1} })},
		{"node: no availability", warden.CodeInvalid, updateWorker(func(n *api.Node) { n.Availability = 0 })},
		{"node: unknown role", warden.CodeInvalid, updateWorker(func(n *api.Node) { n.DesiredRole = 3 })},
		{"node: promoted", "", updateWorker(func(n *api.Node) { n.DesiredRole = api.Role_ROLE_MANAGER })},
		{"node: last manager demoted", warden.CodeNoQuorum, func(w *world) ops {
			return ops{put(w.s.View().Node(w.manager), func(n *api.Node) { n.DesiredRole = api.Role_ROLE_WORKER })}
		}},
		{"node: last manager buried", warden.CodeNoQuorum, func(w *world) ops { return ops{bury(w, w.s.View().Node(w.manager))} }},
		{"node: one manager more than the most", warden.CodeTooLarge, func(w *world) ops {
			for range warden.ManagersMax - 1 {
				n := storetest.Node("m", w.workers)
				w.ok(storetest.Join(n)...)
				w.ok(put(w.s.View().Node(n.Id), func(n *api.Node) { n.DesiredRole = api.Role_ROLE_MANAGER }))
			}
			return updateWorker(func(n *api.Node) { n.DesiredRole = api.Role_ROLE_MANAGER })(w)
		}},
		{"node: removed without a tombstone", warden.CodeDenied, func(w *world) ops { return ops{remove(w.s.View().Node(w.pci.Id))} }},
		{"node: removed before its tombstone in one command", warden.CodeNotFound, func(w *world) ops {
			return ops{remove(w.s.View().Node(w.pci.Id)), bury(w, w.pci)}
		}},
		{"tombstone: of nobody", warden.CodeNotFound, func(w *world) ops { return ops{bury(w, storetest.Node("x", w.workers))} }},
		{"tombstone: removed", warden.CodeDenied, func(w *world) ops {
			w.ok(bury(w, w.pci))
			return ops{remove(w.s.View().Tombstone(w.pci.Id))}
		}},
		{"tombstone: becomes compromised", "", func(w *world) ops {
			w.ok(bury(w, w.pci))
			return ops{put(w.s.View().Tombstone(w.pci.Id), func(t *api.Tombstone) { t.Compromised = true })}
		}},
		{"tombstone: forgets keys", warden.CodeInvalid, func(w *world) ops {
			w.ok(bury(w, w.pci))
			return ops{put(w.s.View().Tombstone(w.pci.Id), func(t *api.Tombstone) { t.KeyHashes = nil })}
		}},

		{"zone: same name", warden.CodeExists, func(w *world) ops { return ops{store.Put(storetest.Zone("pci"), 0)} }},
		{"zone: no name", warden.CodeInvalid, func(w *world) ops { return ops{store.Put(storetest.Zone(""), 0)} }},
		{"zone: bad name", warden.CodeInvalid, func(w *world) ops { return ops{store.Put(storetest.Zone("PCI"), 0)} }},
		{"zone: renamed", warden.CodeInvalid, func(w *world) ops { return ops{put(w.s.View().Zone("pci"), func(z *api.Zone) { z.Name = "x" })} }},
		{"zone: used", warden.CodeInUse, func(w *world) ops { return ops{remove(w.s.View().Zone("pci"))} }},
		{"zone: default", warden.CodeDenied, func(w *world) ops { return ops{remove(w.s.View().Zone("default"))} }},
		{"zone: unused", "", func(w *world) ops {
			w.ok(store.Put(storetest.Zone("spare"), 0))
			return ops{remove(w.s.View().Zone("spare"))}
		}},

		{"token: bad ID", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Token(api.Role_ROLE_WORKER)
			t.Id = "short"
			return ops{store.Put(t, 0)}
		}},
		{"token: used before it was born", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Token(api.Role_ROLE_WORKER)
			t.Uses = 1
			return ops{store.Put(t, 0)}
		}},
		{"token: lives too long", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Token(api.Role_ROLE_WORKER)
			t.ExpiresNs = time.Now().Add(2 * warden.TokenTTLMax).UnixNano()
			return ops{store.Put(t, 0)}
		}},
		{"token: unknown zone", warden.CodeNotFound, func(w *world) ops {
			t := storetest.Token(api.Role_ROLE_WORKER)
			t.Zone = "pcl"
			return ops{store.Put(t, 0)}
		}},
		{"token: bad CIDR", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Token(api.Role_ROLE_WORKER)
			t.Cidr = "10.0.0.0/99"
			return ops{store.Put(t, 0)}
		}},
		{"token: becomes a manager's", warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().Token(w.workers.Id), func(t *api.Token) { t.Role = api.Role_ROLE_MANAGER })}
		}},
		{"token: uses put back", warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().Token(w.workers.Id), func(t *api.Token) { t.Uses = 0 })}
		}},
		{"token: revoked", "", func(w *world) ops {
			return ops{put(w.s.View().Token(w.workers.Id), func(t *api.Token) { t.RevokedNs = 1 })}
		}},
		{"token: unrevoked", warden.CodeInvalid, func(w *world) ops {
			w.ok(put(w.s.View().Token(w.workers.Id), func(t *api.Token) { t.RevokedNs = 1 }))
			return ops{put(w.s.View().Token(w.workers.Id), func(t *api.Token) { t.RevokedNs = 0 })}
		}},
		{"token: used after revocation", warden.CodeRevoked, func(w *world) ops {
			w.ok(put(w.s.View().Token(w.workers.Id), func(t *api.Token) { t.RevokedNs = 1 }))
			return node(w, func(*api.Node) {})
		}},
		{"token: used after its end", warden.CodeExpired, func(w *world) ops {
			w.now += int64(2 * time.Hour)
			return node(w, func(*api.Node) {})
		}},
		{"token: unknown", warden.CodeUnknownToken, func(w *world) ops { return ops{storetest.UseToken("nosuchtoken0")} }},
		{"token: used up", warden.CodeUsedUp, func(w *world) ops {
			t := storetest.Token(api.Role_ROLE_WORKER)
			t.UsesMax = 1
			w.ok(store.Put(t, 0), storetest.UseToken(t.Id))
			return ops{storetest.UseToken(t.Id)}
		}},
		{"token: bound to another host", warden.CodeBinding, func(w *world) ops {
			t := storetest.Token(api.Role_ROLE_WORKER)
			t.Hostname = "only"
			w.ok(store.Put(t, 0))
			return storetest.Join(storetest.Node("other", t))
		}},
		{"token: removed", "", func(w *world) ops { return ops{remove(w.s.View().Token(w.workers.Id))} }},

		{"service: made", "", func(w *world) ops { return service(func(*api.Service) {}) }},
		{"service: same name", warden.CodeExists, func(w *world) ops { return service(func(s *api.Service) { s.Spec.Name = "web" }) }},
		{"service: no spec", warden.CodeInvalid, func(w *world) ops { return service(func(s *api.Service) { s.Spec = nil }) }},
		{"service: unknown zone", warden.CodeNotFound, func(w *world) ops { return service(func(s *api.Service) { s.Spec.Task.Zone = "pcl" }) }},
		{"service: no zone", warden.CodeNotFound, func(w *world) ops { return service(func(s *api.Service) { s.Spec.Task.Zone = "" }) }},
		{"service: no image", warden.CodeInvalid, func(w *world) ops { return service(func(s *api.Service) { s.Spec.Task.Image = "" }) }},
		{"service: too many replicas", warden.CodeTooLarge, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Replicas = warden.ReplicasMax + 1 })
		}},
		{"service: negative reservation", warden.CodeInvalid, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Task.Resources.ReserveMemoryBytes = -1 })
		}},
		{"service: variable without a key", warden.CodeInvalid, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Task.Env = []string{"=x"} })
		}},
		{"service: target that climbs", warden.CodeInvalid, func(w *world) ops {
			return service(func(s *api.Service) {
				r := storetest.Reference(w.open)
				r.Target = "../x"
				s.Spec.Task.Secrets = []*api.SecretReference{r}
			})
		}},
		{"service: same target twice", warden.CodeInvalid, func(w *world) ops {
			return service(func(s *api.Service) {
				s.Spec.Task.Secrets = []*api.SecretReference{storetest.Reference(w.open), storetest.Reference(w.open)}
			})
		}},
		{"service: secret that is not there", warden.CodeNotFound, func(w *world) ops {
			return service(func(s *api.Service) {
				s.Spec.Task.Secrets = []*api.SecretReference{storetest.Reference(storetest.Secret("nope"))}
			})
		}},
		{"service: version that is not there", warden.CodeNotFound, func(w *world) ops {
			return service(func(s *api.Service) {
				r := storetest.Reference(w.open)
				r.Version = 9
				s.Spec.Task.Secrets = []*api.SecretReference{r}
			})
		}},
		{"service: secret of another zone", warden.CodeWrongZone, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Task.Secrets = []*api.SecretReference{storetest.Reference(w.card)} })
		}},
		{"service: renamed", warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().Service(w.web.Id), func(s *api.Service) { s.Spec.Name = "x" })}
		}},
		{"service: removed", "", func(w *world) ops { return ops{remove(w.s.View().Service(w.web.Id))} }},

		{"secret: same name", warden.CodeExists, func(w *world) ops {
			s := storetest.Secret("open")
			return ops{store.Put(s, 0), store.Put(storetest.SecretVersion(s, 1), 0)}
		}},
		{"secret: without its version", warden.CodeNotFound, func(w *world) ops { return ops{store.Put(storetest.Secret("x"), 0)} }},
		{"secret: unknown zone", warden.CodeNotFound, func(w *world) ops {
			s := storetest.Secret("x", "pcl")
			return ops{store.Put(s, 0), store.Put(storetest.SecretVersion(s, 1), 0)}
		}},
		{"secret: a zone twice", warden.CodeInvalid, func(w *world) ops {
			s := storetest.Secret("x", "pci", "pci")
			return ops{store.Put(s, 0), store.Put(storetest.SecretVersion(s, 1), 0)}
		}},
		{"secret: rotated", "", func(w *world) ops {
			return ops{put(w.s.View().Secret(w.open.Id), func(s *api.Secret) { s.CurrentVersion = 3 }), store.Put(storetest.SecretVersion(w.open, 3), 0)}
		}},
		{"secret: used by a service", warden.CodeInUse, func(w *world) ops { return ops{remove(w.s.View().Secret(w.open.Id))} }},
		{"secret: used by a task", warden.CodeInUse, func(w *world) ops {
			return ops{remove(w.s.View().Service(w.web.Id)), remove(w.s.View().Secret(w.open.Id))}
		}},
		{"secret version: under another name", warden.CodeInvalid, func(w *world) ops {
			v := storetest.SecretVersion(w.open, 3)
			v.Version = 4
			return ops{store.Put(v, 0)}
		}},
		{"secret version: of no secret", warden.CodeNotFound, func(w *world) ops {
			return ops{store.Put(storetest.SecretVersion(storetest.Secret("x"), 1), 0)}
		}},
		{"secret version: too large", warden.CodeTooLarge, func(w *world) ops {
			v := storetest.SecretVersion(w.open, 3)
			v.SizeBytes = warden.SecretBytesMax + 1
			return ops{store.Put(v, 0)}
		}},
		{"secret version: another value", warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().SecretVersion(w.open.Id, 1), func(v *api.SecretVersion) { v.Ciphertext = []byte("x") })}
		}},
		{"secret version: re-sealed", "", func(w *world) ops {
			return ops{put(w.s.View().SecretVersion(w.open.Id, 1), func(v *api.SecretVersion) { v.WrappedKey, v.KeysetGeneration = []byte("x"), 2 })}
		}},
		{"secret version: used", warden.CodeInUse, func(w *world) ops { return ops{remove(w.s.View().SecretVersion(w.open.Id, 1))} }},
		{"secret version: unused", "", func(w *world) ops { return ops{remove(w.s.View().SecretVersion(w.open.Id, 2))} }},
		{"secret version: current", warden.CodeInUse, func(w *world) ops {
			s := storetest.Secret("x")
			w.ok(store.Put(s, 0), store.Put(storetest.SecretVersion(s, 1), 0))
			return ops{remove(w.s.View().SecretVersion(s.Id, 1))}
		}},

		{"task: of no service", warden.CodeNotFound, func(w *world) ops {
			return ops{store.Put(storetest.Task(storetest.Service("x", "default"), 1), 0)}
		}},
		{"task: unknown state", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Task(w.web, 3)
			t.Status.State = 75
			return ops{store.Put(t, 0)}
		}},
		{"task: no state", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Task(w.web, 3)
			t.Status = nil
			return ops{store.Put(t, 0)}
		}},
		{"task: wants what no task can want", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Task(w.web, 3)
			t.DesiredState = api.TaskState_TASK_FAILED
			return ops{store.Put(t, 0)}
		}},
		{"task: runs nowhere", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Task(w.web, 3)
			t.Status.State = api.TaskState_TASK_RUNNING
			return ops{store.Put(t, 0)}
		}},
		{"task: another spec", warden.CodeInvalid, updateRunning(func(t *api.Task) { t.Spec.Image = "other" })},
		{"task: another slot", warden.CodeInvalid, updateRunning(func(t *api.Task) { t.Slot = 9 })},
		{"task: back to pending", warden.CodeInvalid, updateRunning(func(t *api.Task) { t.Status.State = api.TaskState_TASK_PENDING })},
		{"task: back", warden.CodeConflict, func(w *world) ops {
			w.ok(storetest.Report(w.running, api.TaskState_TASK_RUNNING))
			return updateRunning(func(t *api.Task) { t.Status.State = api.TaskState_TASK_STARTING })(w)
		}},
		{"task: ended another way", warden.CodeConflict, func(w *world) ops {
			w.ok(storetest.Report(w.running, api.TaskState_TASK_COMPLETE))
			return updateRunning(func(t *api.Task) { t.Status.State = api.TaskState_TASK_FAILED })(w)
		}},
		{"task: moved", warden.CodeConflict, updateRunning(func(t *api.Task) { t.NodeId = w0 })},
		{"task: to end", "", updateRunning(func(t *api.Task) { t.DesiredState = api.TaskState_TASK_SHUTDOWN })},
		{"task: started again", warden.CodeConflict, func(w *world) ops {
			w.ok(updateRunning(func(t *api.Task) { t.DesiredState = api.TaskState_TASK_SHUTDOWN })(w)...)
			return updateRunning(func(t *api.Task) { t.DesiredState = api.TaskState_TASK_RUNNING })(w)
		}},
		{"task: removed while its node may run it", warden.CodeInUse, func(w *world) ops { return ops{remove(w.s.View().Task(w.running.Id))} }},
		{"task: removed before it was placed", "", func(w *world) ops { return ops{remove(w.s.View().Task(w.webTask.Id))} }},
		{"task: removed after its end", "", func(w *world) ops {
			w.ok(storetest.Report(w.running, api.TaskState_TASK_FAILED))
			return ops{remove(w.s.View().Task(w.running.Id))}
		}},
		{"task: removed after its node", "", func(w *world) ops {
			w.ok(bury(w, w.worker), remove(w.s.View().Node(w.worker.Id)))
			return ops{remove(w.s.View().Task(w.running.Id))}
		}},

		{"placement", "", func(w *world) ops { return place(w, w.webTask, w.worker.Id) }},
		{"placement: in another zone", warden.CodeWrongZone, func(w *world) ops { return place(w, w.vaultTask, w.worker.Id) }},
		{"placement: on no node", warden.CodeNoFit, func(w *world) ops { return place(w, w.webTask, w0) }},
		{"placement: on a removed node", warden.CodeNoFit, func(w *world) ops {
			w.ok(bury(w, w.worker))
			return place(w, w.webTask, w.worker.Id)
		}},
		{"placement: on a drained node", warden.CodeNoFit, func(w *world) ops { return place(w, w.webTask, w.manager) }},
		{"placement: of a task that is to end", warden.CodeNoFit, func(w *world) ops {
			w.ok(put(w.s.View().Task(w.webTask.Id), func(t *api.Task) { t.DesiredState = api.TaskState_TASK_SHUTDOWN }))
			t := storetest.Placed(w.s.View().Task(w.webTask.Id), w.worker.Id)
			return ops{store.Put(t, t.Meta.Version)}
		}},
		{"placement: of a secret whose zones changed meanwhile", warden.CodeWrongZone, func(w *world) ops {
			w.ok(put(w.s.View().Secret(w.open.Id), func(s *api.Secret) { s.Zones = []string{"pci"} }))
			return place(w, w.webTask, w.worker.Id)
		}},
		{"placement: after the node changed its zone", warden.CodeWrongZone, func(w *world) ops {
			w.ok(updateWorker(func(n *api.Node) { n.Zone = "pci" })(w)...)
			return place(w, w.webTask, w.worker.Id)
		}},

		{"exposure: put", warden.CodeDenied, func(w *world) ops {
			return ops{store.Put(&api.Exposure{Id: "x", NodeId: w.worker.Id}, 0)}
		}},
		{"exposure: removed", warden.CodeDenied, func(w *world) ops { return ops{remove(w.s.View().Exposures()[0])} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			operations := c.ops(w)
			before := w.s.View()
			nodes := len(before.Nodes())
			r := w.apply(operations...)
			if warden.Code(r.Code) != c.want {
				t.Fatalf("apply = %q [%s], want [%s]", r.Text, r.Code, c.want)
			}
			if r.Code != "" && (r.Text == "" || len(w.lastKeys) != 0 || len(w.s.View().Nodes()) != nodes) {
				t.Fatalf("refused with text %q, and changed %v", r.Text, w.lastKeys)
			}
			if r.Code == "" && len(r.Versions) != len(operations) {
				t.Fatalf("%d versions for %d operations", len(r.Versions), len(operations))
			}
		})
	}
}

// w0 is an ID that nothing has.
const w0 = "0000000000000000000000000"

func TestApplyIsAllOrNothing(t *testing.T) {
	w := newWorld(t)
	before := w.s.View()
	r := w.apply(store.Put(storetest.Zone("a"), 0), storetest.UseToken(w.workers.Id), store.Put(storetest.Zone("a"), 0))
	if r.Code != string(warden.CodeExists) {
		t.Fatalf("code = %q", r.Code)
	}
	after := w.s.View()
	if after.Zone("a") != nil || after.Token(w.workers.Id).Uses != before.Token(w.workers.Id).Uses {
		t.Fatal("a part of the refused command was applied")
	}
	if after.Index() != before.Index()+1 {
		t.Fatalf("index = %d, want %d", after.Index(), before.Index()+1)
	}
}

func TestMeta(t *testing.T) {
	w := newWorld(t)
	z := storetest.Zone("a")
	z.Meta = &api.Meta{Version: 77, Index: 77, CreatedNs: 77}
	r := w.ok(store.Put(z, 0))
	m := w.s.View().Zone("a").Meta
	if m.Version != 1 || m.Index != r.Index || m.CreatedNs != w.now || m.UpdatedNs != w.now || r.Versions[0] != 1 {
		t.Fatalf("meta = %v", m)
	}
	created := w.s.View().Node(w.worker.Id).Meta.CreatedNs
	r = w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.Labels = map[string]string{"a": "b"} }))
	if m := w.s.View().Node(w.worker.Id).Meta; m.Version != 2 || m.CreatedNs != created || m.UpdatedNs != w.now || r.Versions[0] != 2 {
		t.Fatalf("meta = %v", m)
	}
}

func TestTimeNeverFalls(t *testing.T) {
	w := newWorld(t)
	before := w.s.View().Time()
	c := storetest.Command(store.Put(storetest.Zone("a"), 0))
	c.TimeNs = before - int64(time.Hour)
	if r := w.command(c); r.Code != "" {
		t.Fatal(r.Text)
	}
	if w.s.View().Time() != before || w.s.View().Zone("a").Meta.CreatedNs != before {
		t.Fatalf("time = %d, want %d", w.s.View().Time(), before)
	}
}

func TestRepeatedRequest(t *testing.T) {
	w := newWorld(t)
	for _, c := range []*api.Command{
		storetest.Command(storetest.UseToken(w.workers.Id)),
		storetest.Command(store.Put(storetest.Zone("pci"), 0)), // refused, and stays refused
	} {
		first := w.command(api.Clone(c))
		uses := w.s.View().Token(w.workers.Id).Uses
		again := w.command(api.Clone(c))
		if !proto.Equal(first, again) {
			t.Errorf("a repeated request gave %v, then %v", first, again)
		}
		if got := w.s.View().Token(w.workers.Id).Uses; got != uses {
			t.Errorf("uses = %d, want %d", got, uses)
		}
	}
}

func TestRequestsAreForgottenInOrder(t *testing.T) {
	w := newWorld(t)
	commands := []*api.Command{storetest.Command(), storetest.Command()}
	for _, c := range commands {
		w.command(c)
	}
	for range warden.RequestsKept - 1 {
		w.command(storetest.Command())
	}
	index := w.index
	if r := w.command(commands[1]); r.Index > index {
		t.Error("the newer request is forgotten")
	}
	if r := w.command(commands[0]); r.Index <= index {
		t.Error("the oldest request is remembered beyond the bound")
	}
}

func TestI12EveryCommandHasAnAuthor(t *testing.T) {
	for name, change := range map[string]func(c *api.Command){
		"no actor":         func(c *api.Command) { c.Actor = nil },
		"unknown actor":    func(c *api.Command) { c.Actor.Kind = "somebody" },
		"no request ID":    func(c *api.Command) { c.RequestId = "" },
		"long request ID":  func(c *api.Command) { c.RequestId = strings.Repeat("x", warden.RequestIDMax+1) },
		"endless operator": func(c *api.Command) { c.Actor.Name = strings.Repeat("x", 300) },
	} {
		w := newWorld(t)
		c := storetest.Command(store.Put(storetest.Zone("a"), 0))
		change(c)
		if r := w.command(c); r.Code != string(warden.CodeInvalid) || w.s.View().Zone("a") != nil {
			t.Errorf("%s: code = %q", name, r.Code)
		}
	}
}

func TestBytesThatAreNoCommand(t *testing.T) {
	w := newWorld(t)
	if r, _ := w.s.Apply(w.index+1, []byte{0xff}); r.Code != string(warden.CodeCorrupt) {
		t.Errorf("code = %q", r.Code)
	}
	if r, _ := w.s.Apply(w.index+2, make([]byte, warden.CommandBytes+1)); r.Code != string(warden.CodeTooLarge) {
		t.Errorf("code = %q", r.Code)
	}
	c := storetest.Command()
	for range warden.CommandOpsMax + 1 {
		c.Operations = append(c.Operations, &api.Operation{})
	}
	if r := w.command(c); r.Code != string(warden.CodeTooLarge) {
		t.Errorf("code = %q", r.Code)
	}
}

func TestTombstoneTakesAllKeys(t *testing.T) {
	w := newWorld(t)
	next := storetest.Hash()
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.NextKeyHash = next }))
	w.ok(store.Put(&api.Tombstone{Id: w.worker.Id, Role: api.Role_ROLE_WORKER, KeyHashes: [][]byte{w.worker.KeyHash}}, 0))
	got := w.s.View().Tombstone(w.worker.Id)
	if len(got.KeyHashes) != 3 || !slices.ContainsFunc(got.KeyHashes, func(h []byte) bool { return bytes.Equal(h, next) }) || got.RemovedNs != w.now {
		t.Fatalf("tombstone = %v", got)
	}
}

func TestLeafTTLChangeIsDated(t *testing.T) {
	w := newWorld(t)
	if got := w.s.View().Cluster().LeafTtlChangedNs; got != 0 {
		t.Fatalf("at init: %d, want 0", got)
	}
	w.ok(put(w.s.View().Cluster(), func(c *api.Cluster) { c.LeafTtlNs = int64(24 * time.Hour) }))
	at := w.now
	w.ok(put(w.s.View().Cluster(), func(c *api.Cluster) { c.LeafTtlChangedNs = 1 }))
	if got := w.s.View().Cluster().LeafTtlChangedNs; got != at {
		t.Fatalf("changed at %d, want %d", got, at)
	}
}

func TestSpecVersion(t *testing.T) {
	w := newWorld(t)
	w.ok(put(w.s.View().Service(w.web.Id), func(s *api.Service) { s.Spec.Replicas = 5 }))
	if got := w.s.View().Service(w.web.Id).SpecVersion; got != 1 {
		t.Errorf("after scaling: %d, want 1", got)
	}
	w.ok(put(w.s.View().Service(w.web.Id), func(s *api.Service) { s.Spec.Task.Command, s.SpecVersion = []string{"x"}, 99 }))
	if got := w.s.View().Service(w.web.Id).SpecVersion; got != 2 {
		t.Errorf("after a change of the task: %d, want 2", got)
	}
}

func TestPlacementCountsReservations(t *testing.T) {
	w := newWorld(t)
	s := storetest.Service("big", "default")
	s.Spec.Task.Resources = &api.Resources{ReserveNanoCpus: 3e9, ReserveMemoryBytes: 1 << 30}
	one, two := storetest.Task(s, 1), storetest.Task(s, 2)
	w.ok(store.Put(s, 0), store.Put(one, 0), store.Put(two, 0))
	r := w.apply(store.Put(storetest.Placed(one, w.worker.Id), 1), store.Put(storetest.Placed(two, w.worker.Id), 1))
	if r.Code != string(warden.CodeNoFit) || !strings.Contains(r.Text, "1000000000 of 4000000000 nano CPUs free") {
		t.Fatalf("both: %q [%s]", r.Text, r.Code)
	}
	one = storetest.Placed(one, w.worker.Id)
	w.ok(store.Put(one, 1))
	w.ok(storetest.Report(one, api.TaskState_TASK_COMPLETE))
	w.ok(store.Put(storetest.Placed(two, w.worker.Id), 1))

	// Within one command, too: what ends makes room, what is placed takes it.
	four, five := storetest.Task(s, 4), storetest.Task(s, 5)
	w.ok(store.Put(four, 0), store.Put(five, 0))
	two = storetest.Placed(two, w.worker.Id)
	end := storetest.Report(two, api.TaskState_TASK_COMPLETE)
	if r := w.apply(store.Put(storetest.Placed(four, w.worker.Id), 1), end); r.Code != string(warden.CodeNoFit) {
		t.Fatalf("before the end: [%s]", r.Code)
	}
	ended := storetest.Report(storetest.Placed(four, w.worker.Id), api.TaskState_TASK_FAILED)
	w.ok(end, store.Put(storetest.Placed(four, w.worker.Id), 1), ended, store.Put(storetest.Placed(five, w.worker.Id), 1))

	unknown := storetest.Node("w2", w.workers)
	unknown.Description = nil
	w.ok(storetest.Join(unknown)...)
	three := storetest.Task(s, 3)
	w.ok(store.Put(three, 0))
	if r := w.apply(store.Put(storetest.Placed(three, unknown.Id), 1)); r.Code != string(warden.CodeNoFit) {
		t.Fatalf("on a node that said nothing: [%s]", r.Code)
	}
}

func TestExposureIsDerived(t *testing.T) {
	w := newWorld(t)
	e := w.s.View().ExposuresByNode(w.worker.Id)
	if len(e) != 1 || e[0].SecretName != "open" || e[0].FirstTaskId != w.running.Id || e[0].FirstNs != w.now {
		t.Fatalf("exposures = %v", e)
	}
	firstSeen := w.now
	w.ok(store.Put(storetest.Placed(w.webTask, w.worker.Id), 1))
	e = w.s.View().ExposuresByNode(w.worker.Id)
	if len(e) != 1 || e[0].FirstNs != firstSeen || e[0].LastNs != w.now || e[0].FirstTaskId != w.running.Id || e[0].Meta.Version != 2 {
		t.Fatalf("exposures = %v", e)
	}

	// It outlives the node while the version lives, and the version while the node lives; not both.
	v := w.s.View()
	w.ok(store.Put(&api.Tombstone{Id: w.worker.Id, Role: api.Role_ROLE_WORKER}, 0), store.Delete(v.Node(w.worker.Id)))
	if len(w.s.View().Exposures()) != 1 {
		t.Fatal("the exposure is gone with its node")
	}
	w.ok(store.Delete(w.s.View().Service(w.web.Id)), store.Delete(w.s.View().Task(w.running.Id)), store.Delete(w.s.View().Task(w.webTask.Id)))
	w.ok(store.Delete(w.s.View().Secret(w.open.Id)))
	if v := w.s.View(); len(v.Exposures()) != 0 || len(v.SecretVersions(w.open.Id)) != 0 {
		t.Fatalf("left: %v %v", v.Exposures(), v.SecretVersions(w.open.Id))
	}
}

func TestI6SecretStaysOutOfOtherZones(t *testing.T) {
	w := newWorld(t)
	w.ok(store.Put(storetest.Placed(w.vaultTask, w.pci.Id), 1)) // where it may
	if got := w.s.View().ExposuresByNode(w.pci.Id); len(got) != 1 || got[0].SecretId != w.card.Id {
		t.Fatalf("exposures = %v", got)
	}
	// A task whose spec claims another zone than the secret's is refused at the placement, whoever made it.
	forged := storetest.Task(w.web, 7)
	forged.Spec.Secrets = []*api.SecretReference{storetest.Reference(w.card)}
	w.ok(store.Put(forged, 0))
	if r := w.apply(store.Put(storetest.Placed(forged, w.worker.Id), 1)); r.Code != string(warden.CodeWrongZone) {
		t.Fatalf("placing it = %q [%s]", r.Text, r.Code)
	}
	for _, e := range w.s.View().ExposuresByNode(w.worker.Id) {
		if e.SecretId == w.card.Id {
			t.Fatal("the worker was exposed to the secret")
		}
	}
}

func TestReports(t *testing.T) {
	w := newWorld(t)
	state := func() api.TaskState { return w.s.View().Task(w.running.Id).Status.State }
	other := api.Clone(w.running)
	other.NodeId = w.pci.Id
	steps := []struct {
		name string
		op   *api.Operation
		want api.TaskState
	}{
		{"forward", storetest.Report(w.running, api.TaskState_TASK_RUNNING), api.TaskState_TASK_RUNNING},
		{"late", storetest.Report(w.running, api.TaskState_TASK_STARTING), api.TaskState_TASK_RUNNING},
		{"of another node", storetest.Report(other, api.TaskState_TASK_FAILED), api.TaskState_TASK_RUNNING},
		{"of a task that is gone", storetest.Report(&api.Task{Id: w0, NodeId: w.worker.Id}, api.TaskState_TASK_FAILED), api.TaskState_TASK_RUNNING},
		{"of a task that is not placed", storetest.Report(w.webTask, api.TaskState_TASK_FAILED), api.TaskState_TASK_RUNNING},
		{"unknown", storetest.Report(w.running, 77), api.TaskState_TASK_RUNNING},
		{"end", storetest.Report(w.running, api.TaskState_TASK_FAILED), api.TaskState_TASK_FAILED},
		{"after the end", storetest.Report(w.running, api.TaskState_TASK_ORPHANED), api.TaskState_TASK_FAILED},
	}
	for _, s := range steps {
		w.ok(s.op)
		if got := state(); got != s.want {
			t.Errorf("%s: state = %s, want %s", s.name, got.Word(), s.want.Word())
		}
	}
	if got := w.s.View().Task(w.webTask.Id).Status.State; got != api.TaskState_TASK_PENDING {
		t.Errorf("the task that is not placed is %s", got.Word())
	}
	version := w.s.View().Task(w.running.Id).Meta.Version
	w.ok(storetest.Report(w.running, api.TaskState_TASK_FAILED))
	if got := w.s.View().Task(w.running.Id).Meta.Version; got != version {
		t.Errorf("a report without news made version %d of %d", got, version)
	}
}

func TestReportsAreClipped(t *testing.T) {
	w := newWorld(t)
	r := storetest.Report(w.running, api.TaskState_TASK_FAILED)
	r.GetReportTask().Status.Error = strings.Repeat("é", 4000)
	w.ok(r)
	if got := w.s.View().Task(w.running.Id).Status.Error; len(got) != 1024 || strings.Trim(got, "é") != "" {
		t.Fatalf("%d bytes", len(got))
	}
}

func TestEvictedNodeReportsNothing(t *testing.T) {
	w := newWorld(t)
	w.ok(store.Put(&api.Tombstone{Id: w.worker.Id, Role: api.Role_ROLE_WORKER}, 0))
	before := w.s.View().Node(w.worker.Id).Meta.Version
	w.ok(storetest.Report(w.running, api.TaskState_TASK_RUNNING),
		&api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: w.worker.Id, Ip: "10.0.0.9"}}})
	if v := w.s.View(); v.Task(w.running.Id).Status.State != api.TaskState_TASK_ASSIGNED || v.Node(w.worker.Id).Meta.Version != before {
		t.Fatal("the evicted node was heard")
	}
}

func TestDescribeNode(t *testing.T) {
	w := newWorld(t)
	describe := func(d *api.NodeDescription, ip string) {
		w.ok(&api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: w.worker.Id, Description: d, Ip: ip}}})
	}
	describe(&api.NodeDescription{Hostname: "w1", NanoCpus: 1e9}, "10.0.0.1")
	n := w.s.View().Node(w.worker.Id)
	if n.Description.NanoCpus != 1e9 || n.Ip != "10.0.0.1" || n.Meta.Version != 2 {
		t.Fatalf("node = %v", n)
	}
	describe(nil, "")
	describe(&api.NodeDescription{NanoCpus: -1}, "10.0.0.2")
	describe(&api.NodeDescription{Version: strings.Repeat("x", 1000)}, "10.0.0.2")
	if again := w.s.View().Node(w.worker.Id); !proto.Equal(again, n) {
		t.Fatalf("node = %v, want %v", again, n)
	}
}

func TestZoneInUseNamesItsUsers(t *testing.T) {
	w := newWorld(t)
	r := w.apply(store.Delete(w.s.View().Zone("pci")))
	for _, want := range []string{"node p1", "service vault", "secret card"} {
		if !strings.Contains(r.Text, want) {
			t.Errorf("text %q lacks %q", r.Text, want)
		}
	}
}

func TestResolve(t *testing.T) {
	w := newWorld(t)
	twin := storetest.Node("w1", w.workers)
	w.ok(storetest.Join(twin)...)
	v := w.s.View()
	for _, c := range []struct {
		kind api.Kind
		ref  string
		id   string
		want warden.Code
	}{
		{api.Kind_KIND_SERVICE, "web", w.web.Id, ""},
		{api.Kind_KIND_SERVICE, w.web.Id, w.web.Id, ""},
		{api.Kind_KIND_SERVICE, w.web.Id[:12], w.web.Id, ""},
		{api.Kind_KIND_NODE, "p1", w.pci.Id, ""},
		{api.Kind_KIND_NODE, "w1", "", warden.CodeAmbiguous},
		{api.Kind_KIND_SECRET, "card", w.card.Id, ""},
		{api.Kind_KIND_SECRET, "car", "", warden.CodeNotFound},
		{api.Kind_KIND_TOKEN, w.workers.Id, w.workers.Id, ""},
		{api.Kind_KIND_SERVICE, "", "", warden.CodeInvalid},
		{api.Kind_KIND_UNSPECIFIED, "x", "", warden.CodeInvalid},
		{api.Kind_KIND_SERVICE, "web\x00", "", warden.CodeNotFound},
	} {
		id, err := v.Resolve(c.kind, c.ref)
		if id != c.id || warden.CodeOf(err) != c.want {
			t.Errorf("Resolve(%v, %q) = %q, %v; want %q [%s]", c.kind, c.ref, id, err, c.id, c.want)
		}
	}
}

func TestViewsAreSortedAndImmutable(t *testing.T) {
	w := newWorld(t)
	for i := range uint64(11) {
		w.ok(store.Put(storetest.SecretVersion(w.open, i+3), 0))
	}
	v := w.s.View()
	for i, sv := range v.SecretVersions(w.open.Id) {
		if sv.Version != uint64(i+1) {
			t.Fatalf("version %d at %d", sv.Version, i)
		}
	}
	tasks := len(v.Tasks())
	w.ok(store.Delete(v.Task(w.webTask.Id)))
	if len(v.Tasks()) != tasks || v.Task(w.webTask.Id) == nil || w.s.View().Task(w.webTask.Id) != nil {
		t.Fatal("the old view changed, or the new one did not")
	}
	ids := func(tasks []*api.Task) (out []string) {
		for _, t := range tasks {
			out = append(out, t.Id)
		}
		return out
	}
	if got := ids(v.TasksByService(w.web.Id)); len(got) != 2 || !slices.IsSorted(got) {
		t.Fatalf("tasks by service = %v", got)
	}
	if got := ids(v.TasksByNode(w.worker.Id)); len(got) != 1 || got[0] != w.running.Id {
		t.Fatalf("tasks by node = %v", got)
	}
	if o := v.Object(api.Kind_KIND_TASK, w.webTask.Id); o.GetTask().GetId() != w.webTask.Id || v.Object(99, "x") != nil {
		t.Fatal("Object gives another one")
	}
}

func TestRestoreRefusesDamage(t *testing.T) {
	good := newWorld(t).snapshot()
	if _, err := store.ReadState(bytes.NewReader(good)); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(good); i += 7 {
		if _, err := store.ReadState(bytes.NewReader(good[:i])); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Fatalf("cut at %d of %d: %v", i, len(good), err)
		}
	}
	if _, err := store.ReadState(bytes.NewReader(append(slices.Clone(good), 0))); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Fatalf("with a byte more: %v", err)
	}
	zone := store.Wrap(storetest.Zone("z"))
	if err := store.WriteSnapshot(&bytes.Buffer{}, zone, zone); err == nil {
		t.Fatal("the same object twice is accepted")
	}
}

func TestNoun(t *testing.T) {
	if got := fmt.Sprint(store.Noun(api.Kind_KIND_SECRET_VERSION), "/", store.Noun(api.Kind_KIND_NODE)); got != "secret version/node" {
		t.Fatal(got)
	}
}
