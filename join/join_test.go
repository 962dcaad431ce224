package join_test

import (
	"bytes"
	"crypto"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/join"
	"warden/tokens"
)

// TestI1RoleAndZoneComeFromTheToken, on both roles, whatever the joiner says of itself.
func TestI1RoleAndZoneComeFromTheToken(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	for _, rule := range []tokens.Rule{{Role: ca.RoleWorker, Zone: "pci"}, {Role: ca.RoleManager, Zone: "default"}} {
		req := newRequest(t)
		req.Availability = api.Availability_AVAILABILITY_PAUSE
		g, err := join.Join(t.Context(), addr, c.mint(t, rule), req, nil)
		if err != nil {
			t.Fatal(err)
		}
		if g.Role.Word() != rule.Role || g.Zone != rule.Zone || g.ClusterId != c.id || g.Managers.GetIndex() != 7 {
			t.Errorf("Join = %v, want role and zone of %+v", g, rule)
		}
		leaf := parse(t, g.Chain)[0]
		id, err := ca.Read(leaf)
		hash, _ := ca.KeyHash(req.Key.Public())
		if err != nil || id.Role != rule.Role || id.Zone != rule.Zone || id.NodeID != g.NodeId || id.KeyHash != hash {
			t.Errorf("the leaf says %+v, %v", id, err)
		}
		a := c.admitted[len(c.admitted)-1]
		want := ""
		if rule.Role == ca.RoleManager {
			want = "127.0.0.1:2377"
		}
		if a.KeyHash != hash || a.Hostname != "node-1" || a.IP.String() != "127.0.0.1" || a.Advertise != want || a.Version != "0.1.0" || a.Availability != req.Availability {
			t.Errorf("Admit got %+v", a)
		}
	}
}

// TestRefusalsReachTheJoiner: each with its code and a hint, and nothing is admitted.
func TestRefusalsReachTheJoiner(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	past := time.Now().Add(-time.Minute)
	unknown := must[tokens.Token](t)(tokens.Mint(c.authority.RootHash()))
	wrong := c.mint(t, tokens.Rule{})
	c.keys[wrong.ID] = [32]byte{1}
	for _, tt := range []struct {
		name   string
		tok    tokens.Token
		change func(*join.Request)
		want   warden.Code
	}{
		{"unknown token", unknown, nil, warden.CodeUnknownToken},
		{"wrong secret", wrong, nil, warden.CodeUnknownToken},
		{"expired", c.mint(t, tokens.Rule{ExpiresAt: past}), nil, warden.CodeExpired},
		{"revoked", c.mint(t, tokens.Rule{RevokedAt: past}), nil, warden.CodeRevoked},
		{"used up", c.mint(t, tokens.Rule{UsesMax: 1, Uses: 1}), nil, warden.CodeUsedUp},
		{"another host", c.mint(t, tokens.Rule{Hostname: "node-2"}), nil, warden.CodeBinding},
		{"another address", c.mint(t, tokens.Rule{CIDR: "10.0.0.0/8"}), nil, warden.CodeBinding},
		{"manager without an address", c.mint(t, tokens.Rule{Role: ca.RoleManager, Zone: "default"}), func(r *join.Request) { r.Advertise = "" }, warden.CodeInvalid},
		{"bad address", c.mint(t, tokens.Rule{}), func(r *join.Request) { r.Advertise = "0.0.0.0:2377" }, warden.CodeInvalid},
		{"no host name", c.mint(t, tokens.Rule{}), func(r *join.Request) { r.Hostname = "" }, warden.CodeInvalid},
	} {
		req := newRequest(t)
		if tt.change != nil {
			tt.change(&req)
		}
		g, err := join.Join(t.Context(), addr, tt.tok, req, nil)
		wantCode(t, tt.name, err, tt.want)
		if g != nil || tt.want != warden.CodeInvalid && warden.HintOf(err) == "" {
			t.Errorf("%s: grant %v, hint %q", tt.name, g, warden.HintOf(err))
		}
	}
	if len(c.admitted) != 0 {
		t.Errorf("%d were admitted", len(c.admitted))
	}
	_, one := join.Join(t.Context(), addr, unknown, newRequest(t), nil)
	_, two := join.Join(t.Context(), addr, wrong, newRequest(t), nil)
	if one.Error() != two.Error() || warden.HintOf(one) != warden.HintOf(two) {
		t.Errorf("an unknown token %q and a wrong secret %q are told apart", one, two)
	}
}

func TestClocksThatDiffer(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	for _, tt := range []struct {
		off  time.Duration
		want warden.Code
	}{{-4 * time.Minute, ""}, {4 * time.Minute, ""}, {-6 * time.Minute, warden.CodeClock}, {6 * time.Minute, warden.CodeClock}} {
		at := time.Now().Add(tt.off)
		c.server.Now = func() time.Time { return at }
		_, err := join.Join(t.Context(), addr, c.mint(t, tokens.Rule{}), newRequest(t), nil)
		wantCode(t, tt.off.String(), err, tt.want)
		if tt.want != "" && (!strings.Contains(err.Error(), at.UTC().Format(time.RFC3339)) || strings.Count(err.Error(), "Z") < 2 || warden.HintOf(err) == "") {
			t.Errorf("%s: error %q does not show both times", tt.off, err)
		}
	}
}

// TestRepeatAfterALostReply: a used-up token still reaches Admit, which alone can tell a repeat.
func TestRepeatAfterALostReply(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	tok, req := c.mint(t, tokens.Rule{UsesMax: 1}), newRequest(t)
	for i := range 2 {
		if _, err := join.Join(t.Context(), addr, tok, req, nil); err != nil {
			t.Errorf("join %d with the same key = %v", i, err)
		}
	}
	_, err := join.Join(t.Context(), addr, tok, newRequest(t), nil)
	wantCode(t, "another key", err, warden.CodeUsedUp)
	if !strings.Contains(warden.HintOf(err), "join-token") {
		t.Errorf("hint %q", warden.HintOf(err))
	}
}

func TestConcurrentJoins(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	c.server.Limiter = join.NewLimiter()
	tok := c.mint(t, tokens.Rule{UsesMax: 5})
	var wg sync.WaitGroup
	codes := make([]warden.Code, 24)
	for i := range codes {
		req := newRequest(t)
		wg.Go(func() {
			_, err := join.Join(t.Context(), addr, tok, req, nil)
			codes[i] = warden.CodeOf(err)
		})
	}
	wg.Wait()
	count := map[warden.Code]int{}
	for _, code := range codes {
		count[code]++
	}
	if count[""] != 5 || count[warden.CodeUsedUp] != len(codes)-5 {
		t.Errorf("codes %v, want 5 joins and the rest used-up", count)
	}
}

// TestInternalErrorsStayInside: their text goes to the manager's log alone.
func TestInternalErrorsStayInside(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	c.alter = func(g *api.JoinGrant) { g.Chain = append(g.Chain, make([]byte, warden.JoinReplyMax)) }
	_, err := join.Join(t.Context(), addr, c.mint(t, tokens.Rule{}), newRequest(t), nil)
	wantCode(t, "a grant that is too large", err, warden.CodeInternal)
	if strings.Contains(err.Error(), "bytes") {
		t.Errorf("the error %q tells details", err)
	}
}

// TestI10NothingSecretInLogsAndErrors of either side.
func TestI10NothingSecretInLogsAndErrors(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	good, bad := c.mint(t, tokens.Rule{}), c.mint(t, tokens.Rule{Hostname: "other"})
	if _, err := join.Join(t.Context(), addr, good, newRequest(t), nil); err != nil {
		t.Fatal(err)
	}
	_, err := join.Join(t.Context(), addr, bad, newRequest(t), nil)
	wantCode(t, "bound token", err, warden.CodeBinding)
	logged := func() string {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.log.String()
	}
	tick := time.NewTicker(time.Millisecond) // a grant is logged after it was sent
	defer tick.Stop()
	for stop := time.Now().Add(10 * time.Second); !strings.Contains(logged(), good.ID) || !strings.Contains(logged(), bad.ID); <-tick.C {
		if time.Now().After(stop) {
			t.Fatalf("the log does not name the tokens: %s", logged())
		}
	}
	out := logged() + fmt.Sprintf("%v %+v %#v", err, err, err) + warden.HintOf(err)
	for _, tok := range []tokens.Token{good, bad} {
		key := tok.Key()
		tok.Text().Use(func(b []byte) error {
			secret := strings.Split(string(b), "-")[4]
			for _, canary := range []string{secret, fmt.Sprintf("%x", key), fmt.Sprintf("%v", key)} {
				if strings.Contains(out, canary) {
					t.Errorf("%q is in the output", canary)
				}
			}
			return nil
		})
	}
}

// TestI3TheKeyStays: nothing that the joiner sends, seen inside TLS by the manager, holds its private key.
func TestI3TheKeyStays(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	req := newRequest(t)
	if _, err := join.Join(t.Context(), addr, c.mint(t, tokens.Rule{}), req, nil); err != nil {
		t.Fatal(err)
	}
	pkcs8 := must[[]byte](t)(ca.MarshalKey(req.Key))
	scalar := privateScalar(t, req.Key)
	a := c.admitted[0]
	if sent := fmt.Appendf(nil, "%s%s%s%s", a.CSR, a.Hostname, a.Advertise, a.Version); bytes.Contains(sent, scalar) || bytes.Contains(sent, pkcs8) {
		t.Error("the private key was sent")
	}
}

func privateScalar(t testing.TB, key crypto.Signer) []byte {
	k, ok := key.(interface{ Bytes() ([]byte, error) })
	if !ok {
		t.Fatalf("a key of type %T", key)
	}
	return must[[]byte](t)(k.Bytes())
}
