package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

func (c *cli) serviceCommand() *cobra.Command {
	return group("service", "Manage services", "  wardenctl service create --name web --replicas 3 host python3 -m http.server\n  wardenctl service ps web",
		c.serviceCreateCommand(), c.serviceListCommand(), c.serviceTasksCommand(), c.serviceInspectCommand(), c.serviceUpdateCommand(), c.serviceScaleCommand(),
		c.serviceRemoveCommand(), c.serviceLogsCommand())
}

// serviceFlags are what "service create" takes, where a flag is not a field of the spec itself.
type serviceFlags struct {
	labels, taskLabels         pairs
	secrets                    []string
	stopGrace, restartDelay    time.Duration
	reserveCPU, limitCPU       int64
	reserveMemory, limitMemory int64
	restart                    api.RestartCondition
	name, zone                 string
	replicas                   uint64
	constraints, env           []string
	restartAttempts            uint32
	updateParallelism          uint32
	updateDelay                time.Duration
	detach                     bool
}

func (c *cli) serviceCreateCommand() *cobra.Command {
	f := serviceFlags{labels: pairs{}, taskLabels: pairs{}}
	cmd := &cobra.Command{
		Use:   "create --name NAME [flags] IMAGE [COMMAND...]",
		Short: "Create a service",
		Long: `Create a service: so many tasks of one image, kept running in one zone.

IMAGE is what the nodes' executor runs; for the process executor it is "host", read-only files of the node's own host. Secrets
appear as files below ` + warden.SecretsDir + ` of each task. A service follows its secrets: "secret rotate" replaces its tasks, one at a time unless
--update-parallelism says otherwise. NAME@3 pins a version instead. --env and --label are shown by inspect: put nothing secret there.

Constraints compare node.id, node.hostname, node.role, node.ip, node.platform.os, node.platform.arch, node.labels.KEY or
engine.labels.KEY by == or !=; all must hold.`,
		Example: `  wardenctl service create --name web --replicas 3 host python3 -m http.server 8080
  wardenctl service create --name db --zone pci --secret source=db-password,target=password,mode=0440 host redis-server
  wardenctl service create --name job --restart-condition on-failure --constraint node.labels.disk==ssd --reserve-memory 512m host /usr/bin/job`,
		Args: takes(1, -1),
		RunE: c.with(func(ctx context.Context, d *daemon, args []string) error {
			spec, err := f.spec(args)
			if err != nil {
				return err
			}
			reply, err := d.control.CreateService(ctx, &api.CreateServiceRequest{Spec: spec})
			if err != nil {
				return err
			}
			c.changed(reply)
			fmt.Fprintln(c.stdout, reply.GetId())
			if f.detach {
				return nil
			}
			return c.awaitTasks(ctx, d, reply.GetId(), spec.GetName(), "created")
		}),
	}
	f.add(cmd)
	return cmd
}

func (f *serviceFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SetInterspersed(false) // what follows IMAGE belongs to the command
	flags.StringVar(&f.name, "name", "", "name of the service")
	cmd.MarkFlagRequired("name")
	flags.Uint64Var(&f.replicas, "replicas", 1, "number of tasks")
	flags.StringVar(&f.zone, "zone", "", `zone to run in (default "`+warden.DefaultZone+`")`)
	flags.StringArrayVar(&f.constraints, "constraint", nil, `nodes to run on, such as "node.labels.disk==ssd" (repeatable)`)
	flags.StringArrayVar(&f.secrets, "secret", nil, "secret to provide: NAME[@VERSION] or source=NAME[@VERSION][,target=FILE][,uid=N][,gid=N][,mode=0400] (repeatable)")
	flags.StringArrayVarP(&f.env, "env", "e", nil, "environment variable KEY=VALUE (repeatable)")
	flags.VarP(f.labels, "label", "l", "label of the service (repeatable)")
	flags.Var(f.taskLabels, "container-label", "label of its tasks (repeatable)")
	flagOf(flags, &f.reserveCPU, "reserve-cpu", "cpus", "processors to set aside for each task", parseCPUs)
	flagOf(flags, &f.reserveMemory, "reserve-memory", "bytes", "memory to set aside for each task", parseMemory)
	flagOf(flags, &f.limitCPU, "limit-cpu", "cpus", "processors that a task may use", parseCPUs)
	flagOf(flags, &f.limitMemory, "limit-memory", "bytes", "memory that a task may use", parseMemory)
	flagOf(flags, &f.restart, "restart-condition", "any|on-failure|none", "when an ended task is replaced (default any)", parseRestart)
	flagOf(flags, &f.restartDelay, "restart-delay", "duration", "first delay before a failed task is replaced; it grows", parseDuration)
	flags.Uint32Var(&f.restartAttempts, "restart-max-attempts", 0, "give a slot up after so many failures one after the other (0: never)")
	flagOf(flags, &f.stopGrace, "stop-grace-period", "duration", "time between asking a task to stop and killing it (default "+warden.StopGraceDefault.String()+")", parseDuration)
	flags.Uint32Var(&f.updateParallelism, "update-parallelism", 1, "tasks that are replaced at once when the service is updated or a secret rotated, 0 for all")
	flagOf(flags, &f.updateDelay, "update-delay", "duration", "time from one new task running to the next old one stopping", zeroOr(parseDuration))
	flags.BoolVarP(&f.detach, "detach", "d", true, "return at once; with --detach=false wait until all tasks run, or say why not")
}

// updatePolicy returns nil for the default: one at a time, without delay. Pure.
func updatePolicy(parallelism uint32, delay time.Duration) *api.UpdatePolicy {
	if parallelism == 1 && delay == 0 {
		return nil
	}
	return &api.UpdatePolicy{Parallelism: parallelism, DelayNs: int64(delay)}
}

// spec returns the service that the flags and arguments describe. Errors: CodeUsage. Pure.
func (f *serviceFlags) spec(args []string) (*api.ServiceSpec, error) {
	task := &api.TaskSpec{
		Image: args[0], Command: args[1:], Env: f.env, Labels: f.taskLabels, Zone: f.zone, Constraints: f.constraints,
		Restart: f.restart, RestartDelayNs: int64(f.restartDelay), RestartAttemptsMax: f.restartAttempts, StopGraceNs: int64(f.stopGrace),
		Resources: &api.Resources{ReserveNanoCpus: f.reserveCPU, ReserveMemoryBytes: f.reserveMemory, LimitNanoCpus: f.limitCPU, LimitMemoryBytes: f.limitMemory},
	}
	if err := checkEnv("env", f.env); err != nil {
		return nil, err
	}
	for _, s := range f.secrets {
		ref, err := parseSecretReference(s)
		if err != nil {
			return nil, warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --secret", "%w", err), secretForm)
		}
		task.Secrets = append(task.Secrets, ref)
	}
	return &api.ServiceSpec{Name: f.name, Labels: f.labels, Replicas: f.replicas, Task: task, Update: updatePolicy(f.updateParallelism, f.updateDelay)}, nil
}

func checkEnv(flag string, env []string) error {
	for _, e := range env {
		if key, _, ok := strings.Cut(e, "="); !ok || key == "" {
			return warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --"+flag, "want KEY=VALUE"), "nothing is taken from wardenctl's own environment")
		}
	}
	return nil
}

// pollPeriod is how often a waiting command looks at the tasks.
const pollPeriod = 200 * time.Millisecond

// awaitTasks waits until each task of a service is what it wants now, and runs or has done its work. was is what the command did.
// Errors: CodeTimeout with the reasons.
func (c *cli) awaitTasks(ctx context.Context, d *daemon, id, name, was string) error {
	tick := time.NewTicker(pollPeriod)
	defer tick.Stop()
	var r api.Rollout
	var waiting []string
	for {
		now, reasons, err := d.rollout(ctx, id)
		switch {
		case err == nil && now.Complete():
			return nil
		case err == nil:
			r, waiting = now, reasons
		case ctx.Err() == nil && !api.Transient(err):
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ctx.Err()
			}
			reasons := strings.Join(waiting, "; ")
			return warden.Hint(warden.Errorf(warden.CodeTimeout, "waiting for service "+name, "%d of %d tasks run%s: %s", r.Done, r.Total, map[bool]string{true: " what they should"}[r.Running > r.Done],
				cmp.Or(reasons, "nothing failed so far")),
				fmt.Sprintf("the service was %s and goes on trying: see `wardenctl service ps %s`", was, name))
		}
	}
}

// rollout returns how far a service is, and why its tasks that do not run do not.
func (d *daemon) rollout(ctx context.Context, id string) (api.Rollout, []string, error) {
	s, err := d.service(ctx, id, false)
	if err != nil {
		return api.Rollout{}, nil, err
	}
	tasks, err := listed(ctx, d, api.Kind_KIND_TASK, false, (*api.Object).GetTask)
	if err != nil {
		return api.Rollout{}, nil, err
	}
	current, err := d.currentVersions(ctx, false)
	if err != nil {
		return api.Rollout{}, nil, err
	}
	return api.RolloutOf(s, tasks, current, nil), reasons(tasks, id), nil
}

// reasons returns why tasks of a service do not run, each reason once. Pure.
func reasons(tasks []*api.Task, serviceID string) (waiting []string) {
	for _, t := range tasks {
		reason := taskReason(t)
		if t.GetServiceId() != serviceID || reason == "" {
			continue
		}
		line := t.GetStatus().GetState().Word() + ": " + reason
		if !slices.Contains(waiting, line) {
			waiting = append(waiting, line)
		}
	}
	return waiting
}

func (c *cli) serviceListCommand() *cobra.Command {
	var flags listFlags
	keys := []string{"id", "name", "label", "zone"}
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List services",
		Example: "  wardenctl service ls\n  wardenctl service ls --filter zone=pci --format 'table {{.Name}}\\t{{.Replicas}}'",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			f, err := parseFilters(flags.filters, keys...)
			if err != nil {
				return err
			}
			services, err := listed(ctx, d, api.Kind_KIND_SERVICE, flags.local, (*api.Object).GetService)
			if err != nil {
				return err
			}
			tasks, err := listed(ctx, d, api.Kind_KIND_TASK, flags.local, (*api.Object).GetTask)
			if err != nil {
				return err
			}
			current, err := d.currentVersions(ctx, flags.local)
			if err != nil {
				return err
			}
			return flags.print(c, serviceListing(services, tasks, current, f, &flags, time.Now()))
		}),
	}
	flags.add(cmd, keys...)
	return cmd
}

// serviceListing sorts by name. The table says how many tasks are up to date while some of a service that it shows are not. Pure.
func serviceListing(services []*api.Service, tasks []*api.Task, current func(secretID string) uint64, f filters, flags *listFlags, now time.Time) listing {
	l := listing{
		fields: []string{"ID", "Name", "Mode", "Replicas", "UpToDate", "Image", "Zone", "Labels", "CreatedAt", "UpdatedAt"},
		shown:  []string{"ID", "Name", "Mode", "Replicas", "Image", "Zone"},
	}
	byService := map[string][]*api.Task{}
	for _, t := range tasks {
		byService[t.GetServiceId()] = append(byService[t.GetServiceId()], t)
	}
	services = slices.SortedFunc(slices.Values(services), func(a, b *api.Service) int { return cmp.Compare(a.GetSpec().GetName(), b.GetSpec().GetName()) })
	for _, s := range services {
		spec := s.GetSpec()
		if !f.fits("id", prefix(s.GetId())) || !f.fits("name", prefix(spec.GetName())) || !f.fits("label", label(spec.GetLabels())) ||
			!f.fits("zone", word(spec.GetTask().GetZone())) {
			continue
		}
		r := api.RolloutOf(s, byService[s.GetId()], current, nil)
		if r.Updated < r.Total && !slices.Contains(l.shown, "UpToDate") {
			l.shown = slices.Insert(l.shown, 4, "UpToDate") // after the replicas
		}
		l.rows = append(l.rows, row{
			"ID": flags.id(s.GetId()), "Name": spec.GetName(), "Mode": "replicated", "Replicas": fmt.Sprintf("%d/%d", r.Running, r.Total),
			"UpToDate": fmt.Sprintf("%d/%d", r.Updated, r.Total),
			"Image":    spec.GetTask().GetImage(), "Zone": spec.GetTask().GetZone(), "Labels": labelText(spec.GetLabels()),
			"CreatedAt": ago(s.GetMeta().GetCreatedNs(), now), "UpdatedAt": ago(s.GetMeta().GetUpdatedNs(), now),
		})
	}
	return l
}

// service looks one service up.
func (d *daemon) service(ctx context.Context, ref string, local bool) (*api.Service, error) {
	services, err := listed(ctx, d, api.Kind_KIND_SERVICE, local, (*api.Object).GetService, ref)
	if err != nil {
		return nil, err
	}
	if len(services) != 1 {
		return nil, noObject("service", ref)
	}
	return services[0], nil
}

func (c *cli) serviceTasksCommand() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use:               "ps SERVICE...",
		Short:             "List the tasks of one or more services",
		Example:           "  wardenctl service ps web\n  wardenctl service ps --filter desired-state=running --format '{{.Name}} {{.Node}} {{.Error}}' web",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SERVICE),
		RunE: c.with(func(ctx context.Context, d *daemon, args []string) error {
			f, err := taskFilters(flags.filters)
			if err != nil {
				return err
			}
			wanted := map[string]bool{}
			if err := c.each(args, func(ref string) (string, error) {
				s, err := d.service(ctx, ref, flags.local)
				if err == nil {
					wanted[s.GetId()] = true
				}
				return "", err
			}); err != nil {
				return err
			}
			return c.printTasks(ctx, d, &flags, f, func(t *api.Task) bool { return wanted[t.GetServiceId()] })
		}),
	}
	flags.add(cmd, taskFilterKeys...)
	return cmd
}

func (c *cli) serviceInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:               "inspect SERVICE...",
		Short:             "Show all of one or more services as JSON",
		Example:           "  wardenctl service inspect web\n  wardenctl service inspect --format '{{.Spec.Mode.Replicated.Replicas}}' web",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SERVICE),
		RunE: c.with(c.inspecting(&format, func(ctx context.Context, d *daemon, ref string) (object, error) {
			s, err := d.service(ctx, ref, false)
			if err != nil {
				return nil, err
			}
			r, _, err := d.rollout(ctx, s.GetId())
			if err != nil {
				return nil, err
			}
			return serviceView(s, r), nil
		})),
	}
	formatFlag(cmd, &format)
	return cmd
}

func (c *cli) serviceScaleCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "scale SERVICE=REPLICAS...",
		Short:             "Set the number of tasks of services",
		Example:           "  wardenctl service scale web=5 worker=0",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SERVICE),
		RunE: c.with(func(ctx context.Context, d *daemon, args []string) error {
			counts := make(map[string]uint64, len(args))
			refs := make([]string, len(args))
			for i, arg := range args {
				ref, number, _ := strings.Cut(arg, "=")
				n, err := strconv.ParseUint(number, 10, 64)
				if err != nil || ref == "" {
					return warden.Hint(warden.Errorf(warden.CodeUsage, "", "%q is not SERVICE=REPLICAS", arg), `write it as "web=5"`)
				}
				if _, ok := counts[ref]; ok {
					return warden.Errorf(warden.CodeUsage, "", "service %q is given twice", ref)
				}
				refs[i], counts[ref] = ref, n
			}
			return c.each(refs, func(ref string) (string, error) {
				reply, err := d.control.ScaleService(ctx, &api.ScaleServiceRequest{Reference: ref, Replicas: counts[ref]})
				if err != nil {
					return "", err
				}
				c.changed(reply)
				return fmt.Sprintf("%s scaled to %d", ref, counts[ref]), nil
			})
		}),
	}
}

func (c *cli) serviceRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm SERVICE...",
		Aliases:           []string{"remove"},
		Short:             "Remove services and stop their tasks",
		Example:           "  wardenctl service rm web",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SERVICE),
		RunE: c.with(c.removal(func(d *daemon) func(context.Context, *api.ReferenceRequest, ...grpc.CallOption) (*api.ChangeReply, error) {
			return d.control.RemoveService
		})),
	}
}
