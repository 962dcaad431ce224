package sealedlog_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"
	"go.etcd.io/bbolt"

	"warden"
	"warden/store/sealedlog"
)

const (
	cluster = "cluster000000000000000000"
	node    = "node000000000000000000001"
	other   = "node000000000000000000002"
)

// sealer is what autolock's keyring is: XChaCha20-Poly1305 by Tink.
type sealer struct{ a tink.AEAD }

func newSealer(t testing.TB) sealer {
	t.Helper()
	h, err := keyset.NewHandle(aead.XChaCha20Poly1305KeyTemplate())
	if err != nil {
		t.Fatal(err)
	}
	a, err := aead.New(h)
	if err != nil {
		t.Fatal(err)
	}
	return sealer{a}
}

func (s sealer) Seal(plaintext, aad []byte) ([]byte, error) { return s.a.Encrypt(plaintext, aad) }
func (s sealer) Open(sealed, aad []byte) ([]byte, error)    { return s.a.Decrypt(sealed, aad) }

var discard = slog.New(slog.DiscardHandler)

func openLog(t testing.TB, dir string, s sealedlog.Sealer) *sealedlog.Log {
	t.Helper()
	l, err := sealedlog.Open(dir, cluster, node, s, discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// entry is a deterministic entry of about a hundred bytes.
func entry(index uint64) *raft.Log {
	return &raft.Log{
		Index: index, Term: 1 + index/10, Type: raft.LogCommand, Data: fmt.Appendf(nil, "canary-%d-%x", index, sha256.Sum256([]byte{byte(index)})),
		AppendedAt: time.Unix(1_800_000_000, int64(index)).UTC(),
	}
}

func store(t testing.TB, l *sealedlog.Log, from, to uint64) {
	t.Helper()
	var es []*raft.Log
	for i := from; i <= to; i++ {
		es = append(es, entry(i))
	}
	if err := l.StoreLogs(es); err != nil {
		t.Fatal(err)
	}
}

// wantRange checks that the log holds exactly the entries first to last.
func wantRange(t testing.TB, l *sealedlog.Log, first, last uint64) {
	t.Helper()
	f, err1 := l.FirstIndex()
	la, err2 := l.LastIndex()
	if err1 != nil || err2 != nil || f != first || la != last {
		t.Fatalf("log holds %d to %d (%v, %v), want %d to %d", f, la, err1, err2, first, last)
	}
	for i := first; i <= last && i > 0; i++ {
		var got raft.Log
		if err := l.GetLog(i, &got); err != nil {
			t.Fatalf("GetLog(%d) = %v", i, err)
		}
		if want := entry(i); got.Index != i || got.Term != want.Term || !bytes.Equal(got.Data, want.Data) || !got.AppendedAt.Equal(want.AppendedAt) {
			t.Fatalf("GetLog(%d) = %+v, want %+v", i, got, want)
		}
	}
}

// refused checks that opening dir is refused with the code, naming the file and saying what can be done.
func refused(t testing.TB, dir string, s sealedlog.Sealer, want warden.Code) {
	t.Helper()
	l, err := sealedlog.Open(dir, cluster, node, s, discard)
	if err == nil {
		l.Close()
		t.Error("opened, want", want)
		return
	}
	if warden.CodeOf(err) != want || warden.HintOf(err) == "" || !bytes.Contains([]byte(err.Error()), []byte(filepath.Join(dir, "log.db"))) {
		t.Errorf("Open = %v [%s], hint %q, want [%s]", err, warden.CodeOf(err), warden.HintOf(err), want)
	}
}

// edit changes the bbolt file in dir as somebody with write access but without the key could.
func edit(t testing.TB, dir string, f func(log, stable, header *bbolt.Bucket) error) {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(dir, "log.db"), 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(func(tx *bbolt.Tx) error {
		return f(tx.Bucket([]byte("log")), tx.Bucket([]byte("stable")), tx.Bucket([]byte("header")))
	}); err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// dirWith makes a raft directory that holds only the given bytes as its log file.
func dirWith(t testing.TB, db []byte) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "log.db"), db)
	return dir
}

func configuration() raft.Configuration {
	return raft.Configuration{Servers: []raft.Server{
		{ID: node, Address: node}, {ID: other, Address: other, Suffrage: raft.Nonvoter},
	}}
}

func openSnapshots(t testing.TB, dir string, s sealedlog.Sealer) *sealedlog.Snapshots {
	t.Helper()
	sn, err := sealedlog.OpenSnapshots(dir, cluster, node, s, 2, discard)
	if err != nil {
		t.Fatal(err)
	}
	return sn
}

// snapshot takes one and returns its ID.
func snapshot(t testing.TB, sn *sealedlog.Snapshots, index uint64, body []byte) string {
	t.Helper()
	sink, err := sn.Create(raft.SnapshotVersionMax, index, 3, configuration(), index-1, nil)
	if err != nil {
		t.Fatal(err)
	}
	for chunk := range slices.Chunk(body, 100_000) {
		if _, err := sink.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	return sink.ID()
}

func readSnapshot(sn *sealedlog.Snapshots, id string) (*raft.SnapshotMeta, []byte, error) {
	m, r, err := sn.Open(id)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return m, b, err
}
