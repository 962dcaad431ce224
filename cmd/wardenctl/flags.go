package main

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"warden/api"
)

// parsed is a flag whose text is parsed while the command line is read, so that a mistake is a usage error.
type parsed[T any] struct {
	value *T
	text  string
	kind  string
	parse func(string) (T, error)
}

// flagOf declares a flag that parse understands; kind is the word in the help.
func flagOf[T any](flags *pflag.FlagSet, value *T, name, kind, help string, parse func(string) (T, error)) {
	flags.Var(&parsed[T]{value: value, kind: kind, parse: parse}, name, help)
}

// String returns the text as it was given.
func (p *parsed[T]) String() string { return p.text }

// Type returns the word for the help.
func (p *parsed[T]) Type() string { return p.kind }

// Set parses the text.
func (p *parsed[T]) Set(text string) error {
	v, err := p.parse(text)
	if err != nil {
		return err
	}
	*p.value, p.text = v, text
	return nil
}

// parseDuration parses Go's spelling of a length of time and whole days ("90d"); it must be positive.
func parseDuration(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err == nil && n > 0 {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, errors.New(`want a length of time such as "90m", "12h" or "90d"`)
	}
	return d, nil
}

// zeroOr makes a flag of an update understand "0", which takes back what was set.
func zeroOr[T ~int64](parse func(string) (T, error)) func(string) (T, error) {
	return func(s string) (T, error) {
		if s == "0" {
			return 0, nil
		}
		return parse(s)
	}
}

// parseMemory parses Docker's spelling of sizes: bytes, or a number with b, k, m, g or t (1024 each; "mb" and "mib" too).
func parseMemory(s string) (int64, error) {
	bad := errors.New(`want a size such as "512m" or "1.5g"`)
	number := strings.TrimRight(strings.ToLower(s), "bikmgt")
	unit := strings.ToLower(s)[len(number):]
	shift := map[string]int{"": 0, "b": 0, "k": 10, "kb": 10, "kib": 10, "m": 20, "mb": 20, "mib": 20, "g": 30, "gb": 30, "gib": 30, "t": 40, "tb": 40, "tib": 40}
	by, ok := shift[unit]
	if !ok {
		return 0, bad
	}
	return scaled(number, int64(1)<<by, true, bad)
}

// parseCPUs parses a number of processors such as "1.5" into billionths.
func parseCPUs(s string) (int64, error) {
	return scaled(s, 1e9, false, errors.New(`want a number of processors such as "0.5" or "2", at most 9 decimals`))
}

// scaled returns number times factor: positive, decimal, in range, and whole unless round.
func scaled(number string, factor int64, round bool, bad error) (int64, error) {
	if number == "" || len(number) > 32 || strings.Trim(number, "0123456789.") != "" {
		return 0, bad
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, bad
	}
	r.Mul(r, new(big.Rat).SetInt64(factor))
	if !r.IsInt() && !round {
		return 0, bad
	}
	n := new(big.Int).Quo(r.Num(), r.Denom())
	if n.Sign() <= 0 || !n.IsInt64() || n.Int64() == math.MaxInt64 {
		return 0, bad
	}
	return n.Int64(), nil
}

// parseAvailability is the inverse of api.Availability.Word.
func parseAvailability(s string) (api.Availability, error) {
	for _, a := range []api.Availability{api.Availability_AVAILABILITY_ACTIVE, api.Availability_AVAILABILITY_PAUSE, api.Availability_AVAILABILITY_DRAIN} {
		if s == a.Word() {
			return a, nil
		}
	}
	return 0, errors.New("want active, pause or drain")
}

func parseRole(s string) (api.Role, error) {
	for _, r := range []api.Role{api.Role_ROLE_MANAGER, api.Role_ROLE_WORKER} {
		if s == r.Word() {
			return r, nil
		}
	}
	return 0, errors.New("want worker or manager")
}

var restartWords = map[api.RestartCondition]string{
	api.RestartCondition_RESTART_ANY:        "any",
	api.RestartCondition_RESTART_ON_FAILURE: "on-failure",
	api.RestartCondition_RESTART_NONE:       "none",
}

func parseRestart(s string) (api.RestartCondition, error) {
	for r, word := range restartWords {
		if s == word {
			return r, nil
		}
	}
	return 0, errors.New("want any, on-failure or none")
}

// parseTail parses a number of lines, or "all" as -1.
func parseTail(s string) (int64, error) {
	if s == "all" {
		return -1, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, errors.New(`want a number of lines, or "all"`)
	}
	return n, nil
}

// pairs is a repeatable flag KEY=VALUE; a key given twice is refused.
type pairs map[string]string

// String returns nothing: the flag has no default.
func (pairs) String() string { return "" }

// Type returns the word for the help.
func (pairs) Type() string { return "key=value" }

// Set adds one pair; KEY alone has the empty value, as Docker's labels do.
func (p pairs) Set(text string) error {
	key, value, _ := strings.Cut(text, "=")
	if key == "" {
		return errors.New("want KEY=VALUE")
	}
	if _, ok := p[key]; ok {
		return fmt.Errorf("the key %q is given twice", key)
	}
	p[key] = value
	return nil
}

// defaultSecretMode is the mode of a secret's file where none is asked for.
const defaultSecretMode = 0o400

// secretForm is what the hints say of a reference to a secret.
const secretForm = "write NAME or NAME@VERSION, or source=NAME,target=FILE,uid=N,gid=N,mode=0400 with any but the first left out"

// cutVersion parses NAME or NAME@VERSION; version 0 is none.
func cutVersion(s string) (name string, version uint64, err error) {
	name, number, pinned := strings.Cut(s, "@")
	if !pinned {
		return name, 0, nil
	}
	version, err = strconv.ParseUint(number, 10, 64)
	if err != nil || version == 0 || name == "" || strconv.FormatUint(version, 10) != number {
		return "", 0, fmt.Errorf("%q is not NAME@VERSION, such as db@3", s)
	}
	return name, version, nil
}

// parseSecretReference parses NAME or source=S[,target=T][,uid=N][,gid=N][,mode=OCTAL]; NAME and S may be pinned to a version, as
// db@3. The name goes into secret_name; the daemon resolves it and, where no target is given, uses the secret's name.
func parseSecretReference(s string) (*api.SecretReference, error) {
	ref := &api.SecretReference{Mode: defaultSecretMode}
	if !strings.ContainsAny(s, "=,") {
		if s == "" {
			return nil, errors.New("want the name of a secret")
		}
		var err error
		ref.SecretName, ref.Version, err = cutVersion(s)
		return ref, err
	}
	seen := map[string]bool{}
	for field := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(field, "=")
		if !ok || value == "" {
			return nil, fmt.Errorf("%q is not KEY=VALUE", field)
		}
		if key == "src" {
			key = "source"
		}
		if seen[key] {
			return nil, fmt.Errorf("%s is given twice", key)
		}
		seen[key] = true
		if err := setSecretField(ref, key, value); err != nil {
			return nil, err
		}
	}
	if ref.SecretName == "" {
		return nil, errors.New("source=SECRET is missing")
	}
	return ref, nil
}

// following returns the text of a reference that is like r, and follows the secret. parseSecretReference is its inverse.
func following(r *api.SecretReference) string {
	if r.GetTarget() == r.GetSecretName() && r.GetUid() == 0 && r.GetGid() == 0 && r.GetMode() == defaultSecretMode {
		return r.GetSecretName()
	}
	return fmt.Sprintf("source=%s,target=%s,uid=%d,gid=%d,mode=%04o", r.GetSecretName(), r.GetTarget(), r.GetUid(), r.GetGid(), r.GetMode())
}

func setSecretField(ref *api.SecretReference, key, value string) error {
	switch key {
	case "source":
		var err error
		ref.SecretName, ref.Version, err = cutVersion(value)
		return err
	case "target":
		ref.Target = value
	case "uid", "gid":
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || n > math.MaxInt32 {
			return fmt.Errorf("%s=%s is not a user or group number", key, value)
		}
		if key == "uid" {
			ref.Uid = uint32(n)
		} else {
			ref.Gid = uint32(n)
		}
	case "mode":
		n, err := strconv.ParseUint(value, 8, 32)
		if err != nil || n == 0 || n > 0o777 {
			return fmt.Errorf("mode=%s is not an octal file mode such as 0400", value)
		}
		ref.Mode = uint32(n)
	default:
		return fmt.Errorf("%q is not one of source, target, uid, gid, mode", key)
	}
	return nil
}
