package store_test

import (
	"bytes"
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
	openV, cardV, second *api.SecretVersion // the second is open's current one
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
	w.ok(store.Put(w.open, 0), store.Put(w.openV, 0), store.Put(w.card, 0), store.Put(w.cardV, 0))
	w.rotate(w.open, w.second)
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

// rotate makes a version the current one.
func (w *world) rotate(s *api.Secret, v *api.SecretVersion) {
	w.t.Helper()
	w.ok(rotation(w, s, v)...)
}

func rotation(w *world, s *api.Secret, v *api.SecretVersion) ops {
	return ops{put(w.s.View().Secret(s.Id), func(s *api.Secret) { s.CurrentVersion = v.Version }), store.Put(v, 0)}
}

// follows returns a reference to whatever version is current.
func follows(s *api.Secret) *api.SecretReference {
	r := storetest.Reference(s)
	r.Version = 0
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

// w0 is an ID that nothing has.
const w0 = "0000000000000000000000000"
