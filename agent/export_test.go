package agent

import (
	"google.golang.org/grpc"

	"warden/api"
)

// Assign serves a stream of assignment sets as a session of its own.
func (a *Agent) Assign(stream grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
	return newSession(a, "manager").Assign(stream)
}
