package dispatcher

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

// pusher is the sending half of a session: what the node has been told so far. It is used by one goroutine at a time.
type pusher struct {
	s        *session
	stream   grpc.BidiStreamingClient[api.AssignmentSet, api.AssignmentAck] // of the present run; nil before its first set
	sequence uint64
	complete bool // the node has all that it should have had at one time
	have     assignment
	managers *api.ManagerList
	broken   map[version]string // versions that could not be opened since the store last changed
	refused  map[string]string  // reasons by task ID, as logged
}

func newPusher(s *session) *pusher { return &pusher{s: s, have: newAssignment("")} }

// run makes the node's assignment what it should be now. Each set is made from the view of that moment. The stream ends with the
// run: a session that is idle has none.
func (p *pusher) run(ctx context.Context) error {
	const op = "assigning tasks"
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.stream, p.broken = nil, nil
	for {
		p.s.hold(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if done, err := p.push(ctx); done || err != nil {
			return warden.Wrap(op, err)
		}
	}
}

// push sends at most one set and waits for its acknowledgement. done says that the node has all that it should have.
func (p *pusher) push(ctx context.Context) (done bool, err error) {
	d := p.s.d
	view := d.cfg.Store.View()
	if view.Node(p.s.peer.NodeID) == nil { // whoever judges connections closes this one
		return true, nil
	}
	want, refused := wanted(view, p.s.peer.NodeID, p.s.peer.Zone, p.broken)
	p.log(refused)
	next := diff(p.have, want, setBytesMax)
	managers := d.managerList()
	if managers == p.managers {
		managers = nil
	}
	if next.empty() && managers == nil && p.complete {
		return true, nil
	}
	set := next.set(p.sequence+1, !p.complete && !next.more)
	set.Managers = managers
	defer func() { d.vault.release(next.addSecrets) }()
	for i, ver := range next.addSecrets {
		value, err := d.vault.open(ver)
		if err != nil {
			next.addSecrets = next.addSecrets[:i] // what was opened, and is to be released
			d.cfg.Logger.Error("could not open secret", "node_id", p.s.peer.NodeID, "secret_id", ver.secretID, "version", ver.number, "error", err)
			p.broken = with(p.broken, ver, string(warden.CodeOf(err)))
			return false, nil // decide again without the tasks that need it
		}
		set.PutSecrets = append(set.PutSecrets, &api.SecretMaterial{SecretId: ver.secretID, Version: ver.number, Data: value,
			Zones: view.Secret(ver.secretID).GetZones()})
	}
	if err := p.send(ctx, set); err != nil {
		return false, err
	}
	d.counts.acknowledged(next.addTasks)
	p.sequence++
	p.complete = p.complete || set.GetComplete()
	p.have = next.apply(p.have, want.secrets)
	if managers != nil {
		p.managers = managers
	}
	return false, nil
}

func with[K comparable](m map[K]string, key K, value string) map[K]string {
	if m == nil {
		m = map[K]string{}
	}
	m[key] = value
	return m
}

// send sends the set and waits for the node to acknowledge it, for ackTimeout at most.
func (p *pusher) send(ctx context.Context, set *api.AssignmentSet) error {
	late := warden.Errorf(warden.CodeTimeout, "", "the node did not acknowledge set %d in %s", set.GetSequence(), ackTimeout)
	timer := time.AfterFunc(ackTimeout, func() { p.s.end(late) })
	defer timer.Stop()
	if p.stream == nil {
		stream, err := p.s.client.Assign(ctx, recvMax(ackMessageMax))
		if err != nil {
			return api.FromError(err)
		}
		p.stream = stream
	}
	if err := p.stream.Send(set); err != nil {
		_, err = p.stream.Recv() // Send says only that the stream has ended; Recv says why
		return cmpErr(api.FromError(err), warden.Errorf(warden.CodeUnavailable, "", "the node ended the stream"))
	}
	ack, err := p.stream.Recv()
	switch done, err := ended(err); {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case done:
		return cmpErr(err, warden.Errorf(warden.CodeUnavailable, "", "the node ended the stream"))
	case ack.GetSequence() != set.GetSequence():
		return warden.Errorf(warden.CodeInvalid, "", "the node acknowledged set %d instead of %d", ack.GetSequence(), set.GetSequence())
	}
	return nil
}

// log warns once of each task that is held back, and again where the reason changes.
func (p *pusher) log(refused []refusal) {
	var now map[string]string
	for _, r := range refused {
		now = with(now, r.taskID, r.reason)
		if p.refused[r.taskID] != r.reason {
			p.s.d.cfg.Logger.Warn("held back task", "node_id", p.s.peer.NodeID, "task_id", r.taskID, "reason", r.reason)
		}
	}
	p.refused = now
}
