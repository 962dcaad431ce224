package door_test

import (
	"context"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"warden"
	"warden/ca"
	"warden/door"
)

// One connection through the port, both ends, over loopback: X25519MLKEM768, chains of three certificates.
//
// Both ends must pay at the join door, in primitives of P-256 (S signature, V verification) and of the key exchange (X25519:
// two key pairs and two secrets; ML-KEM-768: a key pair, an encapsulation, a decapsulation): the server S, the client V for
// the handshake and V for the leaf (V for the issuing CA the first time). The node and peer doors add S for the client's
// handshake, and V for it and V for its leaf on the server.
func BenchmarkHandshake(b *testing.B) {
	for _, name := range []string{warden.DoorJoin, warden.DoorNode} {
		b.Run(name[len("warden-"):len(name)-len("/1")], func(b *testing.B) {
			served := make(chan struct{}, 1)
			w := onLoopback(b, map[string]func(context.Context, *door.Conn){name: func(context.Context, *door.Conn) { served <- struct{}{} }})
			var cert *tls.Certificate
			if name != warden.DoorJoin {
				var id ca.Identity
				cert, id = w.leaf(b, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
				w.record(id)
			}
			b.ReportAllocs()
			for b.Loop() {
				conn, err := door.Dial(b.Context(), w.addr(), name, cert, door.Expect{Root: w.root, NodeID: w.self, KeyHashes: [][32]byte{w.certID.KeyHash}})
				if err != nil {
					b.Fatal(err)
				}
				<-served
				if _, err := conn.Read(make([]byte, 1)); err == nil {
					b.Fatal("read a byte")
				}
				conn.Close()
			}
		})
	}
}

// Many at once from one address: how many the port takes a second.
func BenchmarkHandshakes(b *testing.B) {
	w := onLoopback(b, map[string]func(context.Context, *door.Conn){warden.DoorNode: func(context.Context, *door.Conn) {}})
	cert, id := w.leaf(b, ca.RoleWorker, warden.NewID(), warden.LeafTTLDefault, time.Now())
	w.record(id)
	b.SetParallelism(16)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			conn, err := door.Dial(b.Context(), w.addr(), warden.DoorNode, cert, door.Expect{Root: w.root, NodeID: w.self, KeyHashes: [][32]byte{w.certID.KeyHash}})
			if err != nil {
				b.Error(err)
				return
			}
			_, err = conn.Read(make([]byte, 1))
			if ne, ok := err.(net.Error); err == nil || ok && ne.Timeout() {
				b.Error("the connection stays open")
			}
			conn.Close()
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conns/s")
}
