package powerloss_test

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/autolock"
	"warden/ca"
	"warden/internal/durable"
	"warden/internal/sensitive"
)

// A node's key file is made, gets a renewed leaf, is sealed, and gets another DEK and unlock key: keySteps. Before, base has the
// identities as key files in clear, and two unlock keys.
var keySteps = []string{"made", "renewed", "sealed", "rotated"}

func init() {
	sequences["key file"] = func(base string, note func(string, ...any)) error {
		dir := filepath.Join(state(base), "identity")
		if err := durable.MkdirPrivate(dir); err != nil {
			return err
		}
		done, err := findKeyFile(base)
		if err != nil {
			return err
		}
		if done >= 0 { // started again: what is acted on is acknowledged
			note("%s", keySteps[done])
		}
		for i := done + 1; i < len(keySteps); i++ {
			id, err := wanted(base, i)
			if err != nil {
				return err
			}
			if err := autolock.WriteKeyFile(filepath.Join(dir, "node.key"), id, sealedTo(base, i)); err != nil {
				return err
			}
			note("%s", keySteps[i])
		}
		return nil
	}
}

// wanted returns the identity that step i writes.
func wanted(base string, i int) (autolock.Identity, error) {
	kf, err := autolock.ReadKeyFile(filepath.Join(base, fmt.Sprintf("identity%d", i)))
	if err != nil {
		return autolock.Identity{}, err
	}
	return kf.Identity()
}

// unlockKey returns the unlock key of step i, which is 2 or more.
func unlockKey(base string, i int) (autolock.UnlockKey, error) {
	text, err := os.ReadFile(filepath.Join(base, fmt.Sprintf("unlock%d", i)))
	if err != nil {
		return autolock.UnlockKey{}, err
	}
	return autolock.ParseUnlockKey(text)
}

func sealedTo(base string, i int) *autolock.Recipient {
	if key, err := unlockKey(base, i); err == nil {
		to := key.Recipient()
		return &to
	}
	return nil
}

// findKeyFile returns which step's identity the key file holds, -1 for none.
func findKeyFile(base string) (int, error) {
	kf, err := autolock.ReadKeyFile(filepath.Join(state(base), "identity", "node.key"))
	if errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	if err != nil {
		return 0, err
	}
	for i := range keySteps {
		want, err := wanted(base, i)
		if err != nil {
			return 0, err
		}
		if key, err := unlockKey(base, i); kf.Locked != (err == nil) || kf.Locked && kf.KeyID != key.Recipient().KeyID() {
			continue
		} else if kf.Locked {
			_, err = kf.Unlock(key)
			if err != nil {
				return 0, err
			}
		}
		if bytes.Equal(kf.Chain[0], want.Chain[0]) {
			return i, nil
		}
	}
	return 0, fmt.Errorf("the key file is none that was written: %q", kf.KeyID)
}

// checkKeyFile wants the last key file that was acknowledged, or the one after; nothing open to others; no key in clear where the file is sealed and that
// is acknowledged; and a next write that succeeds and leaves nothing else.
func checkKeyFile(base string, notes []string) error {
	acked := 0
	if len(notes) > 0 {
		acked = slices.Index(keySteps, notes[len(notes)-1]) + 1
	}
	found, err := findKeyFile(base)
	if err != nil {
		return err
	}
	if written := found + 1; written != acked && written != acked+1 {
		return fmt.Errorf("key file %d was acknowledged, found is %d", acked, written)
	}
	if err := private(base); err != nil {
		return err
	}
	last, err := wanted(base, len(keySteps)-1)
	if err != nil {
		return err
	}
	dir := filepath.Join(state(base), "identity")
	if acked > 2 { // sealed
		if err := nothingInClear(base, dir); err != nil {
			return err
		}
	}
	if err := errors.Join(durable.MkdirPrivate(dir), autolock.WriteKeyFile(filepath.Join(dir, "node.key"), last, sealedTo(base, len(keySteps)-1))); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		return fmt.Errorf("after the next write: %v, %v", entries, err)
	}
	return nothingInClear(base, dir)
}

// nothingInClear searches for the node keys of all steps.
func nothingInClear(base, dir string) error {
	for i := range keySteps {
		id, err := wanted(base, i)
		if err != nil {
			return err
		}
		err = id.Key.Use(func(key []byte) error {
			return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, key) {
					return fmt.Errorf("%s holds node key %d in clear (%v)", path, i, err)
				}
				return nil
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// prepareKeyFile makes the identities and the unlock keys.
func prepareKeyFile(t *testing.T, base string) {
	cluster, node := warden.NewID(), warden.NewID()
	root, rootKey, err := ca.NewRoot(cluster, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	issuing, issuingKey, err := ca.NewIssuing(root, rootKey, cluster, 1, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.New(cluster, root, issuing, issuingKey)
	if err != nil {
		t.Fatal(err)
	}
	ring, err := autolock.NewKeyring()
	if err != nil {
		t.Fatal(err)
	}
	for i, step := range keySteps {
		var key crypto.Signer
		var csr, leaf, der []byte
		var v *ca.Vetted
		if key, err = ca.NewKey(); err == nil {
			csr, err = ca.NewCSR(key)
		}
		if err == nil {
			v, err = authority.Vet(ca.Request{CSR: csr, NodeID: node, Role: ca.RoleManager, Zone: warden.DefaultZone, TTL: time.Hour}, time.Now())
		}
		if err == nil {
			leaf, err = authority.Issue(v)
		}
		if err == nil {
			der, err = ca.MarshalKey(key)
		}
		if err == nil && step == "rotated" {
			ring, err = ring.Rotate()
		}
		if err != nil {
			t.Fatal(err)
		}
		id := autolock.Identity{ClusterID: cluster, NodeID: node, Role: ca.RoleManager, Key: sensitive.New(der), Chain: authority.Chain(leaf), Keyring: ring}
		if err := autolock.WriteKeyFile(filepath.Join(base, fmt.Sprintf("identity%d", i)), id, nil); err != nil {
			t.Fatal(err)
		}
		if step != "sealed" && step != "rotated" {
			continue
		}
		unlock, err := autolock.NewUnlockKey()
		if err != nil {
			t.Fatal(err)
		}
		writeUnlockKey(t, filepath.Join(base, fmt.Sprintf("unlock%d", i)), unlock)
	}
}

func writeUnlockKey(t *testing.T, path string, key autolock.UnlockKey) {
	t.Helper()
	err := key.Text().Use(func(text []byte) error { return os.WriteFile(path, []byte(strings.TrimSpace(string(text))), 0o600) })
	if err != nil {
		t.Fatal(err)
	}
}

// TestKeyFile: wherever the making and replacing of a key file is cut, there is the old one or the new.
func TestKeyFile(t *testing.T) {
	attack{sequence: "key file", prepare: prepareKeyFile, check: checkKeyFile, kills: 15, again: "key file"}.run(t)
}
