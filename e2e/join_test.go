package e2e

import (
	"crypto"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"warden"
	"warden/ca"
	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/join"
	"warden/tokens"
)

// TestTokensRefused wants each wrong token refused with its own code and a hint, and nothing left on the joiner's disk.
func TestTokensRefused(t *testing.T) {
	testcluster.Root(t)
	c := testcluster.New(t)
	m, other, w := c.Host("m"), c.Host("other"), c.Host("w")
	m.Ctl("swarm", "init")
	other.Ctl("swarm", "init")

	rotatedAway := m.Token("worker")
	good := m.Token("--rotate", "worker")
	used := m.Token("--uses", "1", "worker")
	once := c.Host("once")
	once.Join(used, m)
	revoked := m.Token("worker")
	id := strings.Split(revoked, "-")[3]
	m.Ctl("swarm", "token", "revoke", id)
	expired := m.Token("--ttl", "1s", "worker")
	testcluster.Await(t, 40*time.Second, func() error {
		out := m.Ctl("swarm", "token", "ls")
		if !strings.Contains(strings.ToLower(out), "expired") {
			return fmt.Errorf("token ls: %s", out)
		}
		return nil
	})
	typo := []byte(good)
	typo[len(typo)-12] ^= 1
	for _, tt := range []struct {
		name, token string
		at          *testcluster.Host
		code        warden.Code
	}{
		{"mistyped", string(typo), m, warden.CodeInvalid},
		{"of another cluster", other.Token("worker"), m, warden.CodeWrongRoot},
		{"at another cluster's manager", good, other, warden.CodeWrongRoot},
		{"used up", used, m, warden.CodeUsedUp},
		{"revoked", revoked, m, warden.CodeRevoked},
		{"rotated away", rotatedAway, m, warden.CodeRevoked},
		{"expired", expired, m, warden.CodeExpired},
		{"of another host name", m.Token("--node-name", "someone-else", "worker"), m, warden.CodeBinding},
		{"of another address", m.Token("--cidr", "10.99.0.0/16", "worker"), m, warden.CodeBinding},
		{"wrong secret", withSecretOf(t, good, other.Token("worker")), m, warden.CodeUnknownToken},
	} {
		_, stderr, code := w.Try("swarm", "join", "--token", tt.token, tt.at.Address)
		if code == 0 || !strings.Contains(stderr, "["+string(tt.code)+"]") {
			t.Errorf("joining with a token %s = exit %d, want [%s]:\n%s", tt.name, code, tt.code, stderr)
		}
		if !strings.Contains(stderr, "hint:") {
			t.Errorf("joining with a token %s gives no hint:\n%s", tt.name, stderr)
		}
		if _, err := os.Stat(filepath.Join(w.State, "identity")); err == nil {
			t.Errorf("joining with a token %s left an identity on disk", tt.name)
		}
	}
	w.Join(good, m)
}

// withSecretOf makes a well-formed token with one's root and ID and the other's secret.
func withSecretOf(t testing.TB, a, b string) string {
	t.Helper()
	pa, pb := strings.Split(a, "-"), strings.Split(b, "-")
	pa[4] = pb[4]
	body := strings.Join(pa[:5], "-")
	sum := sha256.Sum256([]byte(body))
	text := body + "-" + warden.Base36(sum[:4], 7)
	if _, err := tokens.Parse(text); err != nil {
		t.Fatal(err)
	}
	return text
}

// TestUsesAreExact lets 64 joiners race for 10 uses over three managers.
func TestUsesAreExact(t *testing.T) {
	c := newThree(t)
	c.awaitVoters(t, c.m[0], 3)
	limited, err := tokens.Parse(c.m[0].Token("--uses", "10", "worker"))
	if err != nil {
		t.Fatal(err)
	}
	var joined, used atomic.Int32
	var wg sync.WaitGroup
	keys := make([]crypto.Signer, 64)
	ids := make([]string, 64)
	ask := func(i int) (string, error) {
		m, err := thief.Join("", c.m[i%3].Address, limited, join.Request{Key: keys[i], Hostname: fmt.Sprintf("n%d", i), Advertise: ":2377"})
		return m.NodeID, err
	}
	for i := range keys {
		if keys[i], err = ca.NewKey(); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			id, err := ask(i)
			switch warden.CodeOf(err) {
			case "":
				ids[i] = id
				joined.Add(1)
			case warden.CodeUsedUp:
				used.Add(1)
			default:
				t.Errorf("joiner %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if joined.Load() != 10 || used.Load() != 54 {
		t.Fatalf("%d joined and %d were told that the token is used up, want 10 and 54", joined.Load(), used.Load())
	}
	if n := len(strings.Fields(c.m[0].Ctl("node", "ls", "-q"))); n != 13 {
		t.Errorf("%d nodes exist, want 3 managers and 10 workers", n)
	}
	// A join that is made again is the same join.
	for i, id := range ids {
		if id == "" {
			continue
		}
		again, err := ask(i)
		if err != nil || again != id {
			t.Errorf("joining again with the same key = %q, %v, want the same node %s", again, err, id)
		}
		break
	}
}
