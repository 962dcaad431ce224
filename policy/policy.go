// Package policy is the *authorise* decision: may this subject do this, may this secret enter that zone, may this task run
// there. It gives a decision with its reason, and does nothing.
//
// It admits no nodes (package tokens), issues nothing (package ca), and does not judge records: whoever asks has already
// authenticated the subject and looked up its record (I4). Pure: no I/O, no clock, no state.
//
// Invariants: what no row of the table allows is denied, an unknown action and an unknown zone included (I11); every denial
// has a reason.
package policy

import (
	"fmt"
	"slices"
	"strconv"

	"warden"
)

// Kinds of subjects.
const (
	KindUID      = "uid"      // a local user, identified by the kernel (SO_PEERCRED); Name is the decimal uid
	KindNode     = "node"     // Name is the node ID of its leaf
	KindOperator = "operator" // Name is of its leaf; no operator can exist yet
)

// Subject is who asks, as authenticated. Name is never empty (I12).
type Subject struct{ Kind, Name string }

// String returns "kind:name".
func (s Subject) String() string { return s.Kind + ":" + s.Name }

// Decision says whether, and why.
type Decision struct {
	Allow  bool
	Reason string
}

// Err returns nil if the decision allows, and otherwise its reason as CodeDenied with op.
func (d Decision) Err(op string) error {
	if d.Allow {
		return nil
	}
	return warden.Errorf(warden.CodeDenied, op, "%s", d.Reason)
}

func allow(format string, args ...any) Decision { return Decision{true, fmt.Sprintf(format, args...)} }
func deny(format string, args ...any) Decision  { return Decision{false, fmt.Sprintf(format, args...)} }

// The actions are the full method names of the two services that a person calls, as gRPC gives them.
const (
	control = "/warden.v1.Control/"
	local   = "/warden.v1.Local/"
)

// table lists, for each action, the kinds of subjects that may. A local user's right is the access to the socket: its file
// mode and group are the gate. Nodes have nothing to call (I5); operators come with doors of their own.
var table = map[string][]string{
	control + "List":            {KindUID},
	control + "UpdateCluster":   {KindUID},
	control + "CreateToken":     {KindUID},
	control + "RevokeToken":     {KindUID},
	control + "UpdateNode":      {KindUID},
	control + "RemoveNode":      {KindUID},
	control + "CreateZone":      {KindUID},
	control + "RemoveZone":      {KindUID},
	control + "CreateService":   {KindUID},
	control + "UpdateService":   {KindUID},
	control + "ScaleService":    {KindUID},
	control + "RemoveService":   {KindUID},
	control + "CreateSecret":    {KindUID},
	control + "RotateSecret":    {KindUID},
	control + "RemoveSecret":    {KindUID},
	control + "RotateUnlockKey": {KindUID},
	control + "RotateDEK":       {KindUID},
	control + "RotateIssuing":   {KindUID},
	control + "Status":          {KindUID},
	control + "Logs":            {KindUID},
	control + "Events":          {KindUID},
	local + "Init":              {KindUID},
	local + "Join":              {KindUID},
	local + "Leave":             {KindUID},
	local + "Unlock":            {KindUID},
	local + "Info":              {KindUID},
}

// Actions returns all known actions, sorted.
func Actions() []string {
	var all []string
	for a := range table {
		all = append(all, a)
	}
	slices.Sort(all)
	return all
}

// Decide says whether s may do action ("/warden.v1.Control/CreateSecret") to resource (a reference, or empty). The resource
// decides nothing yet; it stands in the reason.
func Decide(s Subject, action, resource string) Decision {
	kinds, known := table[action]
	switch {
	case !known:
		return deny("the action %q is unknown", clip(action))
	case s.Kind == KindUID && !validUID(s.Name):
		return deny("the caller is not identified")
	case slices.Contains(kinds, s.Kind):
		return allow("%s may %s%s: it has access to the local socket", s, action, of(resource))
	case s.Kind == KindNode:
		return deny("a node may not %s%s: nodes have nothing to call", action, of(resource))
	case s.Kind == KindOperator:
		return deny("operators may not %s%s yet", action, of(resource))
	}
	return deny("subjects of kind %q may not %s", clip(s.Kind), action)
}

func validUID(s string) bool {
	n, err := strconv.ParseUint(s, 10, 32)
	return err == nil && strconv.FormatUint(n, 10) == s
}

func of(resource string) string {
	if resource == "" {
		return ""
	}
	return fmt.Sprintf(" %q", clip(resource))
}

// SecretMayEnter says whether a secret that may enter secretZones (none: any zone) may enter nodeZone. known reports whether
// a zone is declared: an unknown one on either side is denied, and so is everything where known is nil (I6, I11).
func SecretMayEnter(secretZones []string, nodeZone string, known func(zone string) bool) Decision {
	if d := declared(nodeZone, "the node's", known); !d.Allow {
		return d
	}
	for _, z := range secretZones {
		if d := declared(z, "the secret's", known); !d.Allow {
			return d
		}
	}
	switch {
	case len(secretZones) == 0:
		return allow("the secret may enter any zone")
	case slices.Contains(secretZones, nodeZone):
		return allow("the secret may enter zone %q", nodeZone)
	case len(secretZones) == 1:
		return deny("the secret may enter zone %q only, not %q", secretZones[0], nodeZone)
	}
	return deny("zone %q is not among the %d zones that the secret may enter", nodeZone, len(secretZones))
}

// TaskMayRun says whether a task of taskZone may run on a node of nodeZone: they have to be equal and declared.
func TaskMayRun(taskZone, nodeZone string, known func(zone string) bool) Decision {
	if d := declared(taskZone, "the task's", known); !d.Allow {
		return d
	}
	if d := declared(nodeZone, "the node's", known); !d.Allow {
		return d
	}
	if taskZone != nodeZone {
		return deny("the task is of zone %q, the node of %q", taskZone, nodeZone)
	}
	return allow("task and node are of zone %q", nodeZone)
}

func declared(zone, whose string, known func(string) bool) Decision {
	switch {
	case zone == "":
		return deny("%s zone is not set", whose)
	case known == nil:
		return deny("the declared zones are not known here")
	case !known(zone):
		return deny("%s zone %q is not declared", whose, clip(zone))
	}
	return allow("")
}

func clip(s string) string { return warden.Clip(s, 64) }
