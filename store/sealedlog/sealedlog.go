// Package sealedlog keeps a manager's raft state on disk, sealed: the log and the stable values in one bbolt file, and the
// snapshots in a directory each.
//
// It does not decide what is in the log, does not make or keep keys (the caller hands it a Sealer), and does not delete
// what it cannot read: it refuses, names the file and says what can be done.
//
// Invariants:
//   - Nothing but raft index, term, the IDs of cluster and node, key names and sizes is readable in the files.
//   - Every value is bound to its place: a value that was moved to another index, key, snapshot, node or cluster, or that was
//     cut or changed, is refused with CodeCorrupt, or CodeForeign where the file's own header tells whose it is.
//   - The log has no gaps; Open refuses a file in which an entry is missing, between others or at an end, or a stable value.
//   - A write that was acknowledged is on disk. A crash leaves the state before a write or after it.
//   - The bytes of a file are checked before they are mapped, and a fault in the mapping is an error, not a crash.
//
// What cannot be seen here: a file or directory that was rolled back as a whole, the loss of the last transaction together with its
// meta page (it looks like a write that power loss cut short), and an entry that raft had replaced, put back at its index.
//
// Trust: the Sealer's keys, and the operating system. The files are not trusted.
//
// References: the contracts of raft.LogStore, raft.MonotonicLogStore, raft.StableStore and raft.SnapshotStore in
// hashicorp/raft v1.8; the page format of go.etcd.io/bbolt v1.5; Tink's streaming AEAD (AES256-GCM-HKDF, 1 MiB segments).
package sealedlog

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"

	"warden"
)

// Sealer seals what goes to disk and opens what comes back. aad says where the bytes belong and is not part of the result.
// Open answers an error for whatever Seal did not make with the same aad. Both must be safe for concurrent use.
type Sealer interface {
	Seal(plaintext, aad []byte) ([]byte, error)
	Open(sealed, aad []byte) ([]byte, error)
}

// Rotating is a Sealer whose keys rotate: Seal uses the present primary, Open accepts older keys too, and UnderPrimary reports whether
// sealed, which Seal made, is under the present primary; it need not authenticate. What is behind it may change at any
// time, if what an older keyring sealed can still be opened until Reseal and Stale were clean under the newer one.
type Rotating interface {
	Sealer
	UnderPrimary(sealed []byte) bool
}

// rotating returns s as a Rotating. Errors: CodeUnsupported.
func rotating(op string, s Sealer) (Rotating, error) {
	if r, ok := s.(Rotating); ok {
		return r, nil
	}
	return nil, warden.Errorf(warden.CodeUnsupported, op, "its sealer has one key for ever")
}

// format is the version of both file formats. A higher one is refused with CodeUnsupported.
const format = 1

// owner is whose file it is. It is readable in the file's header, so that a foreign file is told from a damaged one; that it
// is true is shown by the sealed values, which are all bound to it.
type owner struct {
	Format  int    `json:"format"`
	Cluster string `json:"cluster"`
	Node    string `json:"node"`
}

// aad returns the associated data of a value in the named place: each part with its length before it, so that no two
// places share theirs.
func (o owner) aad(place string, parts ...[]byte) []byte {
	b := []byte("warden sealedlog 1")
	for _, p := range append([][]byte{[]byte(o.Cluster), []byte(o.Node), []byte(place)}, parts...) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return b
}

// check compares the header of the file at path with o. Errors: CodeCorrupt, CodeUnsupported, CodeForeign.
func (o owner) check(path string, header []byte) error {
	var h owner
	if err := json.Unmarshal(header, &h); err != nil {
		return corrupt(path, "its header does not parse")
	}
	if h.Format != format {
		return warden.Hint(warden.Errorf(warden.CodeUnsupported, "opening "+path, "format %d is not known here, only %d", h.Format, format),
			"run the version of warden that wrote the file")
	}
	if h.Cluster != o.Cluster || h.Node != o.Node {
		return warden.Hint(warden.Errorf(warden.CodeForeign, "opening "+path, "it belongs to node %.64q of cluster %.64q, not to node %q of cluster %q",
			h.Node, h.Cluster, o.Node, o.Cluster), "a node's raft directory works on that node only: put the right one back, or join this node anew")
	}
	return nil
}

// hintCorrupt is what to do about a damaged file. Nothing is repaired by dropping data: a manager that forgot a vote or an
// acknowledged entry could break the agreement of the others.
const hintCorrupt = "nothing was changed; if other managers are well, remove this one (wardenctl node rm), empty its state directory and join it again; " +
	"otherwise put this node's raft directory back from a backup"

func corrupt(path, why string, args ...any) error {
	return warden.Hint(warden.Errorf(warden.CodeCorrupt, "opening "+path, why, args...), hintCorrupt)
}

// makeDir makes dir and what is missing above it with mode 0700, and makes its name durable.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return warden.Recode(warden.CodeInternal, "making "+dir, err)
	}
	return syncDir(filepath.Dir(dir))
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return warden.Recode(warden.CodeInternal, "syncing "+dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return warden.Recode(warden.CodeInternal, "syncing "+dir, err)
	}
	return nil
}
