package orchestrator

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// commandOverhead is kept free in a command for all but its operations, in bytes.
const commandOverhead = 4 << 10

// inFlight is how many commands may wait for their commit at once: while one is on its way to the disks, the next is made.
const inFlight = 4

// commit proposes the steps, and reports whether each was applied, and whether a proposal failed, so that nobody knows. One that is refused
// does not hold up the others.
func (o *Orchestrator) commit(ctx context.Context, steps []Step) (done, lost bool) {
	var failed, missed atomic.Bool
	var wg sync.WaitGroup
	room := make(chan struct{}, inFlight)
	for _, batch := range batches(steps) {
		room <- struct{}{}
		if failed.Load() { // no use to go on now
			break
		}
		wg.Go(func() { // ends with the proposal
			defer func() { <-room }()
			applied, err := o.propose(ctx, batch)
			if err != nil && !failed.Swap(true) && ctx.Err() == nil {
				o.cfg.Logger.Log(ctx, level(err), "could not commit task changes", "error", err)
			}
			if !applied {
				missed.Store(true)
			}
		})
	}
	wg.Wait()
	return !failed.Load() && !missed.Load(), failed.Load()
}

// propose commits the steps as one command, and where that is refused, as two halves. It returns whether each was applied, and
// an error where the proposal itself failed.
func (o *Orchestrator) propose(ctx context.Context, steps []Step) (bool, error) {
	all := len(steps)
	steps = o.current(steps)
	if len(steps) == 0 {
		return all == 0, nil
	}
	cmd := o.command(steps...)
	result, err := o.cfg.Store.Propose(ctx, cmd)
	switch warden.CodeOf(err) {
	case "":
		o.cfg.Counts.committed(cmd.Operations)
		o.cfg.Logger.Info("committed task changes", "operations", len(cmd.Operations), "index", result.GetIndex())
		return len(steps) == all, nil
	case warden.CodeNotLeader, warden.CodeNoLeader, warden.CodeUnavailable, warden.CodeTimeout, warden.CodeClock, warden.CodeInternal:
		return false, err
	}
	if len(steps) == 1 {
		o.refused(ctx, steps[0], err)
		return false, nil
	}
	half := len(steps) / 2
	if _, err := o.propose(ctx, steps[:half]); err != nil {
		return false, err
	}
	_, err = o.propose(ctx, steps[half:])
	return false, err
}

func (o *Orchestrator) command(steps ...Step) *api.Command {
	return &api.Command{Actor: &api.Actor{Kind: "system", Name: "orchestrator", Via: o.cfg.NodeID}, RequestId: warden.NewID(),
		Operations: slices.Concat(steps...)}
}

// current leaves out the steps that a newer version of a task has overtaken: the next pass decides them again.
func (o *Orchestrator) current(steps []Step) []Step {
	view := o.cfg.Store.View()
	var out []Step
	for _, s := range steps {
		ok := true
		for _, op := range s {
			id, expect := op.GetDelete().GetId(), op.GetDelete().GetExpect()
			if p := op.GetPut(); p != nil {
				id, expect = p.GetObject().GetTask().GetId(), p.GetExpect()
			}
			ok = ok && view.Task(id).GetMeta().GetVersion() == expect
		}
		if ok {
			out = append(out, s)
		}
	}
	return out
}

// refused logs a step that the apply refuses. Where it refuses the placement of a new task, the task is made without; where it goes on
// refusing, the task says so.
func (o *Orchestrator) refused(ctx context.Context, step Step, err error) {
	o.cfg.Counts.rejected(step)
	last := step[len(step)-1].GetPut()
	t := last.GetObject().GetTask()
	o.cfg.Logger.Log(ctx, refusalLevel(o.refusals), "had a task change refused", "task_id", t.GetId(), "node_id", t.GetNodeId(), "error", err)
	if t.GetNodeId() == "" || warden.CodeOf(err) == warden.CodeConflict {
		return
	}
	old := o.cfg.Store.View().Task(t.GetId())
	switch {
	case last.GetExpect() == 0 && old == nil:
		t = edit(t)
		t.NodeId, t.Status.State = "", api.TaskState_TASK_PENDING
		step = append(slices.Clone(step[:len(step)-1]), put(t))
	case o.refusals == 2 && waiting(old):
		t = edit(old)
		t.Status.Message = "placement refused: " + err.Error()
		step = Step{put(t)}
	default:
		return
	}
	if _, err := o.cfg.Store.Propose(ctx, o.command(step)); err != nil {
		o.cfg.Logger.Debug("could not keep a task whose placement was refused", "task_id", t.GetId(), "error", err)
	}
}

// batches cuts steps into commands of at most half of CommandOpsMax operations, and within CommandBytes.
func batches(steps []Step) [][]Step {
	var out [][]Step
	start, ops, size := 0, 0, commandOverhead
	for i, s := range steps {
		bytes := 0
		for _, op := range s {
			bytes += proto.Size(op) + 8 // tag and length
		}
		if i > start && (ops+len(s) > warden.CommandOpsMax/2 || size+bytes > warden.CommandBytes) {
			out = append(out, steps[start:i])
			start, ops, size = i, 0, commandOverhead
		}
		ops, size = ops+len(s), size+bytes
	}
	if start < len(steps) {
		out = append(out, steps[start:])
	}
	return out
}

// level is how bad it is that nothing can be committed: a change of leader is not.
func level(err error) slog.Level {
	switch warden.CodeOf(err) {
	case warden.CodeNotLeader, warden.CodeNoLeader, warden.CodeTimeout:
		return slog.LevelDebug
	}
	return slog.LevelWarn
}

// refusalLevel: one refusal is a race; again and again, a rule and a decision disagree.
func refusalLevel(refusals int) slog.Level {
	if refusals < 2 {
		return slog.LevelDebug
	}
	return slog.LevelWarn
}
