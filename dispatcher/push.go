package dispatcher

import (
	"bytes"
	"context"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

// pusher is the sending half of a session: what the node has been told so far.
type pusher struct {
	s        *session
	stream   grpc.BidiStreamingClient[api.AssignmentSet, api.AssignmentAck]
	acks     chan uint64 // fed by receive; unbuffered, so that a flood of acknowledgements waits in the network
	sequence uint64
	complete bool // the node has all that it should have had at one time
	have     assignment
	managers *api.ManagerList
	broken   map[version]string // versions that could not be opened since the store last changed
	refused  map[string]string  // reasons by task ID, as logged
}

// assign keeps the node's assignment what it should be. Each set is made from the view of that moment.
func (s *session) assign(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := s.client.Assign(ctx, recvMax(ackMessageMax))
	if err != nil {
		return warden.Wrap("assigning tasks", api.FromError(err))
	}
	p := &pusher{s: s, stream: stream, acks: make(chan uint64), have: newAssignment(""), broken: map[version]string{}, refused: map[string]string{}}
	go p.receive(ctx, cancel) // ends with ctx, which ends the stream
	for {
		s.hold(ctx)
		if ctx.Err() != nil {
			break
		}
		done, err := p.push(ctx)
		if err != nil {
			return warden.Wrap("assigning tasks", err)
		}
		if !done {
			continue
		}
		select {
		case <-s.assignKick:
			clear(p.broken)
		case n := <-p.acks:
			return warden.Errorf(warden.CodeInvalid, "assigning tasks", "the node acknowledged set %d, which was not sent", n)
		case <-ctx.Done():
		}
	}
	return warden.Wrap("assigning tasks", context.Cause(ctx))
}

func (p *pusher) receive(ctx context.Context, end context.CancelCauseFunc) {
	for {
		ack, err := p.stream.Recv()
		if done, err := ended(err); done {
			end(cmpErr(err, warden.Errorf(warden.CodeUnavailable, "", "the node ended the stream")))
			return
		}
		select {
		case p.acks <- ack.GetSequence():
		case <-ctx.Done():
			return
		}
	}
}

// push sends at most one set and waits for its acknowledgement. done says that the node has all that it should have.
func (p *pusher) push(ctx context.Context) (done bool, err error) {
	d := p.s.d
	want, refused := wanted(d.cfg.Store.View(), p.s.peer.NodeID, p.s.peer.Zone, p.broken)
	p.log(refused)
	next := diff(p.have, want, setBytesMax)
	managers := d.cfg.Managers()
	if sameManagers(managers, p.managers) {
		managers = nil
	}
	if next.empty() && managers == nil && p.complete {
		return true, nil
	}
	set := next.set(p.sequence+1, !p.complete && !next.more)
	set.Managers = managers
	defer wipe(set)
	for _, ver := range next.addSecrets {
		if err := p.open(set, ver); err != nil {
			d.cfg.Logger.Error("could not open secret", "node_id", p.s.peer.NodeID, "secret_id", ver.secretID, "version", ver.number, "error", err)
			p.broken[ver] = string(warden.CodeOf(err))
			return false, nil // decide again without the tasks that need it
		}
	}
	if err := p.send(ctx, set); err != nil {
		return false, err
	}
	p.sequence++
	p.complete = p.complete || set.GetComplete()
	p.have = next.apply(p.have, want.secrets)
	if managers != nil {
		p.managers = managers
	}
	return false, nil
}

// open adds the version's value to the set.
func (p *pusher) open(set *api.AssignmentSet, ver version) error {
	value, err := p.s.d.cfg.Open(ver.secretID, ver.number)
	if err != nil {
		return err
	}
	defer value.Wipe()
	return value.Use(func(b []byte) error {
		set.PutSecrets = append(set.PutSecrets, &api.SecretMaterial{SecretId: ver.secretID, Version: ver.number, Data: bytes.Clone(b),
			Zones: p.s.d.cfg.Store.View().Secret(ver.secretID).GetZones()})
		return nil
	})
}

// wipe zeroes the values in the set. gRPC has encoded the message when Send returns; its buffers are not ours to wipe.
func wipe(set *api.AssignmentSet) {
	for _, secret := range set.GetPutSecrets() {
		clear(secret.GetData())
	}
}

// send sends the set and waits for the node to acknowledge it, for ackTimeout at most.
func (p *pusher) send(ctx context.Context, set *api.AssignmentSet) error {
	late := warden.Errorf(warden.CodeTimeout, "", "the node did not acknowledge set %d in %s", set.GetSequence(), ackTimeout)
	timer := time.AfterFunc(ackTimeout, func() { p.s.end(late) })
	defer timer.Stop()
	if err := p.stream.Send(set); err != nil {
		<-ctx.Done() // Send says only that the stream has ended; receive says why
		return context.Cause(ctx)
	}
	select {
	case n := <-p.acks:
		if n != set.GetSequence() {
			return warden.Errorf(warden.CodeInvalid, "", "the node acknowledged set %d instead of %d", n, set.GetSequence())
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// log warns once of each task that is held back, and again where the reason changes.
func (p *pusher) log(refused []refusal) {
	now := make(map[string]string, len(refused))
	for _, r := range refused {
		now[r.taskID] = r.reason
		if p.refused[r.taskID] != r.reason {
			p.s.d.cfg.Logger.Warn("held back task", "node_id", p.s.peer.NodeID, "task_id", r.taskID, "reason", r.reason)
		}
	}
	p.refused = now
}
