package manager

import (
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// describeBurst is how many descriptions of one node are stored at once: that of its join, and those of a few changes and restarts.
// From then on it is one each warden.DescribePeriod.
const describeBurst = 4

// describe returns what stores the descriptions in a report that differ from the records, as far as their nodes have not used up what the
// log takes of them: a manager reports a description until the record shows it, so what is held back comes again, or something newer
// in its place. lost are the sessions that lost their claim: what they say is old.
func (m *Manager) describe(claims []*api.SessionClaim, lost []string) (ops []*api.Operation) {
	v, now := m.store.View(), time.Now()
	for _, c := range claims {
		if c.Description == nil { // as the record says
			continue
		}
		n := v.Node(c.NodeId)
		if n == nil || proto.Equal(n.Description, c.Description) && n.Ip == c.Ip || slices.Contains(lost, c.SessionId) {
			continue
		}
		if stores, news := m.described.spend(c.NodeId, c.SessionId, now); !stores {
			if news {
				err := warden.Errorf(warden.CodeLimited, "storing the description of node "+c.NodeId, "it has changed more than %d times in %s", describeBurst, describeBurst*warden.DescribePeriod)
				m.counts.refusal(warden.DoorNode, err)
				m.logger.Info("held back a description", "node_id", c.NodeId, "session_id", c.SessionId, "reason", err)
			}
			continue
		}
		ops = append(ops, &api.Operation{Of: &api.Operation_DescribeNode{DescribeNode: &api.DescribeNode{
			NodeId: c.NodeId, Description: c.Description, Ip: c.Ip,
		}}})
	}
	return ops
}
