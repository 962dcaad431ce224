package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"warden"
	"warden/api"
)

// removeFlags are those of "node rm".
type removeFlags struct{ force, compromised, rotate, generate bool }

func (c *cli) nodeRemoveCommand() *cobra.Command {
	var f removeFlags
	cmd := &cobra.Command{
		Use:     "rm NODE...",
		Aliases: []string{"remove"},
		Short:   "Remove nodes for ever",
		Long: `Remove nodes for ever: on commit every manager cuts the node's connections, its tasks run elsewhere, and its ID and keys never
come back.

--force removes a node that is not down. --compromised (which implies --force) treats the node's keys and all that it held as
known to an attacker: it prints every secret version that the node was ever assigned, what was done about it, and what you
have to do.

--rotate then gives each secret whose current value the node had a new one: it asks for each on the terminal, without showing it,
and makes a random one (32 bytes, as base64url text) where the answer is empty, or for all with --generate. Services that follow
these secrets roll by themselves. Values that are made are shown nowhere. Of an evicted manager these are all secrets.`,
		Example: `  wardenctl node rm worker-3
  wardenctl node rm --force --compromised worker-2
  wardenctl node rm --compromised --rotate --generate worker-2`,
		Args: takes(1, -1), ValidArgsFunction: c.names(api.Kind_KIND_NODE),
		RunE: func(cmd *cobra.Command, args []string) error { return c.removeNodes(cmd, args, &f) },
	}
	cmd.Flags().BoolVarP(&f.force, "force", "f", false, "remove the node even if it is not down")
	cmd.Flags().BoolVar(&f.compromised, "compromised", false, "the node may be in an attacker's hands: list what it held")
	cmd.Flags().BoolVar(&f.rotate, "rotate", false, "give the secrets that it held new values (with --compromised)")
	cmd.Flags().BoolVar(&f.generate, "generate", false, "make the new values at random, without asking (with --rotate)")
	return cmd
}

// removeNodes evicts all nodes first, which protects, and then sees to the secrets. A failure keeps nothing else from being done.
func (c *cli) removeNodes(cmd *cobra.Command, args []string, f *removeFlags) error {
	switch {
	case f.rotate && !f.compromised:
		return usage(cmd, "--rotate goes with --compromised")
	case f.generate && !f.rotate:
		return usage(cmd, "--generate goes with --rotate")
	case f.rotate && !f.generate && c.terminal() == nil:
		return warden.Hint(warden.Errorf(warden.CodeUsage, "", "there is no terminal to ask for the new values on; nothing was done"),
			"add --generate to have random values made, or run it on a terminal")
	}
	var evicted []*api.RemoveNodeReply
	err := c.with(func(ctx context.Context, d *daemon, args []string) error {
		return c.each(args, func(ref string) (string, error) {
			reply, err := d.control.RemoveNode(ctx, &api.RemoveNodeRequest{Reference: ref, Force: f.force || f.compromised, Compromised: f.compromised})
			if err != nil {
				return "", err
			}
			evicted = append(evicted, reply)
			c.silent(reply.GetSilentManagers())
			fmt.Fprintln(c.stdout, ref)
			return "", writeRemoval(c.stdout, reply, f.compromised, f.rotate)
		})
	})(cmd, args)
	if !f.rotate || len(evicted) == 0 {
		return err
	}
	return join(err, c.rotateSeen(cmd, evicted, f.generate))
}

// join returns the errors as one; of none, nil.
func join(errs ...error) error {
	var all several
	for _, err := range errs {
		if many, ok := errors.AsType[several](err); ok {
			all = append(all, many...)
		} else if err != nil {
			all = append(all, err)
		}
	}
	if len(all) == 1 {
		return all[0]
	}
	if len(all) > 1 {
		return all
	}
	return nil
}

// seenSecret is a secret that evicted nodes had.
type seenSecret struct {
	secret   *api.Secret
	versions []uint64 // that they had, oldest first
}

func (s seenSecret) current() bool { return slices.Contains(s.versions, s.secret.GetCurrentVersion()) }

// seenBy returns the secrets, still there, of which evicted nodes had a version, by name. Pure.
func seenBy(evicted []*api.RemoveNodeReply, secrets []*api.Secret, uses []*api.SecretUse) []seenSecret {
	had := map[string]map[uint64]bool{}
	note := func(id string, version uint64) {
		if had[id] == nil {
			had[id] = map[uint64]bool{}
		}
		had[id][version] = true
	}
	for _, r := range evicted {
		for _, e := range r.GetExposures() {
			note(e.GetSecretId(), e.GetVersion())
		}
		if r.GetAllSecrets() {
			for _, u := range uses {
				note(u.GetSecretId(), u.GetVersion())
			}
		}
	}
	var seen []seenSecret
	for _, s := range slices.SortedFunc(slices.Values(secrets), func(a, b *api.Secret) int { return cmp.Compare(a.GetName(), b.GetName()) }) {
		if len(had[s.GetId()]) == 0 {
			continue
		}
		x := seenSecret{secret: s}
		for v := range had[s.GetId()] {
			x.versions = append(x.versions, v)
		}
		slices.Sort(x.versions)
		seen = append(seen, x)
	}
	return seen
}

// rotateSeen gives a new value to each secret whose current one an evicted node had, and says what still uses an old one. What
// fails is named with the command that does it, and keeps nothing else from being done.
func (c *cli) rotateSeen(cmd *cobra.Command, evicted []*api.RemoveNodeReply, generate bool) error {
	var seen []seenSecret
	if err := c.with(func(ctx context.Context, d *daemon, _ []string) error {
		reply, err := d.list(ctx, api.Kind_KIND_SECRET, false)
		seen = seenBy(evicted, pick(reply, (*api.Object).GetSecret), reply.GetUses())
		return err
	})(cmd, nil); err != nil {
		return leftToDo(err, "the nodes were removed, and no secret has a new value yet: `wardenctl secret rotate NAME FILE` for each that is listed above")
	}
	if len(seen) == 0 {
		return nil
	}
	fmt.Fprintln(c.stdout, "\nNew values:")
	var failed several
	made := false
	for _, s := range seen {
		name := s.secret.GetName()
		if !s.current() {
			fmt.Fprintf(c.stdout, "  %s: not needed, the current version %d was not there\n", clean(name), s.secret.GetCurrentVersion())
			continue
		}
		value, random, err := c.newValue(cmd.Context(), name, generate)
		if err == nil {
			err = c.rotateOne(cmd, name, value)
			clear(value)
		}
		if err != nil {
			failed = append(failed, leftToDo(err, fmt.Sprintf("secret %s still has the value that the node had: `wardenctl secret rotate %s FILE`", name, name)))
			continue
		}
		made = made || random
	}
	if made {
		fmt.Fprintln(c.stdout, "Values that were made are shown nowhere: tasks get them, and nobody else needs them.")
	}
	return join(append(failed, c.stillPinned(cmd, seen))...)
}

// newValue asks for a value on the terminal, and makes one at random where the answer is empty or with generate.
func (c *cli) newValue(ctx context.Context, name string, generate bool) (value []byte, random bool, err error) {
	if !generate {
		var file *os.File
		if file = c.terminal(); file == nil {
			return nil, false, warden.Errorf(warden.CodeUsage, "", "there is no terminal to ask on")
		}
		value, err = c.prompt(ctx, "new value of secret "+name+" (empty: a random one is made)", file, warden.SecretBytesMax)
		if err != nil || len(value) > 0 {
			return value, false, err
		}
	}
	raw := make([]byte, 32)
	defer clear(raw)
	rand.Read(raw) // never fails
	return base64.RawURLEncoding.AppendEncode(nil, raw), true, nil
}

func (c *cli) rotateOne(cmd *cobra.Command, name string, value []byte) error {
	return c.with(func(ctx context.Context, d *daemon, _ []string) error {
		reply, err := d.control.RotateSecret(ctx, &api.RotateSecretRequest{Reference: name, Data: value})
		if err == nil {
			fmt.Fprintf(c.stdout, "  %s: %s\n", clean(name), rotated(reply))
		}
		return err
	})(cmd, nil)
}

// stillPinned names the services that pin a version which an evicted node had: no new value reaches them.
func (c *cli) stillPinned(cmd *cobra.Command, seen []seenSecret) error {
	return c.with(func(ctx context.Context, d *daemon, _ []string) error {
		services, err := listed(ctx, d, api.Kind_KIND_SERVICE, false, (*api.Object).GetService)
		if err != nil {
			return leftToDo(err, "services that pin an old version of these secrets still use it: see `wardenctl secret inspect NAME`")
		}
		var pinned several
		for _, s := range services {
			for _, r := range s.GetSpec().GetTask().GetSecrets() {
				i := slices.IndexFunc(seen, func(x seenSecret) bool { return x.secret.GetId() == r.GetSecretId() })
				if i < 0 || r.GetVersion() == 0 || !slices.Contains(seen[i].versions, r.GetVersion()) {
					continue
				}
				pinned = append(pinned, warden.Hint(
					warden.Errorf(warden.CodeInUse, "", "service %s pins %s@%d, which the node had", s.GetSpec().GetName(), r.GetSecretName(), r.GetVersion()),
					fmt.Sprintf("let it follow the new value: `wardenctl service update --secret-rm %s@%d --secret-add %s %s`", r.GetSecretName(), r.GetVersion(), following(r), s.GetSpec().GetName())))
			}
		}
		return join(pinned...)
	})(cmd, nil)
}

// leftToDo adds to an error's hint what is left to the operator.
func leftToDo(err error, what string) error {
	if hint := warden.HintOf(err); hint != "" && !strings.Contains(hint, what) {
		what = hint + "; " + what
	}
	return warden.Hint(err, what)
}
