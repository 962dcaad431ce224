package dispatcher

import (
	"context"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"warden"
	"warden/api"
)

// Bounds of reports. A full batch stays below warden.CommandBytes.
const (
	reportTextMax    = 1 << 10 // bytes of a report's message, and of its error
	reportBatchMax   = 400
	sizeMax          = 1 << 50 // nano CPUs or bytes of memory that a node may claim to have
	reportBackoffMin = 100 * time.Millisecond
	reportBackoffMax = 2 * time.Second
)

type reportKey struct{ nodeID, taskID string }

// reports gathers the newest state of each task until it is delivered. It grows with the tasks of the cluster, not with the
// number of reports.
type reports struct {
	wake chan struct{} // capacity 1

	mu      sync.Mutex // guards the fields below; held for their access only
	pending map[reportKey]*api.TaskReport
	order   []reportKey // of pending, by first arrival
}

func newReports() *reports {
	return &reports{wake: make(chan struct{}, 1), pending: map[reportKey]*api.TaskReport{}}
}

// add keeps the report unless a later state of the task waits already.
func (r *reports) add(nodeID string, report *api.TaskReport) {
	r.addAll(nodeID, []*api.TaskReport{report})
}

// addAll is add for several reports of a node, and returns how many they are.
func (r *reports) addAll(nodeID string, all []*api.TaskReport) int {
	if len(all) == 0 {
		return 0
	}
	r.mu.Lock()
	for _, report := range all {
		key := reportKey{nodeID, report.GetTaskId()}
		old, waits := r.pending[key]
		if !waits {
			r.order = append(r.order, key)
		}
		if old.GetStatus().GetState() <= report.GetStatus().GetState() {
			r.pending[key] = report
		}
	}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
	return len(all)
}

// take removes and returns up to reportBatchMax reports, the oldest first.
func (r *reports) take() []*api.NodeTaskReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := min(len(r.order), reportBatchMax)
	batch := make([]*api.NodeTaskReport, 0, n)
	for _, key := range r.order[:n] {
		batch = append(batch, &api.NodeTaskReport{NodeId: key.nodeID, Report: r.pending[key]})
		delete(r.pending, key)
	}
	if r.order = r.order[n:]; len(r.order) == 0 {
		r.order = nil
	}
	return batch
}

// deliver hands reports to the leader, one batch at a time, and keeps trying; it ends with ctx.
func (d *Dispatcher) deliver(ctx context.Context) {
	backoff := reportBackoffMin
	for ctx.Err() == nil {
		batch := d.reports.take()
		if len(batch) == 0 {
			select {
			case <-d.reports.wake:
			case <-ctx.Done():
			}
			continue
		}
		err := d.cfg.Report(ctx, batch)
		if err == nil {
			backoff = reportBackoffMin
			continue
		}
		for _, r := range batch {
			d.reports.add(r.GetNodeId(), r.GetReport())
		}
		if ctx.Err() == nil {
			d.cfg.Logger.Warn("could not deliver task reports", "reports", len(batch), "error", err)
		}
		sleep(ctx, backoff)
		backoff = min(2*backoff, reportBackoffMax)
	}
}

// reportable says whether it is for a node to report the state.
func reportable(s api.TaskState) bool {
	_, known := api.TaskState_name[int32(s)]
	return known && s >= api.TaskState_TASK_ACCEPTED && s <= api.TaskState_TASK_SHUTDOWN
}

// clipReport returns the report without unknown fields, its texts cut to reportTextMax.
func clipReport(r *api.TaskReport) *api.TaskReport {
	s := r.GetStatus()
	return &api.TaskReport{TaskId: r.GetTaskId(), Status: &api.TaskStatus{State: s.GetState(), Message: clip(s.GetMessage()),
		Error: clip(s.GetError()), ExitCode: s.GetExitCode(), TimeNs: s.GetTimeNs()}}
}

func clip(s string) string {
	if len(s) <= reportTextMax {
		return s
	}
	cut := reportTextMax
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut]
}

// checkDescription refuses what is out of bounds. Errors: CodeInvalid.
func checkDescription(d *api.NodeDescription) error {
	bad := func(what string) error {
		return warden.Errorf(warden.CodeInvalid, "checking the node's description", "%s is out of bounds", what)
	}
	switch {
	case d == nil:
		return bad("nothing given: it")
	case !isText(d.GetHostname(), warden.HostnameMax):
		return bad("host name")
	case d.GetNanoCpus() < 0 || d.GetNanoCpus() > sizeMax || d.GetMemoryBytes() < 0 || d.GetMemoryBytes() > sizeMax:
		return bad("size of the machine")
	case len(d.GetEngineLabels()) > warden.LabelsMax:
		return bad("number of labels")
	}
	for _, s := range []string{d.GetOs(), d.GetArch(), d.GetVersion(), d.GetExecutor(), d.GetSecretMounts()} {
		if !isText(s, warden.NameMax) {
			return bad("a word")
		}
	}
	for k, v := range d.GetEngineLabels() {
		if k == "" || !isText(k, warden.LabelKeyMax) || !isText(v, warden.LabelValueMax) {
			return bad("a label")
		}
	}
	return nil
}

// isText reports whether s has at most bytesMax bytes and no control characters.
func isText(s string, bytesMax int) bool {
	return len(s) <= bytesMax && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}
