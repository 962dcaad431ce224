package rafttransport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"

	"warden/store/rafttransport"
	"warden/store/sealedlog"
)

const clusterID = "cluster000000000000000000"

// sealer is what autolock's keyring is.
type sealer struct{ a tink.AEAD }

func (s sealer) Seal(plaintext, aad []byte) ([]byte, error) { return s.a.Encrypt(plaintext, aad) }
func (s sealer) Open(sealed, aad []byte) ([]byte, error)    { return s.a.Decrypt(sealed, aad) }

// list is a state machine that keeps all that was applied, a line each; a line that comes twice in a row counts once, as its
// proposer tries again when an election came between.
type list struct {
	mu    sync.Mutex // guards lines
	lines []byte
}

func (l *list) Apply(e *raft.Log) any {
	l.mu.Lock()
	defer l.mu.Unlock()
	if line := append(bytes.Clone(e.Data), '\n'); !bytes.HasSuffix(l.lines, line) {
		l.lines = append(l.lines, line...)
	}
	return nil
}

func (l *list) Snapshot() (raft.FSMSnapshot, error) { return image(l.get()), nil }

func (l *list) Restore(r io.ReadCloser) error {
	b, err := io.ReadAll(r)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = b
	return errors.Join(err, r.Close())
}

func (l *list) get() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.lines)
}

type image []byte

func (i image) Persist(s raft.SnapshotSink) error {
	_, err := s.Write(i)
	return err
}
func (image) Release() {}

// member is one manager of the test's cluster; its files and its port outlive a restart.
type member struct {
	id     string
	dir    string
	sealer sealer
	listen net.Listener
	run    *running
}

// running is what a restart replaces.
type running struct {
	raft *raft.Raft
	fsm  *list
	tr   *rafttransport.Transport
	log  *sealedlog.Log
}

type cluster struct {
	t       *testing.T
	members map[string]*member
	mu      sync.Mutex // guards member.run against the accepting goroutines
}

func newCluster(t *testing.T, ids ...string) *cluster {
	c := &cluster{t: t, members: map[string]*member{}}
	for _, id := range ids {
		h, err := keyset.NewHandle(aead.XChaCha20Poly1305KeyTemplate())
		if err != nil {
			t.Fatal(err)
		}
		a, err := aead.New(h)
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		m := &member{id: id, dir: t.TempDir(), sealer: sealer{a}, listen: l}
		c.members[id] = m
		t.Cleanup(func() { l.Close() })
		go c.accept(m)
	}
	t.Cleanup(func() {
		for _, m := range c.members {
			c.stop(m)
		}
	})
	return c
}

// accept plays the door: the caller says who it is, where TLS would prove it. It ends when the listener is closed.
func (c *cluster) accept(m *member) {
	for {
		conn, err := m.listen.Accept()
		if err != nil {
			return
		}
		peer := make([]byte, len(alice))
		if _, err := io.ReadFull(conn, peer); err != nil {
			conn.Close()
			continue
		}
		c.mu.Lock()
		run := m.run
		c.mu.Unlock()
		if run == nil {
			conn.Close()
			continue
		}
		go run.tr.Serve(conn, string(peer))
	}
}

func (c *cluster) start(m *member) {
	c.t.Helper()
	logger := slog.New(slog.DiscardHandler)
	l, err := sealedlog.Open(m.dir, clusterID, m.id, m.sealer, logger)
	if err != nil {
		c.t.Fatal(err)
	}
	sn, err := sealedlog.OpenSnapshots(m.dir, clusterID, m.id, m.sealer, 2, logger)
	if err != nil {
		c.t.Fatal(err)
	}
	tr := rafttransport.New(m.id, func(ctx context.Context, id string) (net.Conn, error) {
		to, ok := c.members[id]
		if !ok {
			return nil, fmt.Errorf("nobody is called %q", id)
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.listen.Addr().String())
		if err == nil {
			_, err = io.WriteString(conn, m.id)
		}
		return conn, err
	}, logger)
	conf := raft.DefaultConfig()
	conf.LocalID, conf.Logger = raft.ServerID(m.id), rafttransport.HCLog(logger)
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = 500*time.Millisecond, 500*time.Millisecond, 250*time.Millisecond
	conf.TrailingLogs, conf.SnapshotThreshold = 5, 1_000_000
	run := &running{fsm: &list{}, tr: tr, log: l}
	if run.raft, err = raft.NewRaft(conf, run.fsm, l, l, sn, tr); err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	m.run = run
	c.mu.Unlock()
}

func (c *cluster) stop(m *member) {
	c.mu.Lock()
	run := m.run
	m.run = nil
	c.mu.Unlock()
	if run == nil {
		return
	}
	if err := errors.Join(run.raft.Shutdown().Error(), run.log.Close()); err != nil {
		c.t.Error(err)
	}
}

// until asks for ok every few milliseconds, up to a deadline.
func (c *cluster) until(what string, ok func() bool) {
	c.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			c.t.Fatal("waited too long for ", what)
		}
	}
}

func (c *cluster) leader() *member {
	c.t.Helper()
	var leader *member
	c.until("a leader", func() bool {
		for _, m := range c.members {
			if m.run != nil && m.run.raft.VerifyLeader().Error() == nil {
				leader = m
				return true
			}
		}
		return false
	})
	return leader
}

// apply has the leader append n lines and returns when they are committed.
func (c *cluster) apply(from, n int) {
	c.t.Helper()
	leader := c.leader()
	for i := range n {
		c.until("a commit", func() bool {
			err := leader.run.raft.Apply(fmt.Appendf(nil, "line %d", from+i), 10*time.Second).Error()
			if err != nil {
				leader = c.leader() // a loaded machine may have made an election necessary
			}
			return err == nil
		})
	}
}

// settled waits until every running member has applied the first n lines.
func (c *cluster) settled(n int) {
	c.t.Helper()
	var want []byte
	for i := range n {
		want = fmt.Appendf(want, "line %d\n", i)
	}
	for id, m := range c.members {
		if m.run != nil {
			c.until("the lines at "+id, func() bool { return bytes.Equal(m.run.fsm.get(), want) })
		}
	}
}

func bootstrap(t *testing.T) *cluster {
	c := newCluster(t, alice, bob, carol)
	var conf raft.Configuration
	for id, m := range c.members {
		conf.Servers = append(conf.Servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id)})
		c.start(m)
	}
	if err := c.members[alice].run.raft.BootstrapCluster(conf).Error(); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestThreeManagers elects, applies, hands leadership over, restarts all without a snapshot, and again with one.
func TestThreeManagers(t *testing.T) {
	c := bootstrap(t)
	c.apply(0, 20)
	c.settled(20)
	c.until("a handover", func() bool { return c.leader().run.raft.LeadershipTransfer().Error() == nil })
	c.apply(20, 1)
	for round := range 2 {
		for _, m := range c.members {
			c.stop(m)
		}
		for _, m := range c.members {
			c.start(m)
		}
		c.apply(21+round, 1)
		c.settled(22 + round)
		if err := c.leader().run.raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestALaggingFollowerGetsTheSnapshot: what it missed is not in the log any more. Its own log is emptied, and it survives a restart.
func TestALaggingFollowerGetsTheSnapshot(t *testing.T) {
	c := bootstrap(t)
	c.apply(0, 3)
	c.settled(3)
	leader := c.leader()
	var lagging *member
	for _, m := range c.members {
		if m != leader {
			lagging = m
		}
	}
	c.stop(lagging)
	c.apply(3, 100)
	c.settled(103)
	for id, m := range c.members { // of both: either may lead when the third comes back
		if m == lagging {
			continue
		}
		if err := m.run.raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
		if first, err := m.run.log.FirstIndex(); err != nil || first < 50 {
			t.Fatalf("the log of %s starts at %d, %v", id, first, err)
		}
	}
	c.start(lagging)
	c.settled(103)
	c.apply(103, 5)
	c.settled(108)
	if first, err := lagging.run.log.FirstIndex(); err != nil || first < 50 {
		t.Errorf("the follower's log starts at %d, %v: no snapshot was installed", first, err)
	}
	c.stop(lagging)
	c.start(lagging)
	c.settled(108)
}

// TestAMemberCannotSpeakForAnother: carol's connection carries a heartbeat and a vote request in alice's name, with a term that would
// depose the leader; nothing happens but the end of the connection.
func TestAMemberCannotSpeakForAnother(t *testing.T) {
	c := bootstrap(t)
	c.apply(0, 3)
	leader := c.leader()
	term := leader.run.raft.CurrentTerm()
	for name, call := range map[string]func(*rafttransport.Transport) error{
		"heartbeat": func(tr *rafttransport.Transport) error {
			return tr.AppendEntries(raft.ServerID(leader.id), raft.ServerAddress(leader.id),
				//lint:ignore SA1019 the old field has to be checked as well
				&raft.AppendEntriesRequest{RPCHeader: header(alice), Term: term + 100, Leader: []byte(alice)}, &raft.AppendEntriesResponse{})
		},
		"append": func(tr *rafttransport.Transport) error {
			return tr.AppendEntries(raft.ServerID(leader.id), raft.ServerAddress(leader.id),
				&raft.AppendEntriesRequest{RPCHeader: header(alice), Term: term + 100, PrevLogEntry: 1, PrevLogTerm: 1}, &raft.AppendEntriesResponse{})
		},
		"vote": func(tr *rafttransport.Transport) error {
			return tr.RequestVote(raft.ServerID(leader.id), raft.ServerAddress(leader.id),
				&raft.RequestVoteRequest{RPCHeader: header(alice), Term: term + 100, LastLogIndex: 1 << 40, LeadershipTransfer: true}, &raft.RequestVoteResponse{})
		},
	} {
		mine, theirs := pair(t)
		ended := make(chan struct{})
		go func() { defer close(ended); leader.run.tr.Serve(theirs, "mallory000000000000000000") }()
		if err := call(caller(t, mine)); err == nil {
			t.Errorf("%s in another's name passed", name)
		}
		wait(t, ended, "the end of the connection")
	}
	if got := leader.run.raft.CurrentTerm(); got >= term+100 {
		t.Errorf("term = %d, was %d: a call in another's name counted", got, term)
	}
	c.apply(3, 1)
	c.settled(4)
}
