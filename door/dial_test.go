package door_test

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"testing"
	"time"

	"warden"
	"warden/ca"
	"warden/door"
	"warden/internal/testcluster"
)

func TestDial(t *testing.T) {
	w := onLoopback(t, nil)
	client, clientID := w.leaf(t, ca.RoleManager, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.record(clientID) // its issuer will be distrusted
	manager := func(ttl time.Duration, at time.Time) (*tls.Certificate, ca.Identity) {
		return w.leaf(t, ca.RoleManager, w.self, ttl, at)
	}
	good, goodID := manager(warden.LeafTTLDefault, time.Now())
	expired, expiredID := manager(warden.LeafTTLMin, time.Now().Add(-500*time.Hour))
	early, earlyID := manager(warden.LeafTTLDefault, time.Now().Add(100*time.Hour))
	ancient := newPKI(t, w.id, time.Now().Add(-3*warden.ExpiredKept))
	late, lateID := ancient.leaf(t, ca.RoleManager, w.self, warden.LeafTTLMin, time.Now().Add(-2*warden.ExpiredKept))
	worker, workerID := w.leaf(t, ca.RoleWorker, w.self, warden.LeafTTLDefault, time.Now())
	strange, strangeID := newPKI(t, w.id, time.Now().Add(-time.Hour)).leaf(t, ca.RoleManager, w.self, warden.LeafTTLDefault, time.Now())
	oldIssuer := w.issuingDER
	w.generation(t, 2, time.Now().Add(-900*time.Hour))
	renewed, _ := manager(warden.LeafTTLDefault, time.Now())
	w.distrust(oldIssuer)
	distrusted := w.distrusted

	pin := func(ids ...ca.Identity) (out [][32]byte) {
		for _, id := range ids {
			out = append(out, id.KeyHash)
		}
		return out
	}
	for _, c := range []struct {
		name string
		cert *tls.Certificate
		want door.Expect
		code warden.Code
	}{
		{"pinned", good, door.Expect{NodeID: w.self, KeyHashes: pin(goodID)}, ""},
		{"one of two pins", good, door.Expect{NodeID: w.self, KeyHashes: pin(expiredID, goodID)}, ""},
		{"another manager answers", good, door.Expect{NodeID: warden.NewID(), KeyHashes: pin(goodID)}, warden.CodeUnauthentic},
		{"another manager answers, loose", good, door.Expect{NodeID: warden.NewID(), Loose: true}, warden.CodeUnauthentic},
		{"a worker answers", worker, door.Expect{NodeID: w.self, KeyHashes: pin(workerID), Loose: true}, warden.CodeWrongRole},
		{"wrong key", renewed, door.Expect{NodeID: w.self, KeyHashes: pin(goodID)}, warden.CodeWrongKey},
		{"no pins", renewed, door.Expect{NodeID: w.self}, warden.CodeWrongKey},
		{"wrong key, loose", renewed, door.Expect{NodeID: w.self, KeyHashes: pin(goodID), Loose: true, Distrusted: distrusted}, ""},
		{"expired, pinned", expired, door.Expect{NodeID: w.self, KeyHashes: pin(expiredID)}, ""},
		{"expired, loose", expired, door.Expect{NodeID: w.self, KeyHashes: pin(goodID), Loose: true}, warden.CodeExpired},
		{"expired", expired, door.Expect{NodeID: w.self, KeyHashes: pin(goodID)}, warden.CodeWrongKey},
		{"not yet valid, pinned", early, door.Expect{NodeID: w.self, KeyHashes: pin(earlyID)}, warden.CodeClock},
		{"expired long ago, pinned", late, door.Expect{NodeID: w.self, KeyHashes: pin(lateID)}, warden.CodeExpired},
		{"not yet valid, pinned, at any time", early, door.Expect{NodeID: w.self, KeyHashes: pin(earlyID), Loose: true, AnyTime: true}, ""},
		{"not yet valid, loose, at any time", early, door.Expect{NodeID: w.self, Loose: true, AnyTime: true}, warden.CodeClock},
		{"expired long ago, pinned, at any time", late, door.Expect{NodeID: w.self, KeyHashes: pin(lateID), AnyTime: true}, ""},
		{"expired long ago, loose, at any time", late, door.Expect{NodeID: w.self, Loose: true, AnyTime: true}, warden.CodeExpired},
		{"other root, pinned, at any time", strange, door.Expect{NodeID: w.self, KeyHashes: pin(strangeID), AnyTime: true}, warden.CodeUnauthentic},
		{"distrusted, pinned", good, door.Expect{NodeID: w.self, KeyHashes: pin(goodID), Distrusted: distrusted}, ""},
		{"distrusted, loose", good, door.Expect{NodeID: w.self, Loose: true, Distrusted: distrusted}, warden.CodeRevoked},
		{"other root, pinned", strange, door.Expect{NodeID: w.self, KeyHashes: pin(strangeID), Loose: true}, warden.CodeUnauthentic},
	} {
		w.set(func() { w.cert = c.cert })
		if c.want.Root = w.root; c.cert == late {
			c.want.Root = ancient.root
		}
		conn, err := door.Dial(t.Context(), w.addr(), warden.DoorNode, client, c.want)
		if got := warden.CodeOf(err); got != c.code {
			t.Errorf("%s: %v [%s], want [%s]", c.name, err, got, c.code)
		}
		if err == nil {
			<-w.entered
			conn.Close()
		} else if !strings.Contains(err.Error(), w.addr()) {
			t.Errorf("%s: %q does not name the address", c.name, err)
		} else if r := <-w.refused; warden.CodeOf(r.err) != warden.CodeUnavailable { // the client's alert: it has failed no proof
			t.Errorf("%s: the manager refused for %v", c.name, r.err)
		}
	}
}

// A refusal of the client shows at its first read, with the kind of alert, whatever it wrote before.
func TestRefusedClientSeesItAtTheFirstRead(t *testing.T) {
	w := onLoopback(t, nil)
	cert, id := w.leaf(t, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.set(func() { w.shut[id.NodeID] = warden.Errorf(warden.CodeDenied, "", "no record") })
	conn, err := door.Dial(t.Context(), w.addr(), warden.DoorNode, cert, door.Expect{Root: w.root, NodeID: w.self, KeyHashes: [][32]byte{w.certID.KeyHash}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Write([]byte("eager"))
	if err := ended(t, conn); !strings.Contains(err.Error(), "bad certificate") {
		t.Errorf("read: %v", err)
	}
	if r := <-w.refused; warden.CodeOf(r.err) != warden.CodeDenied || r.id.NodeID != id.NodeID {
		t.Errorf("refused: %+v", r)
	}
}

func TestDialNobody(t *testing.T) {
	l, err := net.Listen("tcp", testcluster.Address(2377))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := door.Dial(ctx, l.Addr().String(), warden.DoorNode, nil, door.Expect{}); warden.CodeOf(err) != warden.CodeTimeout {
		t.Errorf("a silent manager: %v [%s]", err, warden.CodeOf(err))
	}
	address := l.Addr().String()
	l.Close()
	if _, err := door.Dial(t.Context(), address, warden.DoorNode, nil, door.Expect{}); warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("a closed port: %v [%s]", err, warden.CodeOf(err))
	}
}
