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

func (c *cli) statusCommand() *cobra.Command {
	var format string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show on one screen how the cluster and this daemon are",
		Long: `Show on one screen how the cluster and this daemon are, from this daemon's own knowledge: leader, lock, nodes, certificates near
expiry, tasks that do not run and why. The exit code is 1 when something is unwell, a locked manager included.

With --json it is printed as JSON with all that the daemon counts under "Facts": the same that ` + "`warden run --metrics`" + ` shows to Prometheus.`,
		Example: "  wardenctl status\n  wardenctl status --format '{{.State}} {{.Leader}}'\n  wardenctl status --json",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			if asJSON && format != "" {
				return warden.Errorf(warden.CodeUsage, "reading flags", "--json and --format exclude each other")
			}
			health, err := d.health(ctx)
			if err != nil {
				return err
			}
			now := time.Now()
			switch {
			case asJSON:
				err = writeObject(c.stdout, health.view(now))
			case format != "":
				err = writeObjects(c.stdout, []object{health.view(now)}, format)
			default:
				err = health.write(c.stdout, now)
			}
			if err != nil {
				return err
			}
			return health.verdict(now)
		}),
	}
	formatFlag(cmd, &format)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print all of it as JSON, with what the daemon counts")
	return cmd
}

// health is what status knows: the daemon itself and, of a running manager, the cluster.
type health struct {
	info       *api.InfoReply
	cluster    *api.StatusReply // nil: no running manager, or it did not answer
	clusterErr error
	nodes      []*api.Node
}

func (d *daemon) health(ctx context.Context) (*health, error) {
	info, err := d.local.Info(ctx, &api.InfoRequest{Facts: true})
	if err != nil {
		return nil, err
	}
	h := &health{info: info}
	if info.GetState() != "running" || info.GetRole() != api.Role_ROLE_MANAGER {
		return h, nil
	}
	h.cluster, err = d.control.Status(ctx, &api.StatusRequest{})
	if err != nil {
		h.cluster, h.clusterErr = nil, d.explain(ctx, err)
		return h, nil
	}
	// Host names only: without them IDs are shown.
	h.nodes, _ = listed(ctx, d, api.Kind_KIND_NODE, true, (*api.Object).GetNode)
	return h, nil
}

// unwell returns why this daemon or the cluster is unwell; nothing where it is well. Pure.
func (h *health) unwell(now time.Time) []string {
	var reasons []string
	switch h.info.GetState() {
	case "running":
	case "locked":
		reasons = append(reasons, "this manager is locked")
	case "uninitialized":
		reasons = append(reasons, "this daemon belongs to no cluster")
	case "evicted":
		reasons = append(reasons, "this node was removed from its cluster")
	default:
		reasons = append(reasons, "the daemon is "+h.info.GetState())
	}
	if len(reasons) > 0 && h.info.GetMessage() != "" {
		reasons[0] += ": " + h.info.GetMessage()
	}
	if h.clusterErr != nil {
		reasons = append(reasons, "the cluster's status is unknown: "+h.clusterErr.Error())
	}
	if h.info.GetState() == "running" {
		if h.info.GetSessionManager() == "" && h.info.GetRole() == api.Role_ROLE_WORKER {
			reasons = append(reasons, "this node has no session with any manager")
		}
		if begin := h.info.GetLeafNotBeforeNs(); begin > now.UnixNano() {
			reasons = append(reasons, "this node's certificate is valid from "+moment(begin)+", now it is "+moment(now.UnixNano())+": set the clock right")
		}
		if end := h.info.GetLeafNotAfterNs(); end != 0 && end < now.UnixNano() {
			reasons = append(reasons, "this node's certificate ended at "+moment(end)+", now it is "+moment(now.UnixNano()))
		}
	}
	return append(reasons, h.cluster.GetUnwell()...)
}

// verdict is the error that gives an unwell status its exit code, 1 whatever the reason; nil where all is well.
func (h *health) verdict(now time.Time) error {
	reasons := h.unwell(now)
	if len(reasons) == 0 {
		return nil
	}
	code, hint := warden.CodeUnavailable, "see the reasons under Unwell"
	switch h.info.GetState() {
	case "locked":
		code, hint = warden.CodeLocked, unlockHint(h.info)
	case "uninitialized":
		code, hint = warden.CodeUninitialized, "start a cluster with `wardenctl swarm init` or enter one with `wardenctl swarm join`"
	case "evicted":
		code, hint = warden.CodeEvicted, "to use this host again, let it join as a new node"
	}
	return exitError{warden.Hint(warden.Errorf(code, "", "unwell: %s", reasons[0]), hint), exitFailed}
}

// name returns "host (short ID)" of a node.
func (h *health) name(id string) string {
	if id == "" {
		return "none"
	}
	for _, n := range h.nodes {
		if n.GetId() == id {
			return clean(n.GetHostname()) + " (" + shortID(id) + ")"
		}
	}
	return shortID(id)
}

// write prints the screen. Pure but for w.
func (h *health) write(w io.Writer, now time.Time) error {
	info, tw := h.info, tabwriter.NewWriter(w, 0, 1, 2, ' ', 0)
	line := func(name, format string, args ...any) {
		if text := fmt.Sprintf(format, args...); text != "" {
			fmt.Fprintf(tw, "%s:\t%s\n", name, clean(text))
		}
	}
	line("State", "%s", info.GetState())
	line("Node", "%s", info.GetHostname())
	line("Node ID", "%s", info.GetNodeId())
	if info.GetRole() != api.Role_ROLE_UNSPECIFIED {
		line("Role", "%s", info.GetRole().Word())
	}
	line("Zone", "%s", info.GetZone())
	line("Cluster", "%s", info.GetClusterId())
	if info.GetRole() == api.Role_ROLE_MANAGER { // workers open no port
		line("Address", "%s", info.GetAddress())
	}
	line("Version", "%s", info.GetVersion())
	line("Executor", "%s", info.GetExecutor())
	line("State directory", "%s", info.GetStateDir())
	if end := info.GetLeafNotAfterNs(); end != 0 {
		line("Certificate", "%s", leafText(info, now))
	}
	if info.GetState() == "running" {
		session := "none"
		if info.GetSessionManager() != "" {
			session = "with manager " + h.name(info.GetSessionManager())
			if info.GetSessionSinceNs() != 0 {
				session += " for " + span(max(0, now.Sub(time.Unix(0, info.GetSessionSinceNs()))))
			}
		}
		line("Session", "%s", session)
		line("Tasks here", "%d", len(info.GetTasks()))
	}
	if info.GetState() == "locked" {
		line("Lock", "locked, needs the unlock key %s: run `wardenctl swarm unlock`", info.GetUnlockKeyId())
	}
	if st := h.cluster; st != nil {
		h.writeCounts(line, st)
	}
	if err := tw.Flush(); err != nil {
		return writeFailed(err)
	}
	if st := h.cluster; st != nil {
		if err := h.writeNodes(w, st); err != nil {
			return err
		}
		writeLines(w, "\nTasks that do not run:", problemLines(st.GetProblems()))
		writeLines(w, "\nCertificates near expiry:", st.GetCertificates())
		writeLines(w, "\nNotes:", st.GetNotes())
	}
	writeLines(w, "\nUnwell:", h.unwell(now))
	return nil
}

func leafText(info *api.InfoReply, now time.Time) string {
	end := time.Unix(0, info.GetLeafNotAfterNs())
	left := "ended " + ago(info.GetLeafNotAfterNs(), now)
	if end.After(now) {
		left = span(end.Sub(now)) + " left"
	}
	return strings.TrimSpace(fmt.Sprintf("%s until %s (%s)", info.GetLeafSubject(), moment(info.GetLeafNotAfterNs()), left))
}

func (h *health) writeCounts(line func(string, string, ...any), st *api.StatusReply) {
	leader := "none known"
	if st.GetLeaderId() != "" {
		leader = fmt.Sprintf("%s (%s)", cmp.Or(st.GetLeaderHostname(), "unknown"), shortID(st.GetLeaderId()))
	}
	line("Leader", "%s", leader)
	line("Managers", "%d of %d reachable, %d needed for a majority", st.GetManagersReachable(), st.GetManagers(), st.GetManagers()/2+1)
	line("Workers", "%d of %d ready", st.GetWorkersReady(), st.GetWorkers())
	line("Autolock", "%s", map[bool]string{true: "on", false: "off"}[st.GetAutolock()])
	line("Raft", "applied %d of %d committed (this replica)", st.GetAppliedIndex(), st.GetCommitIndex())
	line("Services", "%d", st.GetServices())
	line("Secrets", "%d", st.GetSecrets())
	line("Tasks", "%d of %d running", st.GetTasksRunning(), st.GetTasksWanted())
}

func (h *health) writeNodes(w io.Writer, st *api.StatusReply) error {
	if len(h.nodes) == 0 {
		return nil
	}
	l := nodeListing(h.nodes, st.GetNodes(), nil, h.info.GetNodeId(), true)
	states := statesByID(st.GetNodes())
	for _, r := range l.rows {
		r["Lock"] = cmp.Or(states[r["ID"].(string)].GetLockState(), "-")
		r["ID"] = shortID(r["ID"].(string))
	}
	l.fields = append(l.fields, "Lock")
	l.shown = []string{"ID", "Hostname", "Status", "Availability", "ManagerStatus", "Lock", "Zone", "Message"}
	fmt.Fprintln(w)
	return l.write(w, "")
}

func problemLines(problems []*api.TaskProblem) []string {
	lines := make([]string, 0, len(problems))
	for _, p := range problems {
		lines = append(lines, fmt.Sprintf("%s.%d (%s): %s: %s", p.GetServiceName(), p.GetSlot(), shortID(p.GetTaskId()), p.GetState(), cmp.Or(p.GetReason(), "no reason given")))
	}
	slices.Sort(lines)
	return lines
}

// view is the screen for --format.
func (h *health) view(now time.Time) object {
	info, st := h.info, h.cluster
	reasons := h.unwell(now)
	return object{
		{"State", info.GetState()},
		{"Well", len(reasons) == 0},
		{"Unwell", listOf(reasons)},
		{"NodeID", info.GetNodeId()},
		{"Hostname", info.GetHostname()},
		{"Role", info.GetRole().Word()},
		{"Zone", info.GetZone()},
		{"ClusterID", info.GetClusterId()},
		{"Address", info.GetAddress()},
		{"StateDir", info.GetStateDir()},
		{"Executor", info.GetExecutor()},
		{"Version", info.GetVersion()},
		{"UnlockKeyID", info.GetUnlockKeyId()},
		{"CertificateSubject", info.GetLeafSubject()},
		{"CertificateNotBefore", stamp(info.GetLeafNotBeforeNs())},
		{"CertificateNotAfter", stamp(info.GetLeafNotAfterNs())},
		{"SessionManager", info.GetSessionManager()},
		{"LocalTasks", listOf(info.GetTasks())},
		{"Leader", st.GetLeaderHostname()},
		{"LeaderID", st.GetLeaderId()},
		{"Autolock", st.GetAutolock()},
		{"AppliedIndex", st.GetAppliedIndex()},
		{"CommitIndex", st.GetCommitIndex()},
		{"Managers", st.GetManagers()},
		{"ManagersReachable", st.GetManagersReachable()},
		{"Workers", st.GetWorkers()},
		{"WorkersReady", st.GetWorkersReady()},
		{"TasksRunning", st.GetTasksRunning()},
		{"TasksWanted", st.GetTasksWanted()},
		{"Services", st.GetServices()},
		{"Secrets", st.GetSecrets()},
		{"Problems", listOf(problemLines(st.GetProblems()))},
		{"Certificates", listOf(st.GetCertificates())},
		{"Notes", listOf(st.GetNotes())},
		{"Facts", factsView(cmp.Or(st.GetFacts(), info.GetFacts()))},
	}
}
