package history

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/internal/courier"
	"warden/internal/leaktest"
	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/test/bed"
)

func TestMain(m *testing.M) {
	bed.Main()
	leaktest.Main(m)
}

const (
	clients     = 9
	limit       = time.Minute // for what takes moments on a quiet machine
	changeEvery = 2500 * time.Millisecond

	valueBytes = 128 // of the value of a secret, and as many more as its tag says: reads show the size
	callsMax   = 150 // on one object; then it makes room for a new one
	doubtsMax  = 6
)

// zones of the cluster.
var zones = []string{warden.DefaultZone, "vault"}

// member is a host of the cluster.
type member struct {
	*bed.Host
	connection              // of the test's own user
	other      connection   // of another one
	zones      *whereabouts // where its tasks are
	id         string       // of its node; only the test's own goroutine uses it
	isDown     bool         // its daemon was ended; as id
}

// run is one cluster and what is done to it.
type run struct {
	t                 *testing.T
	bed               *bed.Bed
	history           *history
	managers, workers []*member
	members           []*member // both
	canary            string    // that all values of secrets begin with
	secrets, services *pool
	zones             *pool // that come and go
	users             zoneUsers
	tokens            tokenPool
	nodes             nodePool
	authors           authors
	tags, readers     atomic.Uint64
	diskFull          atomic.Bool  // somewhere: calls may fail for that
	diskFreed         atomic.Int64 // when it was not any more, in ns since 1970: calls that began before may fail yet

	mu       sync.Mutex        // guards all below
	secret   map[string]string // what nobody may find anywhere, and what it is
	needles  *needles          // of these; nil: made when needed
	keys     map[string]string // unlock keys, by ID
	changed  time.Time         // when a client changed the cluster last
	changes  []string          // what clients are to change of the cluster next
	observed map[string]bool   // what was said to be violated: each is said once
	purges   []purge
	stolen   []thief.Member // of managers that were removed
}

// violated fails the test: an invariant does not hold. Any goroutine may call it.
func (r *run) violated(invariant, format string, args ...any) {
	text := invariant + ": " + fmt.Sprintf(format, args...)
	r.mu.Lock()
	known := r.observed[text]
	r.observed[text] = true
	r.mu.Unlock()
	if !known {
		r.t.Errorf("%s %s", time.Now().UTC().Format("15:04:05.000"), text)
	}
}

// plant notes what nobody may find anywhere.
func (r *run) plant(what, value string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.secret[value], r.needles = what, nil
}

// planted finds what was planted.
func (r *run) planted() *needles {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.needles == nil {
		r.needles = newNeedles(maps.Clone(r.secret))
	}
	return r.needles
}

// value is what a secret gets by a call: it says which one, and where it may be.
func (r *run) value(name string, tag uint64) []byte {
	b := []byte(fmt.Sprintf("%s/%s/%d/", r.canary, name, tag))
	return append(b, strings.Repeat(".", valueBytes+int(tag)-len(b))...)
}

func (r *run) newUnlockKey() (id string, recipient []byte) {
	key, err := autolock.NewUnlockKey()
	if err != nil {
		panic(err) // no randomness
	}
	to := key.Recipient()
	_ = key.Text().Use(func(text []byte) error {
		parts := strings.Split(string(text), "-")
		r.plant("unlock key "+to.KeyID(), slices.MaxFunc(parts, func(a, b string) int { return len(a) - len(b) }))
		r.mu.Lock()
		defer r.mu.Unlock()
		r.keys[to.KeyID()] = string(text)
		return nil
	})
	return to.KeyID(), to[:]
}

// changeOfCluster returns what a client is to change of the cluster now: each in turn, in an order that is drawn. "": nothing.
func (r *run) changeOfCluster(rand *mathrand.Rand) (what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.changed) < changeEvery {
		return ""
	}
	r.changed = time.Now()
	if len(r.changes) == 0 {
		r.changes = []string{"on", "rotate", "off", "rotate-dek", "rotate-issuing", "rotate-issuing", "ttl"}
		rand.Shuffle(len(r.changes), func(i, j int) { r.changes[i], r.changes[j] = r.changes[j], r.changes[i] })
	}
	what, r.changes = r.changes[0], r.changes[1:]
	return what
}

// place is a name in a pool and the zones that it is for; none: all.
type place struct {
	name  string
	zones []string
}

func (p place) mayEnter(zone string) bool { return len(p.zones) == 0 || slices.Contains(p.zones, zone) }

// pool is the names of one kind that clients use now, and all that they used. Safe for concurrent use.
type pool struct {
	kind    string // prefix of names; objects are kind/name
	history *history
	model   porcupine.Model
	mu      sync.Mutex // guards all below
	now     []place
	made    []place // all ever
	tags    map[string]uint64
}

func newPool(kind string, h *history, model porcupine.Model, places ...[]string) *pool {
	p := &pool{kind: kind, history: h, model: model, tags: map[string]uint64{}, now: make([]place, len(places))}
	for i, zones := range places {
		p.now[i].zones = zones
		p.renew(i)
	}
	return p
}

// renew puts a new name in a place. p.mu is held.
func (p *pool) renew(i int) {
	p.now[i].name = fmt.Sprintf("%s-%d", p.kind, len(p.made)+1)
	p.history.object(p.kind+"/"+p.now[i].name, p.model)
	p.made = append(p.made, p.now[i])
}

func (p *pool) pick(intN func(int) int) place {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := intN(len(p.now))
	if calls, doubts := p.history.size(p.kind + "/" + p.now[i].name); calls >= callsMax || doubts >= doubtsMax {
		p.renew(i)
	}
	return p.now[i]
}

// more returns a new name that no other client gets.
func (p *pool) more(zones ...string) place {
	p.mu.Lock()
	defer p.mu.Unlock()
	made := place{fmt.Sprintf("%s-%d", p.kind, len(p.made)+1), zones}
	p.history.object(p.kind+"/"+made.name, p.model)
	p.made = append(p.made, made)
	return made
}

func (p *pool) names() (all []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.now {
		all = append(all, n.name)
	}
	return all
}

// ever returns all names that were in the pool.
func (p *pool) ever() []place {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.made)
}

// tag returns a new one of the name.
func (p *pool) tag(name string) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tags[name]++
	return p.tags[name]
}

// tokenPool is the tokens that clients join with. Safe for concurrent use; its zero value is ready.
type tokenPool struct {
	mu  sync.Mutex // guards all
	all []*joinToken
}

const tokensAtOnce = 3

func (p *tokenPool) add(t *joinToken) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, t)
}

// pick returns one of the newest, false where a new one is due.
func (p *tokenPool) pick(intN func(int) int) (*joinToken, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.all) < tokensAtOnce {
		return nil, false
	}
	t := p.all[len(p.all)-1-intN(tokensAtOnce)]
	t.mu.Lock()
	defer t.mu.Unlock()
	return t, t.joins < max(t.max, 2)+3
}

func (p *tokenPool) ever() []*joinToken {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.all)
}

// nodePool is the nodes that clients make calls on. Safe for concurrent use; its zero value is ready.
type nodePool struct {
	mu   sync.Mutex // guards all
	now  []*node
	made []*node // all ever
}

func (p *nodePool) add(n *node, h *history, init nodeState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h.object(n.object, nodeModel(init))
	p.now, p.made = append(p.now, n), append(p.made, n)
}

// gone takes one out of use that was removed, and says so.
func (p *nodePool) gone(n *node) {
	n.isGone.Store(true)
	if g := n.guest; g != nil {
		g.mu.Lock()
		g.gone = true
		g.mu.Unlock()
	}
	p.retire(n)
}

// retire takes one out of use.
func (p *nodePool) retire(n *node) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now = slices.DeleteFunc(p.now, func(o *node) bool { return o == n })
}

func (p *nodePool) pick(intN func(int) int) (*node, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.now) == 0 {
		return nil, false
	}
	return p.now[intN(len(p.now))], true
}

func (p *nodePool) known() []*node {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.now)
}

func (p *nodePool) ever() []*node {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.made)
}

// newRun makes a cluster of three managers, two workers of the default zone and one of the other.
func newRun(t *testing.T) *run {
	b := bed.New(t)
	h := newHistory()
	r := &run{t: t, bed: b, history: h, secret: map[string]string{}, keys: map[string]string{}, observed: map[string]bool{}}
	t.Cleanup(func() { // before the bed ends
		if !t.Failed() {
			return
		}
		if err := h.list(filepath.Join(b.Dir, "history")); err != nil {
			t.Error(err)
		}
	})
	random := make([]byte, 8)
	rand.Read(random)
	r.canary = "canary-" + hex.EncodeToString(random)
	r.plant("the value of a secret", r.canary)
	r.secrets = newPool("secret", h, secretModel, nil, nil, zones[:1], zones[1:])
	r.services = newPool("service", h, serviceModel, zones[:1], zones[:1], zones[1:])
	r.zones = newPool("zone", h, zoneModel, nil, nil)

	m, w := b.Cluster(3, 2, bed.WithDisk(96<<20))
	m[0].Ctl("zone", "create", zones[1])
	extra := b.Hosts([]string{"w3"})
	extra[0].Join(m[0].Token("--zone", zones[1], "worker"), m[0])
	b.AwaitReady(m[0], 6)
	for _, h := range append(append(slices.Clone(m), w...), extra...) {
		for _, dir := range []string{b.Dir, filepath.Join(b.Dir, h.Name)} {
			if err := os.Chmod(dir, 0o710); err != nil { // so that the group may reach the socket
				t.Fatal(err)
			}
		}
		one := &member{Host: h, connection: r.connect(h, os.Getuid()), other: r.connect(h, otherUser), zones: in(warden.DefaultZone)}
		if h == extra[0] {
			one.zones = in(zones[1])
		}
		r.members = append(r.members, one)
	}
	r.managers, r.workers = r.members[:3], r.members[3:]
	testcluster.Await(t, limit, func() error {
		reply, err := r.managers[0].control.List(t.Context(), &api.ListRequest{Kind: api.Kind_KIND_CLUSTER})
		if err == nil {
			c := reply.Objects[0].GetCluster()
			h.object("cluster/lock", lockModel(lockState{DEK: c.DekGeneration}))
			h.object("cluster/issuing", issuingModel(c.IssuingGeneration))
			h.object("cluster/ttl", ttlModel(uint64(c.LeafTtlNs)))
		}
		return err
	})
	var reply *api.ListReply
	testcluster.Await(t, limit, func() (err error) {
		reply, err = r.managers[0].control.List(t.Context(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
		return err
	})
	r.authors.from = reply.Index
	for _, o := range reply.Objects {
		n := o.GetNode()
		i := slices.IndexFunc(r.members, func(m *member) bool { return m.Name == n.Hostname })
		r.members[i].id = n.Id
		r.authors.is(n.Hostname, n.Id)
		made := &node{id: n.Id, zones: in(n.Zone), object: "node/" + n.Id}
		made.wasManager.Store(n.WasManager)
		r.nodes.add(made, h, nodeState{n.Availability.Word(), n.DesiredRole.Word()})
	}
	return r
}

// client returns a new one, with random numbers of its own.
func (r *run) client(n int) *client {
	return &client{run: r, n: n, rand: mathrand.New(mathrand.NewPCG(r.bed.Rand.Uint64(), uint64(n))), seen: map[string]*api.Service{}}
}

// reader returns one more client, for the goroutine of c.
func (c *client) reader() *client {
	return &client{run: c.run, n: int(c.readers.Add(1)) + clients, rand: mathrand.New(mathrand.NewPCG(c.rand.Uint64(), 0)), seen: map[string]*api.Service{}}
}

// under makes random calls while do runs.
func (r *run) under(do func(c *client)) {
	ctx, stop := context.WithCancel(r.t.Context())
	var wg sync.WaitGroup
	for n := range clients {
		c := r.client(n)
		wg.Go(func() { c.loop(ctx) })
	}
	wg.Go(func() { r.observe(ctx) })
	defer wg.Wait()
	defer stop()
	do(r.client(clients))
}

// hold waits.
func (r *run) hold(d time.Duration) {
	select {
	case <-time.After(d):
	case <-r.t.Context().Done():
	}
}

// start starts a daemon that has ended, and unlocks it where it is locked.
func (r *run) start(m *member) {
	m.Start()
	m.isDown = false
	r.unlock(m)
}

// unlock gives a daemon the unlock key that it asks for, if it asks.
func (r *run) unlock(m *member) {
	testcluster.Await(r.t, limit, func() error {
		ctx, cancel := context.WithTimeout(r.t.Context(), patience)
		defer cancel()
		info, err := m.local.Info(ctx, &api.InfoRequest{})
		if err != nil || info.State == "starting" {
			return fmt.Errorf("%s after its start: %q, %v", m.Name, info.GetState(), err)
		}
		if info.State != "locked" {
			return nil
		}
		r.mu.Lock()
		key, ok := r.keys[info.UnlockKeyId]
		r.mu.Unlock()
		if !ok {
			return fmt.Errorf("%s wants unlock key %q, which nobody made", m.Name, info.UnlockKeyId)
		}
		return unlockWith(ctx, m, info, key)
	})
}

func unlockWith(ctx context.Context, m *member, info *api.InfoReply, key string) error {
	sealed, err := courier.Seal(info.UnlockInbox, []byte(key))
	if err != nil {
		return err
	}
	_, err = m.local.Unlock(ctx, &api.UnlockRequest{SealedKey: sealed})
	return err
}

// purge is the removal of a node that was a manager, which revokes all tokens that have a use left.
type purge struct{ began, ended int64 }

// purged notes a purge that has just ended, and writes down what it means for each token: before is those of its begin.
func (r *run) purged(c *client, began int64, unknown bool, before []*joinToken) {
	r.mu.Lock()
	r.purges = append(r.purges, purge{began, r.history.now()})
	r.mu.Unlock()
	for _, t := range r.tokens.ever() {
		r.history.add(c.n, t.object, call{Verb: "purge"}, began, reply{Unknown: unknown || !slices.Contains(before, t)})
	}
}

// mayBePurged reports whether a token that was minted from then to now may have been revoked by a purge that has ended.
func (r *run) mayBePurged(began int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.purges, func(p purge) bool { return p.ended > began })
}
