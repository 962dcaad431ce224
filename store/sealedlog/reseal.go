package sealedlog

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"go.etcd.io/bbolt"

	"warden"
)

const (
	resealSuffix = ".new"         // of the copy of log.db that is being made
	resealBatch  = 1 << 20        // bytes of records that are read, sealed and synced at once
	noRewind     = math.MaxUint64 // Log.rewound: nothing was replaced
)

// Stale counts the records of the log file that are not under the primary of the Sealer: entries, stable values, header and extent.
// 0 means that no byte of the file was sealed under an older key, free pages included: a file gets its header when it is made, and only
// what was sealed after that gets into it. Cost: one pass over the file, nothing is opened. Errors: CodeUnsupported if the
// Sealer is no Rotating; those of reading.
func (l *Log) Stale() (n int, err error) {
	op := "scanning " + l.path
	r, err := rotating(op, l.sealer)
	if err != nil {
		return 0, err
	}
	count := func(v []byte) {
		if !r.UnderPrimary(v) {
			n++
		}
	}
	next, end := uint64(0), false
	for !end { // in batches: a long transaction would keep writers from growing the file
		err := l.view(op, func(tx *bbolt.Tx) error {
			header := tx.Bucket(bucketHeader)
			if next == 0 {
				count(header.Get(keySealed))
				count(header.Get(keyExtent))
				if err := tx.Bucket(bucketStable).ForEach(func(_, v []byte) error { count(v); return nil }); err != nil {
					return err
				}
			}
			c := tx.Bucket(bucketLog).Cursor()
			k, v := c.Seek(logKey(next))
			for range 4096 {
				if k == nil {
					break
				}
				next = binary.BigEndian.Uint64(k) + 1
				count(v[min(8, len(v)):])
				k, v = c.Next()
			}
			end = k == nil
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	return n, nil
}

// Reseal puts everything in the log file under the Sealer's primary. It makes a copy of the file beside it, so that no free page keeps
// what an older key sealed, and renames it over the old one: killed at any point, the old file or the new one is there, whole. It
// copies beside readers and writers, and keeps them out only for what they changed meanwhile, a few syncs long. The old file is
// overwritten before its blocks are freed, as far as the file system and the disk write in place.
//
// The Sealer must use the new primary before the call. With nothing stale it does nothing. Errors: those of ctx, and of Open; CodeUnsupported
// if the Sealer is no Rotating; CodeUnavailable after Close. On an error the old file stays, unless the disk failed in the rename: then
// all later calls are errors.
func (l *Log) Reseal(ctx context.Context) error {
	op := "re-sealing " + l.path
	l.resealing.Lock()
	defer l.resealing.Unlock()
	stale, err := l.Stale()
	if err != nil || stale == 0 {
		return err
	}
	start := time.Now()
	c, err := l.newCopy(op)
	if err != nil {
		return err
	}
	for end := false; !end; {
		if err = ctx.Err(); err == nil && l.closing.Load() {
			err = warden.Errorf(warden.CodeUnavailable, op, "the log is being closed")
		}
		if err == nil {
			end, err = c.round(l.view, false)
		}
		if err != nil {
			c.discard()
			return warden.Wrap(op, err)
		}
	}
	old, held, err := l.swap(c)
	if err != nil {
		return warden.Wrap(op, err)
	}
	defer old.Close()
	if err := overwrite(old); err != nil {
		l.logger.Warn("failed to overwrite the old raft log before removing it", "path", l.path, "err", err)
	}
	l.logger.Info("re-sealed raft log", "path", l.path, "stale", stale, "took", time.Since(start), "exclusive", held)
	return nil
}

// markRewound tells Reseal that the entries from low on are not what they were. It is called after the transaction, so that Reseal,
// which takes the mark before it reads, sees the new ones.
func (l *Log) markRewound(low uint64) {
	for {
		old := l.rewound.Load()
		if low >= old || l.rewound.CompareAndSwap(old, low) {
			return
		}
	}
}

// replica is a copy of the log file in the making.
type replica struct {
	l      *Log
	op     string
	r      Rotating
	header []byte // sealed; it tells which key was primary when the copy was begun
	path   string
	db     *bbolt.DB
	file   *os.File
	next   uint64 // entries below are copied
}

// newCopy makes the file of a copy. l.resealing is held.
func (l *Log) newCopy(op string) (*replica, error) {
	r, err := rotating(op, l.sealer)
	if err != nil {
		return nil, err
	}
	l.rewound.Store(noRewind)
	c := &replica{l: l, op: op, r: r, path: l.path + resealSuffix}
	if err := os.Remove(c.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	_, err = catch(func() (err error) {
		if c.db, err = bbolt.Open(c.path, 0o600, boltOptions(c.openFile)); err != nil {
			return err
		}
		c.header, err = l.initialise(c.db)
		return err
	})
	if err != nil {
		c.discard()
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	return c, nil
}

// openFile makes the file and locks it, so that it is locked when it gets the name log.db.
func (c *replica) openFile(path string, flag int, mode os.FileMode) (f *os.File, err error) {
	if c.file, err = os.OpenFile(path, flag|os.O_EXCL|syscall.O_NOFOLLOW, mode); err != nil {
		return nil, err
	}
	return c.file, syscall.Flock(int(c.file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

// discard removes the copy.
func (c *replica) discard() {
	if c.db != nil {
		_, _ = catch(c.db.Close)
	}
	if c.file != nil {
		c.file.Close()
	}
	os.Remove(c.path)
}

// record is a key of a bucket and its sealed value.
type record struct{ key, value []byte }

// round copies about resealBatch bytes of entries, and drops from the copy what the log has dropped. It reports whether it came to the
// end of the log. With last it then adds the stable values and the extent: the copy is whole. view runs a transaction on the log.
func (c *replica) round(view func(string, func(*bbolt.Tx) error) error, last bool) (end bool, err error) {
	var entries, stable []record
	var first uint64 // of the log; 0: it is empty
	c.next = min(c.next, c.l.rewound.Swap(noRewind))
	from := c.next
	err = view(c.op, func(tx *bbolt.Tx) error {
		cursor := tx.Bucket(bucketLog).Cursor()
		if k, _ := cursor.First(); k != nil {
			first = binary.BigEndian.Uint64(k)
		}
		from = max(from, first)
		c.next = from
		k, v := cursor.Seek(logKey(from))
		for size := 0; k != nil && size < resealBatch; k, v = cursor.Next() {
			c.next = binary.BigEndian.Uint64(k) + 1
			entries = append(entries, record{bytes.Clone(k), bytes.Clone(v)})
			size += len(v)
		}
		end = k == nil
		return tx.Bucket(bucketStable).ForEach(func(k, v []byte) error {
			stable = append(stable, record{bytes.Clone(k), bytes.Clone(v)})
			return nil
		})
	})
	if err != nil {
		return false, err
	}
	// Sealing comes after the transaction, which would keep writers from growing the file.
	for i, e := range entries {
		if entries[i].value, err = c.entry(e); err != nil {
			return false, err
		}
	}
	for i, s := range stable {
		if stable[i].value, err = c.stable(s); err != nil {
			return false, err
		}
	}
	_, err = catch(func() error {
		return c.db.Update(func(tx *bbolt.Tx) error {
			log := tx.Bucket(bucketLog)
			if first == 0 {
				from = 0
			}
			err := errors.Join(deleteRange(log, from, math.MaxUint64), deleteRange(log, 0, max(first, 1)-1))
			log.FillPercent = logFill
			for _, e := range entries {
				err = errors.Join(err, log.Put(e.key, e.value))
			}
			if !end || !last || err != nil {
				return err
			}
			for _, s := range stable {
				err = errors.Join(err, tx.Bucket(bucketStable).Put(s.key, s.value))
			}
			return errors.Join(err, c.l.putExtent(tx))
		})
	})
	return end, warden.Recode(warden.CodeInternal, c.op, err)
}

// entry returns the value of a log entry under the primary.
func (c *replica) entry(e record) ([]byte, error) {
	if len(e.value) >= 8 && c.r.UnderPrimary(e.value[8:]) {
		return e.value, nil
	}
	var out raft.Log
	if err := c.l.openEntry(binary.BigEndian.Uint64(e.key), e.value, &out); err != nil {
		return nil, err
	}
	v, err := c.l.sealEntry(&out)
	return v, warden.Recode(warden.CodeInternal, c.op, err)
}

// stable returns a stable value under the primary.
func (c *replica) stable(s record) ([]byte, error) {
	if c.r.UnderPrimary(s.value) {
		return s.value, nil
	}
	plain, err := c.l.openStable(s.key, s.value)
	if err != nil {
		return nil, err
	}
	v, err := c.l.sealer.Seal(plain, c.l.owner.aad("stable", s.key))
	return v, warden.Recode(warden.CodeInternal, c.op, err)
}

// swap finishes the copy and puts it in the place of the log file, while nobody reads or writes. It returns the old file, still open
// for writing though without a name, and how long it kept others out.
func (l *Log) swap(c *replica) (old *os.File, held time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	start := time.Now()
	for end := false; !end; {
		if end, err = c.round(l.viewHeld, true); err != nil {
			c.discard()
			return nil, 0, err
		}
	}
	if !c.r.UnderPrimary(c.header) { // free pages could hold what the primary of before sealed
		c.discard()
		return nil, 0, warden.Hint(warden.Errorf(warden.CodeConflict, c.op, "the key was rotated again meanwhile"), "re-seal again")
	}
	old, err = os.OpenFile(l.path, os.O_WRONLY|syscall.O_NOFOLLOW, 0)
	if err == nil {
		if err = os.Rename(c.path, l.path); err != nil {
			old.Close()
		}
	}
	if err != nil {
		c.discard()
		return nil, 0, warden.Recode(warden.CodeInternal, c.op, err)
	}
	// From here on the new file has the name, whatever fails.
	err = l.guard(l.db.Close)
	l.db, l.file = c.db, c.file
	if serr := syncDir(filepath.Dir(l.path)); serr != nil {
		l.broken.Store(true) // after a power loss the old file could be back, without what is written from now on
		old.Close()
		return nil, 0, serr
	}
	if err != nil {
		l.logger.Warn("failed to close the old raft log", "path", l.path, "err", err)
	}
	return old, time.Since(start), nil
}

// overwrite fills f with zeros, synced bit by bit, so that others who sync don't wait for all of it.
func overwrite(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	zeros := make([]byte, min(info.Size(), resealBatch))
	for at := int64(0); at < info.Size(); at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), info.Size()-at)], at); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

// Stale counts the snapshots of which not all is under the primary of the Sealer, and what could not be removed of others. Errors:
// CodeUnsupported if the Sealer is no Rotating; those of reading.
func (sn *Snapshots) Stale() (int, error) {
	r, err := rotating("scanning "+sn.dir, sn.sealer)
	if err != nil {
		return 0, err
	}
	sn.mu.Lock()
	defer sn.mu.Unlock()
	stale, left, err := sn.stale(r)
	return len(stale) + len(left), err
}

// stale returns the IDs of the snapshots that are not under the primary, the newest first, and the directories that hold none. sn.mu is held.
func (sn *Snapshots) stale(r Rotating) (stale, left []string, err error) {
	ids, err := sn.ids()
	if err != nil {
		return nil, nil, err
	}
	for _, id := range ids {
		switch under, err := sn.underPrimary(r, id); {
		case err != nil:
			return nil, nil, err
		case !under:
			stale = append(stale, id)
		}
	}
	entries, err := os.ReadDir(sn.dir)
	if err != nil {
		return nil, nil, warden.Recode(warden.CodeInternal, "listing "+sn.dir, err)
	}
	for _, e := range entries {
		id, isTmp := strings.CutSuffix(e.Name(), tmpSuffix)
		if _, open := sn.open[id]; isTmp && !open && snapshotID.MatchString(id) {
			left = append(left, filepath.Join(sn.dir, e.Name()))
		}
	}
	return stale, left, nil
}

// underPrimary reports whether metadata and key of a snapshot are under the primary.
func (sn *Snapshots) underPrimary(r Rotating, id string) (bool, error) {
	_, sealed, err := sn.readSealed(id)
	if err != nil || !r.UnderPrimary(sealed) {
		return false, err
	}
	m, _, err := sn.readMeta(id)
	if err != nil {
		return false, err
	}
	key, err := keyset.NewBinaryReader(bytes.NewReader(m.Key)).ReadEncrypted()
	if err != nil {
		return false, corrupt(filepath.Join(sn.dir, id, metaFile), "the key of its body does not parse")
	}
	return r.UnderPrimary(key.GetEncryptedKeyset()), nil
}

// Reseal puts the newest snapshot under the Sealer's primary, with a new key for its body, and removes all that are under older ones.
// It works where raft has nothing new to take a snapshot of, and beside open snapshots and sinks; a body is read and written in
// pieces. Killed at any point, the newest state is there, in one snapshot or two. The Sealer must use the new primary before the
// call. With nothing stale it does nothing. Errors: those of ctx, of Open and Create; CodeUnsupported if the Sealer is no Rotating.
func (sn *Snapshots) Reseal(ctx context.Context) error {
	op := "re-sealing " + sn.dir
	r, err := rotating(op, sn.sealer)
	if err != nil {
		return err
	}
	sn.resealing.Lock()
	defer sn.resealing.Unlock()
	for {
		newest, done, err := sn.dropStale(r)
		if err != nil || done {
			return warden.Wrap(op, err)
		}
		if err := sn.copySnapshot(ctx, newest); err != nil {
			return warden.Wrap(op, err)
		}
	}
}

// dropStale removes all that is stale if the newest snapshot is not. Otherwise it returns the newest's ID.
func (sn *Snapshots) dropStale(r Rotating) (newest string, done bool, err error) {
	sn.mu.Lock()
	defer sn.mu.Unlock()
	ids, err := sn.ids()
	if err != nil {
		return "", false, err
	}
	stale, left, err := sn.stale(r)
	if err != nil {
		return "", false, err
	}
	if len(stale) > 0 && stale[0] == ids[0] {
		return ids[0], false, nil
	}
	for _, id := range stale {
		if err := sn.remove(id); err != nil {
			return "", false, warden.Recode(warden.CodeInternal, "removing snapshot "+id, err)
		}
		sn.logger.Info("removed snapshot under an old key", "snapshot_id", id)
	}
	for _, dir := range left {
		if err := removeTmp(dir); err != nil {
			return "", false, warden.Recode(warden.CodeInternal, "removing "+dir, err)
		}
	}
	return "", true, nil
}

// copySnapshot makes a snapshot of the same state.
func (sn *Snapshots) copySnapshot(ctx context.Context, id string) error {
	start := time.Now()
	m, body, err := sn.Open(id)
	if warden.CodeOf(err) == warden.CodeNotFound { // a newer one took its place
		return nil
	}
	if err != nil {
		return err
	}
	defer body.Close()
	sink, err := sn.Create(m.Version, m.Index, m.Term, m.Configuration, m.ConfigurationIndex, nil)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{sink}, reader(func(p []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return body.Read(p)
	}), make([]byte, 256<<10)); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	if err := sink.Close(); err != nil {
		return err
	}
	sn.mu.Lock()
	sn.replaced[id] = sink.ID()
	sn.mu.Unlock()
	sn.logger.Info("re-sealed snapshot", "snapshot_id", id, "as", sink.ID(), "bytes", m.Size, "took", time.Since(start))
	return nil
}

// reader is a function as an io.Reader.
type reader func([]byte) (int, error)

func (r reader) Read(p []byte) (int, error) { return r(p) }
