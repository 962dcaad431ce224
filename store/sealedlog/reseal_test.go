package sealedlog_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/raft"

	"warden"
	"warden/internal/keyset"
	"warden/store/sealedlog"
)

// holder is a keyring that rotates, as a daemon's is. seal, where it is set, comes before each Seal.
type holder struct {
	now  atomic.Pointer[keyset.Set]
	seal func() error
}

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
	if h.seal != nil {
		if err := h.seal(); err != nil {
			return nil, err
		}
	}
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

// prefixOf returns what all that the keyring seals begins with: 1 and the key's ID.
func prefixOf(t testing.TB, k *keyset.Set) []byte {
	t.Helper()
	sealed, err := k.Seal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return sealed[:5]
}

// wantNothingUnder searches every byte of every file below dir for what the keyring sealed.
func wantNothingUnder(t testing.TB, dir string, k *keyset.Set) {
	t.Helper()
	prefix := prefixOf(t, k)
	if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() && bytes.Contains(readFile(t, path), prefix) {
			t.Errorf("%s holds what the old key sealed", path)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

func wantStale(t testing.TB, stale func() (int, error), want int) {
	t.Helper()
	if n, err := stale(); err != nil || n != want {
		t.Errorf("Stale() = %d, %v, want %d", n, err, want)
	}
}

func TestAResealedLogIsUnderTheNewKeyAlone(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	l := openLog(t, dir, h)
	store(t, l, 1, 3000)
	if err := errors.Join(l.DeleteRange(1, 700), l.Set([]byte("vote"), []byte("a")), l.SetUint64([]byte("term"), 7)); err != nil {
		t.Fatal(err)
	}
	wantStale(t, l.Stale, 0)
	if err := l.Reseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	old := h.rotate(t)
	wantStale(t, l.Stale, 2300+2+2)
	store(t, l, 3001, 3003)
	wantStale(t, l.Stale, 2300+2+1) // the extent was sealed anew
	before := state(t, l)
	for range 2 {
		if err := l.Reseal(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantStale(t, l.Stale, 0)
	}
	if now := state(t, l); now != before {
		t.Errorf("re-sealing changed the state from %s to %s", before, now)
	}
	wantNothingUnder(t, dir, old)
	store(t, l, 3004, 3010)
	refused(t, dir, h, warden.CodeInUse)
	l.Close()
	refused(t, dir, old, warden.CodeCorrupt)
	h.drop(t)
	l = openLog(t, dir, h)
	wantRange(t, l, 701, 3010)
	if v, err := l.GetUint64([]byte("term")); err != nil || v != 7 {
		t.Errorf(`GetUint64("term") = %d, %v`, v, err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("left %v", names)
	}
}

func TestResealingWantsASealerThatRotates(t *testing.T) {
	s := newSealer(t)
	l, sn := openLog(t, t.TempDir(), s), openSnapshots(t, t.TempDir(), s)
	_, err1 := l.Stale()
	_, err2 := sn.Stale()
	for _, err := range []error{l.Reseal(t.Context()), sn.Reseal(t.Context()), err1, err2} {
		if warden.CodeOf(err) != warden.CodeUnsupported {
			t.Errorf("got %v, want [unsupported]", err)
		}
	}
}

// TestResealingBesideRaft: appends, replaced ends, compactions, emptied logs and votes go on meanwhile, and none is lost.
func TestResealingBesideRaft(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	l := openLog(t, dir, h)
	big := func(i, salt uint64) *raft.Log {
		e := entry(i)
		e.Data = bytes.Repeat(binary.BigEndian.AppendUint64(nil, i*1000+salt), 500)
		return e
	}
	want, next, salt := map[uint64]uint64{}, uint64(1), uint64(0)
	append1 := func(n uint64) {
		var es []*raft.Log
		salt = (salt + 1) % 1000
		for range n {
			es = append(es, big(next, salt))
			want[next] = salt
			next++
		}
		if err := l.StoreLogs(es); err != nil {
			t.Error(err)
		}
	}
	deleted := func(low, high uint64) {
		if err := l.DeleteRange(low, high); err != nil {
			t.Error(err)
		}
		for i := range want {
			if i >= low && i <= high {
				delete(want, i)
			}
		}
	}
	append1(2000)
	first := uint64(1)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var votes uint64
	wg.Go(func() {
		for step := uint64(0); ; step++ {
			select {
			case <-stop:
				return
			default:
			}
			switch {
			case step%97 == 96: // all is covered by a snapshot that a leader sent
				deleted(first, next-1)
				next += 5
				first = next
				append1(3)
			case step%13 == 12: // compaction
				low := first
				first = min(next-1, first+(next-first)/8)
				if first > low {
					deleted(low, first-1)
				}
			case step%7 == 6: // another leader's entries replace ours
				if n := min(20, next-first-1); n > 0 {
					next -= n
					for i := next; i < next+n; i++ {
						delete(want, i)
					}
					append1(2)
				}
			case step%7 == 5 && next-first > 10:
				next -= 2
				deleted(next, next+1)
			case step%5 == 4:
				votes++
				if err := l.SetUint64([]byte("CurrentTerm"), votes); err != nil {
					t.Error(err)
				}
			default:
				append1(1 + step%40)
			}
		}
	})
	var olds []*keyset.Set
	for range 8 {
		olds = append(olds, h.rotate(t))
		if err := l.Reseal(t.Context()); err != nil {
			t.Error(err)
		}
		wantStale(t, l.Stale, 0)
		for _, old := range olds {
			wantNothingUnder(t, dir, old)
		}
		h.drop(t)
	}
	close(stop)
	wg.Wait()
	for range 2 {
		f, _ := l.FirstIndex()
		la, _ := l.LastIndex()
		if f != first || la != next-1 || uint64(len(want)) != next-first {
			t.Fatalf("log holds %d to %d, want %d to %d (%d)", f, la, first, next-1, len(want))
		}
		for i, salt := range want {
			var e raft.Log
			if err := l.GetLog(i, &e); err != nil || !bytes.Equal(e.Data, big(i, salt).Data) {
				t.Fatalf("GetLog(%d) is not what was stored last: %v", i, err)
			}
		}
		if v, err := l.GetUint64([]byte("CurrentTerm")); err != nil || v != votes {
			t.Errorf("CurrentTerm = %d, %v, want %d", v, err, votes)
		}
		l.Close()
		l = openLog(t, dir, h)
	}
}

// images collects what kill -9 would leave: all files below dir, as they are before each sealing.
func images(t testing.TB, dir string, h *holder) *[]map[string][]byte {
	out := &[]map[string][]byte{}
	h.seal = func() error {
		*out = append(*out, image(t, dir))
		return nil
	}
	return out
}

func image(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			name, _ := filepath.Rel(dir, path)
			files[name] = readFile(t, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return files
}

// lay writes an image into a fresh directory.
func lay(t testing.TB, files map[string][]byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, b)
	}
	return dir
}

// TestAResealingThatIsKilledIsResumed: whatever is there when the process dies, before each record and after each page of the
// copy's file, opens under the keyring of both keys as it was, and re-sealing it ends what was begun.
func TestAResealingThatIsKilledIsResumed(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	l := openLog(t, dir, h)
	store(t, l, 1, 90)
	if err := errors.Join(l.Set([]byte("vote"), []byte("a")), l.DeleteRange(1, 20)); err != nil {
		t.Fatal(err)
	}
	old := h.rotate(t)
	store(t, l, 91, 92) // some are under the new key before the re-sealing
	want := state(t, l)
	before := image(t, dir)
	at := images(t, dir, h)
	if err := l.Reseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.seal = nil
	all := append(*at, before, image(t, dir))
	l.Close()
	after := readFile(t, filepath.Join(dir, "log.db"))
	for n := 0; n <= len(after); n += page / 2 { // the copy, cut short, beside the old file
		all = append(all, map[string][]byte{"log.db": before["log.db"], "log.db.new": after[:n]})
	}
	for i, files := range all {
		dir := lay(t, files)
		l, err := sealedlog.Open(dir, cluster, node, h, discard)
		if err != nil {
			t.Fatalf("image %d of %d: %v", i, len(all), err)
		}
		if got := state(t, l); got != want {
			t.Errorf("image %d of %d: %s, want %s", i, len(all), got, want)
		}
		if err := l.Reseal(t.Context()); err != nil {
			t.Errorf("image %d of %d: Reseal() = %v", i, len(all), err)
		}
		wantStale(t, l.Stale, 0)
		l.Close()
		wantNothingUnder(t, dir, old)
		if names, _ := os.ReadDir(dir); len(names) != 1 {
			t.Errorf("image %d: left %v", i, names)
		}
	}
	t.Log(len(all), "images")
}

// TestAResealingThatFailsChangesNothing: at each record.
func TestAResealingThatFailsChangesNothing(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	l := openLog(t, dir, h)
	store(t, l, 1, 20)
	if err := l.Set([]byte("vote"), []byte("a")); err != nil {
		t.Fatal(err)
	}
	want := state(t, l)
	h.rotate(t)
	failures := 0
	for fail := 1; ; fail++ {
		n := 0
		h.seal = func() error {
			if n++; n == fail {
				return errors.New("no entropy")
			}
			return nil
		}
		err := l.Reseal(t.Context())
		h.seal = nil
		if err == nil {
			break
		}
		failures++
		if warden.CodeOf(err) != warden.CodeInternal {
			t.Errorf("failure %d: Reseal() = %v", fail, err)
		}
		if got := state(t, l); got != want {
			t.Errorf("failure %d: %s, want %s", fail, got, want)
		}
		if names, _ := os.ReadDir(dir); len(names) != 1 {
			t.Errorf("failure %d: left %v", fail, names)
		}
		if err := l.Set([]byte("vote"), []byte("a")); err != nil {
			t.Errorf("failure %d: Set() = %v", fail, err)
		}
	}
	if failures < 20 {
		t.Errorf("%d failures, want one for each record", failures)
	}
	wantStale(t, l.Stale, 0)
}

func TestAResealingEndsWithItsContextAndItsLog(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	l := openLog(t, dir, h)
	store(t, l, 1, 20)
	h.rotate(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Reseal(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Reseal of a cancelled context = %v", err)
	}
	var closed sync.WaitGroup
	closing := make(chan struct{})
	var once sync.Once
	h.seal = func() error {
		once.Do(func() {
			closed.Go(func() { close(closing); l.Close() })
			<-closing
		})
		return nil
	}
	err := l.Reseal(t.Context())
	closed.Wait()
	h.seal = nil
	if err != nil && warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("Reseal of a log that is closed meanwhile = %v", err)
	}
	if err := l.Reseal(t.Context()); err == nil {
		t.Error("Reseal of a closed log succeeded")
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("left %v", names)
	}
	wantRange(t, openLog(t, dir, h), 1, 20)
}

// TestAKeyRotatedDuringTheResealingIsTold: what the key in between sealed could stay in free pages.
func TestAKeyRotatedDuringTheResealingIsTold(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	l := openLog(t, dir, h)
	store(t, l, 1, 20)
	first := h.rotate(t)
	n, second := 0, (*keyset.Set)(nil)
	h.seal = func() error {
		if n++; n == 10 {
			second = h.rotate(t)
		}
		return nil
	}
	if err := l.Reseal(t.Context()); warden.CodeOf(err) != warden.CodeConflict || warden.HintOf(err) == "" {
		t.Errorf("Reseal() = %v, want [conflict]", err)
	}
	h.seal = nil
	if err := l.Reseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNothingUnder(t, dir, first)
	wantNothingUnder(t, dir, second)
	wantRange(t, l, 1, 20)
}

// TestDamageIsFoundByResealing: it does not launder what does not authenticate.
func TestDamageIsFoundByResealing(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	l := openLog(t, dir, h)
	store(t, l, 1, 20)
	f, err := os.OpenFile(filepath.Join(dir, "log.db"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := int64(-1)
	if err := func() error { // the tail of the newest record of entry 7
		b := readFile(t, f.Name())
		i := bytes.LastIndex(b, append(binary.BigEndian.AppendUint64(nil, entry(7).Term), prefixOf(t, h.now.Load())...))
		at = int64(i) + 40
		_, err := f.WriteAt([]byte{b[at] ^ 1}, at)
		return err
	}(); err != nil {
		t.Fatal(err)
	}
	h.rotate(t)
	if err := l.Reseal(t.Context()); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Errorf("Reseal() = %v, want [corrupt]", err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("left %v", names)
	}
}

func TestResealedSnapshots(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	sn := openSnapshots(t, dir, h)
	if err := sn.Reseal(t.Context()); err != nil {
		t.Errorf("Reseal() of none = %v", err)
	}
	snapshot(t, sn, 5, bodyOf("a"))
	id := snapshot(t, sn, 6, bodyOf("b"))
	wantStale(t, sn.Stale, 0)
	old := h.rotate(t)
	wantStale(t, sn.Stale, 2)
	_, open, err := sn.Open(id) // as raft has it while it sends it to a follower
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	during, err := sn.Create(raft.SnapshotVersionMax, 7, 3, configuration(), 6, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := sn.Reseal(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantStale(t, sn.Stale, 0)
	}
	wantNothingUnder(t, dir, old)
	list, err := sn.List()
	if err != nil || len(list) != 1 || list[0].Index != 6 || list[0].ID == id {
		t.Fatalf("List() = %v, %v", list, err)
	}
	for _, id := range []string{id, list[0].ID} { // raft may have asked for the list before
		m, b, err := readSnapshot(sn, id)
		if err != nil || !bytes.Equal(b, bodyOf("b")) || m.ConfigurationIndex != 5 || len(m.Configuration.Servers) != 2 || m.Term != 3 {
			t.Errorf("snapshot %s = %+v, %v", id, m, err)
		}
	}
	if b, err := io.ReadAll(open); err != nil || !bytes.Equal(b, bodyOf("b")) {
		t.Errorf("the old snapshot, open: %v", err)
	}
	// A sink of before the rotation is under the new key once it is closed.
	if _, err := during.Write(bodyOf("c")); err != nil {
		t.Fatal(err)
	}
	if err := during.Close(); err != nil {
		t.Fatal(err)
	}
	wantStale(t, sn.Stale, 0)
	wantNothingUnder(t, dir, old)
	h.drop(t)
	sn = openSnapshots(t, dir, h)
	if _, b, err := readSnapshot(sn, during.ID()); err != nil || !bytes.Equal(b, bodyOf("c")) {
		t.Errorf("the snapshot of a sink of before the rotation: %v", err)
	}
	if _, err := sealedlog.OpenSnapshots(dir, cluster, node, old, 2, discard); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Errorf("OpenSnapshots with the old key = %v", err)
	}
}

// TestAResealingOfSnapshotsThatIsKilledIsResumed: at each sealing, and at each step that has none.
func TestAResealingOfSnapshotsThatIsKilledIsResumed(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	sn := openSnapshots(t, dir, h)
	first, second := snapshot(t, sn, 5, []byte("a")), snapshot(t, sn, 6, bodyOf("b"))
	old := h.rotate(t)
	before := image(t, dir)
	at := images(t, dir, h)
	if err := sn.Reseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.seal = nil
	after := image(t, dir)
	with := func(parts ...map[string][]byte) map[string][]byte {
		all := map[string][]byte{}
		for _, p := range parts {
			for k, v := range p {
				all[k] = v
			}
		}
		return all
	}
	only := func(files map[string][]byte, id, as string) map[string][]byte {
		out := map[string][]byte{}
		for _, f := range []string{"meta", "state"} {
			out[filepath.Join("snapshots", as, f)] = files[filepath.Join("snapshots", id, f)]
		}
		return out
	}
	wiped := only(before, second, second+".tmp")
	wiped[filepath.Join("snapshots", second+".tmp", "meta")] = make([]byte, 100)
	all := append(*at, before, after,
		with(before, after), // published, nothing removed yet
		with(only(before, first, first+".tmp"), only(before, second, second), after),
		with(only(before, first, first), only(before, second, second+".tmp"), after),
		with(wiped, after))
	for i, files := range all {
		dir := lay(t, files)
		sn, err := sealedlog.OpenSnapshots(dir, cluster, node, h, 2, discard)
		if err != nil {
			t.Fatalf("image %d: %v", i, err)
		}
		if err := sn.Reseal(t.Context()); err != nil {
			t.Errorf("image %d: Reseal() = %v", i, err)
		}
		wantStale(t, sn.Stale, 0)
		wantNothingUnder(t, dir, old)
		list, err := sn.List()
		if err != nil || len(list) != 1 || list[0].Index != 6 {
			t.Fatalf("image %d: List() = %v, %v", i, list, err)
		}
		if _, b, err := readSnapshot(sn, list[0].ID); err != nil || !bytes.Equal(b, bodyOf("b")) {
			t.Errorf("image %d: %v", i, err)
		}
	}
	t.Log(len(all), "images")
}

func TestAResealingOfSnapshotsThatFailsLosesNothing(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	sn := openSnapshots(t, dir, h)
	id := snapshot(t, sn, 6, bodyOf("b"))
	h.rotate(t)
	for fail := 1; ; fail++ {
		n := 0
		h.seal = func() error {
			if n++; n == fail {
				return errors.New("no entropy")
			}
			return nil
		}
		err := sn.Reseal(t.Context())
		h.seal = nil
		if err == nil {
			break
		}
		if names, _ := os.ReadDir(filepath.Join(dir, "snapshots")); len(names) != 1 || names[0].Name() != id {
			t.Errorf("failure %d: left %v", fail, names)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h.rotate(t)
	if err := sn.Reseal(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Reseal of a cancelled context = %v", err)
	}
	if _, b, err := readSnapshot(sn, id); err != nil || !bytes.Equal(b, bodyOf("b")) {
		t.Error(err)
	}
}

// TestSnapshotsBesideResealing: raft takes snapshots and reads them while keys rotate.
func TestSnapshotsBesideResealing(t *testing.T) {
	dir, h := t.TempDir(), newHolder(t)
	sn := openSnapshots(t, dir, h)
	var wg sync.WaitGroup
	stop, took := make(chan struct{}), make(chan struct{}, 1)
	newest := uint64(0)
	wg.Go(func() {
		for i := uint64(1); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			id := snapshot(t, sn, i, fmt.Appendf(nil, "state %d", i))
			if _, b, err := readSnapshot(sn, id); err != nil || string(b) != fmt.Sprintf("state %d", i) {
				t.Errorf("snapshot %s = %q, %v", id, b, err)
			}
			newest = i
			select {
			case took <- struct{}{}:
			default:
			}
		}
	})
	for range 20 {
		<-took // there is something new to re-seal
		h.rotate(t)
		if err := sn.Reseal(t.Context()); err != nil {
			t.Error(err)
		}
		wantStale(t, sn.Stale, 0)
	}
	close(stop)
	wg.Wait()
	sn = openSnapshots(t, dir, h)
	list, err := sn.List()
	if err != nil || len(list) != 1 || list[0].Index != newest {
		t.Errorf("List() = %v, %v, want index %d", list, err, newest)
	}
}
