package manager

import (
	"context"
	"errors"
	"io"
	"time"

	"warden"
	"warden/api"
)

// Times of a followed log whose session has ended.
const (
	resumeEvery = 100 * time.Millisecond
	resumeMax   = warden.HeartbeatMissed // without a session for this long the follower is told
)

// RelayLogs streams the logs of a task from the manager that has its node's session: the claimed one where this manager
// leads, else whichever says that it has it. A followed log goes on over the node's next session where one ends, as it does
// when the node gets a new leaf: no line is missing and none comes twice.
func (m *Manager) RelayLogs(ctx context.Context, nodeID string, req *api.LogsRequest, send func(*api.LogChunk) error) error {
	var at logPlace
	var refused error // by send
	take := func(c *api.LogChunk) error {
		if at.passed(c) {
			return nil
		}
		refused = send(c)
		return refused
	}
	begun := time.Now()
	err := m.relay(ctx, nodeID, req, take)
	lost := time.Now()
	if at.lines == 0 && lost.Sub(begun) < resumeEvery { // there was no session to begin with
		return err
	}
	for err != nil && req.GetFollow() && refused == nil && warden.CodeOf(err) == warden.CodeUnavailable && time.Since(lost) < resumeMax {
		select {
		case <-time.After(resumeEvery):
		case <-ctx.Done():
			return err
		}
		again, sent, since := &api.LogsRequest{TaskId: req.GetTaskId(), Follow: true, Tail: -1}, at.lines, time.Now()
		if sent == 0 {
			again.Tail = req.GetTail()
		}
		at.resume()
		err = m.relay(ctx, nodeID, again, take)
		if at.lines != sent || time.Since(since) > resumeEvery {
			lost = time.Now()
		}
	}
	return err
}

// logPlace is how far a log has been sent.
type logPlace struct {
	timeNs int64 // of the newest line
	same   int   // lines of that time
	lines  int   // in all
	skip   int   // lines of that time that come again
}

// resume says that the log comes again from its beginning.
func (p *logPlace) resume() { p.skip = p.same }

// passed reports whether the line was sent before, and else notes it.
func (p *logPlace) passed(c *api.LogChunk) bool {
	switch t := c.GetTimeNs(); {
	case t < p.timeNs && p.skip > 0:
		return true
	case t == p.timeNs && p.skip > 0:
		p.skip--
		return true
	case t == p.timeNs:
		p.same++
	case t > p.timeNs:
		p.timeNs, p.same = t, 1
	}
	p.skip = 0
	p.lines++
	return false
}

// relay streams from the first manager that has the node's session.
func (m *Manager) relay(ctx context.Context, nodeID string, req *api.LogsRequest, send func(*api.LogChunk) error) error {
	holders := []string{m.cfg.NodeID}
	for _, i := range m.Managers().Managers {
		if i.NodeId != m.cfg.NodeID {
			holders = append(holders, i.NodeId)
		}
	}
	if c, ok := m.live.claim(nodeID); ok {
		holders = append([]string{c.manager}, holders...)
	}
	var err error
	sent := false
	for _, holder := range holders {
		err = m.relayFrom(ctx, holder, nodeID, req, func(c *api.LogChunk) error { sent = true; return send(c) })
		if sent || warden.CodeOf(err) != warden.CodeUnavailable || ctx.Err() != nil {
			return err
		}
	}
	return err
}

func (m *Manager) relayFrom(ctx context.Context, holder, nodeID string, req *api.LogsRequest, send func(*api.LogChunk) error) error {
	if holder == m.cfg.NodeID {
		return m.dispatcher.Logs(ctx, nodeID, req, send)
	}
	client, err := m.peers.client(holder)
	if err != nil {
		return err
	}
	stream, err := client.Relay(ctx, req)
	if err != nil {
		return api.FromError(err)
	}
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return api.FromError(err)
		}
		if err := send(chunk); err != nil {
			return err
		}
	}
}
