package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"warden"
	"warden/api"
)

// updateTries is how often an update is made from a fresh look at the service after others changed it meanwhile.
const updateTries = 5

// serviceChange is what "service update" changes. Scalars count where their flag was given.
type serviceChange struct {
	image, args, zone            string
	command                      []string // after "--"; nil: none
	replicas                     uint64
	envAdd, envRemove            []string
	secretAdd, secretRemove      []string
	constraintAdd                []string
	constraintRemove             []string
	labelAdd, taskLabelAdd       pairs
	labelRemove, taskLabelRemove []string
	reserveCPU, limitCPU         int64
	reserveMemory, limitMemory   int64
	restart                      api.RestartCondition
	restartDelay, stopGrace      time.Duration
	restartAttempts              uint32
	updateParallelism            uint32
	updateDelay                  time.Duration
	force, detach                bool
	given                        func(flag string) bool
}

func (c *cli) serviceUpdateCommand() *cobra.Command {
	u := serviceChange{labelAdd: pairs{}, taskLabelAdd: pairs{}}
	cmd := &cobra.Command{
		Use:   "update [flags] SERVICE [-- COMMAND...]",
		Short: "Change a service",
		Long: `Change a service. What is not named stays as it is; of one kind, removals come before additions, and an addition replaces what has
the same key: a secret the one of the same target, so that --secret-add db@4 pins and --secret-add db follows again.

Tasks are replaced where image, command, environment, container labels, zone, secrets or resources changed, or with --force:
one is stopped and its successor has to run before the next, unless --update-parallelism and --update-delay say otherwise. A new task
that fails before it runs, or within --update-delay after that, stops the update where it is: give a delay to programs that take a
while to fail. Constraints replace only tasks whose node does not fit any more; replicas, labels, restarts,
the grace period and the update flags replace none. "service ls" and "service inspect" show how far it is.

0 takes a reservation, limit or delay back.`,
		Example: `  wardenctl service update --env-add MODE=fast --secret-add db-password@4 web
  wardenctl service update --update-parallelism 2 --update-delay 30s web -- python3 -m http.server 8081
  wardenctl service update --force web`,
		Args:              func(cmd *cobra.Command, args []string) error { return updateArgs(cmd, args) },
		ValidArgsFunction: c.names(api.Kind_KIND_SERVICE),
	}
	u.add(cmd.Flags())
	u.given = cmd.Flags().Changed
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 {
			u.command = args[1:]
		}
		if err := u.check(cmd); err != nil {
			return err
		}
		return c.with(func(ctx context.Context, d *daemon, args []string) error { return c.updateService(ctx, d, args[0], &u) })(cmd, args)
	}
	return cmd
}

// updateArgs wants one service, and a command only behind "--": a flag that was mistyped must not become part of it.
func updateArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 || len(args) > 1 && cmd.ArgsLenAtDash() != 1 {
		return usage(cmd, `%q takes one service, and a command behind "--"`, cmd.CommandPath())
	}
	return nil
}

func (u *serviceChange) add(flags *pflag.FlagSet) {
	flags.StringVar(&u.image, "image", "", "image to run")
	flags.StringVar(&u.args, "args", "", `command, as one word: split at spaces, quotes hold together; "" for that of the image`)
	flags.StringVar(&u.zone, "zone", "", "zone to run in")
	flags.Uint64Var(&u.replicas, "replicas", 0, "number of tasks")
	flags.StringArrayVar(&u.envAdd, "env-add", nil, "environment variable KEY=VALUE to set (repeatable)")
	flags.StringArrayVar(&u.envRemove, "env-rm", nil, "environment variable to take away, by KEY (repeatable)")
	flags.StringArrayVar(&u.secretAdd, "secret-add", nil, "secret to provide, as create takes it: NAME[@VERSION] or source=NAME[@VERSION][,target=FILE]… (repeatable)")
	flags.StringArrayVar(&u.secretRemove, "secret-rm", nil, "secret to take away, NAME or NAME@VERSION (repeatable)")
	flags.StringArrayVar(&u.constraintAdd, "constraint-add", nil, "constraint to add (repeatable)")
	flags.StringArrayVar(&u.constraintRemove, "constraint-rm", nil, "constraint to take away (repeatable)")
	flags.Var(u.labelAdd, "label-add", "label of the service to set (repeatable)")
	flags.StringArrayVar(&u.labelRemove, "label-rm", nil, "label of the service to take away, by KEY (repeatable)")
	flags.Var(u.taskLabelAdd, "container-label-add", "label of its tasks to set (repeatable)")
	flags.StringArrayVar(&u.taskLabelRemove, "container-label-rm", nil, "label of its tasks to take away, by KEY (repeatable)")
	flagOf(flags, &u.reserveCPU, "reserve-cpu", "cpus", "processors to set aside for each task", zeroOr(parseCPUs))
	flagOf(flags, &u.reserveMemory, "reserve-memory", "bytes", "memory to set aside for each task", zeroOr(parseMemory))
	flagOf(flags, &u.limitCPU, "limit-cpu", "cpus", "processors that a task may use", zeroOr(parseCPUs))
	flagOf(flags, &u.limitMemory, "limit-memory", "bytes", "memory that a task may use", zeroOr(parseMemory))
	flagOf(flags, &u.restart, "restart-condition", "any|on-failure|none", "when an ended task is replaced", parseRestart)
	flagOf(flags, &u.restartDelay, "restart-delay", "duration", "first delay before a failed task is replaced; it grows", zeroOr(parseDuration))
	flags.Uint32Var(&u.restartAttempts, "restart-max-attempts", 0, "give a slot up after so many failures one after the other (0: never)")
	flagOf(flags, &u.stopGrace, "stop-grace-period", "duration", "time between asking a task to stop and killing it", parseDuration)
	flags.Uint32Var(&u.updateParallelism, "update-parallelism", 1, "tasks that are replaced at once, 0 for all")
	flagOf(flags, &u.updateDelay, "update-delay", "duration", "time from one new task running to the next old one stopping", zeroOr(parseDuration))
	flags.BoolVar(&u.force, "force", false, "replace every task though nothing else changes")
	flags.BoolVarP(&u.detach, "detach", "d", true, "return at once; with --detach=false wait until the update is done, or say why not")
}

// check refuses what can be told without a look at the service. Errors: CodeUsage.
func (u *serviceChange) check(cmd *cobra.Command) error {
	something := u.command != nil
	cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) { something = something || f.Changed && f.Name != "detach" && f.Name != "help" })
	if !something {
		return warden.Hint(warden.Errorf(warden.CodeUsage, "", "there is nothing to change"), "name it, such as --image, --env-add or --replicas, or replace all tasks with --force")
	}
	if u.command != nil && u.given("args") {
		return usage(cmd, `give the command by --args or behind "--", not both`)
	}
	if u.given("args") {
		words, err := splitWords(u.args)
		if err != nil {
			return warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --args", "%w", err), `or give the command behind "--"`)
		}
		u.command = words
	}
	if err := checkEnv("env-add", u.envAdd); err != nil {
		return err
	}
	for _, s := range u.secretAdd {
		if _, err := parseSecretReference(s); err != nil {
			return warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --secret-add", "%w", err), secretForm)
		}
	}
	for _, s := range u.secretRemove {
		if _, _, err := cutVersion(s); err != nil || s == "" {
			return warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --secret-rm", "%q is no secret", s), "write NAME or NAME@VERSION")
		}
	}
	return nil
}

// updateService makes the change from a fresh look at the service, again where somebody else was faster.
func (c *cli) updateService(ctx context.Context, d *daemon, ref string, u *serviceChange) error {
	secrets := map[string]*api.Secret{} // by the reference as it was typed
	for _, s := range u.secretAdd {
		r, err := parseSecretReference(s)
		if err != nil {
			return err
		}
		found, err := listed(ctx, d, api.Kind_KIND_SECRET, false, (*api.Object).GetSecret, r.GetSecretName())
		if err != nil {
			return err
		}
		if len(found) != 1 {
			return noObject("secret", r.GetSecretName())
		}
		secrets[r.GetSecretName()] = found[0]
	}
	for try := 1; ; try++ {
		s, err := d.service(ctx, ref, false)
		if err != nil {
			return err
		}
		spec := api.Clone(s.GetSpec())
		missing := u.apply(spec, secrets)
		reply, err := d.control.UpdateService(ctx, &api.UpdateServiceRequest{Reference: s.GetId(), Version: s.GetMeta().GetVersion(), Spec: spec})
		if err != nil && warden.CodeOf(api.FromError(err)) == warden.CodeConflict && try < updateTries {
			continue
		}
		if err != nil {
			return err
		}
		for _, m := range missing {
			c.warn("service %s has no %s", s.GetSpec().GetName(), m)
		}
		c.changed(reply)
		if reply.GetVersion() == s.GetMeta().GetVersion() {
			fmt.Fprintf(c.stdout, "%s: nothing changed\n", clean(ref))
		} else {
			fmt.Fprintln(c.stdout, clean(ref))
		}
		if u.detach {
			return nil
		}
		return c.awaitTasks(ctx, d, s.GetId(), s.GetSpec().GetName(), "updated")
	}
}

// apply makes the change in spec, and returns what it should have taken away and did not find. secrets are those to add, by the
// reference as it was typed. Pure.
func (u *serviceChange) apply(spec *api.ServiceSpec, secrets map[string]*api.Secret) (missing []string) {
	t := spec.GetTask()
	if t.Resources == nil && slices.ContainsFunc([]string{"reserve-cpu", "reserve-memory", "limit-cpu", "limit-memory"}, u.given) {
		t.Resources = &api.Resources{}
	}
	set(u, "image", &t.Image, u.image)
	set(u, "zone", &t.Zone, u.zone)
	set(u, "replicas", &spec.Replicas, u.replicas)
	if r := t.Resources; r != nil {
		set(u, "reserve-cpu", &r.ReserveNanoCpus, u.reserveCPU)
		set(u, "reserve-memory", &r.ReserveMemoryBytes, u.reserveMemory)
		set(u, "limit-cpu", &r.LimitNanoCpus, u.limitCPU)
		set(u, "limit-memory", &r.LimitMemoryBytes, u.limitMemory)
	}
	set(u, "restart-condition", &t.Restart, u.restart)
	set(u, "restart-delay", &t.RestartDelayNs, int64(u.restartDelay))
	set(u, "restart-max-attempts", &t.RestartAttemptsMax, u.restartAttempts)
	set(u, "stop-grace-period", &t.StopGraceNs, int64(u.stopGrace))
	if u.command != nil {
		t.Command = u.command
	}
	if u.force {
		t.Force++
	}
	u.policy(spec)
	missing = append(missing, u.env(t)...)
	missing = append(missing, u.secrets(t, secrets)...)
	missing = append(missing, u.constraints(t)...)
	missing = append(missing, relabel(&spec.Labels, "label", u.labelRemove, u.labelAdd)...)
	return append(missing, relabel(&t.Labels, "container label", u.taskLabelRemove, u.taskLabelAdd)...)
}

func set[T any](u *serviceChange, flag string, field *T, value T) {
	if u.given(flag) {
		*field = value
	}
}

func (u *serviceChange) policy(spec *api.ServiceSpec) {
	if !u.given("update-parallelism") && !u.given("update-delay") {
		return
	}
	parallelism, delay := uint32(1), time.Duration(spec.GetUpdate().GetDelayNs())
	if spec.GetUpdate() != nil {
		parallelism = spec.GetUpdate().GetParallelism()
	}
	set(u, "update-parallelism", &parallelism, u.updateParallelism)
	set(u, "update-delay", &delay, u.updateDelay)
	spec.Update = updatePolicy(parallelism, delay)
}

func (u *serviceChange) env(t *api.TaskSpec) (missing []string) {
	has := func(key string) func(string) bool {
		return func(e string) bool { k, _, _ := strings.Cut(e, "="); return k == key }
	}
	for _, key := range u.envRemove {
		if !slices.ContainsFunc(t.Env, has(key)) {
			missing = append(missing, "environment variable "+key)
		}
		t.Env = slices.DeleteFunc(t.Env, has(key))
	}
	for _, e := range u.envAdd {
		key, _, _ := strings.Cut(e, "=")
		if i := slices.IndexFunc(t.Env, has(key)); i >= 0 {
			t.Env[i] = e
			continue
		}
		t.Env = append(t.Env, e)
	}
	return missing
}

func (u *serviceChange) secrets(t *api.TaskSpec, found map[string]*api.Secret) (missing []string) {
	for _, s := range u.secretRemove {
		name, version, _ := cutVersion(s) // checked before
		fits := func(r *api.SecretReference) bool {
			return (r.GetSecretName() == name || r.GetSecretId() == name) && (version == 0 || r.GetVersion() == version)
		}
		if !slices.ContainsFunc(t.Secrets, fits) {
			missing = append(missing, "secret "+s)
		}
		t.Secrets = slices.DeleteFunc(t.Secrets, fits)
	}
	for _, s := range u.secretAdd {
		ref, _ := parseSecretReference(s) // checked before
		secret := found[ref.GetSecretName()]
		ref.SecretId, ref.SecretName = secret.GetId(), secret.GetName()
		if ref.Target == "" {
			ref.Target = secret.GetName()
		}
		if i := slices.IndexFunc(t.Secrets, func(r *api.SecretReference) bool { return r.GetTarget() == ref.GetTarget() }); i >= 0 {
			t.Secrets[i] = ref
			continue
		}
		t.Secrets = append(t.Secrets, ref)
	}
	return missing
}

func (u *serviceChange) constraints(t *api.TaskSpec) (missing []string) {
	same := func(want string) func(string) bool {
		return func(c string) bool { return plainConstraint(c) == plainConstraint(want) }
	}
	for _, c := range u.constraintRemove {
		if !slices.ContainsFunc(t.Constraints, same(c)) {
			missing = append(missing, "constraint "+c)
		}
		t.Constraints = slices.DeleteFunc(t.Constraints, same(c))
	}
	for _, c := range u.constraintAdd {
		if !slices.ContainsFunc(t.Constraints, same(c)) {
			t.Constraints = append(t.Constraints, c)
		}
	}
	return missing
}

// plainConstraint takes out the spaces around the operator, which mean nothing. Pure.
func plainConstraint(c string) string {
	for _, op := range []string{"!=", "=="} {
		if key, value, ok := strings.Cut(c, op); ok {
			return strings.TrimSpace(key) + op + strings.TrimSpace(value)
		}
	}
	return c
}

func relabel(labels *map[string]string, what string, remove []string, add pairs) (missing []string) {
	for _, key := range remove {
		if _, ok := (*labels)[key]; !ok {
			missing = append(missing, what+" "+key)
		}
		delete(*labels, key)
	}
	if *labels == nil && len(add) > 0 {
		*labels = map[string]string{}
	}
	maps.Copy(*labels, add)
	return missing
}

// splitWords splits a command at spaces. Single quotes hold all together, double quotes all but a backslash before '"' or '\\';
// outside of quotes a backslash takes the next character as it is. Nothing is expanded. Never nil. Pure.
func splitWords(s string) ([]string, error) {
	words, word, in := []string{}, []rune(nil), false
	quote, escaped := rune(0), false
	for _, r := range s {
		switch {
		case escaped:
			if quote == '"' && r != '"' && r != '\\' {
				word = append(word, '\\')
			}
			word, escaped = append(word, r), false
		case r == '\\' && quote != '\'':
			in, escaped = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word = append(word, r)
		case r == '\'' || r == '"':
			in, quote = true, r
		case r == ' ' || r == '\t' || r == '\n':
			if in {
				words, word, in = append(words, string(word)), nil, false
			}
		default:
			in, word = true, append(word, r)
		}
	}
	switch {
	case quote != 0:
		return nil, fmt.Errorf("the quote %c is not closed", quote)
	case escaped:
		return nil, fmt.Errorf("nothing follows the last backslash")
	case in:
		words = append(words, string(word))
	}
	return words, nil
}
