package rafttransport_test

import (
	"context"
	"io"
	"testing"
	"time"

	"warden"
	"warden/store/rafttransport"
)

// TestClock: who asks gets the time of the manager that it asked, as often as it asks on one connection.
func TestClock(t *testing.T) {
	s := serve(t, alice)
	at := time.Unix(1e9, 7)
	s.t.Now = func() time.Time { at = at.Add(time.Hour); return at } // one question after the other
	clock, err := caller(t, s.conn).Clock(t.Context(), bob)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		wall, err := clock.Wall(t.Context())
		if want := time.Unix(1e9, 7).Add(time.Duration(i+1) * time.Hour).UnixNano(); err != nil || wall != want {
			t.Errorf("question %d: %d, %v, want %d", i, wall, err, want)
		}
	}
	clock.Close()
	wait(t, s.ended, "the end of the connection")
	if _, err := clock.Wall(t.Context()); warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("a closed clock: %v", err)
	}
}

// TestClockEnds a question that is never answered, with its context and with the transport; a dial likewise.
func TestClockEnds(t *testing.T) {
	for name, end := range map[string]func(cancel context.CancelFunc, tr *rafttransport.Transport){
		"context":   func(cancel context.CancelFunc, _ *rafttransport.Transport) { cancel() },
		"transport": func(_ context.CancelFunc, tr *rafttransport.Transport) { tr.Close() },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		mine, theirs := pair(t)
		tr := caller(t, mine)
		clock, err := tr.Clock(ctx, bob)
		if err != nil {
			t.Fatal(err)
		}
		failed := make(chan error, 1)
		go func() { _, err := clock.Wall(ctx); failed <- err }()
		if _, err := io.ReadFull(theirs, make([]byte, 1)); err != nil { // the question is there
			t.Fatal(err)
		}
		end(cancel, tr)
		if err := <-failed; warden.CodeOf(err) != warden.CodeUnavailable {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
}

// TestClockConnectionCarriesNothingElse: another byte ends it, and so does a question among raft's calls.
func TestClockConnectionCarriesNothingElse(t *testing.T) {
	told := tell(t, func(w io.WriteCloser, _ *rafttransport.Transport) { io.WriteString(w, "\xc1\xc1\x00") })
	if len(told) != 1 || told[0] != warden.CodeInvalid {
		t.Errorf("a raft call after a question: told of %q", told)
	}
	told = tell(t, func(w io.WriteCloser, call *rafttransport.Transport) {
		if err := calls(header(alice))["append"](call); err != nil {
			t.Error(err)
		}
		io.WriteString(w, "\xc1")
	})
	if len(told) != 1 || told[0] != warden.CodeInvalid {
		t.Errorf("a question after a raft call: told of %q", told)
	}
}
