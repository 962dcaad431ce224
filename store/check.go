package store

import (
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"warden"
	"warden/api"
)

// Bounds that concern records only.
const (
	hashBytes          = 32
	sealedKeyMax       = 8 << 10  // bytes of a sealed CA key
	keysetMax          = 64 << 10 // bytes of the cluster keyset
	distrustedMax      = 1024     // issuers
	addressMax         = 300      // bytes of host:port
	ipMax              = 64       // bytes
	actorNameMax       = 255      // bytes
	imageMax           = 512      // bytes
	targetMax          = 255      // bytes of a file name
	wrappedKeyMax      = 4 << 10  // bytes of a sealed data key
	sealOverheadMax    = 4 << 10  // bytes that sealing adds to a value
	tombstoneHashesMax = 16
	statusTextMax      = 1 << 10 // bytes; longer text is cut
	resourceMax        = 1 << 50 // nano CPUs or bytes, so that sums over a node can't overflow
	usersShown         = 5       // users named by a refusal
)

// checkCommand checks what every command needs, whatever it does.
func checkCommand(c *api.Command) error {
	const op = "checking a command"
	switch id := c.GetRequestId(); {
	case id == "" || len(id) > warden.RequestIDMax:
		return warden.Errorf(warden.CodeInvalid, op, "want a request ID of 1 to %d bytes", warden.RequestIDMax)
	case len(c.GetOperations()) > warden.CommandOpsMax:
		return warden.Errorf(warden.CodeTooLarge, op, "%d operations, at most %d", len(c.GetOperations()), warden.CommandOpsMax)
	}
	switch c.GetActor().GetKind() {
	case "uid", "node", "operator", "system":
	default:
		return warden.Errorf(warden.CodeInvalid, op, "want an actor of a known kind")
	}
	if len(c.GetActor().GetName()) > actorNameMax || len(c.GetActor().GetVia()) > actorNameMax {
		return warden.Errorf(warden.CodeInvalid, op, "the actor's name is too long")
	}
	return nil
}

func invalid(format string, args ...any) error {
	return warden.Errorf(warden.CodeInvalid, "", format, args...)
}

// checkID refuses what is no ID.
func checkID(what, id string) error {
	if !warden.ValidID(id) {
		return invalid("%s is not an ID of %d characters", what, warden.IDLength)
	}
	return nil
}

// checkText refuses text that is too long or has control characters.
func checkText(what, s string, bytesMax int) error {
	if len(s) > bytesMax {
		return warden.Errorf(warden.CodeTooLarge, "", "%s has %d bytes, at most %d", what, len(s), bytesMax)
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return invalid("%s has control characters", what)
	}
	return nil
}

// checkHash refuses what is no SHA-256 sum. An empty one passes where it is optional.
func checkHash(what string, h []byte, optional bool) error {
	if len(h) != hashBytes && !(optional && len(h) == 0) {
		return invalid("%s has %d bytes, want %d", what, len(h), hashBytes)
	}
	return nil
}

// checkBytes refuses byte strings that are empty or too long.
func checkBytes(what string, b []byte, bytesMax int) error {
	if len(b) == 0 || len(b) > bytesMax {
		return invalid("%s has %d bytes, want 1 to %d", what, len(b), bytesMax)
	}
	return nil
}

func checkLabels(what string, labels map[string]string) error {
	if len(labels) > warden.LabelsMax {
		return warden.Errorf(warden.CodeTooLarge, "", "%d %s, at most %d", len(labels), what, warden.LabelsMax)
	}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if k == "" {
			return invalid("one of the %s has no key", what)
		}
		if err := checkText("a key of the "+what, k, warden.LabelKeyMax); err != nil {
			return err
		}
		if err := checkText("a value of the "+what, labels[k], warden.LabelValueMax); err != nil {
			return err
		}
	}
	return nil
}

func checkRole(what string, r api.Role) error {
	if r != api.Role_ROLE_WORKER && r != api.Role_ROLE_MANAGER {
		return invalid("%s is neither worker nor manager", what)
	}
	return nil
}

func checkCluster(c *api.Cluster) error {
	ttl := c.GetLeafTtlNs()
	switch {
	case ttl < int64(warden.LeafTTLMin) || ttl > int64(warden.LeafTTLMax):
		return invalid("the life of leaves is %d s, want %d to %d", ttl/1e9, int64(warden.LeafTTLMin)/1e9, int64(warden.LeafTTLMax)/1e9)
	case len(c.GetSealedRootKey()) > sealedKeyMax:
		return invalid("the sealed root key is too long")
	case c.GetIssuingGeneration() == 0 || c.GetKeysetGeneration() == 0 || c.GetApplyVersion() == 0:
		return invalid("generations and the apply version start at 1")
	case c.GetAutolock() != (len(c.GetUnlockRecipient()) > 0), c.GetAutolock() != (c.GetUnlockKeyId() != ""):
		return invalid("want an unlock recipient and its key ID where autolock is on, and only there")
	case len(c.GetDistrustedIssuers())%hashBytes != 0 || len(c.GetDistrustedIssuers()) > distrustedMax*hashBytes:
		return invalid("the distrusted issuers are not up to %d sums of %d bytes", distrustedMax, hashBytes)
	}
	return firstError(
		checkID("the cluster's ID", c.GetId()),
		checkBytes("the root certificate", c.GetRootCert(), warden.CertBytesMax),
		checkBytes("the issuing certificate", c.GetIssuingCert(), warden.CertBytesMax),
		checkBytes("the sealed issuing key", c.GetSealedIssuingKey(), sealedKeyMax),
		checkBytes("the keyset", c.GetKeyset(), keysetMax),
		checkHash("the unlock recipient", c.GetUnlockRecipient(), true),
		checkText("the unlock key's ID", c.GetUnlockKeyId(), warden.NameMax))
}

func checkNode(n *api.Node) error {
	if n.GetAvailability() < api.Availability_AVAILABILITY_ACTIVE || n.GetAvailability() > api.Availability_AVAILABILITY_DRAIN {
		return invalid("its availability is none of active, pause and drain")
	}
	if n.GetLeafRole() != api.Role_ROLE_UNSPECIFIED {
		if err := checkRole("the role of its leaf", n.GetLeafRole()); err != nil {
			return err
		}
	}
	if len(n.GetLeaf()) > warden.CertBytesMax {
		return invalid("its leaf has %d bytes, at most %d", len(n.GetLeaf()), warden.CertBytesMax)
	}
	return firstError(
		checkID("the node's ID", n.GetId()),
		checkText("the host name", n.GetHostname(), warden.HostnameMax),
		checkRole("its role", n.GetRole()),
		checkRole("its desired role", n.GetDesiredRole()),
		checkLabels("labels", n.GetLabels()),
		checkText("the address", n.GetAddress(), addressMax),
		checkText("the IP address", n.GetIp(), ipMax),
		checkHash("the hash of its key", n.GetKeyHash(), false),
		checkHash("the hash of its next key", n.GetNextKeyHash(), true),
		checkHash("the hash of its first key", n.GetJoinKeyHash(), true),
		checkText("the zone of its leaf", n.GetLeafZone(), warden.NameMax),
		checkDescription(n.GetDescription()))
}

func checkDescription(d *api.NodeDescription) error {
	if d.GetNanoCpus() < 0 || d.GetNanoCpus() > resourceMax || d.GetMemoryBytes() < 0 || d.GetMemoryBytes() > resourceMax {
		return invalid("the described resources are out of range")
	}
	return firstError(
		checkText("the described host name", d.GetHostname(), warden.HostnameMax),
		checkText("the operating system", d.GetOs(), warden.NameMax),
		checkText("the architecture", d.GetArch(), warden.NameMax),
		checkText("the version", d.GetVersion(), warden.LabelKeyMax),
		checkText("the executor", d.GetExecutor(), warden.NameMax),
		checkText("the kind of secret mounts", d.GetSecretMounts(), warden.NameMax),
		checkLabels("engine labels", d.GetEngineLabels()))
}

func checkTombstone(t *api.Tombstone) error {
	if len(t.GetKeyHashes()) > tombstoneHashesMax {
		return invalid("%d hashes of keys, at most %d", len(t.GetKeyHashes()), tombstoneHashesMax)
	}
	for _, h := range t.GetKeyHashes() {
		if err := checkHash("the hash of a key", h, false); err != nil {
			return err
		}
	}
	return firstError(
		checkID("the node's ID", t.GetId()),
		checkText("the host name", t.GetHostname(), warden.HostnameMax),
		checkRole("its role", t.GetRole()),
		checkText("the zone", t.GetZone(), warden.NameMax))
}

func checkSecretVersion(v *api.SecretVersion) error {
	if v.GetVersion() == 0 || v.GetId() != SecretVersionID(v.GetSecretId(), v.GetVersion()) {
		return invalid("its ID does not name its secret and version")
	}
	if v.GetSizeBytes() > warden.SecretBytesMax {
		return warden.Errorf(warden.CodeTooLarge, "", "the value has %d bytes, at most %d", v.GetSizeBytes(), warden.SecretBytesMax)
	}
	if v.GetKeysetGeneration() == 0 {
		return invalid("generations start at 1")
	}
	return firstError(
		checkBytes("the sealed value", v.GetCiphertext(), warden.SecretBytesMax+sealOverheadMax),
		checkBytes("the sealed data key", v.GetWrappedKey(), wrappedKeyMax))
}

// checkTaskSpec checks what a service runs; that a task's references are resolved, its rule checks.
func checkTaskSpec(s *api.TaskSpec) error {
	if s == nil || s.GetImage() == "" {
		return invalid("want an image")
	}
	r := s.GetResources()
	for _, n := range []int64{r.GetReserveNanoCpus(), r.GetReserveMemoryBytes(), r.GetLimitNanoCpus(), r.GetLimitMemoryBytes()} {
		if n < 0 || n > resourceMax {
			return invalid("a resource is out of range")
		}
	}
	switch {
	case s.GetRestart() < api.RestartCondition_RESTART_ANY || s.GetRestart() > api.RestartCondition_RESTART_NONE:
		return invalid("the restart condition is none of any, on-failure and none")
	case s.GetStopGraceNs() < 0 || s.GetStopGraceNs() > int64(warden.StopGraceMax):
		return invalid("the time to stop is out of range")
	case s.GetRestartDelayNs() < 0 || s.GetRestartDelayNs() > int64(warden.RestartDelayMax):
		return invalid("the restart delay is out of range")
	case len(s.GetConstraints()) > warden.ConstraintsMax:
		return warden.Errorf(warden.CodeTooLarge, "", "%d constraints, at most %d", len(s.GetConstraints()), warden.ConstraintsMax)
	}
	for _, c := range s.GetConstraints() {
		if err := checkText("a constraint", c, warden.ConstraintMax); err != nil {
			return err
		}
	}
	return firstError(
		checkText("the image", s.GetImage(), imageMax),
		checkLabels("labels", s.GetLabels()),
		checkWords(s.GetCommand()),
		checkEnv(s.GetEnv()),
		checkReferences(s.GetSecrets()))
}

// checkUpdate checks how a service is updated; nil is the default.
func checkUpdate(u *api.UpdatePolicy) error {
	if u.GetParallelism() > warden.ReplicasMax {
		return warden.Errorf(warden.CodeTooLarge, "", "%d slots updated at once, at most %d", u.GetParallelism(), warden.ReplicasMax)
	}
	if u.GetDelayNs() < 0 || u.GetDelayNs() > int64(warden.UpdateDelayMax) {
		return invalid("the delay between updated tasks is out of range")
	}
	return nil
}

func checkWords(words []string) error {
	total := 0
	for _, w := range words {
		total += len(w)
		if strings.ContainsRune(w, 0) {
			return invalid("a word of the command has a zero byte")
		}
	}
	if len(words) > warden.CommandArgsMax || total > warden.CommandBytesMax {
		return warden.Errorf(warden.CodeTooLarge, "", "the command has %d words of %d bytes, at most %d of %d",
			len(words), total, warden.CommandArgsMax, warden.CommandBytesMax)
	}
	return nil
}

func checkEnv(env []string) error {
	if len(env) > warden.EnvMax {
		return warden.Errorf(warden.CodeTooLarge, "", "%d variables, at most %d", len(env), warden.EnvMax)
	}
	for i, e := range env { // values stay out of the text
		switch {
		case len(e) > warden.EnvBytesMax:
			return warden.Errorf(warden.CodeTooLarge, "", "variable %d has %d bytes, at most %d", i+1, len(e), warden.EnvBytesMax)
		case strings.IndexByte(e, '=') < 1 || strings.ContainsRune(e, 0):
			return invalid("variable %d is not KEY=VALUE", i+1)
		}
	}
	return nil
}

func checkReferences(refs []*api.SecretReference) error {
	if len(refs) > warden.SecretRefsMax {
		return warden.Errorf(warden.CodeTooLarge, "", "%d secrets, at most %d", len(refs), warden.SecretRefsMax)
	}
	targets := map[string]bool{}
	for _, r := range refs {
		t := r.GetTarget()
		switch {
		case t == "" || t == "." || t == ".." || len(t) > targetMax || strings.ContainsAny(t, "/\x00"):
			return invalid("the target of secret %s is not a file name", clip(r.GetSecretName()))
		case targets[t]:
			return invalid("two secrets have the target %s", clip(t))
		case r.GetMode() > 0o777:
			return invalid("the mode of secret %s is more than 0777", clip(r.GetSecretName()))
		}
		if err := checkID("the ID of a referenced secret", r.GetSecretId()); err != nil {
			return err
		}
		targets[t] = true
	}
	return nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// clip shortens what a message quotes.
func clip(s string) string { return cut(s, 80) }

// cut returns the longest prefix of s, in whole characters, of at most bytesMax bytes.
func cut(s string, bytesMax int) string {
	if len(s) <= bytesMax {
		return s
	}
	for bytesMax > 0 && !utf8.RuneStart(s[bytesMax]) {
		bytesMax--
	}
	return s[:bytesMax]
}
