package daemon

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/ca"
	"warden/internal/durable"
	"warden/internal/sensitive"
)

// Files of the state directory.
const (
	identityDir  = "identity"
	keyFile      = "identity/node.key"      // key, chain and, for a manager, its DEK; the one file that makes a node
	certFile     = "identity/node.crt"      // the chain once more, for people and tools
	managersFile = "identity/managers.json" // where to dial, and the keys to expect there
	raftDir      = "raft"
	tasksDir     = "tasks"
	lockFile     = "lock"

	unfinishedFile = "unfinished" // while it is there, what has no key file is wiped at the next start
)

// identity is who this node is: its key and chain in memory, and their files. Safe for concurrent use.
type identity struct {
	dir string

	mu        sync.Mutex // guards all below; held while files are written, so that memory and disk agree
	id        autolock.Identity
	recipient *autolock.Recipient // that the key file is sealed to; nil: it is in clear
	sealer    *autolock.Sealer    // of the replicated state, with id's keyring; another one after each promotion, nil on workers
	leaf      ca.Identity
	root      *x509.Certificate
	cert      *tls.Certificate
	pending   crypto.Signer // made by Renew, spent by Install
	held      time.Time     // when id or recipient last changed
	managers  *api.ManagerList
	contact   time.Time // when a manager was last heard
}

// openIdentity takes over what a key file held, and what it is sealed to.
func openIdentity(dir string, id autolock.Identity, to *autolock.Recipient) (*identity, error) {
	i := &identity{dir: dir, managers: &api.ManagerList{}}
	var key crypto.Signer
	err := id.Key.Use(func(der []byte) (err error) {
		key, err = ca.ParseKey(der)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := i.take(id, to, key); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, managersFile))
	if err == nil {
		err = protojson.Unmarshal(b, i.managers)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, warden.Hint(warden.Recode(warden.CodeCorrupt, "reading "+filepath.Join(dir, managersFile), err),
			"remove the file and start again: a manager finds its peers in its state; a worker has to join again")
	}
	if st, err := os.Stat(filepath.Join(dir, managersFile)); err == nil {
		i.contact = st.ModTime()
	}
	return i, nil
}

// take sets what the rest of the daemon sees. i.mu is held, or i not shared yet.
func (i *identity) take(id autolock.Identity, to *autolock.Recipient, key crypto.Signer) error {
	const op = "reading the node's chain"
	chain := make([]*x509.Certificate, len(id.Chain))
	for k, der := range id.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return warden.Recode(warden.CodeCorrupt, op, err)
		}
		chain[k] = c
	}
	if len(chain) < 2 {
		return warden.Errorf(warden.CodeCorrupt, op, "want leaf, issuing CA and root, got %d certificates", len(chain))
	}
	root := chain[len(chain)-1]
	now := time.Now()
	for _, c := range chain { // a clock that is behind shows where it matters, at the handshake, and may be set right while this runs
		if c.NotBefore.After(now) {
			now = c.NotBefore
		}
	}
	leaf, err := ca.Verify(chain, root, ca.VerifyOptions{Now: now, AllowExpiredFor: 1 << 62})
	if err != nil {
		return warden.Wrap(op, err)
	}
	if leaf.NodeID != id.NodeID || leaf.ClusterID != id.ClusterID {
		return warden.Errorf(warden.CodeForeign, op, "the leaf is node %s's of cluster %s", leaf.NodeID, leaf.ClusterID)
	}
	i.root, i.leaf = root, leaf
	i.hold(id, to)
	i.cert = &tls.Certificate{Certificate: id.Chain, PrivateKey: key, Leaf: chain[0]}
	return nil
}

// hold sets what the key file holds. i.mu is held, or i not shared yet.
func (i *identity) hold(id autolock.Identity, to *autolock.Recipient) {
	i.id, i.recipient, i.held = id, to, time.Now()
	switch {
	case id.Keyring == nil:
		i.sealer = nil
	case i.sealer == nil:
		i.sealer = autolock.NewSealer(id.Keyring)
	default:
		i.sealer.Swap(id.Keyring)
	}
}

// writeIdentity makes the identity durable: the key file first, which alone counts.
func writeIdentity(dir string, id autolock.Identity, recipient *autolock.Recipient) error {
	if err := durable.MkdirPrivate(filepath.Join(dir, identityDir)); err != nil {
		return err
	}
	if err := autolock.WriteKeyFile(filepath.Join(dir, keyFile), id, recipient); err != nil {
		return err
	}
	return writeCert(dir, id.Chain)
}

func writeCert(dir string, chain [][]byte) error {
	var b bytes.Buffer
	for _, der := range chain {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return err
		}
	}
	return durable.WriteFile(filepath.Join(dir, certFile), b.Bytes(), 0o644)
}

func (i *identity) certificate() *tls.Certificate {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.cert
}

func (i *identity) trust() *x509.Certificate {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.root
}

func (i *identity) now() (autolock.Identity, ca.Identity) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.id, i.leaf
}

// renew makes the key that a coming Install will be for. It exists in memory only until then.
func (i *identity) renew() ([]byte, error) {
	key, err := ca.NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.pending = key
	return csr, nil
}

// install takes a leaf for the pending key over: durable when it returns. A new manager's key file is sealed as the lock state
// that came along says, before it holds anything (I9). One that is a manager already follows a newer lock state with the same write, so that no
// new key is ever sealed under what the cluster has replaced, and never an older one. The old key is forgotten.
// promoted: the role became manager; demoted: it ceased to be.
func (i *identity) install(r *api.InstallRequest) (promoted, demoted bool, err error) {
	const op = "installing a leaf"
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pending == nil {
		return false, false, warden.Errorf(warden.CodeInvalid, op, "no renewal is pending")
	}
	if len(r.Chain) < 2 || len(r.Chain) > warden.ChainMax {
		return false, false, warden.Errorf(warden.CodeInvalid, op, "%d certificates", len(r.Chain))
	}
	if !bytes.Equal(r.Chain[len(r.Chain)-1], i.root.Raw) {
		return false, false, warden.Errorf(warden.CodeWrongRoot, op, "the chain ends in another root")
	}
	chain := make([]*x509.Certificate, len(r.Chain))
	for k, der := range r.Chain {
		if chain[k], err = x509.ParseCertificate(der); err != nil {
			return false, false, warden.Recode(warden.CodeInvalid, op, err)
		}
	}
	leaf, err := ca.Verify(chain, i.root, ca.VerifyOptions{Now: time.Now()})
	if err != nil {
		return false, false, warden.Wrap(op, err)
	}
	hash, err := ca.KeyHash(i.pending.Public())
	if err != nil {
		return false, false, err
	}
	switch {
	case leaf.KeyHash != hash:
		return false, false, warden.Errorf(warden.CodeWrongKey, op, "the leaf is not for the key that was made for it")
	case leaf.NodeID != i.id.NodeID || leaf.ClusterID != i.id.ClusterID:
		return false, false, warden.Errorf(warden.CodeForeign, op, "the leaf names node %s of cluster %s", leaf.NodeID, leaf.ClusterID)
	}
	next := i.id
	next.Role, next.Chain = leaf.Role, r.Chain
	if next.Key, err = keyBytes(i.pending); err != nil {
		return false, false, err
	}
	to := i.recipient
	if leaf.Role == ca.RoleManager {
		want, err := lockOf(r.Lock)
		if err != nil {
			return false, false, warden.Wrap(op, err)
		}
		switch {
		case next.Keyring == nil:
			if next.Keyring, err = autolock.NewKeyring(); err != nil {
				return false, false, err
			}
			next.LockGeneration, next.DEKGeneration, to = want.generation, want.dek, want.to
		case want.ahead(i.id, i.recipient):
			if next, err = relocked(next, i.recipient, want); err != nil {
				return false, false, warden.Wrap(op, err)
			}
			to = want.to
		}
	} else {
		next.Keyring, next.LockGeneration, next.DEKGeneration, to = nil, 0, 0, nil
	}
	promoted = leaf.Role == ca.RoleManager && i.id.Role != ca.RoleManager
	demoted = leaf.Role != ca.RoleManager && i.id.Role == ca.RoleManager
	if err := writeIdentity(i.dir, next, to); err != nil {
		return false, false, warden.Wrap(op, err)
	}
	old := i.id.Key
	if err := i.take(next, to, i.pending); err != nil {
		return false, false, err
	}
	old.Wipe()
	i.pending = nil
	return promoted, demoted, nil
}

func keyBytes(key crypto.Signer) (sensitive.Bytes, error) {
	der, err := ca.MarshalKey(key)
	return sensitive.New(der), err
}

// recipientOf returns what to seal to: nil where autolock is off. Errors: CodeInvalid for a state that says on and names no
// recipient, or one that protects nothing: a manager's key is never written in clear then.
func recipientOf(l *api.LockState) (*autolock.Recipient, error) {
	if l == nil {
		return nil, warden.Errorf(warden.CodeInvalid, "reading the lock state", "it is missing")
	}
	if !l.Autolock {
		return nil, nil
	}
	r, err := autolock.ParseRecipient(l.Recipient)
	if err != nil {
		return nil, warden.Wrap("reading the lock state", err)
	}
	return &r, nil
}

// setManagers stores where to dial, where it differs from before. The last word counts, whatever its index: a manager that
// claimed a huge one could freeze the list for ever.
func (i *identity) setManagers(l *api.ManagerList) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.contact = time.Now()
	if l == nil || len(l.Managers) == 0 || proto.Equal(l, i.managers) {
		return nil
	}
	i.managers = l
	return writeManagers(i.dir, l)
}

func writeManagers(dir string, l *api.ManagerList) error {
	if err := durable.MkdirPrivate(filepath.Join(dir, identityDir)); err != nil {
		return err
	}
	b, err := protojson.MarshalOptions{Multiline: true}.Marshal(l)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, managersFile), b, 0o600)
}

// known returns the list of managers, and whether the last contact is so long ago that their keys may all have changed.
func (i *identity) known() (l *api.ManagerList, stale bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.managers, time.Since(i.contact) > warden.PinStale
}

// heard notes that a manager whose key is pinned is connected.
func (i *identity) heard() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.contact = time.Now()
}
