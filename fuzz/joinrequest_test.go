package fuzz_test

import (
	"bytes"
	"net/netip"
	"testing"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/join"
	"warden/tokens"
)

// FuzzJoinRequest: whatever parses as a join request is within all bounds, has nothing but its known fields, and is the same
// after another trip over the wire.
func FuzzJoinRequest(f *testing.F) {
	request := &api.JoinRequest{TokenId: "0123456789ab", Csr: bytes.Repeat([]byte{0x30}, 200), Proof: bytes.Repeat([]byte{7}, 32), Hostname: "node-1", TimeNs: 1}
	full := api.Clone(request)
	full.Advertise, full.Availability, full.Version = "[2001:db8::1]:2377", api.Availability_AVAILABILITY_DRAIN, "0.1.0"
	for _, r := range []*api.JoinRequest{request, full} {
		body, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		if _, err := join.ParseRequest(body); err != nil {
			f.Fatalf("the seed does not parse: %v", err)
		}
		f.Add(body)
		f.Add(body[:len(body)-1])
		f.Add(append(body[:len(body):len(body)], body...))
		f.Add(append(body[:len(body):len(body)], 0xfa, 0x01, 1, 'x'))
	}
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := join.ParseRequest(body)
		if err != nil {
			if code := warden.CodeOf(err); code != warden.CodeInvalid && code != warden.CodeTooLarge {
				t.Fatalf("ParseRequest = %v [%s]", err, code)
			}
			return
		}
		if len(body) > warden.JoinFrameMax || len(r.Csr) > warden.CSRBytesMax || len(r.Proof) != 32 || len(r.Hostname) > warden.HostnameMax ||
			!tokens.ValidID(r.TokenId) || len(r.ProtoReflect().GetUnknown()) != 0 {
			t.Fatalf("ParseRequest lets %v through", r)
		}
		if r.Advertise != "" {
			if _, err := join.Advertised(r.Advertise, netip.IPv6Loopback()); err != nil {
				t.Fatalf("the advertised address %q: %v", r.Advertise, err)
			}
		}
		again, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := join.ParseRequest(again); err != nil || !proto.Equal(back, r) {
			t.Fatalf("a second trip gives %v, %v, want %v", back, err, r)
		}
	})
}
