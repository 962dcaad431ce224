package tokens_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"warden"
	"warden/tokens"
)

func text(t tokens.Token) string {
	var s string
	t.Text().Use(func(b []byte) error { s = string(b); return nil })
	return s
}

func mint(t testing.TB, rootHash [32]byte) tokens.Token {
	t.Helper()
	tok, err := tokens.Mint(rootHash)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func genHash(t *rapid.T) (h [32]byte) {
	copy(h[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "root hash"))
	return h
}

func TestParseIsTheInverseOfText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tok, err := tokens.Mint(genHash(t))
		if err != nil {
			t.Fatal(err)
		}
		s := text(tok)
		back, err := tokens.Parse(s)
		if err != nil {
			t.Fatalf("Parse(Text) = %v", err)
		}
		if text(back) != s || back.RootHash != tok.RootHash || back.ID != tok.ID || back.Key() != tok.Key() {
			t.Fatal("Parse(Text) is another token")
		}
		if len(s) > warden.TokenTextMax || !tokens.ValidID(tok.ID) {
			t.Fatalf("a token of %d characters with ID %q", len(s), tok.ID)
		}
	})
}

// TestOneWrongCharacterIsToldOffline: no single substitution, deletion or doubling gives a token.
func TestOneWrongCharacterIsToldOffline(t *testing.T) {
	tok := text(mint(t, [32]byte{1, 2, 3}))
	rapid.Check(t, func(t *rapid.T) {
		i := rapid.IntRange(0, len(tok)-1).Draw(t, "at")
		c := string(rapid.SampledFrom([]rune("0123456789abcdefghijklmnopqrstuvwxyzABZ- \n\x00é")).Draw(t, "character"))
		for _, s := range []string{tok[:i] + c + tok[i+1:], tok[:i] + tok[i+1:], tok[:i] + c + tok[i:]} {
			if s == tok {
				continue
			}
			if _, err := tokens.Parse(s); err == nil {
				t.Fatalf("Parse accepts a token changed at %d", i)
			}
		}
	})
}

func TestParseRefuses(t *testing.T) {
	good := text(mint(t, [32]byte{}))
	for _, tt := range []struct{ name, in, hint string }{
		{"empty", "", "copy the whole token"},
		{"prefix alone", tokens.Prefix, "copy the whole token"},
		{"abc", "WDNTKN-1-abc", "copy the whole token"},
		{"version 2", strings.Replace(good, "-1-", "-2-", 1), "copy the whole token"},
		{"capitals", strings.ToUpper(good), "copy the whole token"},
		{"newline after", good + "\n", "copy the whole token"},
		{"blank before", " " + good, "copy the whole token"},
		{"fifth part", good + "-a", "copy the whole token"},
		{"twice", good + good, "copy the whole token"},
		{"megabyte", tokens.Prefix + strings.Repeat("a", 1<<20), "copy the whole token"},
		{"Docker's", "SWMTKN-1-3pu6hszjas19xyp7ghgosyx9k8atbfcr8p2is99znpy26u2lkl-1awxwuwd3z9j1z3puu7rcgdbx", "Docker Swarm"},
		{"an unlock key", "WDNKEY-1-abc", "unlock key"},
	} {
		_, err := tokens.Parse(tt.in)
		if warden.CodeOf(err) != warden.CodeInvalid || !strings.Contains(warden.HintOf(err), tt.hint) {
			t.Errorf("%s: Parse = %v (hint %q), want [invalid] with a hint on %q", tt.name, err, warden.HintOf(err), tt.hint)
		}
		if err != nil && !strings.Contains(err.Error(), "malformed join token") {
			t.Errorf("%s: error %q does not say what is malformed", tt.name, err)
		}
	}
}

// TestI10TokenDoesNotPrint: no verb, encoder or error shows the secret.
func TestI10TokenDoesNotPrint(t *testing.T) {
	tok := mint(t, [32]byte{9})
	full := text(tok)
	secret := strings.Split(full, "-")[4]
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "token", tok, "wrapped", []any{tok}, "pointer", &tok)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "token", tok, "wrapped", []any{tok})
	js, err := json.Marshal(map[string]any{"t": tok, "p": &tok})
	if err != nil {
		t.Fatal(err)
	}
	_, perr := tokens.Parse(full[:len(full)-1])
	out := log.String() + string(js) + tok.String() + perr.Error() + warden.HintOf(perr)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		out += fmt.Sprintf(verb+verb+verb, tok, &tok, struct{ T tokens.Token }{tok})
		out += fmt.Sprintf(verb, []tokens.Token{tok})
	}
	raw, _ := warden.ParseBase36(secret, 16, 25)
	for _, canary := range []string{secret, fmt.Sprintf("%x", raw), fmt.Sprintf("%v", raw), string(raw)} {
		if strings.Contains(out, canary) {
			t.Errorf("the secret prints as %q", canary)
		}
	}
	if !strings.Contains(tok.String(), tok.ID) || !strings.HasSuffix(tok.String(), "REDACTED") {
		t.Errorf("String = %q, want the ID and REDACTED", tok)
	}
}

func TestZeroTokenHasNoKey(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("the zero Token has a key")
		}
	}()
	tokens.Token{}.Key()
}

func TestProofsBindEverything(t *testing.T) {
	key, exporter, csr := [32]byte{1}, []byte("exporter"), []byte("csr")
	proof := tokens.Prove(key, exporter, csr)
	grant := tokens.ProveGrant(key, exporter, csr)
	if !tokens.CheckProof(key, exporter, csr, proof) || !tokens.CheckGrant(key, exporter, csr, grant) {
		t.Fatal("a proof does not hold")
	}
	for _, tt := range []struct {
		name string
		ok   bool
	}{
		{"another key", tokens.CheckProof([32]byte{2}, exporter, csr, proof)},
		{"another exporter", tokens.CheckProof(key, []byte("exporteR"), csr, proof)},
		{"another CSR", tokens.CheckProof(key, exporter, []byte("csR"), proof)},
		{"bytes moved between parts", tokens.CheckProof(key, []byte("exporterc"), []byte("sr"), proof)},
		{"truncated", tokens.CheckProof(key, exporter, csr, proof[:31])},
		{"empty", tokens.CheckProof(key, exporter, csr, nil)},
		{"grant as proof", tokens.CheckProof(key, exporter, csr, grant)},
		{"proof as grant", tokens.CheckGrant(key, exporter, csr, proof)},
	} {
		if tt.ok {
			t.Errorf("%s: the proof holds", tt.name)
		}
	}
}

func TestAdmit(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	good := tokens.Rule{Role: "worker", ExpiresAt: now.Add(time.Hour)}
	attempt := tokens.Attempt{Hostname: "node-1", IP: netip.MustParseAddr("10.1.2.3"), Now: now}
	for _, tt := range []struct {
		name   string
		change func(*tokens.Rule, *tokens.Attempt)
		want   warden.Code
	}{
		{"good", func(*tokens.Rule, *tokens.Attempt) {}, ""},
		{"manager", func(r *tokens.Rule, _ *tokens.Attempt) { r.Role = "manager" }, ""},
		{"no role", func(r *tokens.Rule, _ *tokens.Attempt) { r.Role = "" }, warden.CodeCorrupt},
		{"operator", func(r *tokens.Rule, _ *tokens.Attempt) { r.Role = "operator" }, warden.CodeCorrupt},
		{"last moment", func(r *tokens.Rule, a *tokens.Attempt) { a.Now = r.ExpiresAt.Add(-1) }, ""},
		{"expired", func(r *tokens.Rule, a *tokens.Attempt) { a.Now = r.ExpiresAt }, warden.CodeExpired},
		{"no end", func(r *tokens.Rule, _ *tokens.Attempt) { r.ExpiresAt = time.Time{} }, warden.CodeExpired},
		{"revoked", func(r *tokens.Rule, _ *tokens.Attempt) { r.RevokedAt = now }, warden.CodeRevoked},
		{"revoked in the future", func(r *tokens.Rule, _ *tokens.Attempt) { r.RevokedAt = now.Add(time.Hour) }, warden.CodeRevoked},
		{"revoked and expired", func(r *tokens.Rule, a *tokens.Attempt) { r.RevokedAt, a.Now = now, r.ExpiresAt }, warden.CodeRevoked},
		{"uses left", func(r *tokens.Rule, _ *tokens.Attempt) { r.UsesMax, r.Uses = 2, 1 }, ""},
		{"used up", func(r *tokens.Rule, _ *tokens.Attempt) { r.UsesMax, r.Uses = 1, 1 }, warden.CodeUsedUp},
		{"more than used up", func(r *tokens.Rule, _ *tokens.Attempt) { r.UsesMax, r.Uses = 1, 5 }, warden.CodeUsedUp},
		{"not limited", func(r *tokens.Rule, _ *tokens.Attempt) { r.Uses = 1 << 40 }, ""},
		{"host name", func(r *tokens.Rule, _ *tokens.Attempt) { r.Hostname = "node-1" }, ""},
		{"another host name", func(r *tokens.Rule, _ *tokens.Attempt) { r.Hostname = "node-2" }, warden.CodeBinding},
		{"host name in capitals", func(r *tokens.Rule, _ *tokens.Attempt) { r.Hostname = "Node-1" }, warden.CodeBinding},
		{"no host name", func(r *tokens.Rule, a *tokens.Attempt) { r.Hostname, a.Hostname = "node-1", "" }, warden.CodeBinding},
		{"in CIDR", func(r *tokens.Rule, _ *tokens.Attempt) { r.CIDR = "10.1.0.0/16" }, ""},
		{"outside CIDR", func(r *tokens.Rule, _ *tokens.Attempt) { r.CIDR = "10.2.0.0/16" }, warden.CodeBinding},
		{"mapped address", func(r *tokens.Rule, a *tokens.Attempt) {
			r.CIDR, a.IP = "10.1.0.0/16", netip.MustParseAddr("::ffff:10.1.2.3")
		}, ""},
		{"mapped address outside", func(r *tokens.Rule, a *tokens.Attempt) {
			r.CIDR, a.IP = "10.1.0.0/16", netip.MustParseAddr("::ffff:10.2.2.3")
		}, warden.CodeBinding},
		{"IPv6 with zone", func(r *tokens.Rule, a *tokens.Attempt) {
			r.CIDR, a.IP = "fe80::/10", netip.MustParseAddr("fe80::1%eth0")
		}, ""},
		{"IPv6 in an IPv4 CIDR", func(r *tokens.Rule, a *tokens.Attempt) {
			r.CIDR, a.IP = "0.0.0.0/0", netip.MustParseAddr("2001:db8::1")
		}, warden.CodeBinding},
		{"no address", func(r *tokens.Rule, a *tokens.Attempt) { r.CIDR, a.IP = "0.0.0.0/0", netip.Addr{} }, warden.CodeBinding},
		{"CIDR that does not parse", func(r *tokens.Rule, _ *tokens.Attempt) { r.CIDR = "10.1.0.0" }, warden.CodeCorrupt},
		{"binding before uses", func(r *tokens.Rule, _ *tokens.Attempt) { r.UsesMax, r.Uses, r.Hostname = 1, 1, "node-2" }, warden.CodeBinding},
	} {
		r, a := good, attempt
		tt.change(&r, &a)
		err := r.Admit(a)
		if got := warden.CodeOf(err); got != tt.want {
			t.Errorf("%s: Admit = %v [%s], want [%s]", tt.name, err, got, tt.want)
		}
		if err != nil && warden.HintOf(err) == "" {
			t.Errorf("%s: no hint", tt.name)
		}
	}
}

func TestParseCIDR(t *testing.T) {
	for _, good := range []string{"10.1.0.0/16", "0.0.0.0/0", "10.1.2.3/32", "2001:db8::/32", "::/0", "::1/128"} {
		if p, err := tokens.ParseCIDR(good); err != nil || p.String() != good {
			t.Errorf("ParseCIDR(%q) = %v, %v", good, p, err)
		}
	}
	for _, bad := range []string{"", "10.1.0.0", "10.1.2.3/16", "010.1.0.0/16", "10.1.0.0/33", "10.1.0.0/016", "::ffff:10.1.0.0/112",
		"2001:DB8::/32", "2001:db8:0::/32", "fe80::%eth0/64", " 10.1.0.0/16", "10.1.0.0/16,10.2.0.0/16"} {
		if p, err := tokens.ParseCIDR(bad); warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" {
			t.Errorf("ParseCIDR(%q) = %v, %v, want [invalid] with a hint", bad, p, err)
		}
	}
}
