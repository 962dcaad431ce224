package store

import (
	"warden"
	"warden/api"
)

func (x *tx) rule(kind api.Kind, old, next Record) error { return nil }

func (x *tx) ruleDelete(kind api.Kind, old Record) error { return nil }

func (x *tx) useToken(id string) error {
	old, _ := x.find(api.Kind_KIND_TOKEN, id).(*api.Token)
	op := "using token " + clip(id)
	switch {
	case old == nil:
		return warden.Errorf(warden.CodeUnknownToken, op, "there is none")
	case old.GetRevokedNs() != 0:
		return warden.Errorf(warden.CodeRevoked, op, "it was revoked")
	case x.now >= old.GetExpiresNs():
		return warden.Errorf(warden.CodeExpired, op, "it has expired")
	case old.GetUsesMax() != 0 && old.GetUses() >= old.GetUsesMax():
		return warden.Errorf(warden.CodeUsedUp, op, "all %d uses are taken", old.GetUsesMax())
	}
	next := api.Clone(old)
	next.Uses++
	x.store(api.Kind_KIND_TOKEN, old, next)
	return nil
}

func (x *tx) reportTask(r *api.ReportTask) {
	old, _ := x.find(api.Kind_KIND_TASK, r.GetTaskId()).(*api.Task)
	if old == nil || old.GetNodeId() != r.GetNodeId() || r.GetStatus().GetState() < old.GetStatus().GetState() || old.GetStatus().GetState().Ended() {
		return
	}
	next := api.Clone(old)
	next.Status = r.GetStatus()
	x.store(api.Kind_KIND_TASK, old, next)
}

func (x *tx) describeNode(d *api.DescribeNode) {
	old, _ := x.find(api.Kind_KIND_NODE, d.GetNodeId()).(*api.Node)
	if old == nil {
		return
	}
	next := api.Clone(old)
	if d.GetDescription() != nil {
		next.Description = d.GetDescription()
	}
	next.Ip = d.GetIp()
	x.store(api.Kind_KIND_NODE, old, next)
}
