package agent_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/agent"
	"warden/api"
)

// cutStream is a stream whose connection ends as a set comes.
type cutStream struct {
	grpc.ServerStream
	ctx context.Context
	cut context.CancelFunc
}

func (s *cutStream) Context() context.Context { return s.ctx }
func (s *cutStream) Recv() (*api.AssignmentSet, error) {
	s.cut()
	return &api.AssignmentSet{}, nil
}
func (s *cutStream) Send(*api.AssignmentAck) error { return s.ctx.Err() }

// TestAssignEndsWithItsStream: a set that comes as the connection ends does not keep the session, and with it the daemon, for ever.
func TestAssignEndsWithItsStream(t *testing.T) {
	a := agent.New(agent.Config{NodeID: warden.NewID(), Zone: func() string { return "default" }, Executor: newFakeExecutor(),
		SetManagers: func(*api.ManagerList) {}, Logger: slog.New(slog.DiscardHandler)})
	for range 100 { // what the agent sees first, the set or the end, is drawn
		ctx, cut := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- a.Assign(&cutStream{ctx: ctx, cut: cut}) }()
		select {
		case err := <-ended:
			if err == nil {
				t.Fatal("Assign() = nil, want an error")
			}
		case <-time.After(10 * time.Second):
			t.Fatal("Assign does not end")
		}
	}
}
