package manager

import (
	"context"
	"fmt"
	"slices"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// membership lets raft's configuration follow the records, while this manager leads: non-voter, then voter once it has
// applied the commit index; out, then the role, for a demoted one. Any new leader goes on where the last one stopped.
func (m *Manager) membership(ctx context.Context) error {
	tick := time.NewTicker(2 * warden.ReportPeriod)
	defer tick.Stop()
	for {
		if err := m.follow(ctx); err != nil && ctx.Err() == nil {
			m.logger.Warn("failed to follow the records with raft's membership", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-m.reconcile:
		}
	}
}

// follow takes every step that is due now.
func (m *Manager) follow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	members, err := m.store.Configuration()
	if err != nil {
		return err
	}
	v := m.store.View()
	in := map[string]store.Member{}
	for _, member := range members {
		in[member.ID] = member
		n := v.Node(member.ID)
		if n != nil && n.EffectiveRole() == api.Role_ROLE_MANAGER {
			continue
		}
		if n == nil && v.Tombstone(member.ID) == nil {
			continue // no record yet: a bootstrap in progress
		}
		if member.ID == m.cfg.NodeID {
			m.logger.Info("hands leadership over: its record is not a manager's any more")
			return m.store.TransferLeadership(ctx)
		}
		if err := m.removeMember(ctx, member.ID); err != nil {
			return err
		}
		delete(in, member.ID)
		m.logger.Info("removed a manager from raft", "node_id", member.ID)
	}
	for _, n := range v.Managers() {
		member, is := in[n.Id]
		switch {
		case n.EffectiveRole() == api.Role_ROLE_MANAGER && !is:
			m.live.forget(n.Id) // a report from an earlier time as a manager proves nothing
			if err := m.store.AddNonvoter(ctx, n.Id); err != nil {
				return warden.Wrap("adding "+n.Id+" to raft", err)
			}
			m.logger.Info("added a manager to raft", "node_id", n.Id, "voter", false)
		case n.EffectiveRole() == api.Role_ROLE_MANAGER && !member.Voter:
			// A voter that can't answer, or has another time, would count against the quorum: it must have caught up, and just now.
			if !m.clocks.near(n.Id) {
				continue
			}
			if r, ok := m.live.reported(n.Id); ok && time.Since(r.at) < warden.LeasePush && r.applied+promotionLag >= m.store.CommitIndex() {
				if err := m.store.AddVoter(ctx, n.Id); err != nil {
					return warden.Wrap("making "+n.Id+" a voter", err)
				}
				m.logger.Info("made a manager a voter", "node_id", n.Id)
			}
		case !is && n.Role == api.Role_ROLE_MANAGER && n.DesiredRole == api.Role_ROLE_WORKER:
			next := api.Clone(n)
			next.Role, next.Address = api.Role_ROLE_WORKER, ""
			if _, err := m.store.Propose(ctx, m.systemCommand("membership", store.Put(next, n.Meta.Version))); err != nil {
				return warden.Wrap("demoting "+n.Id, err)
			}
			m.logger.Info("demoted a manager", "node_id", n.Id)
		}
	}
	return nil
}

// promotionLag is how many entries a non-voter may be behind the commit index when it becomes a voter: what a busy cluster
// commits between two reports.
const promotionLag = 1000

// CanRemoveManager refuses a step that would lose quorum, with the arithmetic. Only managers that report after the call
// began count as reachable: one that died a second ago looks alive until its next report is missed. So it takes up to a
// second, or LeasePush before it refuses. Errors: CodeNoQuorum.
func (m *Manager) CanRemoveManager(id string) error {
	members, err := m.store.Configuration()
	if err != nil {
		return err
	}
	view := m.store.View()
	var voters []string
	isVoter := false
	for _, member := range members {
		switch {
		case member.ID == id:
			isVoter = member.Voter
		case view.Node(member.ID).EffectiveRole() != api.Role_ROLE_MANAGER: // on its way out
		case member.Voter:
			voters = append(voters, member.ID)
		}
	}
	if !isVoter {
		return nil
	}
	start := time.Now()
	tick := time.NewTicker(warden.ReportPeriod / 20)
	defer tick.Stop()
	for {
		var silent []string
		for _, v := range voters {
			if r, ok := m.live.reported(v); v != m.cfg.NodeID && (!ok || r.at.Before(start)) {
				silent = append(silent, v)
			}
		}
		err := quorumWithout(id, voters, silent)
		if err == nil || time.Since(start) > warden.LeasePush {
			return err
		}
		<-tick.C
	}
}

// quorumWithout refuses where the voters that would remain without a manager, less the silent among them, are no majority.
// Pure.
func quorumWithout(id string, voters, silent []string) error {
	op := "removing manager " + id
	if len(voters) == 0 {
		return warden.Hint(warden.Errorf(warden.CodeNoQuorum, op, "it is the only voting manager: the cluster would have none"),
			"promote another node first and wait until `wardenctl node ls` shows it as reachable")
	}
	if reachable, need := len(voters)-len(silent), len(voters)/2+1; reachable < need {
		return warden.Hint(warden.Errorf(warden.CodeNoQuorum, op,
			"of the %d managers that would remain, %d reachable, and %d are needed for a majority", len(voters), reachable, need),
			fmt.Sprintf("bring back or replace %v first", silent))
	}
	return nil
}

// Reachable reports whether a manager reported to this leader lately.
func (m *Manager) Reachable(id string) bool {
	if id == m.cfg.NodeID {
		return true
	}
	r, ok := m.live.reported(id)
	return ok && time.Since(r.at) < warden.LeasePush
}

// StepDown hands leadership over, so that a call about this manager itself can run on another leader.
func (m *Manager) StepDown(ctx context.Context) error { return m.store.TransferLeadership(ctx) }

// AwaitManagers waits until every manager has acknowledged the index, or its lease is over, and returns the hostnames of
// those that were silent. On the leader only.
func (m *Manager) AwaitManagers(ctx context.Context, index uint64) (silent []string) {
	ctx, cancel := context.WithTimeout(ctx, warden.LeaseHold)
	defer cancel()
	for _, n := range m.store.View().Managers() {
		if n.EffectiveRole() != api.Role_ROLE_MANAGER || n.Id == m.cfg.NodeID {
			continue
		}
		for {
			r, ok := m.live.reported(n.Id)
			if ok && r.applied >= index {
				break
			}
			next := r.changed
			if !ok {
				next = nil
			}
			retry := time.NewTimer(warden.ReportPeriod / 2)
			select {
			case <-next:
			case <-retry.C:
			case <-ctx.Done():
			}
			retry.Stop()
			if ctx.Err() != nil {
				silent = append(silent, n.Hostname)
				break
			}
		}
	}
	return silent
}

// NodeStates returns what this manager knows in memory of nodes: all of it only on the leader.
func (m *Manager) NodeStates(ids []string) []*api.NodeState {
	members, _ := m.store.Configuration()
	leader, leads := m.store.Leader(), m.store.IsLeader()
	out := make([]*api.NodeState, len(ids))
	for i, id := range ids {
		s := &api.NodeState{NodeId: id, Leader: id == leader}
		out[i] = s
		if k := slices.IndexFunc(members, func(x store.Member) bool { return x.ID == id }); k >= 0 {
			s.Raft = "nonvoter"
			if members[k].Voter {
				s.Raft = "voter"
			}
		}
		if !leads {
			continue
		}
		s.Liveness = m.liveness(id)
		if c, ok := m.live.claim(id); ok {
			s.SessionManager, s.SeenNs = c.manager, c.seen.UnixNano()
		}
		s.Message = m.skewed(id, s.Raft)
		if a := m.live.alarm(id); a != "" {
			s.Message = a
		}
		if s.Raft != "" {
			s.Reachable = m.Reachable(id)
			if r, ok := m.live.reported(id); ok {
				s.LockState, s.UnlockKeyId, s.DekGeneration = r.lock.State, r.lock.KeyID, r.lock.DEKGeneration
			}
		}
	}
	return out
}

// skewed says how far a node's clock is from this leader's or, where it is not known how far that one's is, from that of the manager which
// has the node's session: either may be out. raft is the node's part in it, as in api.NodeState. Of the leader itself it says why there can
// be no changes. "" where nothing is to be said.
func (m *Manager) skewed(id, raft string) string {
	if id == m.cfg.NodeID {
		voters, err := m.voters()
		if err == nil {
			_, _, _, err = m.clocks.agreed(id, voters)
		}
		if err != nil {
			return "changes are refused: " + err.Error()
		}
		return ""
	}
	skew, manager := m.ahead(id)
	if skew.Abs() <= warden.SkewWarn {
		return ""
	}
	if n := m.store.View().Node(manager); n != nil {
		manager = n.GetHostname()
	}
	way := "ahead of"
	if skew < 0 {
		way = "behind"
	}
	said := fmt.Sprintf("its clock is %s %s that of manager %s", skew.Abs().Round(time.Second), way, manager)
	if raft == "nonvoter" && skew.Abs() > warden.SkewMax {
		said += ", and until they agree it gets no vote"
	}
	return said
}

// ahead returns how far a node's clock is ahead of this leader's. Where that is not known, not even through those that have sessions, it is
// how far it is ahead of another manager's.
func (m *Manager) ahead(id string) (skew time.Duration, of string) {
	for range 3 { // the node, the manager that has its session, and the one that has that manager's
		if d, known := m.clocks.skew(id); known || id == m.cfg.NodeID {
			return skew + d, m.cfg.NodeID
		}
		c, ok := m.live.claim(id)
		if !ok || time.Since(c.seen) > warden.NodeDownAfter {
			break
		}
		skew, id = skew+c.skew, c.manager
	}
	return skew, id
}

// housekeeping removes what time has made useless, while this manager leads.
func (m *Manager) housekeeping(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := m.forgetTokens(ctx); err != nil && ctx.Err() == nil {
			m.logger.Warn("failed to remove ended tokens", "error", err)
		}
		if err := m.ageDEKs(ctx, time.Now()); err != nil && ctx.Err() == nil {
			m.logger.Warn("failed to ask for new DEKs", "error", err)
		}
	}
}

// forgetTokens deletes tokens that ended TokenKept ago. Until then a try with one is told why it is refused.
func (m *Manager) forgetTokens(ctx context.Context) error {
	before := time.Now().Add(-warden.TokenKept).UnixNano()
	for _, t := range m.store.View().Tokens() {
		if t.ExpiresNs > before && (t.RevokedNs == 0 || t.RevokedNs > before) {
			continue
		}
		_, err := m.store.Propose(ctx, m.systemCommand("housekeeping", store.Delete(t)))
		if err != nil && warden.CodeOf(err) != warden.CodeConflict {
			return err
		}
	}
	return nil
}
