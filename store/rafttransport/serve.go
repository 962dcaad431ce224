package rafttransport

import (
	"bytes"
	"net"
	"time"

	"github.com/hashicorp/raft"

	"warden"
)

// Serve handles the calls that come in on conn from the node peerID, which TLS has proved, and returns when the connection has ended:
// by the peer, by a refusal, by Close, or because the caller closed it. It closes conn. Each connection has its own Serve.
func (t *Transport) Serve(conn net.Conn, peerID string) {
	t.mu.Lock()
	if t.isClosed || peerID == "" || peerID == t.localID {
		t.mu.Unlock()
		conn.Close()
		return
	}
	t.serving.Add(1)
	t.mu.Unlock()
	defer t.serving.Done()

	c := newInConn(conn, t.callMax, func() time.Time { return t.Now() })
	in := network(inListener{c}, 0, t.logger)
	defer in.Close()
	s := &session{t: t, conn: c, peerID: peerID}
	in.SetHeartbeatHandler(s.heartbeat)
	for {
		select {
		case rpc := <-in.Consumer():
			s.forward(rpc)
		case <-c.done:
			if err := c.ended(); err != nil {
				s.refused(err)
			}
			return
		case <-t.closed:
			in.Close()
			select {
			case <-c.accept: // raft's transport never took it
				c.Close()
			default:
			}
			conn.Close()
			<-c.done
			return
		}
	}
}

// session is one inbound connection.
type session struct {
	t      *Transport
	conn   *inConn
	peerID string
}

// forward hands a call that passes the check to raft.
func (s *session) forward(rpc raft.RPC) {
	if !s.admit(rpc) {
		return
	}
	select {
	case s.t.consumer <- rpc:
	case <-s.t.closed:
		rpc.Respond(nil, raft.ErrTransportShutdown)
	}
}

// heartbeat is the fast path: raft's transport calls it on its own goroutine, past the consumer. Only what Beside lets through stays there.
func (s *session) heartbeat(rpc raft.RPC) {
	s.t.mu.Lock()
	f := s.t.heartbeat
	s.t.mu.Unlock()
	beat, ok := rpc.Command.(*raft.AppendEntriesRequest)
	if f == nil || !ok || s.t.Beside != nil && !s.t.Beside(beat.Term) {
		s.forward(rpc)
		return
	}
	if s.admit(rpc) {
		f(rpc)
	}
}

// admit reports whether rpc may reach raft. If not it is answered and the connection ends.
func (s *session) admit(rpc raft.RPC) bool {
	err := check(rpc.Command, s.peerID)
	if err == nil && s.conn.isRefused() {
		err = warden.Errorf(warden.CodeDenied, "checking raft call", "an earlier call on this connection was refused")
	}
	if err == nil {
		s.conn.allow(rpc.Command)
		return true
	}
	if !s.conn.isRefused() {
		s.refused(err)
	}
	s.conn.refuse()
	rpc.Respond(nil, err)
	return false
}

func (s *session) refused(err error) {
	s.t.logger.Error("refused raft call", "node_id", s.peerID, "err", err)
	if s.t.Refused != nil {
		s.t.Refused(s.peerID, err)
	}
}

// check compares who sent the command, by its header and by the older field, with the peer of the connection, and refuses what
// raft v1.8 ends the process over. Errors: CodeDenied, CodeInvalid.
func check(command any, peerID string) error {
	const op = "checking raft call"
	h, ok := command.(raft.WithRPCHeader)
	if !ok {
		return warden.Errorf(warden.CodeInvalid, op, "unknown kind %T", command)
	}
	claims := [][]byte{h.GetRPCHeader().ID, h.GetRPCHeader().Addr}
	older := func(b []byte) {
		if len(b) > 0 {
			claims = append(claims, b)
		}
	}
	var configurations [][]byte
	switch c := command.(type) {
	case *raft.AppendEntriesRequest:
		//lint:ignore SA1019 an old field that raft still reads: it must not name another node either
		older(c.Leader)
		for _, e := range c.Entries {
			switch {
			case e == nil:
				return warden.Errorf(warden.CodeInvalid, op, "an entry is empty")
			case e.Type == raft.LogConfiguration:
				configurations = append(configurations, e.Data)
			case e.Type != raft.LogCommand && e.Type != raft.LogNoop && e.Type != raft.LogBarrier:
				return warden.Errorf(warden.CodeInvalid, op, "entry %d is of kind %d", e.Index, e.Type)
			}
		}
	case *raft.RequestVoteRequest:
		//lint:ignore SA1019 an old field that raft still reads: it must not name another node either
		older(c.Candidate)
	case *raft.InstallSnapshotRequest:
		older(c.Leader)
		configurations = append(configurations, c.Configuration)
		if c.SnapshotVersion != raft.SnapshotVersionMax || c.Size < 0 {
			return warden.Errorf(warden.CodeInvalid, op, "snapshot of version %d and %d bytes", c.SnapshotVersion, c.Size)
		}
	case *raft.RequestPreVoteRequest, *raft.TimeoutNowRequest:
	default:
		return warden.Errorf(warden.CodeInvalid, op, "unknown kind %T", command)
	}
	for _, claim := range claims {
		if !bytes.Equal(claim, []byte(peerID)) {
			return warden.Errorf(warden.CodeDenied, op, "node %s speaks as %.64q", peerID, claim)
		}
	}
	for _, b := range configurations {
		if !decodes(b) {
			return warden.Errorf(warden.CodeInvalid, op, "a configuration does not decode")
		}
	}
	return nil
}

// decodes reports whether raft can decode the configuration; it panics on one that it cannot.
func decodes(configuration []byte) (ok bool) {
	defer func() { ok = recover() == nil }()
	raft.DecodeConfiguration(configuration)
	return true
}
