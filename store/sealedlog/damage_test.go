package sealedlog_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store/sealedlog"
)

const page = 4096 // what bbolt takes on the machines that these tests run on

// state is what a log holds, as text.
func state(t testing.TB, l *sealedlog.Log) string {
	t.Helper()
	first, err1 := l.FirstIndex()
	last, err2 := l.LastIndex()
	v, err3 := l.Get([]byte("vote"))
	if err := errors.Join(err1, err2); err != nil || err3 != nil && err3.Error() != "not found" {
		t.Fatal(err, err3)
	}
	s := fmt.Sprintf("%d-%d vote %q", first, last, v)
	for i := first; i <= last && i > 0; i++ {
		var e raft.Log
		if err := l.GetLog(i, &e); err != nil || !bytes.Equal(e.Data, entry(i).Data) {
			t.Fatalf("GetLog(%d) = %+v, %v", i, e, err)
		}
	}
	return s
}

// reopen returns the state of a log file with these bytes, or the error with which it is refused.
func reopen(t testing.TB, db []byte, s sealedlog.Sealer) (string, error) {
	t.Helper()
	dir := t.TempDir()
	defer os.RemoveAll(dir)
	writeFile(t, filepath.Join(dir, "log.db"), db)
	l, err := sealedlog.Open(dir, cluster, node, s, discard)
	if err != nil {
		return "", err
	}
	defer l.Close()
	return state(t, l), nil
}

// writes lists the pages that differ, in the order in which bbolt writes them: data by page number, then one meta page.
func writes(before, after []byte) (order []int) {
	var meta []int
	for i := range len(after) / page {
		b := after[i*page : (i+1)*page]
		if (i+1)*page <= len(before) && bytes.Equal(b, before[i*page:(i+1)*page]) {
			continue
		}
		if i < 2 {
			meta = append(meta, i)
		} else {
			order = append(order, i)
		}
	}
	return append(order, meta...)
}

// TestPowerLossGivesTheOldStateOrTheNew cuts the writes of each transaction after every page, and in the middle of every page, and
// reopens what is there then.
func TestPowerLossGivesTheOldStateOrTheNew(t *testing.T) {
	dir, s := t.TempDir(), newSealer(t)
	path := filepath.Join(dir, "log.db")
	l := openLog(t, dir, s)
	cuts := 0
	for i, write := range []func() error{
		func() error { return l.StoreLogs([]*raft.Log{entry(1), entry(2), entry(3)}) },
		func() error { return l.Set([]byte("vote"), []byte("a")) },
		func() error {
			var es []*raft.Log
			for i := range uint64(60) {
				es = append(es, entry(4+i))
			}
			return l.StoreLogs(es)
		},
		func() error { return l.Set([]byte("vote"), []byte("b")) },
		func() error { return l.DeleteRange(50, 63) },
		func() error { return l.StoreLogs([]*raft.Log{entry(50)}) },
		func() error { return l.DeleteRange(1, 40) },
		func() error { return l.StoreLogs([]*raft.Log{entry(90), entry(91)}) },
	} {
		before, old := readFile(t, path), state(t, l)
		if err := write(); err != nil {
			t.Fatal(err)
		}
		after, now := readFile(t, path), state(t, l)
		order := writes(before, after)
		if n := len(order); n < 2 || order[n-1] > 1 || order[n-2] < 2 {
			t.Fatalf("write %d: pages %v, want data and one meta page", i, order)
		}
		disk := append(bytes.Clone(before), make([]byte, max(0, len(after)-len(before)))...)
		for n, p := range order {
			for _, upTo := range []int{0, 8, 100, 512, page / 2, page} { // bytes of the page that arrived
				copy(disk[p*page:p*page+upTo], after[p*page:])
				want := []string{old}
				if n == len(order)-1 && upTo > 80 { // the meta page's own bytes are there
					want = []string{now}
				}
				got, err := reopen(t, disk, s)
				if err != nil || got != want[0] {
					t.Errorf("write %d cut in page %d (%d of %d) after %d bytes: %q, %v; want %q", i, p, n+1, len(order), upTo, got, err, want)
				}
				cuts++
			}
		}
	}
	t.Log(cuts, "cuts")
}

// damaged returns a closed log file with history, its state, and the state before its last transaction.
func damaged(t testing.TB, s sealedlog.Sealer) (db []byte, now, old string) {
	dir := t.TempDir()
	l := openLog(t, dir, s)
	store(t, l, 1, 90)
	if err := errors.Join(l.Set([]byte("vote"), []byte("a")), l.DeleteRange(1, 20)); err != nil {
		t.Fatal(err)
	}
	old = state(t, l)
	store(t, l, 91, 99)
	now = state(t, l)
	l.Close()
	return readFile(t, filepath.Join(dir, "log.db")), now, old
}

// TestATornMetaPageIsRepaired: bbolt goes back to the other meta page, which power loss cannot have hit as well.
func TestATornMetaPageIsRepaired(t *testing.T) {
	s := newSealer(t)
	db, now, old := damaged(t, s)
	newest := 0
	if binary.LittleEndian.Uint64(db[page+16+48:]) > binary.LittleEndian.Uint64(db[16+48:]) {
		newest = 1
	}
	for meta := range 2 {
		want := now
		if meta == newest {
			want = old
		}
		for name, tear := range map[string]func(b []byte){
			"zeroed":     func(b []byte) { clear(b) },
			"half":       func(b []byte) { clear(b[40:]) },
			"bit":        func(b []byte) { b[16+20] ^= 4 },
			"page size":  func(b []byte) { b[16+9] ^= 0x30 },
			"overwrites": func(b []byte) { copy(b, bytes.Repeat([]byte{0xff}, page)) },
		} {
			b := bytes.Clone(db)
			tear(b[meta*page : (meta+1)*page])
			got, err := reopen(t, b, s)
			if err != nil || got != want {
				t.Errorf("meta page %d %s: %q, %v; want %q", meta, name, got, err, want)
			}
		}
	}
	clear(db[:2*page])
	refused(t, dirWith(t, db), s, warden.CodeCorrupt)
}

// TestATruncatedFileIsRefused: bbolt would map pages that the file does not have, and the process would end at reading one.
func TestATruncatedFileIsRefused(t *testing.T) {
	s := newSealer(t)
	db, now, _ := damaged(t, s)
	newest := max(binary.LittleEndian.Uint64(db[16+48:]), binary.LittleEndian.Uint64(db[page+16+48:]))
	meta := db[newest%2*page:]
	used := int(binary.LittleEndian.Uint64(meta[16+40:])) * page // the high-water mark
	for _, size := range []int{0, 1, 15, 79, 80, 100, page - 1, page, page + 80, 2 * page, 3 * page, used / 2, used - page, used - 1} {
		refused(t, dirWith(t, db[:size]), s, warden.CodeCorrupt)
	}
	for size := used; size <= len(db); size += page {
		if got, err := reopen(t, db[:size], s); err != nil || got != now {
			t.Errorf("cut behind the last used page, at %d: %q, %v", size, got, err)
		}
	}
	for cut := used - page; cut > 2*page; cut -= page { // a tail of zeros
		b := bytes.Clone(db)
		clear(b[cut:])
		if got, err := reopen(t, b, s); err == nil && got != now || err != nil && warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("zeros from %d: %q, %v", cut, got, err)
		}
	}
}

// TestDamageIsRefusedAndNeverACrash changes a few bytes at a time everywhere, above all in page headers and elements.
func TestDamageIsRefusedAndNeverACrash(t *testing.T) {
	s := newSealer(t)
	db, now, old := damaged(t, s)
	r := rand.New(rand.NewPCG(1, 2))
	refusals := 0
	try := func(what string, b []byte) {
		got, err := reopen(t, b, s)
		switch {
		case err == nil && got != now && got != old:
			t.Errorf("%s: opened as %q", what, got)
		case err != nil && warden.CodeOf(err) != warden.CodeCorrupt:
			t.Errorf("%s: %v [%s]", what, err, warden.CodeOf(err))
		case err != nil && !strings.Contains(err.Error(), "log.db"):
			t.Errorf("%s: %v does not name the file", what, err)
		case err != nil:
			refusals++
		}
	}
	values := []byte{0, 1, 0x7f, 0x80, 0xff}
	for p := range len(db) / page {
		for range 8 {
			b := bytes.Clone(db)
			off := p*page + r.IntN(16+16*8)
			if r.IntN(4) == 0 {
				off = p*page + r.IntN(page)
			}
			for i := range 1 + r.IntN(4) {
				b[min(off+i, len(b)-1)] = values[r.IntN(len(values))]
			}
			try(fmt.Sprintf("bytes at %d", off), b)
		}
		for _, q := range []int{0, 1, 2, 3, len(db)/page - 1} { // a page in another's place
			b := bytes.Clone(db)
			copy(b[p*page:(p+1)*page], db[q*page:(q+1)*page])
			try(fmt.Sprintf("page %d in place of %d", q, p), b)
			if p > 1 { // … that even claims to be the right one
				binary.LittleEndian.PutUint64(b[p*page:], uint64(p))
				try(fmt.Sprintf("page %d in place of %d, renumbered", q, p), b)
			}
		}
	}
	if refusals < 100 {
		t.Errorf("only %d refusals", refusals)
	}
	t.Log(refusals, "refusals")
}

// TestAFileThatShrinksWhileItIsOpenIsAnError: the mapping has pages then that the file has not.
func TestAFileThatShrinksWhileItIsOpenIsAnError(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir, newSealer(t))
	store(t, l, 1, 300)
	if err := os.Truncate(filepath.Join(dir, "log.db"), 2*page); err != nil {
		t.Fatal(err)
	}
	if err := l.GetLog(150, &raft.Log{}); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Errorf("GetLog = %v", err)
	}
	if err := l.StoreLog(entry(301)); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Errorf("StoreLog = %v", err)
	}
}

func TestAnInterruptedCreationIsDoneAgain(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "log.db.tmp"), []byte("half a page"))
	wantRange(t, openLog(t, dir, newSealer(t)), 0, 0)
	if _, err := os.Stat(filepath.Join(dir, "log.db.tmp")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("log.db.tmp: %v", err)
	}
}

func TestASymbolicLinkIsNotFollowed(t *testing.T) {
	dir, elsewhere, s := t.TempDir(), t.TempDir(), newSealer(t)
	openLog(t, elsewhere, s).Close()
	if err := os.Symlink(filepath.Join(elsewhere, "log.db"), filepath.Join(dir, "log.db")); err != nil {
		t.Fatal(err)
	}
	if l, err := sealedlog.Open(dir, cluster, node, s, discard); err == nil {
		l.Close()
		t.Error("opened")
	}
}
