package sealedlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"warden"
)

// logFile is the name of the bbolt file in the raft directory.
const logFile = "log.db"

// The buckets: the header (whose the file is, in clear and sealed, and the sealed extent), the log (index to term and sealed
// record) and the stable values (name to sealed value).
var (
	bucketHeader = []byte("header")
	bucketLog    = []byte("log")
	bucketStable = []byte("stable")
	keyClear     = []byte("clear")
	keySealed    = []byte("sealed")
	keyExtent    = []byte("extent")
)

// logFill is how full pages of the log are made: entries are appended and never grow, so that there is nothing to leave room for.
const logFill = 1.0

// errNotFound is for a stable value that was never set. raft v1.8 compares the text.
var errNotFound = errors.New("not found")

// Log is the sealed log and the stable values of one manager. It is a raft.LogStore, raft.MonotonicLogStore and
// raft.StableStore. All methods are safe for concurrent use.
type Log struct {
	path   string
	owner  owner
	sealer Sealer
	logger *slog.Logger
	broken atomic.Bool // a fault was caught: bbolt may hold its locks for ever, so that nothing calls it again

	// mu guards db and file. It is held shared from before a record is sealed until it is written, so that Reseal, which holds it
	// exclusively to swap the file, leaves no record behind that was sealed under a key of before.
	mu   sync.RWMutex
	db   *bbolt.DB
	file *os.File // of db

	resealing sync.Mutex    // held across Reseal
	rewound   atomic.Uint64 // lowest index replaced, or deleted at the log's end, since Reseal looked
	closing   atomic.Bool   // ends Reseal
}

var (
	_ raft.LogStore          = (*Log)(nil)
	_ raft.MonotonicLogStore = (*Log)(nil)
	_ raft.StableStore       = (*Log)(nil)
	_ io.Closer              = (*Log)(nil)
)

// Open opens dir/log.db, or makes it, and dir, where there is none. It reads and authenticates everything in it before it
// returns, so that damage is told before raft acts on half of the state; cost: one pass over the file.
// Errors: CodeCorrupt, CodeForeign and CodeUnsupported with the file's name and what can be done, CodeInUse if another process has it open.
// The caller closes the Log after raft is shut down. One directory belongs to one node.
func Open(dir, clusterID, nodeID string, s Sealer, logger *slog.Logger) (*Log, error) {
	l := &Log{path: filepath.Join(dir, logFile), owner: owner{Format: format, Cluster: clusterID, Node: nodeID}, sealer: s, logger: logger}
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	switch _, err := os.Lstat(l.path); {
	case errors.Is(err, os.ErrNotExist):
		if err := l.create(); err != nil {
			return nil, err
		}
		logger.Info("made raft log", "path", l.path)
	case err != nil:
		return nil, warden.Recode(warden.CodeInternal, "opening "+l.path, err)
	}
	start := time.Now()
	entries, err := l.open()
	if err == nil {
		err = l.settle()
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	if err := os.Remove(l.path + resealSuffix); err == nil { // the lock of log.db is held, so that nobody is at work on it
		logger.Info("removed an interrupted re-sealing", "path", l.path+resealSuffix)
	} else if !errors.Is(err, os.ErrNotExist) {
		l.Close()
		return nil, warden.Recode(warden.CodeInternal, "removing an interrupted re-sealing", err)
	}
	logger.Info("opened raft log", "path", l.path, "entries", entries, "took", time.Since(start))
	return l, nil
}

// settle makes durable what there is: a process that was killed before a sync left what is read now, and power loss could take back. It
// is counted on from now on, above all by the leader that hears how far this log reaches.
func (l *Log) settle() error {
	return errors.Join(warden.Recode(warden.CodeInternal, "syncing "+l.path, l.file.Sync()), syncDir(filepath.Dir(l.path)))
}

// create makes an empty file under another name and renames it, so that log.db is whole or not there: a file of no bytes is
// damage, not a new node that has never voted.
func (l *Log) create() error {
	const op = "making raft log"
	tmp := l.path + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	db, err := bbolt.Open(tmp, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	defer db.Close()
	_, err = l.initialise(db)
	if err := errors.Join(err, db.Sync(), db.Close()); err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	if err := os.Rename(tmp, l.path); err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	return syncDir(filepath.Dir(l.path))
}

// initialise makes the buckets of an empty file, its header and the extent of nothing. It returns the sealed header.
func (l *Log) initialise(db *bbolt.DB) (sealed []byte, err error) {
	clear, err := json.Marshal(l.owner)
	if err != nil {
		return nil, err
	}
	if sealed, err = l.sealer.Seal(clear, l.owner.aad("header")); err != nil {
		return nil, err
	}
	return sealed, db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketHeader, bucketLog, bucketStable} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		h := tx.Bucket(bucketHeader)
		return errors.Join(h.Put(keyClear, clear), h.Put(keySealed, sealed), l.putExtent(tx))
	})
}

// boltOptions is how log.db is opened.
func boltOptions(open func(path string, flag int, mode os.FileMode) (*os.File, error)) *bbolt.Options {
	return &bbolt.Options{Timeout: time.Second, FreelistType: bbolt.FreelistMapType, NoStatistics: true, OpenFile: open}
}

// open opens the existing file and scans it. It returns the number of log entries.
func (l *Log) open() (entries int, err error) {
	err = l.guard(func() error {
		db, err := bbolt.Open(l.path, 0o600, boltOptions(func(path string, flag int, mode os.FileMode) (f *os.File, err error) {
			l.file, err = openBoltFile(path, flag, mode)
			return l.file, err
		}))
		if err != nil {
			return err
		}
		l.db = db
		return db.View(func(tx *bbolt.Tx) (err error) {
			entries, err = l.scan(tx)
			return err
		})
	})
	return entries, l.explain("opening "+l.path, err)
}

// scan authenticates the header, every stable value and every log entry, and checks that no entry is missing in between.
func (l *Log) scan(tx *bbolt.Tx) (entries int, err error) {
	header, log, stable := tx.Bucket(bucketHeader), tx.Bucket(bucketLog), tx.Bucket(bucketStable)
	if header == nil || log == nil || stable == nil {
		return 0, corrupt(l.path, "a part of it is missing")
	}
	clear := header.Get(keyClear)
	if err := l.owner.check(l.path, clear); err != nil {
		return 0, err
	}
	if h, err := l.sealer.Open(header.Get(keySealed), l.owner.aad("header")); err != nil || !bytes.Equal(h, clear) {
		return 0, corrupt(l.path, "its header does not authenticate under this manager's key")
	}
	if err := stable.ForEach(func(k, v []byte) error {
		_, err := l.openStable(k, v)
		return err
	}); err != nil {
		return 0, err
	}
	var last uint64
	err = log.ForEach(func(k, v []byte) error {
		var e raft.Log
		if len(k) != 8 {
			return corrupt(l.path, "a log key has %d bytes", len(k))
		}
		index := binary.BigEndian.Uint64(k)
		if entries > 0 && index != last+1 {
			return corrupt(l.path, "log entries %d to %d are missing", last+1, index-1)
		}
		entries, last = entries+1, index
		return l.openEntry(index, v, &e)
	})
	if err != nil {
		return 0, err
	}
	want, err := l.sealer.Open(header.Get(keyExtent), l.owner.aad("extent"))
	if err != nil {
		return 0, corrupt(l.path, "the record of its extent does not authenticate under this manager's key")
	}
	got, err := extent(tx)
	if err != nil {
		return 0, err
	}
	if !bytes.Equal(got, want) {
		return 0, corrupt(l.path, "log entries are missing at an end, or a stable value is missing or old")
	}
	return entries, nil
}

// extent returns what a file must hold as a whole: first and last index of the log, and a hash over names and sealed bytes of all
// stable values, of which there are few. Each change seals it anew, so that an end cut off, or a vote forgotten, is seen at Open.
func extent(tx *bbolt.Tx) ([]byte, error) {
	var b []byte
	c := tx.Bucket(bucketLog).Cursor()
	if k, _ := c.First(); k != nil { // bbolt v1.5 loops for ever in Last of pages that this transaction has emptied
		b = append(b, k...)
		k, _ = c.Last()
		b = append(b, k...)
	}
	sum := sha256.New()
	err := tx.Bucket(bucketStable).ForEach(func(k, v []byte) error {
		for _, s := range [][]byte{k, v} {
			sum.Write(binary.BigEndian.AppendUint64(nil, uint64(len(s))))
			sum.Write(s)
		}
		return nil
	})
	return sum.Sum(b), err
}

func (l *Log) putExtent(tx *bbolt.Tx) error {
	b, err := extent(tx)
	if err != nil {
		return err
	}
	sealed, err := l.sealer.Seal(b, l.owner.aad("extent"))
	if err != nil {
		return err
	}
	return tx.Bucket(bucketHeader).Put(keyExtent, sealed)
}

// Close ends a re-sealing and closes the file. More calls do nothing; other methods answer errors from then on.
func (l *Log) Close() error {
	l.closing.Store(true)
	l.resealing.Lock()
	defer l.resealing.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken.Load() || l.db == nil {
		if l.file != nil {
			l.file.Close() // lets go of the lock; what is mapped stays so until the process ends
		}
		return nil
	}
	return warden.Recode(warden.CodeInternal, "closing "+l.path, l.db.Close())
}

// IsMonotonic tells raft that this log has no gaps, so that raft empties it after it installed a snapshot.
func (l *Log) IsMonotonic() bool { return true }

// FirstIndex returns the lowest index in the log, 0 if it is empty.
func (l *Log) FirstIndex() (uint64, error) { return l.end((*bbolt.Cursor).First) }

// LastIndex returns the highest index in the log, 0 if it is empty.
func (l *Log) LastIndex() (uint64, error) { return l.end((*bbolt.Cursor).Last) }

func (l *Log) end(to func(*bbolt.Cursor) ([]byte, []byte)) (index uint64, err error) {
	err = l.view("reading "+l.path, func(tx *bbolt.Tx) error {
		if k, _ := to(tx.Bucket(bucketLog).Cursor()); k != nil {
			index = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return index, err
}

// GetLog fills out with the entry at index. Errors: raft.ErrLogNotFound as it is, since raft compares it; CodeCorrupt.
func (l *Log) GetLog(index uint64, out *raft.Log) error {
	found := false
	err := l.view("reading "+l.path, func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketLog).Get(logKey(index))
		if found = v != nil; !found {
			return nil
		}
		return l.openEntry(index, v, out)
	})
	if err == nil && !found {
		return raft.ErrLogNotFound
	}
	return err
}

// StoreLog stores one entry as StoreLogs does.
func (l *Log) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// StoreLogs stores entries of consecutive indexes, all or none, and returns when they are on disk. The log ends with the last of
// them then and has no gap: what stood at their indexes or above is replaced, as raft stores there only when its own log
// ends before (a write that failed may have been done); if a gap would come before them, what stood below is dropped, as
// raft leaves one only where a snapshot covers all below (a crash between installing it and emptying the log).
// Errors: CodeInternal if the indexes are not consecutive or the disk fails.
func (l *Log) StoreLogs(entries []*raft.Log) error {
	if len(entries) == 0 {
		return nil
	}
	op := "storing log entries in " + l.path
	l.mu.RLock()
	defer l.mu.RUnlock()
	first := entries[0].Index
	values := make([][]byte, len(entries))
	for i, e := range entries {
		if e.Index != first+uint64(i) || e.Index == 0 {
			return warden.Errorf(warden.CodeInternal, op, "entry %d does not follow entry %d", e.Index, first+uint64(i)-1)
		}
		var err error
		if values[i], err = l.sealEntry(e); err != nil {
			return warden.Recode(warden.CodeInternal, op, err)
		}
	}
	replaced := false
	defer func() {
		if replaced {
			l.markRewound(first)
		}
	}()
	return l.update(op, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketLog)
		if last, _ := b.Cursor().Last(); last != nil {
			switch last := binary.BigEndian.Uint64(last); {
			case last >= first:
				replaced = true
				if err := deleteRange(b, first, last); err != nil {
					return err
				}
			case last+1 < first:
				if err := deleteRange(b, 0, last); err != nil {
					return err
				}
			}
		}
		b.FillPercent = logFill
		for i, v := range values {
			if err := b.Put(logKey(first+uint64(i)), v); err != nil {
				return err
			}
		}
		return nil
	})
}

// DeleteRange deletes the entries from index low to high, both included. raft deletes at one end of the log only; a range in the
// middle is refused with CodeInternal.
func (l *Log) DeleteRange(low, high uint64) error {
	op := "deleting log entries in " + l.path
	l.mu.RLock()
	defer l.mu.RUnlock()
	atEnd := false
	defer func() {
		if atEnd {
			l.markRewound(low)
		}
	}()
	return l.update(op, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketLog)
		first, _ := b.Cursor().First()
		last, _ := b.Cursor().Last()
		atEnd = last != nil && high >= binary.BigEndian.Uint64(last)
		if first != nil && low > binary.BigEndian.Uint64(first) && high < binary.BigEndian.Uint64(last) {
			return warden.Errorf(warden.CodeInternal, op, "entries %d to %d lie in the middle of the log", low, high)
		}
		return deleteRange(b, low, high)
	})
}

// deleteRange collects the keys before it deletes: a bbolt cursor may skip a key after a deletion.
func deleteRange(b *bbolt.Bucket, low, high uint64) error {
	var keys [][]byte
	c := b.Cursor()
	for k, _ := c.Seek(logKey(low)); k != nil && binary.BigEndian.Uint64(k) <= high; k, _ = c.Next() {
		keys = append(keys, bytes.Clone(k))
	}
	for _, k := range keys {
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

// Set stores a stable value and returns when it is on disk.
func (l *Log) Set(key, val []byte) error {
	op := "storing a stable value in " + l.path
	l.mu.RLock()
	defer l.mu.RUnlock()
	sealed, err := l.sealer.Seal(val, l.owner.aad("stable", key))
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	return l.update(op, func(tx *bbolt.Tx) error { return tx.Bucket(bucketStable).Put(key, sealed) })
}

// Get returns a stable value. Errors: one with the text "not found", which raft compares, if it was never set; CodeCorrupt.
func (l *Log) Get(key []byte) (val []byte, err error) {
	found := false
	err = l.view("reading "+l.path, func(tx *bbolt.Tx) (err error) {
		v := tx.Bucket(bucketStable).Get(key)
		if found = v != nil; found {
			val, err = l.openStable(key, v)
		}
		return err
	})
	if err == nil && !found {
		return nil, errNotFound
	}
	return val, err
}

// SetUint64 stores val in 8 bytes, big-endian, as Set does.
func (l *Log) SetUint64(key []byte, val uint64) error {
	return l.Set(key, binary.BigEndian.AppendUint64(nil, val))
}

// GetUint64 is the inverse of SetUint64. Errors as Get, and CodeCorrupt for a value of another length.
func (l *Log) GetUint64(key []byte) (uint64, error) {
	v, err := l.Get(key)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, corrupt(l.path, "stable value %.64q is not a number", key)
	}
	return binary.BigEndian.Uint64(v), nil
}

func logKey(index uint64) []byte { return binary.BigEndian.AppendUint64(nil, index) }

func (l *Log) entryAAD(index, term uint64) []byte {
	return l.owner.aad("log", logKey(index), binary.BigEndian.AppendUint64(nil, term))
}

// sealEntry returns the value of an entry: its term in clear, the rest sealed. openEntry is its inverse.
func (l *Log) sealEntry(e *raft.Log) ([]byte, error) {
	sealed, err := l.sealer.Seal(FormatRecord(e), l.entryAAD(e.Index, e.Term))
	if err != nil {
		return nil, err
	}
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(sealed)), e.Term), sealed...), nil
}

// openEntry opens the value at index into out. Errors: CodeCorrupt.
func (l *Log) openEntry(index uint64, v []byte, out *raft.Log) error {
	if len(v) < 8 {
		return corrupt(l.path, "log entry %d is cut short", index)
	}
	term := binary.BigEndian.Uint64(v)
	b, err := l.sealer.Open(v[8:], l.entryAAD(index, term))
	if err != nil {
		return corrupt(l.path, "log entry %d does not authenticate under this manager's key: it was changed or moved", index)
	}
	var e raft.Log
	if err := ParseRecord(b, &e); err != nil {
		return corrupt(l.path, "log entry %d: %w", index, err)
	}
	if e.Index != index || e.Term != term {
		return corrupt(l.path, "log entry %d says it is entry %d of term %d", index, e.Index, e.Term)
	}
	*out = e
	return nil
}

// openStable opens the value of key. Errors: CodeCorrupt.
func (l *Log) openStable(key, v []byte) ([]byte, error) {
	b, err := l.sealer.Open(v, l.owner.aad("stable", key))
	if err != nil {
		return nil, corrupt(l.path, "stable value %.64q does not authenticate under this manager's key: it was changed or moved", key)
	}
	return b, nil
}

// view runs f in a transaction for reading. mu is not held.
func (l *Log) view(op string, f func(*bbolt.Tx) error) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.viewHeld(op, f)
}

// viewHeld is view where mu is held.
func (l *Log) viewHeld(op string, f func(*bbolt.Tx) error) error {
	return l.explain(op, l.guard(func() error { return l.db.View(f) }))
}

// update runs f in a transaction that writes. mu is held.
func (l *Log) update(op string, f func(*bbolt.Tx) error) error {
	return l.explain(op, l.guard(func() error {
		return l.db.Update(func(tx *bbolt.Tx) error {
			if err := f(tx); err != nil {
				return err
			}
			return l.putExtent(tx)
		})
	}))
}

// explain gives err a code if it has none: CodeCorrupt for what guard caught, CodeInternal otherwise.
func (l *Log) explain(op string, err error) error {
	if _, ok := errors.AsType[*warden.Error](err); ok || err == nil {
		return err
	}
	if _, ok := errors.AsType[fault](err); ok {
		return warden.Hint(warden.Recode(warden.CodeCorrupt, op, err), hintCorrupt)
	}
	return warden.Recode(warden.CodeInternal, op, err)
}

// fault is a panic or a memory fault that guard caught.
type fault string

func (f fault) Error() string { return string(f) }

// guard runs f and turns a panic of bbolt, or a fault on a page that the file does not have any more, into an error. The
// check at Open leaves few ways to get here: a file that shrinks while it is open, a disk that cannot read a page.
func (l *Log) guard(f func() error) error {
	if l.broken.Load() {
		return fault("it failed before, see the first error")
	}
	caught, err := catch(f)
	if caught {
		l.broken.Store(true)
	}
	return err
}

// catch runs f and returns its panic as an error.
func catch(f func() error) (caught bool, err error) {
	old := debug.SetPanicOnFault(true) // of this goroutine only
	defer debug.SetPanicOnFault(old)
	defer func() {
		if r := recover(); r != nil {
			caught, err = true, fault(fmt.Sprintf("its pages are not well-formed or not readable: %v", r))
		}
	}()
	return false, f()
}
