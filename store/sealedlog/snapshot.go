package sealedlog

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/streamingaead"
	"github.com/tink-crypto/tink-go/v2/tink"

	"warden"
)

const (
	snapshotDir   = "snapshots" // in the raft directory; a directory for each snapshot in it
	metaFile      = "meta"      // the owner in clear, a newline, the sealed metadata
	stateFile     = "state"     // the sealed body
	tmpSuffix     = ".tmp"      // of a snapshot's directory until it is whole
	metaBytesMax  = 1 << 20
	retainDefault = 2
	bodyFormat    = 1 // first byte of every body: Tink cannot read an empty stream
)

// snapshotID is term, index and Unix milliseconds, in decimal, and by that the name of the directory.
var snapshotID = regexp.MustCompile(`^[0-9]{1,20}-[0-9]{1,20}-[0-9]{1,15}$`)

// Snapshots is a raft.SnapshotStore. Each body is encrypted by Tink's streaming AEAD under a key of its own, which the metadata
// carries; the metadata is sealed by the Sealer. Both are bound to cluster, node and snapshot ID.
// All methods are safe for concurrent use, also beside open snapshots and sinks.
type Snapshots struct {
	dir    string
	owner  owner
	sealer Sealer
	retain int
	logger *slog.Logger

	mu       sync.Mutex          // guards open and replaced; held across what seals metadata, renames and removes in dir
	open     map[string]struct{} // IDs of the sinks that are being written
	replaced map[string]string   // by Reseal: old ID to new, for those who got the old one from List

	resealing sync.Mutex // held across Reseal
}

var _ raft.SnapshotStore = (*Snapshots)(nil)

// meta is the sealed metadata of a snapshot.
type meta struct {
	ID                 string   `json:"id"`
	Index              uint64   `json:"index"`
	Term               uint64   `json:"term"`
	Servers            []server `json:"servers"`
	ConfigurationIndex uint64   `json:"configuration_index"`
	Size               int64    `json:"size"` // of the body, in clear
	Key                []byte   `json:"key"`  // the body's Tink keyset, encrypted by the Sealer
}

// server is one member of the raft configuration.
type server struct {
	ID       string              `json:"id"`
	Address  string              `json:"address"`
	Suffrage raft.ServerSuffrage `json:"suffrage"`
}

// OpenSnapshots opens dir/snapshots, or makes it, and dir, where there is none. It removes what an interrupted snapshot left
// and reads the newest snapshot to its end, so that a damaged one is told before raft starts; nothing falls back to an
// older one, since the log entries between them may be gone already. retain is how many snapshots are kept, 2 if it is less than 1.
// Errors: CodeCorrupt, CodeForeign and CodeUnsupported with the file's name and what can be done.
func OpenSnapshots(dir, clusterID, nodeID string, s Sealer, retain int, logger *slog.Logger) (*Snapshots, error) {
	if retain < 1 {
		retain = retainDefault
	}
	sn := &Snapshots{
		dir:    filepath.Join(dir, snapshotDir),
		owner:  owner{Format: format, Cluster: clusterID, Node: nodeID},
		sealer: s, retain: retain, logger: logger,
		open: map[string]struct{}{}, replaced: map[string]string{},
	}
	if err := errors.Join(makeDir(dir), makeDir(sn.dir)); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(sn.dir)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "opening "+sn.dir, err)
	}
	for _, e := range entries {
		id, isTmp := strings.CutSuffix(e.Name(), tmpSuffix)
		switch {
		case !snapshotID.MatchString(id):
			logger.Warn("ignored unknown file among snapshots", "path", filepath.Join(sn.dir, e.Name()))
		case isTmp:
			if err := os.RemoveAll(filepath.Join(sn.dir, e.Name())); err != nil {
				return nil, warden.Recode(warden.CodeInternal, "removing an interrupted snapshot", err)
			}
			logger.Info("removed interrupted snapshot", "snapshot_id", id)
		}
	}
	if err := syncDir(sn.dir); err != nil { // a process that was killed may have left names that power loss could take back
		return nil, err
	}
	list, err := sn.List()
	if err != nil || len(list) == 0 {
		return sn, err
	}
	start := time.Now()
	_, body, err := sn.Open(list[0].ID)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if _, err := io.Copy(io.Discard, body); err != nil {
		return nil, err
	}
	logger.Info("verified newest snapshot", "snapshot_id", list[0].ID, "bytes", list[0].Size, "took", time.Since(start))
	return sn, nil
}

// List returns the newest snapshot only, or none. raft v1.8 takes the first of the list, and at its start goes on to the next if it
// cannot restore that: silently, and with log entries missing. The older ones that are kept are for people, and can be opened by ID.
// Errors: as OpenSnapshots.
func (sn *Snapshots) List() ([]*raft.SnapshotMeta, error) {
	ids, err := sn.ids()
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	m, _, err := sn.readMeta(ids[0])
	if err != nil {
		return nil, err
	}
	return []*raft.SnapshotMeta{m.raft()}, nil
}

// ids returns the IDs of all snapshots, the newest first: by term, then index, then time.
func (sn *Snapshots) ids() ([]string, error) {
	entries, err := os.ReadDir(sn.dir)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "listing "+sn.dir, err)
	}
	var ids []string
	for _, e := range entries {
		if snapshotID.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	slices.SortFunc(ids, func(a, b string) int { return slices.CompareFunc(numbers(b), numbers(a), cmp.Compare[uint64]) })
	return ids, nil
}

// numbers returns the three numbers of a snapshot ID; one out of range counts as the highest.
func numbers(id string) []uint64 {
	var n []uint64
	for s := range strings.SplitSeq(id, "-") {
		v, _ := strconv.ParseUint(s, 10, 64) // the largest value if it is out of range
		n = append(n, v)
	}
	return n
}

// Open returns the metadata and the body of a snapshot. The body's Read answers an error that names the file if what it read does
// not authenticate, or if the body ends early; what it gave before that is authentic. The caller closes the body.
// Errors: CodeNotFound, and as OpenSnapshots.
func (sn *Snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	sn.mu.Lock()
	for next, ok := sn.replaced[id]; ok; next, ok = sn.replaced[id] {
		id = next
	}
	sn.mu.Unlock()
	m, key, err := sn.readMeta(id)
	if err != nil {
		return nil, nil, err
	}
	path := filepath.Join(sn.dir, id, stateFile)
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, missing(path, err)
	}
	r, err := key.NewDecryptingReader(f, sn.owner.aad("snapshot body", []byte(id)))
	if err != nil {
		f.Close()
		return nil, nil, corrupt(path, "it cannot be decrypted")
	}
	b := &body{path: path, f: f, r: r, left: m.Size}
	var first [1]byte
	if _, err := io.ReadFull(r, first[:]); err != nil || first[0] != bodyFormat {
		f.Close()
		return nil, nil, b.corrupt()
	}
	return m.raft(), b, nil
}

// body is an open snapshot. It is not for concurrent use.
type body struct {
	path string
	f    *os.File
	r    io.Reader
	left int64 // bytes that must still come
}

func (b *body) corrupt() error {
	return corrupt(b.path, "it does not authenticate: it was changed, moved or cut short")
}

// Read reads the decrypted body. io.EOF comes only after the whole body was authenticated.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.left -= int64(n)
	if err == nil && b.left >= 0 || err == io.EOF && b.left == 0 {
		return n, err
	}
	return 0, b.corrupt()
}

// Close closes the file.
func (b *body) Close() error { return b.f.Close() }

// readSealed reads the metadata of a snapshot as it is on disk, and checks whose it is.
func (sn *Snapshots) readSealed(id string) (path string, sealed []byte, err error) {
	if !snapshotID.MatchString(id) {
		return "", nil, warden.Errorf(warden.CodeNotFound, "opening snapshot", "%.64q is not the ID of a snapshot", id)
	}
	path = filepath.Join(sn.dir, id, metaFile)
	f, err := os.Open(path)
	if err != nil {
		return "", nil, missing(path, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, metaBytesMax+1))
	if err != nil {
		return "", nil, warden.Recode(warden.CodeInternal, "reading "+path, err)
	}
	clear, sealed, ok := bytes.Cut(b, []byte("\n"))
	if !ok || len(b) > metaBytesMax {
		return "", nil, corrupt(path, "it has no header, or is too large")
	}
	return path, sealed, sn.owner.check(path, clear)
}

// readMeta reads, opens and checks the metadata of a snapshot and the key of its body.
func (sn *Snapshots) readMeta(id string) (*meta, tink.StreamingAEAD, error) {
	path, sealed, err := sn.readSealed(id)
	if err != nil {
		return nil, nil, err
	}
	plain, err := sn.sealer.Open(sealed, sn.owner.aad("snapshot", []byte(id)))
	if err != nil {
		return nil, nil, corrupt(path, "it does not authenticate under this manager's key: it was changed or moved")
	}
	var m meta
	d := json.NewDecoder(bytes.NewReader(plain))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil || m.ID != id || m.Size < 0 {
		return nil, nil, corrupt(path, "its metadata does not parse")
	}
	if n := numbers(id); m.Term != n[0] || m.Index != n[1] {
		return nil, nil, corrupt(path, "it says it is of term %d and index %d", m.Term, m.Index)
	}
	h, err := keyset.ReadWithAssociatedData(keyset.NewBinaryReader(bytes.NewReader(m.Key)), wrapper{sn.sealer}, sn.owner.aad("snapshot key", []byte(id)))
	if err != nil {
		return nil, nil, corrupt(path, "the key of its body does not open")
	}
	key, err := streamingaead.New(h)
	if err != nil {
		return nil, nil, corrupt(path, "the key of its body is not usable")
	}
	return &m, key, nil
}

// missing is the error for a file of a snapshot that cannot be opened.
func missing(path string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		if _, e := os.Lstat(filepath.Dir(path)); errors.Is(e, os.ErrNotExist) {
			return warden.Errorf(warden.CodeNotFound, "opening snapshot", "%s does not exist", filepath.Dir(path))
		}
		return corrupt(path, "it is missing")
	}
	return warden.Recode(warden.CodeInternal, "opening "+path, err)
}

func (m *meta) raft() *raft.SnapshotMeta {
	out := &raft.SnapshotMeta{
		Version: raft.SnapshotVersionMax, ID: m.ID, Index: m.Index, Term: m.Term,
		ConfigurationIndex: m.ConfigurationIndex, Size: m.Size,
	}
	for _, s := range m.Servers {
		out.Configuration.Servers = append(out.Configuration.Servers,
			raft.Server{Suffrage: s.Suffrage, ID: raft.ServerID(s.ID), Address: raft.ServerAddress(s.Address)})
	}
	return out
}

// wrapper lets Tink encrypt a keyset by the Sealer.
type wrapper struct{ s Sealer }

func (w wrapper) Encrypt(plaintext, aad []byte) ([]byte, error)  { return w.s.Seal(plaintext, aad) }
func (w wrapper) Decrypt(ciphertext, aad []byte) ([]byte, error) { return w.s.Open(ciphertext, aad) }

// Create starts a snapshot. It is not in the list before its sink was closed without an error. The transport is not used.
func (sn *Snapshots) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	const op = "creating snapshot"
	if version != raft.SnapshotVersionMax {
		return nil, warden.Errorf(warden.CodeUnsupported, op, "snapshot version %d", version)
	}
	s := &sink{sn: sn, meta: meta{Index: index, Term: term, ConfigurationIndex: cIndex}}
	for _, m := range c.Servers {
		s.meta.Servers = append(s.meta.Servers, server{ID: string(m.ID), Address: string(m.Address), Suffrage: m.Suffrage})
	}
	if err := s.start(); err != nil {
		s.abandon()
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	return s, nil
}

// makeTmp makes the directory of a new snapshot and returns its ID.
func (sn *Snapshots) makeTmp(term, index uint64) (id string, err error) {
	sn.mu.Lock()
	defer sn.mu.Unlock()
	ms := time.Now().UnixMilli()
	ids, err := sn.ids()
	if err != nil {
		return "", err
	}
	for _, other := range ids { // the newest of one index is the one with the latest time, wherever the clock was set
		if n := numbers(other); n[0] == term && n[1] == index {
			ms = max(ms, int64(n[2])+1)
		}
	}
	for ; ; ms++ {
		id = fmt.Sprintf("%d-%d-%d", term, index, ms)
		if _, err := os.Lstat(filepath.Join(sn.dir, id)); err == nil {
			continue
		}
		if err := os.Mkdir(filepath.Join(sn.dir, id+tmpSuffix), 0o700); !os.IsExist(err) {
			sn.open[id] = struct{}{}
			return id, err
		}
	}
}

// publish renames a finished snapshot into place and removes those that are too old. sn.mu is held.
func (sn *Snapshots) publish(id string) error {
	if err := os.Rename(filepath.Join(sn.dir, id+tmpSuffix), filepath.Join(sn.dir, id)); err != nil {
		return err
	}
	if err := syncDir(sn.dir); err != nil {
		return err
	}
	ids, err := sn.ids()
	if err != nil {
		return err
	}
	for _, old := range ids[min(sn.retain, len(ids)):] {
		if err := sn.remove(old); err != nil {
			sn.logger.Warn("kept an old snapshot", "snapshot_id", old, "err", err)
			continue
		}
		sn.logger.Info("removed old snapshot", "snapshot_id", old)
	}
	return nil
}

// remove removes a snapshot. The name goes first, so that a crash leaves a whole snapshot or what the next start removes; then
// the metadata, which has the body's key, is overwritten, so that the blocks that are freed hold no key. sn.mu is held.
func (sn *Snapshots) remove(id string) error {
	tmp := filepath.Join(sn.dir, id+tmpSuffix)
	if err := errors.Join(os.Rename(filepath.Join(sn.dir, id), tmp), syncDir(sn.dir)); err != nil { // else power loss could bring the name back, of what is overwritten
		return err
	}
	return removeTmp(tmp)
}

// removeTmp removes what is left of a snapshot.
func removeTmp(dir string) error {
	if f, err := os.OpenFile(filepath.Join(dir, metaFile), os.O_WRONLY|syscall.O_NOFOLLOW, 0); err == nil {
		_ = overwrite(f) // it may make it harder to find; that it is gone is told by RemoveAll
		f.Close()
	}
	return os.RemoveAll(dir)
}
