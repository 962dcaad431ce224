package sealedlog_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	"pgregory.net/rapid"

	"warden"
	"warden/store/sealedlog"
)

func TestWhatWasStoredComesBackAfterReopening(t *testing.T) {
	dir, s := filepath.Join(t.TempDir(), "raft"), newSealer(t)
	l := openLog(t, dir, s)
	wantRange(t, l, 0, 0)
	store(t, l, 1, 25)
	store(t, l, 26, 26)
	if err := errors.Join(l.Set([]byte("name"), []byte("value")), l.SetUint64([]byte("number"), 1<<63+5)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wantRange(t, l, 1, 26)
		if v, err := l.Get([]byte("name")); err != nil || string(v) != "value" {
			t.Errorf(`Get("name") = %q, %v`, v, err)
		}
		if v, err := l.GetUint64([]byte("number")); err != nil || v != 1<<63+5 {
			t.Errorf(`GetUint64("number") = %d, %v`, v, err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = openLog(t, dir, s)
	}
	if info, err := os.Stat(filepath.Join(dir, "log.db")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of log.db = %v, %v", info.Mode(), err)
	}
}

// TestWhatRaftComparesByText: raft v1.8 looks at the text of a stable value's error and at the identity of a log entry's.
func TestWhatRaftComparesByText(t *testing.T) {
	l := openLog(t, t.TempDir(), newSealer(t))
	if _, err := l.Get([]byte("none")); err == nil || err.Error() != "not found" {
		t.Errorf("Get = %v", err)
	}
	if _, err := l.GetUint64([]byte("none")); err == nil || err.Error() != "not found" {
		t.Errorf("GetUint64 = %v", err)
	}
	if err := l.GetLog(1, &raft.Log{}); err != raft.ErrLogNotFound {
		t.Errorf("GetLog = %v", err)
	}
	if !l.IsMonotonic() {
		t.Error("IsMonotonic() = false")
	}
}

func TestTheLogHasNoGaps(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	l := openLog(t, dir, s)
	store(t, l, 1, 20)
	if err := l.StoreLogs([]*raft.Log{entry(21), entry(23)}); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("StoreLogs(21, 23) = %v", err)
	}
	if err := l.StoreLogs([]*raft.Log{entry(0)}); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("StoreLogs(0) = %v", err)
	}
	if err := l.DeleteRange(5, 6); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("DeleteRange(5, 6) of 1 to 20 = %v", err)
	}
	wantRange(t, l, 1, 20)
	store(t, l, 11, 12) // raft's own log ended at 10: what is above is not part of it
	wantRange(t, l, 1, 12)
	if err := l.DeleteRange(1, 4); err != nil {
		t.Fatal(err)
	}
	wantRange(t, l, 5, 12)
	if err := l.DeleteRange(10, 12); err != nil {
		t.Fatal(err)
	}
	wantRange(t, l, 5, 9)
	store(t, l, 100, 103) // a snapshot at 99 was installed, and the log not yet emptied
	wantRange(t, l, 100, 103)
	if err := l.DeleteRange(100, 103); err != nil {
		t.Fatal(err)
	}
	wantRange(t, l, 0, 0)
	store(t, l, 7, 9)
	l.Close()
	wantRange(t, openLog(t, dir, s), 7, 9)
}

func TestDeletingManyEntriesLeavesNone(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	l := openLog(t, dir, s)
	store(t, l, 1, 3000)
	if err := l.DeleteRange(1, 2500); err != nil {
		t.Fatal(err)
	}
	f, _ := l.FirstIndex()
	la, _ := l.LastIndex()
	if f != 2501 || la != 3000 {
		t.Errorf("log holds %d to %d", f, la)
	}
	l.Close()
	openLog(t, dir, s)
}

// TestEmptyingALogOfManyPages is what raft does after a leader sent it a snapshot.
func TestEmptyingALogOfManyPages(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	l := openLog(t, dir, s)
	store(t, l, 1, 1000)
	if err := l.DeleteRange(1, 1000); err != nil {
		t.Fatal(err)
	}
	wantRange(t, l, 0, 0)
	store(t, l, 2000, 2100)
	l.Close()
	wantRange(t, openLog(t, dir, s), 2000, 2100)
}

// TestI8NothingSecretInTheFile searches the file for the entries' text.
func TestI8NothingSecretInTheFile(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir, newSealer(t))
	store(t, l, 1, 50)
	if err := l.Set([]byte("LastVoteCand"), []byte("canary-vote")); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(readFile(t, filepath.Join(dir, "log.db")), []byte("canary")) {
		t.Error("log.db holds plaintext")
	}
}

// TestI8RecordsElsewhereAreRefused: what somebody can do who writes the file but has no key.
func TestI8RecordsElsewhereAreRefused(t *testing.T) {
	s := newSealer(t)
	key := func(i uint64) []byte { return binary.BigEndian.AppendUint64(nil, i) }
	for name, change := range map[string]func(log, stable, header *bbolt.Bucket) error{
		"swapped entries": func(log, _, _ *bbolt.Bucket) error {
			a, b := bytes.Clone(log.Get(key(2))), bytes.Clone(log.Get(key(3)))
			return errors.Join(log.Put(key(2), b), log.Put(key(3), a))
		},
		"copied entry": func(log, _, _ *bbolt.Bucket) error { return log.Put(key(9), bytes.Clone(log.Get(key(8)))) },
		"appended entry": func(log, _, _ *bbolt.Bucket) error {
			return log.Put(key(13), bytes.Clone(log.Get(key(12))))
		},
		"cut tail":       func(log, _, _ *bbolt.Bucket) error { return log.Delete(key(12)) },
		"cut head":       func(log, _, _ *bbolt.Bucket) error { return log.Delete(key(1)) },
		"forgotten vote": func(_, stable, _ *bbolt.Bucket) error { return stable.Delete([]byte("b")) },
		"extent removed": func(_, _, header *bbolt.Bucket) error { return header.Delete([]byte("extent")) },
		"missing entry":  func(log, _, _ *bbolt.Bucket) error { return log.Delete(key(5)) },
		"flipped bit": func(log, _, _ *bbolt.Bucket) error {
			v := bytes.Clone(log.Get(key(4)))
			v[len(v)/2] ^= 1
			return log.Put(key(4), v)
		},
		"changed term": func(log, _, _ *bbolt.Bucket) error {
			v := bytes.Clone(log.Get(key(4)))
			v[7] ^= 1
			return log.Put(key(4), v)
		},
		"truncated entry": func(log, _, _ *bbolt.Bucket) error {
			v := bytes.Clone(log.Get(key(4)))
			return log.Put(key(4), v[:len(v)-1])
		},
		"entry of 7 bytes": func(log, _, _ *bbolt.Bucket) error { return log.Put(key(4), make([]byte, 7)) },
		"empty entry":      func(log, _, _ *bbolt.Bucket) error { return log.Put(key(4), nil) },
		"odd key":          func(log, _, _ *bbolt.Bucket) error { return log.Put([]byte("zzz"), bytes.Clone(log.Get(key(4)))) },
		"bucket for entry": func(log, _, _ *bbolt.Bucket) error {
			_, err := log.CreateBucket(key(13))
			return err
		},
		"swapped stable values": func(_, stable, _ *bbolt.Bucket) error {
			a, b := bytes.Clone(stable.Get([]byte("a"))), bytes.Clone(stable.Get([]byte("b")))
			return errors.Join(stable.Put([]byte("a"), b), stable.Put([]byte("b"), a))
		},
		"entry as stable value": func(log, stable, _ *bbolt.Bucket) error {
			return stable.Put([]byte("a"), bytes.Clone(log.Get(key(4)))[8:])
		},
		"truncated stable value": func(_, stable, _ *bbolt.Bucket) error {
			return stable.Put([]byte("a"), bytes.Clone(stable.Get([]byte("a")))[1:])
		},
		"header rewritten": func(_, _, header *bbolt.Bucket) error {
			return header.Put([]byte("clear"), append(bytes.Clone(header.Get([]byte("clear"))), ' '))
		},
		"header removed":   func(_, _, header *bbolt.Bucket) error { return header.Delete([]byte("clear")) },
		"sealed removed":   func(_, _, header *bbolt.Bucket) error { return header.Delete([]byte("sealed")) },
		"log removed":      func(_, _, header *bbolt.Bucket) error { return header.Tx().DeleteBucket([]byte("log")) },
		"stable removed":   func(_, _, header *bbolt.Bucket) error { return header.Tx().DeleteBucket([]byte("stable")) },
		"all but log gone": func(_, _, h *bbolt.Bucket) error { return h.Tx().DeleteBucket([]byte("header")) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := openLog(t, dir, s)
			store(t, l, 1, 12)
			if err := errors.Join(l.SetUint64([]byte("a"), 1), l.SetUint64([]byte("b"), 2)); err != nil {
				t.Fatal(err)
			}
			l.Close()
			edit(t, dir, change)
			refused(t, dir, s, warden.CodeCorrupt)
		})
	}
}

func TestI8AnotherNodesFileIsRefused(t *testing.T) {
	s := newSealer(t) // the same key even: the header tells
	for _, c := range []struct{ cluster, node string }{{cluster, other}, {"cluster000000000000000009", node}} {
		dir := t.TempDir()
		l, err := sealedlog.Open(dir, c.cluster, c.node, s, discard)
		if err != nil {
			t.Fatal(err)
		}
		store(t, l, 1, 3)
		l.Close()
		refused(t, dir, s, warden.CodeForeign)
		// Nor does a header help that claims to be ours.
		mine := t.TempDir()
		openLog(t, mine, s).Close()
		var clear, sealed []byte
		edit(t, mine, func(_, _, h *bbolt.Bucket) error {
			clear, sealed = bytes.Clone(h.Get([]byte("clear"))), bytes.Clone(h.Get([]byte("sealed")))
			return nil
		})
		edit(t, dir, func(_, _, h *bbolt.Bucket) error { return h.Put([]byte("clear"), clear) })
		refused(t, dir, s, warden.CodeCorrupt)
		edit(t, dir, func(_, _, h *bbolt.Bucket) error { return h.Put([]byte("sealed"), sealed) })
		refused(t, dir, s, warden.CodeCorrupt) // its entries are still the other's
	}
}

// TestI8AnOldVoteIsRefused: a stable value that was replaced does not come back alone.
func TestI8AnOldVoteIsRefused(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	l := openLog(t, dir, s)
	store(t, l, 1, 3)
	var old []byte
	for term := range uint64(2) {
		if err := l.SetUint64([]byte("CurrentTerm"), term); err != nil {
			t.Fatal(err)
		}
		l.Close()
		edit(t, dir, func(_, stable, _ *bbolt.Bucket) error {
			if term == 0 {
				old = bytes.Clone(stable.Get([]byte("CurrentTerm")))
				return nil
			}
			return stable.Put([]byte("CurrentTerm"), old)
		})
		if term == 0 {
			l = openLog(t, dir, s)
		}
	}
	refused(t, dir, s, warden.CodeCorrupt)
}

func TestAnotherKeyIsRefused(t *testing.T) {
	dir := t.TempDir()
	openLog(t, dir, newSealer(t)).Close()
	refused(t, dir, newSealer(t), warden.CodeCorrupt)
}

func TestANewerFormatIsRefused(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	openLog(t, dir, s).Close()
	edit(t, dir, func(_, _, h *bbolt.Bucket) error { return h.Put([]byte("clear"), []byte(`{"format":2}`)) })
	refused(t, dir, s, warden.CodeUnsupported)
}

func TestAFileIsOpenOnce(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	l := openLog(t, dir, s)
	refused(t, dir, s, warden.CodeInUse)
	l.Close()
	openLog(t, dir, s)
}

func TestAfterCloseCallsAreErrors(t *testing.T) {
	l := openLog(t, t.TempDir(), newSealer(t))
	l.Close()
	if err := l.Close(); err != nil {
		t.Errorf("second Close = %v", err)
	}
	if _, err := l.LastIndex(); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("LastIndex = %v", err)
	}
	if err := l.StoreLog(entry(1)); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("StoreLog = %v", err)
	}
}

// TestRecordsHaveOneSpelling: ParseRecord is the inverse of FormatRecord.
func TestRecordsHaveOneSpelling(t *testing.T) {
	if got := (raft.Log{}); sealedlog.ParseRecord(sealedlog.FormatRecord(&raft.Log{}), &got) != nil || !got.AppendedAt.IsZero() {
		t.Errorf("the zero entry comes back as %+v", got)
	}
	rapid.Check(t, func(t *rapid.T) {
		in := entry(rapid.Uint64().Draw(t, "index"))
		in.Term = rapid.Uint64().Draw(t, "term")
		in.Type = raft.LogType(rapid.Byte().Draw(t, "type"))
		in.Data = rapid.SliceOf(rapid.Byte()).Draw(t, "data")
		in.Extensions = rapid.SliceOf(rapid.Byte()).Draw(t, "extensions")
		b := sealedlog.FormatRecord(in)
		var out raft.Log
		if err := sealedlog.ParseRecord(b, &out); err != nil {
			t.Fatal(err)
		}
		if out.Index != in.Index || out.Term != in.Term || out.Type != in.Type || !bytes.Equal(out.Data, in.Data) ||
			!bytes.Equal(out.Extensions, in.Extensions) || !out.AppendedAt.Equal(in.AppendedAt) || !bytes.Equal(sealedlog.FormatRecord(&out), b) {
			t.Fatalf("ParseRecord(FormatRecord(%+v)) = %+v", in, out)
		}
		cut := rapid.IntRange(0, len(b)-1).Draw(t, "cut")
		if err := sealedlog.ParseRecord(b[:cut], &out); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Fatalf("ParseRecord of the first %d bytes = %v", cut, err)
		}
		if err := sealedlog.ParseRecord(append(b, 0), &out); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Fatalf("ParseRecord with a byte more = %v", err)
		}
	})
}
