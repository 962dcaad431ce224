package history

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/sealedlog"
	"warden/test/bed"
)

// otherUser is who half of the clients are.
const otherUser = 12345

// asOther returns the host as the other user reaches it.
func (m *member) asOther() *member {
	return &member{Host: m.Host, connection: m.other, zones: m.zones}
}

// dialAs dials a socket as a user of the group root.
func dialAs(ctx context.Context, uid int, path string) (conn net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocks it: the thread ends with the goroutine
		const same = ^uintptr(0)
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, same, uintptr(uid), same); e != 0 {
			err = e
			return
		}
		conn, err = new(net.Dialer).DialContext(ctx, "unix", path)
	}()
	<-done
	return conn, err
}

// requestIDKey is the metadata in which a call carries its request ID.
const requestIDKey = "warden-request-id"

// asker is a user at the socket of a host.
type asker struct {
	uid  int
	host string
}

// asked is a call that changes something. One that was made again has the same request ID.
type asked struct {
	method string
	by     map[asker]bool
	index  uint64 // that a reply named
	done   bool
}

type entryID struct{ index, term uint64 }

// authors is who asked for what (I12). Safe for concurrent use.
type authors struct {
	from uint64 // index at which clients begin; constant while they call

	mu      sync.Mutex                 // guards all below
	asked   map[string]*asked          // by request ID
	nodes   map[string]map[string]bool // by host: the IDs of all nodes that it was
	entries map[entryID][sha256.Size]byte
}

// is notes that a host is a node now.
func (a *authors) is(host, id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.nodes == nil {
		a.nodes = map[string]map[string]bool{}
	}
	if a.nodes[host] == nil {
		a.nodes[host] = map[string]bool{}
	}
	a.nodes[host][id] = true
}

// note gives each call that changes something a request ID, unless it has one, and notes who made it.
func (a *authors) note(h *bed.Host, uid int) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		name, isControl := strings.CutPrefix(method, "/warden.v1.Control/")
		if !isControl || name == "List" || name == "Status" {
			return invoke(ctx, method, req, reply, cc, opts...)
		}
		md, _ := metadata.FromOutgoingContext(ctx)
		ids := md.Get(requestIDKey)
		if len(ids) == 0 {
			ids = []string{warden.NewID()}
			ctx = metadata.AppendToOutgoingContext(ctx, requestIDKey, ids[0])
		}
		a.mu.Lock()
		if a.asked == nil {
			a.asked = map[string]*asked{}
		}
		if a.asked[ids[0]] == nil {
			a.asked[ids[0]] = &asked{method: name, by: map[asker]bool{}}
		}
		call := a.asked[ids[0]]
		call.by[asker{uid, h.Name}] = true
		a.mu.Unlock()
		err := invoke(ctx, method, req, reply, cc, opts...)
		if err == nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			call.done = true
			if r, ok := reply.(interface{ GetIndex() uint64 }); ok {
				call.index = r.GetIndex()
			}
		}
		return err
	}
}

// check returns what is wrong with the author of a command: whoever asked for it, by the manager that was asked, is it, and what nobody
// asked for is what managers and joiners do by themselves.
func (a *authors) check(c *api.Command) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	actor := c.GetActor()
	if actor.GetName() == "" || c.RequestId == "" || c.TimeNs == 0 {
		return errors.New("it has no author, no request ID or no time")
	}
	via := ""
	for host, ids := range a.nodes {
		if ids[actor.Via] {
			via = host
		}
	}
	if via == "" {
		return fmt.Errorf("it came by %q, which is no host", actor.Via)
	}
	id, _, _ := strings.Cut(c.RequestId, "#")
	call := a.asked[id]
	uid, err := strconv.Atoi(actor.Name)
	switch {
	case call != nil && (actor.Kind != "uid" || err != nil || !call.by[asker{uid, via}]):
		return fmt.Errorf("%v asked for this %s, and not %s %s by %s", call.by, call.method, actor.Kind, actor.Name, via)
	case call != nil:
		return nil
	}
	for _, op := range c.Operations {
		kind, record := store.Unwrap(op.GetPut().GetObject())
		if record == nil {
			kind = op.GetDelete().GetKind()
		}
		switch {
		case actor.Kind == "uid" && (kind == api.Kind_KIND_CLUSTER || kind == api.Kind_KIND_SECRET_VERSION): // new keys after the removal of a manager
		case actor.Kind == "node" && (op.GetUseToken() != nil || kind == api.Kind_KIND_NODE && record.GetId() == actor.Name): // its join
		case actor.Kind == "system" && ofSystem(kind, record != nil):
		default:
			return fmt.Errorf("%s %s did what nobody asked for: %s", actor.Kind, actor.Name, kind)
		}
	}
	return nil
}

// ofSystem reports whether managers change this kind of record by themselves. What is no put may remove one, or reports of nodes.
func ofSystem(kind api.Kind, put bool) bool {
	switch kind {
	case api.Kind_KIND_ZONE, api.Kind_KIND_SECRET, api.Kind_KIND_SERVICE, api.Kind_KIND_TOMBSTONE:
		return false
	case api.Kind_KIND_TOKEN:
		return !put
	}
	return true
}

// wantAuthors: each command in the log of a manager whose daemon has ended has an author, and the same place in two logs has the same
// command. It returns a copy of the manager's raft directory.
func (r *run) wantAuthors(m *member) (dir string) {
	dir = filepath.Join(r.t.TempDir(), "raft")
	if out, err := exec.Command("cp", "-a", filepath.Join(m.State(), "raft"), dir).CombinedOutput(); err != nil {
		r.t.Fatalf("%v: %s", err, out)
	}
	l, err := r.openLog(m, dir)
	if err != nil {
		r.violated("I12", "the log of %s does not open: %v", m.Name, err)
		return dir
	}
	defer l.Close()
	for e, err := range logEntries(l) {
		if err != nil {
			r.violated("I12", "the log of %s: %v", m.Name, err)
			return dir
		}
		sum := sha256.Sum256(e.Data)
		r.authors.mu.Lock()
		if r.authors.entries == nil {
			r.authors.entries = map[entryID][sha256.Size]byte{}
		}
		was, known := r.authors.entries[entryID{e.Index, e.Term}]
		r.authors.entries[entryID{e.Index, e.Term}] = sum
		r.authors.mu.Unlock()
		if known && was != sum {
			r.violated("logs", "entry %d of term %d is another one on %s than elsewhere", e.Index, e.Term, m.Name)
		}
		if e.Type != raft.LogCommand || e.Index <= r.authors.from || known {
			continue
		}
		c := new(api.Command)
		if err := proto.Unmarshal(e.Data, c); err != nil {
			r.violated("I12", "entry %d of %s is no command: %v", e.Index, m.Name, err)
		} else if err := r.authors.check(c); err != nil {
			r.violated("I12", "entry %d of %s, request %s: %v", e.Index, m.Name, c.RequestId, err)
		}
	}
	return dir
}

// openLog opens a copy of a manager's log with its keys.
func (r *run) openLog(m *member, dir string) (*sealedlog.Log, error) {
	id, err := r.openKeyFile(m)
	if err != nil {
		return nil, err
	}
	return sealedlog.Open(dir, id.ClusterID, id.NodeID, id.Keyring, slog.New(slog.DiscardHandler))
}

// logEntries yields all entries of a log.
func logEntries(l *sealedlog.Log) func(yield func(*raft.Log, error) bool) {
	return func(yield func(*raft.Log, error) bool) {
		first, err1 := l.FirstIndex()
		last, err2 := l.LastIndex()
		if err := errors.Join(err1, err2); err != nil {
			yield(nil, err)
			return
		}
		for i := max(first, 1); i <= last; i++ {
			e := new(raft.Log)
			if err := l.GetLog(i, e); !yield(e, err) || err != nil {
				return
			}
		}
	}
}

// alwaysChange are the calls that succeed only where a command of theirs was committed.
var alwaysChange = map[string]bool{"CreateToken": true, "CreateZone": true, "CreateService": true, "CreateSecret": true, "RotateSecret": true,
	"RemoveZone": true, "RemoveService": true, "RemoveSecret": true, "RemoveNode": true, "RotateDEK": true, "RotateIssuing": true}

// wantResults: a manager's snapshot and log have, for each call that made something and was said to be done, its request ID at the index
// that the reply named. The results in a snapshot are of the last 10,000 commands.
func (r *run) wantResults(m *member, dir string) {
	made, err := r.requests(m, dir)
	if err != nil {
		r.violated("I12", "the snapshot and log of %s: %v", m.Name, err)
		return
	}
	r.authors.mu.Lock()
	defer r.authors.mu.Unlock()
	newest := uint64(0) // what is older than this by as much as the state keeps may be forgotten
	for _, at := range made {
		newest = max(newest, slices.Max(at))
	}
	if newest > resultsMax {
		return
	}
	found := 0
	for id, call := range r.authors.asked {
		switch at := made[id]; {
		case !call.done || !alwaysChange[call.method]:
		case slices.Contains(at, call.index), call.index == 0 && len(at) > 0:
			found++
		default:
			r.violated("I12", "%s %s was said to be done at index %d, and %s has it at %v", call.method, id, call.index, m.Name, at)
		}
	}
	r.t.Logf("%s knows %d calls that made something; %d entries of logs were looked at", m.Name, found, len(r.authors.entries))
}

// resultsMax is less than the results that the state keeps.
const resultsMax = 9000

// requests returns the indexes at which a copy of a manager's raft directory has commands, by the request ID of the call.
func (r *run) requests(m *member, dir string) (map[string][]uint64, error) {
	id, err := r.openKeyFile(m)
	if err != nil {
		return nil, err
	}
	snapshots, err := sealedlog.OpenSnapshots(dir, id.ClusterID, id.NodeID, id.Keyring, 2, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	list, err := snapshots.List()
	if err != nil {
		return nil, err
	}
	made := map[string][]uint64{}
	for _, meta := range list {
		_, body, err := snapshots.Open(meta.ID)
		if err != nil {
			return nil, err
		}
		s, err := store.ReadState(body)
		body.Close()
		if err != nil {
			return nil, err
		}
		r.authors.mu.Lock()
		for id := range r.authors.asked {
			for attempt := id; ; attempt = fmt.Sprintf("%s#%d", id, len(made[id])) {
				result := s.View().Result(attempt)
				if result == nil {
					break
				}
				made[id] = append(made[id], result.Index)
			}
		}
		r.authors.mu.Unlock()
	}
	l, err := r.openLog(m, dir)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	for e, err := range logEntries(l) {
		if err != nil {
			return nil, err
		}
		c := new(api.Command)
		if err := proto.Unmarshal(e.Data, c); err == nil && e.Type == raft.LogCommand {
			id, _, _ := strings.Cut(c.RequestId, "#")
			made[id] = append(made[id], e.Index)
		}
	}
	return made, nil
}
