package store_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"warden"
	"warden/api"
	"warden/internal/keyset"
	"warden/store"
	"warden/store/rafttransport"
	"warden/store/sealedlog"
	"warden/store/storetest"
)

// holder is a keyring that rotates, as a daemon's is.
type holder struct{ now atomic.Pointer[keyset.Set] }

func newHolder(t testing.TB) *holder {
	t.Helper()
	k, err := keyset.New()
	if err != nil {
		t.Fatal(err)
	}
	h := &holder{}
	h.now.Store(&k)
	return h
}

func (h *holder) Seal(plaintext, aad []byte) ([]byte, error) {
	return h.now.Load().Seal(plaintext, aad)
}
func (h *holder) Open(sealed, aad []byte) ([]byte, error) { return h.now.Load().Open(sealed, aad) }
func (h *holder) UnderPrimary(sealed []byte) bool         { return h.now.Load().UnderPrimary(sealed) }

// rotate makes a new primary and returns the keyring of before.
func (h *holder) rotate(t testing.TB) (old *keyset.Set) {
	t.Helper()
	old = h.now.Load()
	next, err := old.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	h.now.Store(&next)
	return old
}

// drop forgets all keys but the primary.
func (h *holder) drop(t testing.TB) {
	t.Helper()
	only, err := h.now.Load().OnlyPrimary()
	if err != nil {
		t.Fatal(err)
	}
	h.now.Store(&only)
}

// peer is one manager on disk, with a port that outlives its restarts.
type peer struct {
	id     string
	dir    string
	sealer *holder
	listen net.Listener
	server *tls.Config
	client *tls.Config

	mu    sync.Mutex // guards the rest
	tr    *rafttransport.Transport
	conns map[net.Conn]bool
	store *store.Store
}

// peers is managers of real files, real time and TLS over loopback.
type peers struct {
	t   testing.TB
	id  string
	all []*peer
}

// newPeers makes n managers, none of which runs.
func newPeers(t testing.TB, n int) *peers {
	t.Helper()
	p := &peers{t: t, id: warden.NewID()}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	for i := range n {
		id := warden.NewID()
		leaf := &x509.Certificate{SerialNumber: big.NewInt(int64(2 + i)), Subject: pkix.Name{CommonName: id}, DNSNames: []string{id}, NotAfter: time.Now().Add(time.Hour)}
		rootDER, err1 := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
		der, err2 := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
		root, err3 := x509.ParseCertificate(rootDER)
		listen, err4 := net.Listen("tcp", "127.0.0.1:0")
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			t.Fatal(err)
		}
		pool.AddCert(root)
		cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
		m := &peer{
			id: id, dir: filepath.Join(t.TempDir(), "raft"), sealer: newHolder(t), listen: listen, conns: map[net.Conn]bool{},
			server: &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true},
			client: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, MinVersion: tls.VersionTLS13},
		}
		p.all = append(p.all, m)
		go m.accept()
	}
	t.Cleanup(func() {
		for _, m := range p.all {
			m.listen.Close()
			m.kill()
		}
	})
	return p
}

// accept is the door. It ends when the listener is closed.
func (m *peer) accept() {
	for {
		conn, err := m.listen.Accept()
		if err != nil {
			return
		}
		go func() {
			c := tls.Server(conn, m.server)
			if c.Handshake() != nil {
				conn.Close()
				return
			}
			m.mu.Lock()
			tr := m.tr
			m.conns[conn] = true
			m.mu.Unlock()
			if tr == nil {
				conn.Close()
			} else {
				tr.Serve(c, c.ConnectionState().PeerCertificates[0].Subject.CommonName)
			}
			m.mu.Lock()
			delete(m.conns, conn)
			m.mu.Unlock()
		}()
	}
}

// transport makes the manager's transport anew.
func (p *peers) transport(m *peer) *rafttransport.Transport {
	var tr *rafttransport.Transport
	tr = rafttransport.New(m.id, func(ctx context.Context, id string) (net.Conn, error) {
		m.mu.Lock()
		gone := m.tr != tr
		m.mu.Unlock()
		if gone {
			return nil, errors.New("this process is gone")
		}
		for _, to := range p.all {
			if to.id == id {
				config := m.client.Clone()
				config.ServerName = id
				conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", to.listen.Addr().String())
				if err != nil {
					return nil, err
				}
				m.mu.Lock()
				defer m.mu.Unlock()
				if m.tr != tr {
					conn.Close()
					return nil, errors.New("this process is gone")
				}
				m.conns[conn] = true
				return conn, nil
			}
		}
		return nil, errors.New("nobody has this ID")
	}, slog.New(slog.DiscardHandler))
	m.mu.Lock()
	m.tr = tr
	m.mu.Unlock()
	return tr
}

func (p *peers) config(m *peer) store.Config {
	return store.Config{ClusterID: p.id, NodeID: m.id, Dir: m.dir, Sealer: m.sealer, Transport: p.transport(m), Logger: slog.New(slog.DiscardHandler)}
}

// bootstrap starts all as a cluster and returns the leader.
func (p *peers) bootstrap(change func(*store.Config)) *peer {
	p.t.Helper()
	first := p.all[0]
	config := func(m *peer) store.Config {
		cfg := p.config(m)
		if change != nil {
			change(&cfg)
		}
		return cfg
	}
	s, err := store.Bootstrap(config(first), storetest.Command(storetest.Genesis(p.id, first.id)...))
	if err != nil {
		p.t.Fatal(err)
	}
	first.store = s
	for _, m := range p.all[1:] {
		if m.store, err = store.Open(config(m)); err != nil {
			p.t.Fatal(err)
		}
		p.must(p.led(func(s *store.Store) error { return s.AddNonvoter(context.Background(), m.id) }))
		p.must(m.store.WaitApplied(context.Background(), s.CommitIndex()))
		p.must(p.led(func(s *store.Store) error { return s.AddVoter(context.Background(), m.id) }))
	}
	return p.leader()
}

// led makes a call of the leader, and of the next one where an election came between, as a loaded machine makes it necessary.
func (p *peers) led(call func(*store.Store) error) error {
	for {
		for _, m := range p.all {
			if m.store == nil || !m.store.IsLeader() {
				continue
			}
			if err := call(m.store); !api.Transient(err) {
				return err
			}
		}
		<-time.After(5 * time.Millisecond)
	}
}

// propose commits the operations, once.
func (p *peers) propose(operations ...*api.Operation) (res *api.Result, err error) {
	cmd := storetest.Command(operations...)
	err = p.led(func(s *store.Store) (err error) {
		res, err = s.Propose(context.Background(), cmd)
		return err
	})
	return res, err
}

func (p *peers) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// start opens the manager's store.
func (p *peers) start(m *peer) {
	p.t.Helper()
	s, err := store.Open(p.config(m))
	p.must(err)
	m.store = s
}

// leader waits until one of those that run leads.
func (p *peers) leader() *peer {
	p.t.Helper()
	for {
		for _, m := range p.all {
			if m.store != nil && m.store.IsLeader() && m.store.Barrier(context.Background()) == nil {
				return m
			}
		}
		<-time.After(5 * time.Millisecond)
	}
}

// kill cuts the manager off, as the end of its process does, and then tidies up: nothing is handed over.
func (m *peer) kill() { m.cut()() }

// cut ends the manager's connections as the end of its process does. What it returns tidies up the rest.
func (m *peer) cut() (tidy func()) {
	m.mu.Lock()
	tr, s := m.tr, m.store
	m.tr, m.store = nil, nil
	for c := range m.conns {
		c.Close()
	}
	m.mu.Unlock()
	return func() {
		if tr != nil {
			tr.Close()
		}
		if s != nil {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			s.Close(ctx)
		}
	}
}

// stop stops the manager in order.
func (m *peer) stop() error {
	s := m.store
	err := s.Close(context.Background())
	m.mu.Lock()
	m.tr, m.store = nil, nil
	m.mu.Unlock()
	return err
}

// bareLog is a log on bbolt as it is without sealing: the store that figures are compared with.
type bareLog struct{ db *bbolt.DB }

func openBare(t testing.TB, dir string) *bareLog {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(filepath.Join(dir, "bare.db"), 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType, NoStatistics: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Update(func(tx *bbolt.Tx) error {
		_, err1 := tx.CreateBucketIfNotExists([]byte("log"))
		_, err2 := tx.CreateBucketIfNotExists([]byte("stable"))
		return errors.Join(err1, err2)
	}); err != nil {
		t.Fatal(err)
	}
	return &bareLog{db}
}

func be(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func (l *bareLog) end(f func(*bbolt.Cursor) ([]byte, []byte)) (i uint64, err error) {
	err = l.db.View(func(tx *bbolt.Tx) error {
		if k, _ := f(tx.Bucket([]byte("log")).Cursor()); k != nil {
			i = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return i, err
}
func (l *bareLog) FirstIndex() (uint64, error) { return l.end((*bbolt.Cursor).First) }
func (l *bareLog) LastIndex() (uint64, error)  { return l.end((*bbolt.Cursor).Last) }
func (l *bareLog) GetLog(i uint64, out *raft.Log) error {
	return l.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket([]byte("log")).Get(be(i))
		if v == nil {
			return raft.ErrLogNotFound
		}
		return sealedlog.ParseRecord(v, out)
	})
}
func (l *bareLog) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }
func (l *bareLog) StoreLogs(es []*raft.Log) error {
	return l.db.Update(func(tx *bbolt.Tx) error {
		for _, e := range es {
			if err := tx.Bucket([]byte("log")).Put(be(e.Index), sealedlog.FormatRecord(e)); err != nil {
				return err
			}
		}
		return nil
	})
}
func (l *bareLog) DeleteRange(low, high uint64) error {
	return l.db.Update(func(tx *bbolt.Tx) error {
		for i := low; i <= high; i++ {
			if err := tx.Bucket([]byte("log")).Delete(be(i)); err != nil {
				return err
			}
		}
		return nil
	})
}
func (l *bareLog) Set(k, v []byte) error {
	return l.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("stable")).Put(k, v) })
}
func (l *bareLog) Get(k []byte) (v []byte, err error) {
	err = l.db.View(func(tx *bbolt.Tx) error { v = append(v, tx.Bucket([]byte("stable")).Get(k)...); return nil })
	if v == nil {
		return nil, errors.New("not found")
	}
	return v, err
}
func (l *bareLog) SetUint64(k []byte, v uint64) error { return l.Set(k, be(v)) }
func (l *bareLog) GetUint64(k []byte) (uint64, error) {
	b, err := l.Get(k)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

// nothing is a state machine that does nothing.
type nothing struct{}

func (nothing) Apply(*raft.Log) any                 { return nil }
func (nothing) Snapshot() (raft.FSMSnapshot, error) { return nothing{}, nil }
func (nothing) Restore(r io.ReadCloser) error       { return r.Close() }
func (nothing) Persist(s raft.SnapshotSink) error   { return s.Close() }
func (nothing) Release()                            {}

// describe returns an operation of about a KiB: what the node says of itself.
func describe(nodeID, text string) *api.Operation {
	return &api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{NodeId: nodeID, Description: &api.NodeDescription{
		Hostname: "m", EngineLabels: map[string]string{"text": text, "a": strings.Repeat("a", 460), "b": strings.Repeat("b", 400)}}}}}
}
