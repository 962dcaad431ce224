package tokens

import (
	"fmt"
	"net/netip"
	"time"

	"warden"
)

// Rule is what the state holds of a token: which joiner it admits, and as what. Empty Hostname and CIDR admit any; an empty
// Zone is the default one; a zero UsesMax does not limit; a zero RevokedAt is not revoked. There is no token without an
// end: a zero ExpiresAt is long past.
type Rule struct {
	Role, Zone, Hostname, CIDR string
	ExpiresAt, RevokedAt       time.Time
	UsesMax, Uses              uint64
}

// Attempt is what is known of a joiner that has proven the token. Hostname is its own word: a binding to it keeps honest
// mistakes out, not a liar.
type Attempt struct {
	Hostname string
	IP       netip.Addr // as the manager sees it
	Now      time.Time
}

// Admit returns nil if the rule admits the attempt, and otherwise why not and what to do: CodeRevoked, CodeExpired,
// CodeBinding, CodeUsedUp; CodeCorrupt for a rule that cannot be read. CodeUsedUp comes last: an attempt that gets it is
// refused for nothing else. The comparison of host names is exact, of addresses with IPv4-mapped ones taken as IPv4. Pure.
func (r Rule) Admit(a Attempt) error {
	const op = "admitting the joiner"
	const mint = "ask for a new token: wardenctl swarm join-token "
	refuse := func(code warden.Code, hint, format string, args ...any) error {
		return warden.Hint(warden.Errorf(code, op, format, args...), hint)
	}
	if r.Role != "manager" && r.Role != "worker" {
		return refuse(warden.CodeCorrupt, "revoke the token and mint another", "the token's role %q is unknown", r.Role)
	}
	if !r.RevokedAt.IsZero() {
		return refuse(warden.CodeRevoked, mint+r.Role, "the token was revoked at %s", stamp(r.RevokedAt))
	}
	if !a.Now.Before(r.ExpiresAt) {
		return refuse(warden.CodeExpired, mint+r.Role, "the token expired at %s, the manager's clock says %s", stamp(r.ExpiresAt), stamp(a.Now))
	}
	if r.Hostname != "" && a.Hostname != r.Hostname {
		return refuse(warden.CodeBinding, "join from that host, or "+mint+r.Role, "the token is bound to host name %q, this host says %q", r.Hostname, clip(a.Hostname))
	}
	if r.CIDR != "" {
		prefix, err := ParseCIDR(r.CIDR)
		if err != nil {
			return refuse(warden.CodeCorrupt, "revoke the token and mint another", "the token's CIDR %q cannot be read", clip(r.CIDR))
		}
		if !prefix.Contains(a.IP.Unmap().WithZone("")) {
			return refuse(warden.CodeBinding, "join from such an address, or "+mint+r.Role, "the token is bound to addresses in %s, the manager sees %s", prefix, a.IP.Unmap())
		}
	}
	if r.UsesMax != 0 && r.Uses >= r.UsesMax {
		return refuse(warden.CodeUsedUp, mint+r.Role, "the token's %s used", plural(r.UsesMax))
	}
	return nil
}

// ParseCIDR reads the address range that a token is bound to, in its one spelling: "10.1.0.0/16", "2001:db8::/32", without
// bits set behind the prefix and not IPv4-mapped. Errors: CodeInvalid with a hint.
func ParseCIDR(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() || p.Masked().String() != s {
		return netip.Prefix{}, warden.Hint(warden.Errorf(warden.CodeInvalid, "parsing CIDR", "%q is not an address range", clip(s)),
			"write it like 10.1.0.0/16 or 2001:db8::/32, with zeros behind the prefix; for one address append /32 or /128")
	}
	return p, nil
}

func plural(n uint64) string {
	if n == 1 {
		return "one use is"
	}
	return fmt.Sprintf("%d uses are all", n)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func clip(s string) string { return warden.Clip(s, 64) }
