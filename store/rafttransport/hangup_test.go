package rafttransport_test

import "testing"

// TestHangUp ends the connections to one node, of which raft's transport keeps one idle, and no others.
func TestHangUp(t *testing.T) {
	s, other := serve(t, alice), serve(t, alice)
	for _, d := range []served{s, other} {
		var a answer
		a.start(t, d.t)
		c := caller(t, d.conn)
		if err := calls(header(alice))["append"](c); err != nil {
			t.Fatal(err)
		}
		c.HangUp(func(nodeID string) bool { return nodeID == bob && d == s })
	}
	wait(t, s.ended, "the end of the connection")
	select {
	case <-other.ended:
		t.Error("a connection to a node that is not gone ended")
	default:
	}
}
