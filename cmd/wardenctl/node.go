package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"warden"
	"warden/api"
)

func (c *cli) nodeCommand() *cobra.Command {
	return group("node", "Manage nodes", "  wardenctl node ls\n  wardenctl node update --availability drain worker-1",
		c.nodeListCommand(), c.nodeInspectCommand(), c.nodeTasksCommand(), c.nodeUpdateCommand(),
		c.nodeRoleCommand(api.Role_ROLE_MANAGER), c.nodeRoleCommand(api.Role_ROLE_WORKER), c.nodeRemoveCommand())
}

func (c *cli) nodeListCommand() *cobra.Command {
	var flags listFlags
	keys := []string{"id", "name", "role", "zone", "label", "node.label"}
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List nodes",
		Example: "  wardenctl node ls\n  wardenctl node ls --filter role=manager --format '{{.Hostname}} {{.ManagerStatus}}'",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			f, err := parseFilters(flags.filters, keys...)
			if err == nil {
				err = f.oneOf("role", "manager", "worker")
			}
			if err != nil {
				return err
			}
			reply, err := d.list(ctx, api.Kind_KIND_NODE, flags.local)
			if err != nil {
				return err
			}
			self := ""
			if info, err := d.local.Info(ctx, &api.InfoRequest{}); err == nil {
				self = info.GetNodeId()
			}
			return flags.print(c, nodeListing(pick(reply, (*api.Object).GetNode), reply.GetNodes(), f, self, flags.quiet || flags.format != ""))
		}),
	}
	flags.add(cmd, keys...)
	return cmd
}

// nodeListing sorts by host name. bare leaves out the mark of the node that was asked. Pure.
func nodeListing(nodes []*api.Node, states []*api.NodeState, f filters, self string, bare bool) listing {
	l := listing{
		fields: []string{"ID", "Self", "Hostname", "Status", "Availability", "ManagerStatus", "Role", "Zone", "Address", "Labels", "EngineVersion", "Message"},
		shown:  []string{"ID", "Hostname", "Status", "Availability", "ManagerStatus", "Zone", "EngineVersion"},
	}
	byID := statesByID(states)
	nodes = slices.SortedFunc(slices.Values(nodes), func(a, b *api.Node) int {
		return cmp.Or(cmp.Compare(a.GetHostname(), b.GetHostname()), cmp.Compare(a.GetId(), b.GetId()))
	})
	for _, n := range nodes {
		if !f.fits("id", prefix(n.GetId())) || !f.fits("name", prefix(n.GetHostname())) || !f.fits("role", word(n.EffectiveRole().Word())) ||
			!f.fits("zone", word(n.GetZone())) || !f.fits("label", label(n.GetDescription().GetEngineLabels())) || !f.fits("node.label", label(n.GetLabels())) {
			continue
		}
		st, id := byID[n.GetId()], n.GetId()
		if !bare && id == self {
			id += " *"
		}
		l.rows = append(l.rows, row{
			"ID": id, "Self": n.GetId() == self, "Hostname": n.GetHostname(), "Status": title(livenessWords[st.GetLiveness()]),
			"Availability": title(n.GetAvailability().Word()), "ManagerStatus": managerStatus(n, st), "Role": n.EffectiveRole().Word(),
			"Zone": n.GetZone(), "Address": cmp.Or(n.GetAddress(), n.GetIp()), "Labels": labelText(n.GetLabels()),
			"EngineVersion": n.GetDescription().GetVersion(), "Message": st.GetMessage(),
		})
	}
	return l
}

func statesByID(states []*api.NodeState) map[string]*api.NodeState {
	byID := make(map[string]*api.NodeState, len(states))
	for _, st := range states {
		byID[st.GetNodeId()] = st
	}
	return byID
}

// managerStatus returns Docker's word, "" for a worker. Reachable is who counts: a manager that has no vote yet is not.
func managerStatus(n *api.Node, st *api.NodeState) string {
	switch {
	case n.EffectiveRole() != api.Role_ROLE_MANAGER:
		return ""
	case st.GetLeader():
		return "Leader"
	case st.GetReachable() && st.GetRaft() != "voter":
		return "Nonvoter"
	}
	return title(reachability(st))
}

func (c *cli) nodeInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:               "inspect NODE...",
		Short:             "Show all of one or more nodes as JSON",
		Long:              `Show all of one or more nodes as JSON. "self" is the node whose daemon is asked.`,
		Example:           "  wardenctl node inspect self\n  wardenctl node inspect --format '{{.Certificate.NotAfter}}' worker-1",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_NODE),
		RunE: c.with(c.inspecting(&format, func(ctx context.Context, d *daemon, ref string) (object, error) {
			n, st, err := d.node(ctx, ref, false)
			if err != nil {
				return nil, err
			}
			return nodeView(n, st), nil
		})),
	}
	formatFlag(cmd, &format)
	return cmd
}

func formatFlag(cmd *cobra.Command, format *string) {
	cmd.Flags().StringVarP(format, "format", "f", "", `print by a Go template: "{{.ID}}" or "json"`)
}

// node looks one node up by a reference or the word "self".
func (d *daemon) node(ctx context.Context, ref string, local bool) (*api.Node, *api.NodeState, error) {
	ref, err := d.self(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	reply, err := d.list(ctx, api.Kind_KIND_NODE, local, ref)
	if err != nil {
		return nil, nil, err
	}
	nodes := pick(reply, (*api.Object).GetNode)
	if len(nodes) != 1 {
		return nil, nil, noObject("node", ref)
	}
	return nodes[0], statesByID(reply.GetNodes())[nodes[0].GetId()], nil
}

func noObject(kind, ref string) error {
	return warden.Hint(warden.Errorf(warden.CodeNotFound, "", "there is no %s %q", kind, ref), fmt.Sprintf("see `wardenctl %s ls`", kind))
}

func (c *cli) nodeTasksCommand() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use:               "ps [NODE...]",
		Short:             "List the tasks of one or more nodes",
		Long:              `List the tasks of one or more nodes, of "self" where none is named.`,
		Example:           "  wardenctl node ps worker-1\n  wardenctl node ps --filter desired-state=running self",
		Args:              takes(0, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_NODE),
		RunE: c.with(func(ctx context.Context, d *daemon, args []string) error {
			f, err := taskFilters(flags.filters)
			if err != nil {
				return err
			}
			if len(args) == 0 {
				args = []string{"self"}
			}
			wanted := map[string]bool{}
			if err := c.each(args, func(ref string) (string, error) {
				n, _, err := d.node(ctx, ref, flags.local)
				if err == nil {
					wanted[n.GetId()] = true
				}
				return "", err
			}); err != nil {
				return err
			}
			return c.printTasks(ctx, d, &flags, f, func(t *api.Task) bool { return wanted[t.GetNodeId()] })
		}),
	}
	flags.add(cmd, taskFilterKeys...)
	return cmd
}

func (c *cli) nodeUpdateCommand() *cobra.Command {
	var (
		request api.UpdateNodeRequest
		add     = pairs{}
	)
	cmd := &cobra.Command{
		Use:   "update [flags] NODE",
		Short: "Change a node's availability, labels or zone",
		Long: `Change a node's availability, labels or zone.

pause keeps the node's tasks and gives it no new ones; drain moves its tasks away. A node that changes its zone gets a new
certificate, and tasks of the old zone leave it.`,
		Example: "  wardenctl node update --availability drain worker-1\n  wardenctl node update --label-add disk=ssd --label-rm tier worker-1\n  wardenctl node update --zone pci worker-2",
		Args:    takes(1, 1), ValidArgsFunction: c.names(api.Kind_KIND_NODE),
		RunE: c.with(func(ctx context.Context, d *daemon, args []string) error {
			if request.GetAvailability() == 0 && len(add) == 0 && len(request.GetLabelsRemove()) == 0 && request.GetZone() == "" {
				return warden.Hint(warden.Errorf(warden.CodeUsage, "", "there is nothing to change"), "give --availability, --label-add, --label-rm or --zone")
			}
			ref, err := d.self(ctx, args[0])
			if err != nil {
				return err
			}
			request.Reference, request.LabelsAdd = ref, add
			reply, err := d.control.UpdateNode(ctx, &request)
			if err != nil {
				return err
			}
			c.changed(reply)
			fmt.Fprintln(c.stdout, args[0])
			return nil
		}),
	}
	flagOf(cmd.Flags(), &request.Availability, "availability", "active|pause|drain", "whether the node takes tasks", parseAvailability)
	cmd.Flags().Var(add, "label-add", "add or replace a label (repeatable)")
	cmd.Flags().StringArrayVar(&request.LabelsRemove, "label-rm", nil, "remove the label with this key (repeatable)")
	cmd.Flags().StringVar(&request.Zone, "zone", "", "move the node to this zone")
	return cmd
}

func (c *cli) nodeRoleCommand(role api.Role) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "promote NODE...",
		Short: "Make workers managers",
		Long: `Make workers managers. A new manager gets a new key and, in an autolocked cluster, has no unsealed key on its disk; it votes
once it has caught up.`,
		Example:           "  wardenctl node promote worker-1",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_NODE),
	}
	already, done := "Node %s is already a manager.", "Node %s promoted to a manager in the swarm."
	if role == api.Role_ROLE_WORKER {
		cmd.Use, cmd.Short, cmd.Example = "demote NODE...", "Make managers workers", "  wardenctl node demote manager-3"
		cmd.Long = `Make managers workers. It counts from the commit on: what the old certificate opened is closed at once. Refused where the
remaining managers would be no majority.`
		already, done = "Node %s is already a worker.", "Manager %s demoted in the swarm."
	}
	cmd.RunE = c.with(func(ctx context.Context, d *daemon, args []string) error {
		return c.each(args, func(ref string) (string, error) {
			n, _, err := d.node(ctx, ref, false)
			if err != nil {
				return "", err
			}
			if n.GetDesiredRole() == role && n.GetRole() == role {
				return fmt.Sprintf(already, ref), nil
			}
			reply, err := d.control.UpdateNode(ctx, &api.UpdateNodeRequest{Reference: n.GetId(), Role: role})
			if err != nil {
				return "", err
			}
			c.changed(reply)
			return fmt.Sprintf(done, ref), nil
		})
	})
	return cmd
}

// writeRemoval prints what a removed node held, what was done and what is left to do; nothing where there is none of it. The
// command may go on to give new values to the secrets: then that is not left.
func writeRemoval(w io.Writer, reply *api.RemoveNodeReply, compromised, rotates bool) error {
	name := fmt.Sprintf("%s (%s, %s)", clean(cmp.Or(reply.GetHostname(), reply.GetId())), shortID(reply.GetId()), reply.GetRole().Word())
	if compromised || len(reply.GetExposures()) > 0 || reply.GetAllSecrets() {
		fmt.Fprintf(w, "\nWhat %s held:\n", name)
		if reply.GetAllSecrets() {
			fmt.Fprintln(w, "  Every secret: as a manager it had all of the replicated state.")
		}
		if len(reply.GetExposures()) == 0 && !reply.GetAllSecrets() {
			fmt.Fprintln(w, "  No secret was ever assigned to it.")
		}
		tw := tabwriter.NewWriter(w, 10, 1, 3, ' ', 0)
		if len(reply.GetExposures()) > 0 {
			fmt.Fprintln(tw, "  SECRET\tVERSION\tFIRST\tLAST")
		}
		for _, e := range reply.GetExposures() {
			fmt.Fprintf(tw, "  %s\t%d\t%s\t%s\n", clean(cmp.Or(e.GetSecretName(), e.GetSecretId())), e.GetVersion(), moment(e.GetFirstNs()), moment(e.GetLastNs()))
		}
		if err := tw.Flush(); err != nil {
			return writeFailed(err)
		}
	}
	writeLines(w, "\nDone:", reply.GetDone())
	todo := reply.GetTodo()
	if rotates {
		todo = slices.DeleteFunc(slices.Clone(todo), func(line string) bool { return strings.Contains(line, "a new value") })
	}
	writeLines(w, "\nTo do:", todo)
	return nil
}

// writeLines prints a head and one indented line for each; nothing where there are none.
func writeLines(w io.Writer, head string, lines []string) {
	if len(lines) == 0 {
		return
	}
	fmt.Fprintln(w, head)
	for _, line := range lines {
		fmt.Fprintf(w, "  %s\n", clean(line))
	}
}

// completionTimeout bounds how long a shell waits for names.
const completionTimeout = 2 * time.Second

// names completes references of a kind from the replica; a daemon that does not answer completes nothing.
func (c *cli) names(kind api.Kind) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		d, err := c.connect()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer d.conn.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
		defer cancel()
		reply, err := d.list(ctx, kind, true)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return referencesOf(reply), cobra.ShellCompDirectiveNoFileComp
	}
}

// referencesOf returns the name of every object, or its ID where it has none. Pure.
func referencesOf(reply *api.ListReply) []string {
	var words []string
	for _, o := range reply.GetObjects() {
		words = append(words, cmp.Or(o.GetNode().GetHostname(), o.GetService().GetSpec().GetName(), o.GetSecret().GetName(),
			o.GetZone().GetName(), o.GetTask().GetId(), o.GetToken().GetId()))
	}
	return words
}
