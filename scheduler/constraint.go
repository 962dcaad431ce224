package scheduler

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"

	"warden"
)

const (
	ipKey       = "node.ip"
	nodeLabel   = "node.labels."
	engineLabel = "engine.labels."

	constraintHint = "write KEY==VALUE or KEY!=VALUE, where KEY is node.id, node.hostname, node.role, node.ip, " +
		"node.platform.os, node.platform.arch, node.labels.NAME or engine.labels.NAME"
)

// Constraint is one condition on a node, such as node.labels.disk==ssd. The zero value matches nothing. Comparable.
type Constraint struct {
	key    string
	value  string
	prefix netip.Prefix // node.ip only
	not    bool
}

// ParseConstraint reads KEY==VALUE or KEY!=VALUE; spaces around key and value do not count. Keys and values compare exactly,
// case and all, but for node.ip, whose value is an address or a prefix in CIDR notation, and node.platform.arch, where x86_64
// means amd64 and aarch64 means arm64. A node that lacks the label (or the address) fails == and passes !=.
//
// Errors: CodeInvalid for an unknown key, another operator, an empty or unprintable value, a value that the key can never
// have, and for more than ConstraintMax bytes. Inverse of String. Pure.
func ParseConstraint(s string) (Constraint, error) {
	c, err := parseConstraint(s)
	if err != nil {
		return Constraint{}, err
	}
	return c, nil
}

func parseConstraint(s string) (c Constraint, err error) {
	if len(s) > warden.ConstraintMax {
		return c, warden.Hint(warden.Errorf(warden.CodeInvalid, "parsing constraint", "%d bytes are too long", len(s)),
			fmt.Sprintf("a constraint has at most %d bytes", warden.ConstraintMax))
	}
	at := strings.IndexAny(s, "=!")
	if at < 0 || at+1 >= len(s) || s[at+1] != '=' {
		return c, refuse(constraintHint, "%q has no operator == or !=", s)
	}
	c.not = s[at] == '!'
	c.key, c.value = strings.Trim(s[:at], " "), strings.Trim(s[at+2:], " ")
	switch {
	case c.key == "":
		return c, refuse(constraintHint, "%q has no key", s)
	case c.value == "":
		return c, refuse(constraintHint, "%q has no value", s)
	case c.value[0] == '=':
		return c, refuse(constraintHint, "%q has another operator than == and !=", s)
	case !printable(c.value):
		return c, refuse(constraintHint, "%q has unprintable characters in its value", s)
	}
	return c, c.check(s)
}

// check holds the value against what the key can have, and brings it into its one spelling.
func (c *Constraint) check(s string) error {
	switch c.key {
	case "node.id":
		if !warden.ValidID(c.value) {
			return refuse("use the whole ID, as `wardenctl node ls` prints it", "%q does not name a node ID", s)
		}
	case "node.hostname", "node.platform.os":
	case "node.platform.arch":
		c.value = arch(c.value)
	case "node.role":
		if c.value != "manager" && c.value != "worker" {
			return refuse("use manager or worker", "%q names an unknown role", s)
		}
	case ipKey:
		return c.checkIP(s)
	default:
		name, ok := strings.CutPrefix(c.key, nodeLabel)
		if !ok {
			name, ok = strings.CutPrefix(c.key, engineLabel)
		}
		if !ok {
			return refuse(constraintHint, "%q has an unknown key", s)
		}
		if name == "" || len(name) > warden.LabelKeyMax || strings.Contains(name, " ") || !printable(name) {
			return refuse(constraintHint, "%q has no valid label name", s)
		}
	}
	return nil
}

func (c *Constraint) checkIP(s string) error {
	if a, err := netip.ParseAddr(c.value); err == nil && a.Zone() == "" {
		a = a.Unmap()
		c.prefix, c.value = netip.PrefixFrom(a, a.BitLen()), a.String()
		return nil
	}
	p, err := netip.ParsePrefix(c.value)
	if err != nil || p.Addr().Is4In6() {
		return refuse("use an address such as 10.0.0.7 or a prefix such as 10.0.0.0/8", "%q has neither an address nor a prefix", s)
	}
	if p != p.Masked() {
		return refuse("use "+p.Masked().String()+" for the whole network", "%q has bits set behind the prefix", s)
	}
	c.prefix, c.value = p, p.String()
	return nil
}

// String returns the one spelling of the constraint. Inverse of ParseConstraint.
func (c Constraint) String() string {
	if c.not {
		return c.key + "!=" + c.value
	}
	return c.key + "==" + c.value
}

// Matches reports whether the node meets the constraint. Pure.
func (c Constraint) Matches(n Node) bool { return c.matches(&n) }

func (c *Constraint) matches(n *Node) bool {
	switch c.key {
	case "":
		return false
	case ipKey:
		return c.prefix.Contains(address(n)) != c.not
	}
	v, ok := value(n, c.key)
	return (ok && v == c.value) != c.not
}

// value returns what the node has under the key of a constraint, which is not ipKey; false where it lacks the label.
func value(n *Node, key string) (string, bool) {
	switch key {
	case "node.id":
		return n.ID, true
	case "node.hostname":
		return n.Hostname, true
	case "node.role":
		return n.Role, true
	case "node.platform.os":
		return n.OS, true
	case "node.platform.arch":
		return arch(n.Arch), true
	}
	if name, ok := strings.CutPrefix(key, engineLabel); ok {
		v, ok := n.EngineLabels[name]
		return v, ok
	}
	v, ok := n.Labels[strings.TrimPrefix(key, nodeLabel)]
	return v, ok
}

// address returns the node's address; the zero one, which no prefix contains, where it has none.
func address(n *Node) netip.Addr {
	a, err := netip.ParseAddr(n.IP)
	if err != nil {
		return netip.Addr{}
	}
	return a.Unmap().WithZone("")
}

func arch(s string) string {
	switch s {
	case "x86_64":
		return "amd64"
	case "aarch64":
		return "arm64"
	}
	return s
}

func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

func refuse(hint, format string, args ...any) error {
	return warden.Hint(warden.Errorf(warden.CodeInvalid, "parsing constraint", format, args...), hint)
}
