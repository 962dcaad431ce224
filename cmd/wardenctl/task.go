package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"warden"
	"warden/api"
)

func (c *cli) taskCommand() *cobra.Command {
	return group("task", "Look at tasks", "  wardenctl task inspect 5f0r2k", c.taskInspectCommand())
}

func (c *cli) taskInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:               "inspect TASK...",
		Short:             "Show all of one or more tasks as JSON",
		Example:           "  wardenctl task inspect 5f0r2k\n  wardenctl task inspect --format '{{.Status.State}}: {{.Status.Err}}' 5f0r2k",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_TASK),
		RunE: c.with(c.inspecting(&format, func(ctx context.Context, d *daemon, ref string) (object, error) {
			tasks, err := listed(ctx, d, api.Kind_KIND_TASK, false, (*api.Object).GetTask, ref)
			if err != nil {
				return nil, err
			}
			if len(tasks) != 1 {
				return nil, warden.Hint(warden.Errorf(warden.CodeNotFound, "", "there is no task %q", ref), "see `wardenctl service ps SERVICE`")
			}
			return taskView(tasks[0]), nil
		})),
	}
	formatFlag(cmd, &format)
	return cmd
}

// taskName returns "service.slot".
func taskName(t *api.Task) string { return fmt.Sprintf("%s.%d", t.GetServiceName(), t.GetSlot()) }

var taskFilterKeys = []string{"id", "name", "node", "service", "desired-state", "zone", "label"}

// taskFilters parses the filters of lists of tasks. Errors: CodeUsage.
func taskFilters(flags []string) (filters, error) {
	f, err := parseFilters(flags, taskFilterKeys...)
	if err != nil {
		return nil, err
	}
	return f, f.oneOf("desired-state", "running", "shutdown")
}

// printTasks lists the tasks that keep wants.
func (c *cli) printTasks(ctx context.Context, d *daemon, flags *listFlags, f filters, keep func(*api.Task) bool) error {
	tasks, err := listed(ctx, d, api.Kind_KIND_TASK, flags.local, (*api.Object).GetTask)
	if err != nil {
		return err
	}
	names, err := d.hostnames(ctx, flags.local)
	if err != nil {
		return err
	}
	services, err := listed(ctx, d, api.Kind_KIND_SERVICE, flags.local, (*api.Object).GetService)
	if err != nil {
		return err
	}
	current, err := d.currentVersions(ctx, flags.local)
	if err != nil {
		return err
	}
	tasks = slices.DeleteFunc(tasks, func(t *api.Task) bool { return !keep(t) })
	return flags.print(c, taskListing(tasks, names, wanted(services, current), f, flags, time.Now()))
}

// currentVersions returns what tells the current version of a secret by its ID.
func (d *daemon) currentVersions(ctx context.Context, local bool) (func(secretID string) uint64, error) {
	secrets, err := listed(ctx, d, api.Kind_KIND_SECRET, local, (*api.Object).GetSecret)
	if err != nil {
		return nil, err
	}
	byID := make(map[string]uint64, len(secrets))
	for _, s := range secrets {
		byID[s.GetId()] = s.GetCurrentVersion()
	}
	return func(id string) uint64 { return byID[id] }, nil
}

// wanted returns, by service ID, what a task of each service is to run now. Pure.
func wanted(services []*api.Service, current func(secretID string) uint64) map[string]*api.TaskSpec {
	byID := make(map[string]*api.TaskSpec, len(services))
	for _, s := range services {
		byID[s.GetId()] = api.Resolve(s.GetSpec().GetTask(), current)
	}
	return byID
}

// upToDate returns "yes" or "no" for a task that is wanted: whether it is what its service asks for now, or is still to be replaced.
// Constraints do not count here. Pure.
func upToDate(t *api.Task, wanted map[string]*api.TaskSpec) string {
	want := wanted[t.GetServiceId()]
	switch {
	case want == nil || t.GetDesiredState() != api.TaskState_TASK_RUNNING:
		return ""
	case api.Changed(want, t.GetSpec()):
		return "no"
	}
	return "yes"
}

// taskListing sorts by service and slot, the newest task of a slot first; in the default table the older ones hang below it, as
// Docker draws them. The table says which tasks are up to date while some that it shows are not. Pure.
func taskListing(tasks []*api.Task, hostnames map[string]string, wanted map[string]*api.TaskSpec, f filters, flags *listFlags, now time.Time) listing {
	l := listing{
		fields: []string{"ID", "Name", "Image", "Node", "NodeID", "Service", "Slot", "Zone", "DesiredState", "CurrentState", "UpToDate", "Error"},
		shown:  []string{"ID", "Name", "Image", "Node", "DesiredState", "CurrentState", "Error"},
	}
	tasks = slices.SortedFunc(slices.Values(tasks), func(a, b *api.Task) int {
		return cmp.Or(cmp.Compare(a.GetServiceName(), b.GetServiceName()), cmp.Compare(a.GetServiceId(), b.GetServiceId()), cmp.Compare(a.GetSlot(), b.GetSlot()),
			cmp.Compare(b.GetMeta().GetCreatedNs(), a.GetMeta().GetCreatedNs()), cmp.Compare(b.GetMeta().GetIndex(), a.GetMeta().GetIndex()),
			cmp.Compare(a.GetId(), b.GetId()))
	})
	above := ""
	for _, t := range tasks {
		name, node := taskName(t), cmp.Or(hostnames[t.GetNodeId()], shortID(t.GetNodeId()))
		if !f.fits("id", prefix(t.GetId())) || !f.fits("name", prefix(name)) || !f.fits("service", prefix(t.GetServiceName())) ||
			!f.fits("node", func(want string) bool { return node == want || t.GetNodeId() != "" && prefix(t.GetNodeId())(want) }) ||
			!f.fits("desired-state", word(t.GetDesiredState().Word())) || !f.fits("zone", word(t.GetSpec().GetZone())) ||
			!f.fits("label", label(t.GetSpec().GetLabels())) {
			continue
		}
		shown := name
		if slot := t.GetServiceId() + name; slot == above && flags.format == "" {
			shown = ` \_ ` + name
		} else {
			above = slot
		}
		fresh := upToDate(t, wanted)
		if fresh == "no" && !slices.Contains(l.shown, "UpToDate") {
			l.shown = slices.Insert(l.shown, len(l.shown)-1, "UpToDate")
		}
		l.rows = append(l.rows, row{
			"ID": flags.id(t.GetId()), "Name": shown, "Image": t.GetSpec().GetImage(), "Node": node, "NodeID": t.GetNodeId(),
			"Service": t.GetServiceName(), "Slot": fmt.Sprint(t.GetSlot()), "Zone": t.GetSpec().GetZone(),
			"DesiredState": title(t.GetDesiredState().Word()), "CurrentState": currentState(t, now), "UpToDate": fresh, "Error": taskReason(t),
		})
	}
	return l
}

// currentState returns the state and its age: "Running 5 minutes ago". Pure.
func currentState(t *api.Task, now time.Time) string {
	since := cmp.Or(t.GetStatus().GetTimeNs(), t.GetMeta().GetUpdatedNs())
	state := title(t.GetStatus().GetState().Word())
	if since == 0 {
		return state
	}
	return state + " " + ago(since, now)
}

// taskReason returns why a task failed, or why it is not running yet; "" for one that runs. Pure.
func taskReason(t *api.Task) string {
	st := t.GetStatus()
	switch {
	case st.GetError() != "":
		return st.GetError()
	case st.GetState() < api.TaskState_TASK_RUNNING:
		return st.GetMessage()
	case st.GetState() == api.TaskState_TASK_FAILED && st.GetExitCode() != 0:
		return fmt.Sprintf("exit code %d", st.GetExitCode())
	case st.GetState() == api.TaskState_TASK_REJECTED, st.GetState() == api.TaskState_TASK_ORPHANED, st.GetState() == api.TaskState_TASK_FAILED:
		return st.GetMessage()
	}
	return ""
}
