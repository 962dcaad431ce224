package autolock_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/nacl/box"

	"warden"
	"warden/autolock"
)

// redigest returns the file with a digest that fits, as an attacker would write it.
func redigest(file []byte) []byte {
	i := bytes.LastIndex(file, []byte("-----BEGIN WARDEN DIGEST-----\n"))
	if i < 0 {
		return file
	}
	sum := sha256.Sum256(file[:i])
	return append(bytes.Clone(file[:i]), pem.EncodeToMemory(&pem.Block{Type: "WARDEN DIGEST", Bytes: sum[:]})...)
}

// open reads file as far as it can be read.
func open(file []byte, unlock autolock.UnlockKey) (autolock.Identity, error) {
	f, err := autolock.ParseKeyFile(file)
	if err != nil {
		return autolock.Identity{}, err
	}
	if f.Locked {
		return f.Unlock(unlock)
	}
	return f.Identity()
}

// Every flipped bit of a file is refused or leaves its meaning; of a sealed one also where the digest was made to fit.
func TestEveryBitFlipIsRefused(t *testing.T) {
	unlock := newUnlockKey(t)
	to := unlock.Recipient()
	n := newNode(t, testCluster, "manager")
	_, clear := write(t, n, nil)
	_, sealed := write(t, n, &to)
	for _, c := range []struct {
		name   string
		file   []byte
		repair bool
		bits   int // how many of each byte, beginning with another one in each
	}{{"sealed", sealed, false, 8}, {"clear", clear, false, 1}, {"sealed, digest repaired", sealed, true, 1}} {
		t.Run(c.name, func(t *testing.T) {
			for i := range len(c.file) * c.bits {
				at, bit := i/c.bits, (i/c.bits+i%c.bits)%8
				flipped := bytes.Clone(c.file)
				flipped[at] ^= 1 << bit
				if c.repair {
					flipped = redigest(flipped)
				}
				id, err := open(flipped, unlock)
				if err == nil && !same(id, n) {
					t.Fatalf("with bit %d of byte %d flipped the file has another meaning", bit, at)
				}
				switch warden.CodeOf(err) {
				case "", warden.CodeCorrupt, warden.CodeForeign, warden.CodeUnsupported, warden.CodeWrongUnlock:
				default:
					t.Fatalf("with bit %d of byte %d flipped: %v", bit, at, err)
				}
			}
		})
	}
}

func TestEveryTruncationIsRefused(t *testing.T) {
	_, file := write(t, newNode(t, testCluster, "manager"), nil)
	for n := range file {
		if _, err := autolock.ParseKeyFile(file[:n]); err == nil {
			t.Fatalf("ParseKeyFile of the first %d of %d bytes succeeded", n, len(file))
		}
	}
}

// blocks returns the blocks of a file by type, in order.
func blocks(t *testing.T, file []byte) (all []*pem.Block) {
	t.Helper()
	for len(file) > 0 {
		var b *pem.Block
		if b, file = pem.Decode(file); b == nil {
			t.Fatal("not PEM")
		}
		all = append(all, b)
	}
	return all
}

// join is the inverse of blocks, with a digest that fits.
func join(all []*pem.Block) []byte {
	var out bytes.Buffer
	for _, b := range all {
		if err := pem.Encode(&out, b); err != nil {
			panic(err)
		}
	}
	return redigest(out.Bytes())
}

// I8: blocks of two nodes, two clusters or two times never make one file.
func TestI8MixedFilesAreRefused(t *testing.T) {
	unlock := newUnlockKey(t)
	to := unlock.Recipient()
	for _, cluster := range []string{testCluster, warden.NewID()} {
		for _, recipient := range []*autolock.Recipient{nil, &to} {
			mine, theirs := newNode(t, testCluster, "manager"), newNode(t, cluster, "manager")
			_, file := write(t, mine, recipient)
			_, other := write(t, theirs, recipient)
			for i, b := range blocks(t, file) {
				if b.Type == "WARDEN DIGEST" || i == 2 { // i 2: another root; package ca verifies chains
					continue
				}
				mixed := blocks(t, file)
				mixed[i] = blocks(t, other)[i]
				_, err := open(join(mixed), unlock)
				if c := warden.CodeOf(err); c != warden.CodeForeign {
					t.Errorf("with another node's block %d (%s): %v, want code foreign", i, b.Type, err)
				}
			}
		}
	}
	t.Run("a root that is not the sealed one", func(t *testing.T) {
		mine, theirs := newNode(t, testCluster, "manager"), newNode(t, testCluster, "manager")
		_, file := write(t, mine, &to)
		mixed := blocks(t, file)
		mixed[2].Bytes = theirs.id.Chain[1]
		if _, err := open(join(mixed), unlock); warden.CodeOf(err) != warden.CodeForeign {
			t.Errorf("Unlock = %v, want code foreign", err)
		}
	})
	t.Run("sealed for an earlier leaf", func(t *testing.T) {
		n := newNode(t, testCluster, "manager")
		_, earlier := write(t, n, &to)
		n.id.Chain = [][]byte{n.id.Chain[0], newNode(t, testCluster, "manager").id.Chain[1]}
		_, later := write(t, n, &to)
		mixed := blocks(t, later)
		mixed[3] = blocks(t, earlier)[3]
		if _, err := open(join(mixed), unlock); warden.CodeOf(err) != warden.CodeForeign {
			t.Errorf("Unlock = %v, want code foreign", err)
		}
	})
	t.Run("moved under another recipient", func(t *testing.T) {
		n := newNode(t, testCluster, "manager")
		other := newUnlockKey(t)
		otherTo := other.Recipient()
		_, file := write(t, n, &to)
		_, resealed := write(t, n, &otherTo)
		mixed := blocks(t, resealed)
		mixed[3] = blocks(t, file)[3]
		if _, err := open(join(mixed), other); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("Unlock = %v, want code corrupt", err)
		}
	})
}

func TestStrictBlocks(t *testing.T) {
	unlock := newUnlockKey(t)
	to := unlock.Recipient()
	manager, worker := newNode(t, testCluster, "manager"), newNode(t, testCluster, "worker")
	_, clear := write(t, manager, nil)
	_, sealed := write(t, manager, &to)
	_, ofWorker := write(t, worker, nil)
	change := func(file []byte, f func([]*pem.Block) []*pem.Block) []byte { return join(f(blocks(t, file))) }
	with := func(file []byte, i int, f func(*pem.Block)) []byte {
		return change(file, func(b []*pem.Block) []*pem.Block { f(b[i]); return b })
	}
	for name, file := range map[string][]byte{
		"nothing":                  nil,
		"garbage":                  []byte("garbage\n"),
		"oversize":                 append(bytes.Clone(clear), make([]byte, warden.KeyFileMax)...),
		"garbage before":           append([]byte("x\n"), clear...),
		"garbage behind":           append(bytes.Clone(clear), "x\n"...),
		"empty line behind":        append(bytes.Clone(clear), '\n'),
		"garbage between":          redigest(bytes.Replace(clear, []byte("-----BEGIN PRIVATE"), []byte("x\n-----BEGIN PRIVATE"), 1)),
		"carriage returns":         bytes.ReplaceAll(clear, []byte("\n"), []byte("\r\n")),
		"other line lengths":       redigest(bytes.Replace(clear, []byte("\nM"), []byte("\nM\n"), 1)),
		"no digest":                clear[:bytes.Index(clear, []byte("-----BEGIN WARDEN DIGEST"))],
		"two digests":              append(bytes.Clone(clear), clear[bytes.Index(clear, []byte("-----BEGIN WARDEN DIGEST")):]...),
		"two files":                append(bytes.Clone(clear), clear...),
		"header alone":             change(clear, func(b []*pem.Block) []*pem.Block { return []*pem.Block{b[0], b[5]} }),
		"no certificate":           change(clear, func(b []*pem.Block) []*pem.Block { return slices.Delete(b, 1, 3) }),
		"no key":                   change(clear, func(b []*pem.Block) []*pem.Block { return slices.Delete(b, 3, 4) }),
		"no DEK":                   change(clear, func(b []*pem.Block) []*pem.Block { return slices.Delete(b, 4, 5) }),
		"key twice":                change(clear, func(b []*pem.Block) []*pem.Block { return slices.Insert(b, 3, b[3]) }),
		"DEK before key":           change(clear, func(b []*pem.Block) []*pem.Block { b[3], b[4] = b[4], b[3]; return b }),
		"header twice":             change(clear, func(b []*pem.Block) []*pem.Block { return slices.Insert(b, 1, b[0]) }),
		"unknown block":            change(clear, func(b []*pem.Block) []*pem.Block { return slices.Insert(b, 5, &pem.Block{Type: "X"}) }),
		"five certificates":        change(clear, func(b []*pem.Block) []*pem.Block { return slices.Insert(b, 3, b[2], b[2], b[2]) }),
		"clear and sealed":         change(sealed, func(b []*pem.Block) []*pem.Block { return slices.Insert(b, 3, blocks(t, clear)[3]) }),
		"sealed without a header":  change(sealed, func(b []*pem.Block) []*pem.Block { b[0] = blocks(t, clear)[0]; return b }),
		"clear with its header":    change(clear, func(b []*pem.Block) []*pem.Block { b[0] = blocks(t, sealed)[0]; return b }),
		"a worker with a DEK":      change(ofWorker, func(b []*pem.Block) []*pem.Block { return slices.Insert(b, 4, blocks(t, clear)[4]) }),
		"header with a body":       with(clear, 0, func(b *pem.Block) { b.Bytes = []byte("x") }),
		"unknown header":           with(clear, 0, func(b *pem.Block) { b.Headers["X"] = "y" }),
		"missing header":           with(clear, 0, func(b *pem.Block) { delete(b.Headers, "Role") }),
		"unknown role":             with(clear, 0, func(b *pem.Block) { b.Headers["Role"] = "operator" }),
		"malformed node":           with(clear, 0, func(b *pem.Block) { b.Headers["Node"] = "../../etc" }),
		"malformed recipient":      with(sealed, 0, func(b *pem.Block) { b.Headers["Recipient"] = "x" }),
		"another key ID":           with(sealed, 0, func(b *pem.Block) { b.Headers["Key-Id"] = "0123456789" }),
		"header of a certificate":  with(clear, 1, func(b *pem.Block) { b.Headers["X"] = "y" }),
		"header of the key":        with(clear, 3, func(b *pem.Block) { b.Headers["X"] = "y" }),
		"trailing bytes in a cert": with(clear, 1, func(b *pem.Block) { b.Bytes = append(b.Bytes, 0) }),
		"trailing bytes in a key":  with(clear, 3, func(b *pem.Block) { b.Bytes = append(b.Bytes, 0) }),
		"a key that is none":       with(clear, 3, func(b *pem.Block) { b.Bytes = []byte("x") }),
		"a DEK that is none":       with(clear, 4, func(b *pem.Block) { b.Bytes = []byte("x") }),
		"a short box":              with(sealed, 3, func(b *pem.Block) { b.Bytes = b.Bytes[:20] }),
	} {
		_, err := open(file, unlock)
		if warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("%s: %v, want code corrupt", name, err)
			continue
		}
		path := filepath.Join(t.TempDir(), "node.key")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := autolock.ReadKeyFile(path)
		if err == nil {
			_, err = f.Unlock(unlock)
		}
		for _, want := range []string{path, "backup", "remove the state directory and join"} {
			if text := fmt.Sprint(err, warden.HintOf(err)); !strings.Contains(text, want) {
				t.Errorf("%s: %q does not say %q", name, text, want)
			}
		}
	}
	newer := with(clear, 0, func(b *pem.Block) { b.Headers["Version"] = "2" })
	if _, err := autolock.ParseKeyFile(newer); warden.CodeOf(err) != warden.CodeUnsupported {
		t.Errorf("a newer version: %v, want code unsupported", err)
	}
}

// What decides before the unlock key is there: a file that no key could make good is refused when it is read.
func TestUnopenableSealedFilesAreRefusedWhenRead(t *testing.T) {
	to := newUnlockKey(t).Recipient()
	_, sealed := write(t, newNode(t, testCluster, "manager"), &to)
	_, ofWorker := write(t, newNode(t, testCluster, "worker"), nil)
	oversize := blocks(t, sealed)
	oversize[3].Bytes = make([]byte, warden.KeyFileMax)
	lockedWorker := blocks(t, ofWorker)
	lockedWorker[3] = blocks(t, sealed)[3]
	lockedWorker[0].Headers["Recipient"], lockedWorker[0].Headers["Key-Id"] = warden.Base36(to[:], 50), to.KeyID()
	for name, all := range map[string][]*pem.Block{"oversize": oversize, "locked worker": lockedWorker} {
		if _, err := autolock.ParseKeyFile(join(all)); warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("ParseKeyFile of a %s = %v, want code corrupt", name, err)
		}
	}
}

// Anybody can make an anonymous box: one that opens is still refused unless it says exactly what the clear part says, and
// holds the leaf's key.
func TestForgedBoxesAreRefused(t *testing.T) {
	unlock := newUnlockKey(t)
	to := unlock.Recipient()
	n := newNode(t, testCluster, "manager")
	_, file := write(t, n, &to)
	private, err := warden.ParseBase36(reveal(t, unlock.Text())[9:59], 32, 50)
	if err != nil {
		t.Fatal(err)
	}
	plaintext, ok := box.OpenAnonymous(nil, blocks(t, file)[3].Bytes, (*[32]byte)(&to), (*[32]byte)(private))
	if !ok {
		t.Fatal("the box does not open")
	}
	forge := func(plaintext []byte) error {
		forged, err := box.SealAnonymous(nil, plaintext, (*[32]byte)(&to), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		all := blocks(t, file)
		all[3].Bytes = forged
		_, err = open(join(all), unlock)
		return err
	}
	if err := forge(plaintext); err != nil {
		t.Fatalf("the box as it was: %v", err)
	}
	if err := forge(append(bytes.Clone(plaintext), 0)); warden.CodeOf(err) != warden.CodeCorrupt {
		t.Errorf("with a trailing byte: %v, want code corrupt", err)
	}
	for i := range plaintext {
		if err := forge(plaintext[:i]); err == nil {
			t.Errorf("the first %d of %d bytes pass", i, len(plaintext))
		}
	}
	end := bytes.Index(plaintext, n.key) + len(n.key)
	for i := range end {
		changed := bytes.Clone(plaintext)
		changed[i] ^= 1
		if err := forge(changed); warden.CodeOf(err) != warden.CodeForeign && warden.CodeOf(err) != warden.CodeCorrupt {
			t.Errorf("with byte %d changed: %v, want code foreign or corrupt", i, err)
		}
	}
}
