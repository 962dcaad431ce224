package autolock_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"warden"
	"warden/autolock"
	"warden/internal/durable"
	"warden/internal/sensitive"
)

// certify returns a certificate of public signed by parent (nil: by itself).
func certify(t testing.TB, name pkix.Name, public crypto.PublicKey, parent *x509.Certificate, signer crypto.Signer) []byte {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: name, IsCA: parent == nil, BasicConstraintsValid: true,
		NotBefore: time.Unix(1_700_000_000, 0), NotAfter: time.Unix(2_000_000_000, 0),
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

type node struct {
	id  autolock.Identity
	key []byte // PKCS #8
}

var testCluster = warden.NewID()

// newNode returns an identity with a real leaf under a real root; a manager's has a keyring.
func newNode(t testing.TB, cluster, role string) node {
	t.Helper()
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := certify(t, pkix.Name{CommonName: "root", Organization: []string{cluster}}, rootKey.Public(), nil, rootKey)
	rootCert, err := x509.ParseCertificate(root)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return newNodeWith(t, cluster, role, key, rootCert, rootKey)
}

func newNodeWith(t testing.TB, cluster, role string, key crypto.Signer, root *x509.Certificate, rootKey crypto.Signer) node {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	id := autolock.Identity{ClusterID: cluster, NodeID: warden.NewID(), Role: role, Key: sensitive.New(bytes.Clone(der))}
	name := pkix.Name{CommonName: id.NodeID, Organization: []string{cluster}, OrganizationalUnit: []string{role}}
	id.Chain = [][]byte{certify(t, name, key.Public(), root, rootKey), root.Raw}
	if role == "manager" {
		if id.Keyring, err = autolock.NewKeyring(); err != nil {
			t.Fatal(err)
		}
	}
	return node{id, der}
}

// write writes n's file and returns its path and bytes.
func write(t testing.TB, n node, to *autolock.Recipient) (string, []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "node.key")
	if err := autolock.WriteKeyFile(path, n.id, to); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, data
}

// same reports whether got means what n was made with: IDs, chain, key, and a DEK that opens what n's sealed.
func same(got autolock.Identity, n node) bool {
	if got.ClusterID != n.id.ClusterID || got.NodeID != n.id.NodeID || got.Role != n.id.Role || !slices.EqualFunc(got.Chain, n.id.Chain, bytes.Equal) {
		return false
	}
	if got.Key.Use(func(key []byte) error {
		if !bytes.Equal(key, n.key) {
			return errors.New("another key")
		}
		return nil
	}) != nil || (got.Keyring == nil) != (n.id.Keyring == nil) {
		return false
	}
	if got.Keyring == nil {
		return true
	}
	sealed, err := n.id.Keyring.Seal([]byte("x"), nil)
	if err != nil {
		return false
	}
	opened, err := got.Keyring.Open(sealed, nil)
	return err == nil && string(opened) == "x"
}

func TestWriteAndReadAreInverse(t *testing.T) {
	unlock := newUnlockKey(t)
	to := unlock.Recipient()
	for _, c := range []struct {
		role string
		to   *autolock.Recipient
	}{{"worker", nil}, {"manager", nil}, {"manager", &to}} {
		n := newNode(t, testCluster, c.role)
		path, _ := write(t, n, c.to)
		f, err := autolock.ReadKeyFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if f.ClusterID != n.id.ClusterID || f.NodeID != n.id.NodeID || f.Role != c.role || f.Locked != (c.to != nil) || len(f.Chain) != 2 {
			t.Errorf("ReadKeyFile = %+v, want what was written", f)
		}
		id, err := f.Identity()
		if c.to == nil {
			if err != nil || !same(id, n) || f.KeyID != "" {
				t.Errorf("Identity of a %s = %v, want what was written", c.role, err)
			}
			if _, err := f.Unlock(unlock); warden.CodeOf(err) != warden.CodeInvalid {
				t.Errorf("Unlock of a file that is not locked = %v, want code invalid", err)
			}
			continue
		}
		if warden.CodeOf(err) != warden.CodeLocked || !strings.Contains(warden.HintOf(err), "wardenctl swarm unlock") || f.KeyID != to.KeyID() {
			t.Errorf("Identity of a locked file = %v, key %s, want code locked and key %s", err, f.KeyID, to.KeyID())
		}
		if id, err := f.Unlock(unlock); err != nil || !same(id, n) {
			t.Errorf("Unlock = %v, want what was written", err)
		}
		if id, err := f.Unlock(unlock); err != nil || !same(id, n) {
			t.Errorf("the second Unlock = %v, want what was written", err)
		}
	}
}

func TestEd25519AndP384KeysAreKept(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{ed, p384} {
		root, err := x509.ParseCertificate(certify(t, pkix.Name{CommonName: "root"}, key.Public(), nil, key))
		if err != nil {
			t.Fatal(err)
		}
		n := newNodeWith(t, testCluster, "worker", key, root, key)
		path, _ := write(t, n, nil)
		f, err := autolock.ReadKeyFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := f.Identity(); err != nil || !same(id, n) {
			t.Errorf("Identity with a %T = %v, want what was written", key, err)
		}
	}
}

func TestWrongUnlockKeyNamesTheKeyThatIsNeeded(t *testing.T) {
	right, wrong := newUnlockKey(t), newUnlockKey(t)
	to := right.Recipient()
	path, _ := write(t, newNode(t, testCluster, "manager"), &to)
	f, err := autolock.ReadKeyFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Unlock(wrong)
	if warden.CodeOf(err) != warden.CodeWrongUnlock || !strings.Contains(warden.HintOf(err), to.KeyID()) || !strings.Contains(err.Error(), wrong.Recipient().KeyID()) {
		t.Errorf("Unlock with another key = %v (%s), want code wrong-unlock and both key IDs", err, warden.HintOf(err))
	}
	if _, err := f.Unlock(autolock.UnlockKey{}); warden.CodeOf(err) != warden.CodeWrongUnlock {
		t.Errorf("Unlock with the zero key = %v, want code wrong-unlock", err)
	}
	right.Wipe()
	if _, err := f.Unlock(right); err == nil {
		t.Error("Unlock with a wiped key succeeded")
	}
}

// I9: a sealed file is useless without the unlock key: it contains neither key, in no spelling.
func TestI9SealedFileHoldsNothingSecret(t *testing.T) {
	to := newUnlockKey(t).Recipient()
	n := newNode(t, testCluster, "manager")
	_, sealed := write(t, n, &to)
	_, clear := write(t, n, nil)
	canaries := map[string][]byte{ // without the fixed headers of PKCS #8 and of Tink
		"node key": n.key[36:],
		"DEK":      blocks(t, clear)[4].Bytes[72:],
	}
	for name, canary := range canaries {
		if got := piecesIn(clear, canary, n); got == 0 {
			t.Errorf("the search does not find the %s even in the file in clear", name)
		}
		if got := piecesIn(sealed, canary, n); got != 0 {
			t.Errorf("%d pieces of the %s are in the sealed file", got, name)
		}
	}
	for _, word := range []string{"PRIVATE KEY", "DEK", "type.googleapis.com"} {
		if bytes.Contains(sealed, []byte(word)) {
			t.Errorf("the sealed file contains %q", word)
		}
	}
}

// piecesIn returns how many 8-byte pieces of canary the file holds: as bytes, hex or base64, in it or in its PEM blocks.
func piecesIn(file, canary []byte, n node) (found int) {
	haystack := bytes.ReplaceAll(file, []byte("\n"), nil)
	for rest := file; len(rest) > 0; {
		var b *pem.Block
		b, rest = pem.Decode(rest)
		haystack = append(haystack, b.Bytes...)
	}
	for i := 0; i+8 <= len(canary); i++ {
		piece := canary[i : i+8]
		for _, spelling := range []string{string(piece), hex.EncodeToString(piece), base64.StdEncoding.EncodeToString(piece)[:9]} {
			if bytes.Contains(haystack, []byte(spelling)) && !publicPart(n, piece) {
				found++
			}
		}
	}
	return found
}

// publicPart reports whether the piece of the PKCS #8 is the public key, which the leaf shows.
func publicPart(n node, piece []byte) bool { return bytes.Contains(n.id.Chain[0], piece) }

func TestFileIs0600WhateverTheUmask(t *testing.T) {
	n := newNode(t, testCluster, "manager")
	for _, umask := range []int{0, 0o777} {
		path := filepath.Join(t.TempDir(), "node.key")
		old := syscall.Umask(umask)
		err := autolock.WriteKeyFile(path, n.id, nil)
		syscall.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("with umask %04o the mode is %v (%v), want 0600", umask, info.Mode(), err)
		}
	}
}

func TestWiderFileIsRefused(t *testing.T) {
	path, _ := write(t, newNode(t, testCluster, "worker"), nil)
	for _, mode := range []os.FileMode{0o601, 0o602, 0o604, 0o610, 0o620, 0o640, 0o666, 0o700} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := autolock.ReadKeyFile(path)
		if warden.CodeOf(err) != warden.CodePermissions || !strings.Contains(err.Error(), path) || !strings.Contains(warden.HintOf(err), "chmod 600") {
			t.Errorf("ReadKeyFile with mode %04o = %v, want code permissions, the file's name and the remedy", mode, err)
		}
	}
	if _, err := autolock.ReadKeyFile(path + "x"); !errors.Is(err, fs.ErrNotExist) || warden.CodeOf(err) != warden.CodeNotFound {
		t.Errorf("ReadKeyFile of nothing = %v, want fs.ErrNotExist", err)
	}
}

// A crash at any step of writing leaves the old file or the new, both whole.
func TestCrashLeavesTheOldFileOrTheNew(t *testing.T) {
	to := newUnlockKey(t).Recipient()
	before, after := newNode(t, testCluster, "manager"), newNode(t, testCluster, "manager")
	var points []string
	undo := durable.SetFault(func(point string) error { points = append(points, point); return nil })
	write(t, before, nil)
	undo()
	seen := map[string]bool{}
	for _, point := range points {
		path, _ := write(t, before, nil)
		power := errors.New("power lost")
		undo := durable.SetFault(func(at string) error {
			if at == point {
				return power
			}
			return nil
		})
		err := autolock.WriteKeyFile(path, after.id, &to)
		undo()
		if !errors.Is(err, power) {
			t.Fatalf("%s: WriteKeyFile = %v, want the fault", point, err)
		}
		f, err := autolock.ReadKeyFile(path)
		if err != nil {
			t.Fatalf("%s: ReadKeyFile = %v", point, err)
		}
		if id, err := f.Identity(); f.NodeID == before.id.NodeID && err == nil && same(id, before) {
			seen["old"] = true
		} else if f.NodeID == after.id.NodeID && f.Locked {
			seen["new"] = true
		} else {
			t.Errorf("%s: the file is neither the old nor the new", point)
		}
		if err := autolock.WriteKeyFile(path, after.id, &to); err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
			t.Errorf("%s: after the next write %d files are left (%v): an unsealed one may be among them", point, len(left), err)
		}
	}
	if !seen["old"] || !seen["new"] {
		t.Errorf("outcomes = %v, want both", seen)
	}
}

func TestWriteRefusesPartsThatDoNotBelongTogether(t *testing.T) {
	to := newUnlockKey(t).Recipient()
	for name, c := range map[string]struct {
		role   string
		to     *autolock.Recipient
		change func(*autolock.Identity)
		code   warden.Code
	}{
		"another node":        {"manager", nil, func(id *autolock.Identity) { id.NodeID = warden.NewID() }, warden.CodeForeign},
		"another cluster":     {"manager", &to, func(id *autolock.Identity) { id.ClusterID = warden.NewID() }, warden.CodeForeign},
		"another key":         {"manager", &to, func(id *autolock.Identity) { id.Key = newNode(t, testCluster, "worker").id.Key }, warden.CodeForeign},
		"another role":        {"manager", nil, func(id *autolock.Identity) { id.Role, id.Keyring = "worker", nil }, warden.CodeForeign},
		"no such role":        {"worker", nil, func(id *autolock.Identity) { id.Role = "operator" }, warden.CodeInvalid},
		"no chain":            {"worker", nil, func(id *autolock.Identity) { id.Chain = nil }, warden.CodeInvalid},
		"no keyring":          {"manager", &to, func(id *autolock.Identity) { id.Keyring = nil }, warden.CodeInvalid},
		"worker with keyring": {"worker", nil, func(id *autolock.Identity) { id.Keyring, _ = autolock.NewKeyring() }, warden.CodeInvalid},
		"worker sealed":       {"worker", &to, func(*autolock.Identity) {}, warden.CodeInvalid},
		"wiped key":           {"worker", nil, func(id *autolock.Identity) { id.Key.Wipe() }, warden.CodeInternal},
		"no key":              {"worker", nil, func(id *autolock.Identity) { id.Key = sensitive.Bytes{} }, warden.CodeInternal},
		"malformed key":       {"worker", nil, func(id *autolock.Identity) { id.Key = sensitive.New([]byte("x")) }, warden.CodeInvalid},
		"low order recipient": {"manager", &autolock.Recipient{}, func(*autolock.Identity) {}, warden.CodeInvalid},
		"recipient 1":         {"manager", &autolock.Recipient{1}, func(*autolock.Identity) {}, warden.CodeInvalid},
	} {
		n := newNode(t, testCluster, c.role)
		c.change(&n.id)
		path := filepath.Join(t.TempDir(), "node.key")
		if err := autolock.WriteKeyFile(path, n.id, c.to); warden.CodeOf(err) != c.code || !strings.Contains(fmt.Sprint(err), path) {
			t.Errorf("WriteKeyFile with %s = %v, want code %s and the file's name", name, err, c.code)
		}
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 0 {
			t.Errorf("WriteKeyFile with %s left %d files", name, len(left))
		}
	}
}

func TestI10IdentityDoesNotPrint(t *testing.T) {
	n := newNode(t, testCluster, "manager")
	path, file := write(t, n, nil)
	f, err := autolock.ReadKeyFile(path)
	if err != nil {
		t.Fatal(err)
	}
	id, err := f.Identity()
	if err != nil {
		t.Fatal(err)
	}
	dek := blocks(t, file)[4].Bytes
	for _, verb := range strings.Split("v +v #v s q x X d", " ") {
		out := strings.ToLower(fmt.Sprintf("%"+verb, []any{id, &id, f, *f, id.Keyring, *id.Keyring}))
		for name, secret := range map[string][]byte{"node key": n.key[36:60], "DEK": dek[len(dek)-28 : len(dek)-12]} {
			for _, s := range []string{string(secret), hex.EncodeToString(secret), strings.Trim(fmt.Sprint(secret), "[]"),
				strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", secret), "[]byte{"), "}")} {
				if strings.Contains(out, strings.ToLower(s)) {
					t.Errorf("Sprintf(%%%s) shows the %s", verb, name)
				}
			}
		}
	}
}
