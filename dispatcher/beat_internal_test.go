package dispatcher

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

// full is a stream that has no room for another message: its node answers what it never reads.
type full struct {
	grpc.BidiStreamingClient[api.WatchRequest, api.WatchReply]
	ctx context.Context
}

func (f full) Send(*api.WatchRequest) error {
	<-f.ctx.Done()
	return f.ctx.Err()
}

// A heartbeat that finds no room in the stream ends the session: nothing else would notice that there are no more.
func TestHeartbeatWithoutRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, end := context.WithCancelCause(t.Context())
		defer end(nil)
		s, start := &session{ctx: ctx, end: end}, time.Now()
		stop := s.beat(full{ctx: ctx})
		select {
		case <-ctx.Done():
		case <-time.After(time.Minute):
			end(nil)
			t.Error("the session goes on")
		}
		stop()
		if took := time.Since(start); warden.CodeOf(context.Cause(ctx)) != warden.CodeTimeout || took > warden.HeartbeatPeriod+warden.HeartbeatMissed {
			t.Errorf("ended by %v after %v", context.Cause(ctx), took)
		}
	})
}
