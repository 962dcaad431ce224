package store

import (
	"net/netip"
	"regexp"
	"strings"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// rule judges the change from old (nil: a creation) to next, and sets the fields of next that are the apply's to set.
func (x *tx) rule(kind api.Kind, old, next Record) error {
	switch n := next.(type) {
	case *api.Cluster:
		return x.ruleCluster(as[*api.Cluster](old), n)
	case *api.Node:
		return x.ruleNode(as[*api.Node](old), n)
	case *api.Tombstone:
		return x.ruleTombstone(as[*api.Tombstone](old), n)
	case *api.Zone:
		return x.ruleZone(as[*api.Zone](old), n)
	case *api.Token:
		return x.ruleToken(as[*api.Token](old), n)
	case *api.Service:
		return x.ruleService(as[*api.Service](old), n)
	case *api.Task:
		return x.ruleTask(as[*api.Task](old), n)
	case *api.Secret:
		return x.ruleSecret(as[*api.Secret](old), n)
	case *api.SecretVersion:
		return x.ruleSecretVersion(as[*api.SecretVersion](old), n)
	}
	return warden.Errorf(warden.CodeDenied, "", "nobody may put a %s: the apply makes them", Noun(kind))
}

// ruleDelete judges the removal of old, and removes what must go with it.
func (x *tx) ruleDelete(kind api.Kind, old Record) error {
	switch o := old.(type) {
	case *api.Node:
		return x.ruleDeleteNode(o)
	case *api.Zone:
		return x.ruleDeleteZone(o)
	case *api.Token, *api.Service:
		return nil
	case *api.Task:
		return x.ruleDeleteTask(o)
	case *api.Secret:
		return x.ruleDeleteSecret(o)
	case *api.SecretVersion:
		return x.ruleDeleteSecretVersion(o)
	}
	return warden.Errorf(warden.CodeDenied, "", "nobody may remove a %s", Noun(kind))
}

// as returns the record as its own type; nil stays nil.
func as[T Record](r Record) T {
	t, _ := r.(T)
	return t
}

// frozen refuses a change of anything but what reset puts back to its old value. reset gets a copy of next.
func frozen[T Record](old, next T, reset func(copy T)) error {
	c := api.Clone(next)
	reset(c)
	setMeta(c, old.GetMeta())
	if !proto.Equal(old, c) {
		return invalid("something changed that never changes")
	}
	return nil
}

// room refuses a new record beyond the bound of its kind.
func (x *tx) room(kind api.Kind, most int) error {
	if x.s.counts[kind]+x.added[kind] >= most {
		return warden.Errorf(warden.CodeTooLarge, "", "a cluster has at most %d %ss", most, Noun(kind))
	}
	return nil
}

// unique refuses a name that another record of the kind has.
func (x *tx) unique(kind api.Kind, name string) error {
	if err := warden.CheckName(Noun(kind), name); err != nil {
		return err
	}
	if len(idsOf(x.txn, kind, byName, name)) > 0 {
		return warden.Errorf(warden.CodeExists, "", "there is a %s %s already", Noun(kind), name)
	}
	return nil
}

func (x *tx) zoneExists(name string) error {
	if name == "" || first[*api.Zone](x.txn, api.Kind_KIND_ZONE, byName, name) == nil {
		return warden.Hint(warden.Errorf(warden.CodeNotFound, "", "no zone is %+q", clip(name)), "zones are declared first: wardenctl zone create NAME")
	}
	return nil
}

// inUse refuses a removal where there are users, and names some.
func inUse(users []string) error {
	if len(users) == 0 {
		return nil
	}
	more := ""
	if len(users) > usersShown {
		more = " and others"
	}
	return warden.Errorf(warden.CodeInUse, "", "%d still need it: %s%s", len(users), strings.Join(users[:min(len(users), usersShown)], ", "), more)
}

func (x *tx) ruleCluster(old, next *api.Cluster) error {
	if err := checkCluster(next); err != nil {
		return err
	}
	if old == nil {
		if x.cluster() != nil {
			return warden.Errorf(warden.CodeExists, "", "there is a cluster record already")
		}
		next.LeafTtlChangedNs, next.DekChangedNs = 0, x.now
		return nil
	}
	relocked := old.GetAutolock() != next.GetAutolock() || string(old.GetUnlockRecipient()) != string(next.GetUnlockRecipient())
	switch {
	case string(old.GetRootCert()) != string(next.GetRootCert()):
		return invalid("the root certificate never changes")
	case next.GetApplyVersion() < old.GetApplyVersion():
		return invalid("the apply version never falls")
	case next.GetRotatedIndex() < old.GetRotatedIndex():
		return invalid("the index of the last rotation never falls")
	case next.GetIssuingGeneration() < old.GetIssuingGeneration() || next.GetKeysetGeneration() < old.GetKeysetGeneration():
		return invalid("generations never fall")
	case next.GetLockGeneration() < old.GetLockGeneration() || next.GetDekGeneration() < old.GetDekGeneration():
		return invalid("the generations of lock and DEKs never fall")
	case relocked && next.GetLockGeneration() == old.GetLockGeneration():
		return invalid("another lock has another generation")
	case relocked && next.GetAutolock() && next.GetDekGeneration() == old.GetDekGeneration():
		return invalid("under another unlock key managers need other DEKs")
	}
	next.DekChangedNs = old.GetDekChangedNs()
	if next.GetDekGeneration() != old.GetDekGeneration() {
		next.DekChangedNs = x.now
	}
	next.LeafTtlChangedNs = old.GetLeafTtlChangedNs()
	if next.GetLeafTtlNs() != old.GetLeafTtlNs() {
		next.LeafTtlChangedNs = x.now
	}
	return nil
}

func (x *tx) ruleZone(old, next *api.Zone) error {
	if old != nil {
		return frozen(old, next, func(*api.Zone) {})
	}
	return firstError(
		checkID("the zone's ID", next.GetId()),
		x.unique(api.Kind_KIND_ZONE, next.GetName()),
		x.room(api.Kind_KIND_ZONE, warden.ZonesMax))
}

func (x *tx) ruleDeleteZone(old *api.Zone) error {
	name := old.GetName()
	if name == warden.DefaultZone {
		return warden.Errorf(warden.CodeDenied, "", "the zone %s stays", name)
	}
	var users []string
	for _, n := range list[*api.Node](x.txn, api.Kind_KIND_NODE, byZone, name) {
		users = append(users, "node "+n.GetHostname())
	}
	for _, s := range list[*api.Service](x.txn, api.Kind_KIND_SERVICE, byZone, name) {
		users = append(users, "service "+s.GetSpec().GetName())
	}
	for _, s := range list[*api.Secret](x.txn, api.Kind_KIND_SECRET, byZone, name) {
		users = append(users, "secret "+s.GetName())
	}
	return inUse(users)
}

var tokenIDPattern = regexp.MustCompile(`^[0-9a-z]{12}$`)

func (x *tx) ruleToken(old, next *api.Token) error {
	if old != nil {
		if next.GetRevokedNs() < old.GetRevokedNs() {
			return invalid("a revoked token stays revoked")
		}
		return frozen(old, next, func(c *api.Token) { c.RevokedNs = old.GetRevokedNs() })
	}
	switch ttl := next.GetExpiresNs() - x.now; {
	case !tokenIDPattern.MatchString(next.GetId()):
		return invalid("its ID is not 12 characters of 0-9 and a-z")
	case next.GetUses() != 0 || next.GetRevokedNs() != 0:
		return invalid("a new token is unused and not revoked")
	case next.GetExpiresNs() <= 0 || ttl > int64(warden.TokenTTLMax+warden.SkewMax):
		return invalid("its life is out of range")
	}
	if next.GetZone() != "" {
		if err := x.zoneExists(next.GetZone()); err != nil {
			return err
		}
	}
	if next.GetCidr() != "" {
		if _, err := netip.ParsePrefix(next.GetCidr()); err != nil {
			return invalid("its CIDR does not parse")
		}
	}
	outstanding := 0
	for _, t := range list[*api.Token](x.txn, api.Kind_KIND_TOKEN, byID+"_prefix", "") {
		if t.GetRevokedNs() == 0 && t.GetExpiresNs() > x.now && (t.GetUsesMax() == 0 || t.GetUses() < t.GetUsesMax()) {
			outstanding++
		}
	}
	if outstanding >= warden.TokensMax {
		return warden.Hint(warden.Errorf(warden.CodeTooLarge, "", "%d tokens are outstanding, which is the most", outstanding),
			"revoke some: wardenctl swarm join-token --rotate ROLE")
	}
	return firstError(
		checkRole("its role", next.GetRole()),
		checkText("the host name", next.GetHostname(), warden.HostnameMax),
		checkHash("its key", next.GetKey(), false),
		checkHash("the hash of the root", next.GetRootHash(), false))
}

// useToken takes one use.
func (x *tx) useToken(id string) error {
	old := as[*api.Token](x.find(api.Kind_KIND_TOKEN, id))
	op := "using token " + clip(id)
	switch {
	case old == nil:
		return warden.Errorf(warden.CodeUnknownToken, op, "there is none")
	case old.GetRevokedNs() != 0:
		return warden.Errorf(warden.CodeRevoked, op, "it was revoked")
	case x.now >= old.GetExpiresNs():
		return warden.Errorf(warden.CodeExpired, op, "it has expired")
	case old.GetUsesMax() != 0 && old.GetUses() >= old.GetUsesMax():
		return warden.Errorf(warden.CodeUsedUp, op, "all %d uses are taken", old.GetUsesMax())
	}
	next := api.Clone(old)
	next.Uses++
	x.store(api.Kind_KIND_TOKEN, old, next)
	return nil
}
