package autolock

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/nacl/box"

	"warden"
	"warden/internal/durable"
	"warden/internal/keyset"
	"warden/internal/sensitive"
)

// Roles that a key file can have; the certificate's OU names the same.
const (
	roleWorker  = "worker"
	roleManager = "manager"
)

const unlockHint = "run wardenctl swarm unlock"

// Identity is all that a node's key file holds: who it is and the keys that prove it.
type Identity struct {
	ClusterID, NodeID string
	Role              string          // "worker" or "manager", as in the leaf
	Key               sensitive.Bytes // PKCS #8 DER of the node key, as x509.MarshalPKCS8PrivateKey writes it
	Chain             [][]byte        // leaf, issuing, root; DER
	Keyring           *Keyring        // the DEK; managers only

	// LockGeneration and DEKGeneration are the cluster's generations that the file has followed: of its lock and of its DEKs. 0
	// for workers. With a recipient they are authenticated.
	LockGeneration, DEKGeneration uint64
}

// KeyFile is a key file that was read. What it shows of a locked one is not authenticated until Unlock.
type KeyFile struct {
	ClusterID, NodeID, Role string
	Chain                   [][]byte
	Locked                  bool
	KeyID                   string // of the unlock key that opens it; "" if not Locked

	path      string    // for messages; "" if it was not read from a file
	identity  Identity  // if Locked, without its keys
	recipient Recipient // if Locked
	box       []byte    // if Locked
}

// WriteKeyFile puts id at path as one file of mode 0600, in one step: after a crash there is the old file or the new. With a
// recipient the keys are sealed to it and nothing secret is readable in the file. A worker has no keyring, and its file is
// never sealed. ReadKeyFile is its inverse.
//
// Errors: CodeInvalid and CodeForeign if the parts of id do not belong together (they are checked as ReadKeyFile does);
// those of durable.WriteFile, after which the file may have been written or not.
func WriteKeyFile(path string, id Identity, to *Recipient) error {
	data, err := formatKeyFile(id, to)
	if err != nil {
		return warden.Wrap("writing key file "+path, err)
	}
	defer clear(data)
	return durable.WriteFile(path, data, 0o600)
}

// ReadKeyFile reads the file at path. Errors: CodePermissions if others may open it; CodeNotFound, for which errors.Is(err,
// fs.ErrNotExist) holds; CodeCorrupt and CodeForeign if it is damaged or its parts do not belong together; CodeUnsupported if
// a newer version wrote it. All name the file and what can be done.
func ReadKeyFile(path string) (*KeyFile, error) {
	data, err := durable.ReadPrivate(path, warden.KeyFileMax)
	if warden.CodeOf(err) == warden.CodeTooLarge {
		err = warden.Recode(warden.CodeCorrupt, "", err)
	}
	if err != nil {
		return nil, explain(path, err)
	}
	defer clear(data)
	file, err := ParseKeyFile(data)
	if err != nil {
		return nil, explain(path, err)
	}
	file.path = path
	return file, nil
}

// explain names the file, and what can be done about one that is damaged.
func explain(path string, err error) error {
	switch warden.CodeOf(err) {
	case warden.CodeCorrupt, warden.CodeForeign:
		err = warden.Hint(err, restoreHint(path))
	}
	return warden.Wrap("reading key file "+path, err)
}

func restoreHint(path string) string {
	if path == "" {
		path = "the key file"
	}
	return "restore " + path + " from a backup of this node; or remove the state directory and join the cluster again as a new node"
}

// Recipient returns what a locked file is sealed to, nil of one in clear. Before Unlock it is only what the file says.
func (f *KeyFile) Recipient() *Recipient {
	if !f.Locked {
		return nil
	}
	to := f.recipient
	return &to
}

// Identity returns what the file holds. All calls return the same keys: wiping one wipes all. Errors: CodeLocked.
func (f *KeyFile) Identity() (Identity, error) {
	if f.Locked {
		return Identity{}, warden.Hint(warden.Errorf(warden.CodeLocked, "reading the keys of node "+f.NodeID, "they are sealed under unlock key %s", f.KeyID), unlockHint)
	}
	return f.identity, nil
}

// Unlock opens a locked file with the unlock key, which the caller wipes afterwards. Errors: CodeWrongUnlock, whose hint has
// the ID of the key that is needed; CodeForeign if the sealed part was made for another node, place or key than the clear
// part says; CodeCorrupt; CodeInvalid if the file is not locked.
func (f *KeyFile) Unlock(key UnlockKey) (Identity, error) {
	op := "unlocking node " + f.NodeID
	if !f.Locked {
		return Identity{}, warden.Errorf(warden.CodeInvalid, op, "it is not locked")
	}
	if key.recipient != f.recipient {
		return Identity{}, warden.Hint(warden.Errorf(warden.CodeWrongUnlock, op, "unlock key %s does not open it", key.recipient.KeyID()),
			"unlock key "+f.KeyID+" is needed: the one that was current when this manager last wrote its key file")
	}
	id, err := f.open(key)
	switch warden.CodeOf(err) {
	case warden.CodeCorrupt, warden.CodeForeign:
		err = warden.Hint(err, restoreHint(f.path))
	}
	return id, warden.Wrap(op, err)
}

// open opens the box and checks that it and the clear part belong together: an anonymous box proves neither its author nor
// its place.
func (f *KeyFile) open(key UnlockKey) (Identity, error) {
	const op = "opening the sealed identity"
	var plaintext []byte
	err := key.private.Use(func(private []byte) error {
		var ok bool
		if plaintext, ok = box.OpenAnonymous(nil, f.box, (*[keySize]byte)(&key.recipient), (*[keySize]byte)(private)); !ok {
			return warden.Errorf(warden.CodeCorrupt, op, "authentication failed")
		}
		return nil
	})
	if err != nil {
		return Identity{}, err
	}
	defer clear(plaintext)
	id := f.identity
	rest, ok := bytes.CutPrefix(plaintext, binding(id, f.recipient))
	if !ok {
		return Identity{}, warden.Errorf(warden.CodeForeign, op, "it was sealed for another node, certificate or unlock key than the file says")
	}
	var nodeKey, dek cryptobyte.String
	s := cryptobyte.String(rest)
	if !s.ReadUint24LengthPrefixed(&nodeKey) || !s.ReadUint24LengthPrefixed(&dek) || !s.Empty() {
		return Identity{}, warden.Errorf(warden.CodeCorrupt, op, "its fields do not parse")
	}
	return withKeys(id, nodeKey, dek)
}

// seal is the inverse of open.
func seal(id Identity, nodeKey, dek []byte, to Recipient) ([]byte, error) {
	const op = "sealing the identity"
	if err := to.check(); err != nil {
		return nil, err
	}
	b := cryptobyte.NewBuilder(binding(id, to))
	for _, field := range [][]byte{nodeKey, dek} {
		b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(field) })
	}
	plaintext, err := b.Bytes()
	if err != nil {
		return nil, warden.Errorf(warden.CodeInternal, op, "its fields are too long")
	}
	defer clear(plaintext)
	sealed, err := box.SealAnonymous(nil, plaintext, (*[keySize]byte)(&to), rand.Reader)
	return sealed, warden.Recode(warden.CodeInternal, op, err)
}

// binding is what the boxed plaintext begins with: purpose and format, cluster, node, role, key ID, recipient, the generations
// where there are any, and the SHA-256 of each certificate, each with its length.
func binding(id Identity, to Recipient) []byte {
	fields := [][]byte{[]byte("warden key file 1: node key and DEK"), []byte(id.ClusterID), []byte(id.NodeID), []byte(id.Role), []byte(to.KeyID()), to[:]}
	if id.LockGeneration != 0 || id.DEKGeneration != 0 {
		fields = append(fields, binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, id.LockGeneration), id.DEKGeneration))
	}
	for _, cert := range id.Chain {
		sum := sha256.Sum256(cert)
		fields = append(fields, sum[:])
	}
	var b cryptobyte.Builder
	b.AddUint8(uint8(len(fields)))
	for _, field := range fields {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(field) })
	}
	return b.BytesOrPanic() // IDs are 25 characters, hashes 32 bytes
}

// withKeys returns id with its keys, which it copies, if they belong to it; dek is for managers. Errors: CodeCorrupt, CodeForeign.
func withKeys(id Identity, nodeKey, dek []byte) (Identity, error) {
	leaf, err := checkClear(id)
	if err != nil {
		return Identity{}, err
	}
	if err := checkNodeKey(nodeKey, leaf); err != nil {
		return Identity{}, err
	}
	if id.Role == roleManager {
		set, err := keyset.Parse(dek)
		if err != nil {
			return Identity{}, err
		}
		id.Keyring = &Keyring{set}
	}
	id.Key = sensitive.New(bytes.Clone(nodeKey))
	return id, nil
}

// checkClear checks that what is in clear belongs together: role, chain and the subject of the leaf, which it returns. It does
// not verify signatures: package ca does, when the chain is used. Errors: CodeCorrupt, CodeForeign.
func checkClear(id Identity) (*x509.Certificate, error) {
	const op = "checking the certificates"
	if !warden.ValidID(id.ClusterID) || !warden.ValidID(id.NodeID) {
		return nil, warden.Errorf(warden.CodeCorrupt, op, "cluster or node ID is malformed")
	}
	if id.Role != roleWorker && id.Role != roleManager {
		return nil, warden.Errorf(warden.CodeCorrupt, op, "the role is neither worker nor manager")
	}
	if id.Role != roleManager && (id.LockGeneration != 0 || id.DEKGeneration != 0) {
		return nil, warden.Errorf(warden.CodeCorrupt, op, "generations of a lock are for managers")
	}
	if len(id.Chain) == 0 || len(id.Chain) > warden.ChainMax {
		return nil, warden.Errorf(warden.CodeCorrupt, op, "%d certificates, want 1 to %d", len(id.Chain), warden.ChainMax)
	}
	var leaf *x509.Certificate
	for i, der := range id.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil || len(der) > warden.CertBytesMax {
			return nil, warden.Errorf(warden.CodeCorrupt, op, "certificate %d does not parse", i+1)
		}
		if i == 0 {
			leaf = cert
		}
	}
	name := leaf.Subject
	if name.CommonName != id.NodeID || len(name.Organization) != 1 || name.Organization[0] != id.ClusterID ||
		len(name.OrganizationalUnit) != 1 || name.OrganizationalUnit[0] != id.Role {
		return nil, warden.Errorf(warden.CodeForeign, op, "the leaf is not that of %s %s in cluster %s", id.Role, id.NodeID, id.ClusterID)
	}
	return leaf, nil
}

// checkNodeKey checks that der is the one spelling of the leaf's private key. Errors: CodeCorrupt, CodeForeign.
func checkNodeKey(der []byte, leaf *x509.Certificate) error {
	const op = "checking the node key"
	key, err := x509.ParsePKCS8PrivateKey(der) // its errors are dropped: they may quote the key
	if err != nil {
		return warden.Errorf(warden.CodeCorrupt, op, "it does not parse")
	}
	again, err := x509.MarshalPKCS8PrivateKey(key)
	defer clear(again)
	if err != nil || !bytes.Equal(again, der) {
		return warden.Errorf(warden.CodeCorrupt, op, "it is not in the form in which keys are written")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return warden.Errorf(warden.CodeCorrupt, op, "it does not sign")
	}
	public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return warden.Errorf(warden.CodeForeign, op, "it is not the key of the leaf")
	}
	return nil
}

// keysOf lends the node key and the DEK in clear to f. Errors: CodeInvalid if id has not what its role needs; those of f.
func keysOf(id Identity, f func(nodeKey, dek []byte) error) error {
	const op = "taking the keys of an identity"
	if (id.Keyring != nil) != (id.Role == roleManager) {
		return warden.Errorf(warden.CodeInvalid, op, "a manager has a keyring, a worker none")
	}
	var dek []byte
	if id.Keyring != nil {
		var err error
		if dek, err = id.Keyring.set.Bytes(); err != nil {
			return err
		}
		defer clear(dek)
	}
	return id.Key.Use(func(nodeKey []byte) error { return f(nodeKey, dek) })
}
