package main

import (
	"fmt"
	"slices"
	"strings"

	"warden"
)

// filters holds --filter KEY=VALUE flags: different keys must all fit, of several values of one key any.
type filters map[string][]string

// parseFilters parses flags; only the allowed keys are known. Errors: CodeUsage.
func parseFilters(flags []string, allowed ...string) (filters, error) {
	f := filters{}
	for _, flag := range flags {
		key, value, ok := strings.Cut(flag, "=")
		key = strings.ToLower(strings.TrimSpace(key))
		hint := "write it as KEY=VALUE; keys: " + strings.Join(allowed, ", ")
		if !ok || value == "" {
			return nil, warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --filter", "%q is not KEY=VALUE", flag), hint)
		}
		if !slices.Contains(allowed, key) {
			return nil, warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --filter", "there is no filter %q here", key), hint)
		}
		f[key] = append(f[key], value)
	}
	return f, nil
}

// oneOf refuses values of a key that are not in the list. Errors: CodeUsage.
func (f filters) oneOf(key string, values ...string) error {
	for _, v := range f[key] {
		if !slices.Contains(values, strings.ToLower(v)) {
			return warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --filter", "%s can't be %q", key, v),
				fmt.Sprintf("%s is one of %s", key, strings.Join(values, ", ")))
		}
	}
	return nil
}

// fits reports whether any value of the key passes test, or none was given.
func (f filters) fits(key string, test func(want string) bool) bool {
	return len(f[key]) == 0 || slices.ContainsFunc(f[key], test)
}

// prefix is the test of IDs and names: Docker's filters match the beginning.
func prefix(have string) func(string) bool {
	return func(want string) bool { return strings.HasPrefix(have, want) }
}

// word is the test of a closed set of words.
func word(have string) func(string) bool {
	return func(want string) bool { return strings.EqualFold(have, want) }
}

// label is the test of "key" or "key=value" against labels.
func label(labels map[string]string) func(string) bool {
	return func(want string) bool {
		key, value, exact := strings.Cut(want, "=")
		have, ok := labels[key]
		return ok && (!exact || have == value)
	}
}
