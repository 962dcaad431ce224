package store_test

import (
	"fmt"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

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
		{"cluster: autolock", "", updateCluster(func(c *api.Cluster) {
			c.Autolock, c.UnlockRecipient, c.UnlockKeyId = true, hash, "k1"
			c.LockGeneration++
			c.DekGeneration++
		})},
		{"cluster: autolock of the same generation", warden.CodeInvalid, updateCluster(func(c *api.Cluster) {
			c.Autolock, c.UnlockRecipient, c.UnlockKeyId = true, hash, "k1"
			c.DekGeneration++
		})},
		{"cluster: autolock under the same DEKs", warden.CodeInvalid, updateCluster(func(c *api.Cluster) {
			c.Autolock, c.UnlockRecipient, c.UnlockKeyId = true, hash, "k1"
			c.LockGeneration++
		})},
		{"cluster: generation of the DEKs falls", warden.CodeInvalid, func(w *world) ops {
			w.ok(updateCluster(func(c *api.Cluster) { c.DekGeneration = 2 })(w)...)
			return updateCluster(func(c *api.Cluster) { c.DekGeneration = 1 })(w)
		}},

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
		{"service: follows a secret", "", func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Task.Secrets = []*api.SecretReference{follows(w.open)} })
		}},
		{"service: follows a secret of another zone", warden.CodeWrongZone, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Task.Secrets = []*api.SecretReference{follows(w.card)} })
		}},
		{"service: updated in bounds", "", func(w *world) ops {
			return service(func(s *api.Service) {
				s.Spec.Update = &api.UpdatePolicy{Parallelism: warden.ReplicasMax, DelayNs: int64(warden.UpdateDelayMax)}
			})
		}},
		{"service: updated too many at once", warden.CodeTooLarge, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Update = &api.UpdatePolicy{Parallelism: warden.ReplicasMax + 1} })
		}},
		{"service: updated too slowly", warden.CodeInvalid, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Update = &api.UpdatePolicy{DelayNs: int64(warden.UpdateDelayMax) + 1} })
		}},
		{"service: updated before now", warden.CodeInvalid, func(w *world) ops {
			return service(func(s *api.Service) { s.Spec.Update = &api.UpdatePolicy{DelayNs: -1} })
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
		{"secret: rotated", "", func(w *world) ops { return rotation(w, w.open, storetest.SecretVersion(w.open, 3)) }},
		{"secret: rotated, the version put first", "", func(w *world) ops {
			o := rotation(w, w.open, storetest.SecretVersion(w.open, 3))
			return ops{o[1], o[0]}
		}},
		{"secret: rotated without a value", warden.CodeNotFound, func(w *world) ops { return rotation(w, w.open, storetest.SecretVersion(w.open, 3))[:1] }},
		{"secret: back to an older version", warden.CodeInvalid, func(w *world) ops {
			return ops{put(w.s.View().Secret(w.open.Id), func(s *api.Secret) { s.CurrentVersion = 1 })}
		}},
		{"secret: rotated to what a follower can't hold", warden.CodeTooLarge, func(w *world) ops {
			w.fill(8)
			v := storetest.SecretVersion(w.open, 3)
			v.SizeBytes = warden.TaskSecretsMax - 8*warden.SecretBytesMax + 1
			return rotation(w, w.open, v)
		}},
		{"secret: rotated to all that a follower can hold", "", func(w *world) ops {
			w.fill(8)
			v := storetest.SecretVersion(w.open, 3)
			v.SizeBytes = warden.TaskSecretsMax - 8*warden.SecretBytesMax
			return rotation(w, w.open, v)
		}},
		{"secret: rotated after its zones left a follower out", warden.CodeWrongZone, func(w *world) ops {
			w.ok(service(func(s *api.Service) { s.Spec.Task.Secrets = []*api.SecretReference{follows(w.open)} })...)
			w.ok(put(w.s.View().Secret(w.open.Id), func(s *api.Secret) { s.Zones = []string{"pci"} }))
			return rotation(w, w.open, storetest.SecretVersion(w.open, 3))
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
			w.ok(updateCluster(func(c *api.Cluster) { c.KeysetGeneration = 2 })(w)...)
			return ops{put(w.s.View().SecretVersion(w.open.Id, 1), func(v *api.SecretVersion) { v.WrappedKey, v.KeysetGeneration = []byte("x"), 2 })}
		}},
		{"secret version: sealed under a keyset that was rotated away", warden.CodeConflict, func(w *world) ops {
			w.ok(updateCluster(func(c *api.Cluster) { c.KeysetGeneration = 2 })(w)...)
			s := storetest.Secret("late")
			return ops{store.Put(s, 0), store.Put(storetest.SecretVersion(s, 1), 0)}
		}},
		{"secret version: pinned and held", warden.CodeInUse, func(w *world) ops { return ops{remove(w.s.View().SecretVersion(w.open.Id, 1))} }},
		{"secret version: held by tasks of a removed service", warden.CodeInUse, func(w *world) ops {
			return ops{remove(w.s.View().Service(w.web.Id)), remove(w.s.View().SecretVersion(w.open.Id, 1))}
		}},
		{"secret version: held by a task that is to end", warden.CodeInUse, func(w *world) ops {
			w.ok(remove(w.s.View().Service(w.web.Id)), remove(w.s.View().Task(w.webTask.Id)))
			w.ok(updateRunning(func(t *api.Task) { t.DesiredState = api.TaskState_TASK_SHUTDOWN })(w)...)
			return ops{remove(w.s.View().SecretVersion(w.open.Id, 1))}
		}},
		{"secret version: held by a task that is not placed", warden.CodeInUse, func(w *world) ops {
			w.ok(storetest.Report(w.running, api.TaskState_TASK_COMPLETE))
			return ops{remove(w.s.View().Service(w.web.Id)), remove(w.s.View().SecretVersion(w.open.Id, 1))}
		}},
		{"secret version: its last task ended", "", func(w *world) ops {
			w.ok(storetest.Report(w.running, api.TaskState_TASK_COMPLETE))
			return ops{remove(w.s.View().Service(w.web.Id)), remove(w.s.View().Task(w.webTask.Id)), remove(w.s.View().SecretVersion(w.open.Id, 1))}
		}},
		{"secret version: older than a follower's", "", func(w *world) ops {
			w.ok(service(func(s *api.Service) { s.Spec.Task.Secrets = []*api.SecretReference{follows(w.open)} })...)
			w.rotate(w.open, storetest.SecretVersion(w.open, 3))
			return ops{remove(w.s.View().SecretVersion(w.open.Id, 2))}
		}},
		{"secret version: put without becoming the current one", warden.CodeInvalid, func(w *world) ops {
			return ops{store.Put(storetest.SecretVersion(w.open, 3), 0)}
		}},
		{"secret version: a number that was used", warden.CodeInvalid, func(w *world) ops {
			w.rotate(w.open, storetest.SecretVersion(w.open, 3))
			w.ok(remove(w.s.View().SecretVersion(w.open.Id, 2)))
			return ops{store.Put(storetest.SecretVersion(w.open, 2), 0)}
		}},
		{"secret version: the last that there may be", "", func(w *world) ops { return w.versions(warden.SecretVersionsMax - 1) }},
		{"secret version: one too many", warden.CodeTooLarge, func(w *world) ops { return w.versions(warden.SecretVersionsMax) }},
		{"secret version: current", warden.CodeInUse, func(w *world) ops {
			s := storetest.Secret("x")
			w.ok(store.Put(s, 0), store.Put(storetest.SecretVersion(s, 1), 0))
			return ops{remove(w.s.View().SecretVersion(s.Id, 1))}
		}},

		{"task: of no service", warden.CodeNotFound, func(w *world) ops {
			return ops{store.Put(storetest.Task(storetest.Service("x", "default"), 1), 0)}
		}},
		{"task: with a secret of no version", warden.CodeInvalid, func(w *world) ops {
			t := storetest.Task(w.web, 3)
			t.Spec.Secrets = []*api.SecretReference{follows(w.open)}
			return ops{store.Put(t, 0)}
		}},
		{"task: with a version that was removed", warden.CodeNotFound, func(w *world) ops {
			w.rotate(w.open, storetest.SecretVersion(w.open, 3))
			w.ok(remove(w.s.View().SecretVersion(w.open.Id, 2)))
			t := storetest.Task(w.web, 3)
			t.Spec.Secrets[0].Version = 2
			return ops{store.Put(t, 0)}
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

// fill stores n secrets of the most bytes and a service that has them, and follows open.
func (w *world) fill(n int) {
	w.t.Helper()
	s := storetest.Service("full", "default", follows(w.open))
	for i := range n {
		secret := storetest.Secret(fmt.Sprint("full", i))
		v := storetest.SecretVersion(secret, 1)
		v.SizeBytes = warden.SecretBytesMax
		w.ok(store.Put(secret, 0), store.Put(v, 0))
		s.Spec.Task.Secrets = append(s.Spec.Task.Secrets, storetest.Reference(secret))
	}
	w.ok(store.Put(s, 0))
}

// versions rotates open until it has n versions, and returns the next rotation.
func (w *world) versions(n int) ops {
	w.t.Helper()
	for len(w.s.View().SecretVersions(w.open.Id)) < n {
		w.rotate(w.open, storetest.SecretVersion(w.open, w.s.View().Secret(w.open.Id).CurrentVersion+1))
	}
	return rotation(w, w.open, storetest.SecretVersion(w.open, w.s.View().Secret(w.open.Id).CurrentVersion+1))
}
