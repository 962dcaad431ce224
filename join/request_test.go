package join_test

import (
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"warden"
	"warden/api"
	"warden/join"
)

func TestParseRequest(t *testing.T) {
	good := &api.JoinRequest{TokenId: "0123456789ab", Csr: []byte{1}, Proof: make([]byte, 32), Hostname: "node-1", TimeNs: 1}
	for _, tt := range []struct {
		name   string
		change func(*api.JoinRequest)
		want   warden.Code
	}{
		{"good", func(*api.JoinRequest) {}, ""},
		{"full", func(r *api.JoinRequest) {
			r.Advertise, r.Availability, r.Version = "db.example:2377", api.Availability_AVAILABILITY_DRAIN, "v0.1.0-rc.1+abc"
		}, ""},
		{"no token ID", func(r *api.JoinRequest) { r.TokenId = "" }, warden.CodeInvalid},
		{"token ID in capitals", func(r *api.JoinRequest) { r.TokenId = "0123456789AB" }, warden.CodeInvalid},
		{"long token ID", func(r *api.JoinRequest) { r.TokenId += "0" }, warden.CodeInvalid},
		{"no CSR", func(r *api.JoinRequest) { r.Csr = nil }, warden.CodeInvalid},
		{"CSR of 8 KiB", func(r *api.JoinRequest) { r.Csr = make([]byte, warden.CSRBytesMax) }, ""},
		{"larger CSR", func(r *api.JoinRequest) { r.Csr = make([]byte, warden.CSRBytesMax+1) }, warden.CodeTooLarge},
		{"larger request", func(r *api.JoinRequest) { r.Csr = make([]byte, warden.JoinFrameMax) }, warden.CodeTooLarge},
		{"short proof", func(r *api.JoinRequest) { r.Proof = r.Proof[:31] }, warden.CodeInvalid},
		{"no host name", func(r *api.JoinRequest) { r.Hostname = "" }, warden.CodeInvalid},
		{"host name with newline", func(r *api.JoinRequest) { r.Hostname = "a\nb" }, warden.CodeInvalid},
		{"host name with newline at its end", func(r *api.JoinRequest) { r.Hostname = "a\n" }, warden.CodeInvalid},
		{"host name with escape", func(r *api.JoinRequest) { r.Hostname = "a\x1b[2Jb" }, warden.CodeInvalid},
		{"host name as option", func(r *api.JoinRequest) { r.Hostname = "-rf" }, warden.CodeInvalid},
		{"host name as path", func(r *api.JoinRequest) { r.Hostname = "../x" }, warden.CodeInvalid},
		{"longest host name", func(r *api.JoinRequest) { r.Hostname = strings.Repeat("a", warden.HostnameMax) }, ""},
		{"longer host name", func(r *api.JoinRequest) { r.Hostname = strings.Repeat("a", warden.HostnameMax+1) }, warden.CodeInvalid},
		{"advertised nonsense", func(r *api.JoinRequest) { r.Advertise = "here" }, warden.CodeInvalid},
		{"unknown availability", func(r *api.JoinRequest) { r.Availability = 99 }, warden.CodeInvalid},
		{"version with blanks", func(r *api.JoinRequest) { r.Version = "0.1 beta" }, warden.CodeInvalid},
		{"long version", func(r *api.JoinRequest) { r.Version = strings.Repeat("1", 65) }, warden.CodeInvalid},
	} {
		r := api.Clone(good)
		tt.change(r)
		got, err := join.ParseRequest(must[[]byte](t)(proto.Marshal(r)))
		wantCode(t, tt.name, err, tt.want)
		if err == nil && !proto.Equal(got, r) {
			t.Errorf("%s: ParseRequest = %v, want %v", tt.name, got, r)
		}
	}
}

// TestParseRequestIsTheInverseOfMarshal, and no byte added to or taken from a valid request makes another valid one with
// more in it than its fields.
func TestParseRequestIsTheInverseOfMarshal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := &api.JoinRequest{
			TokenId:  rapid.StringMatching(`[0-9a-z]{12}`).Draw(t, "token ID"),
			Csr:      rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(t, "CSR"),
			Proof:    rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "proof"),
			Hostname: rapid.StringMatching(`[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?`).Draw(t, "host name"),
			TimeNs:   rapid.Int64().Draw(t, "time"),
			Version:  rapid.StringMatching(`[0-9a-z.+-]{0,20}`).Draw(t, "version"),
		}
		body, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := join.ParseRequest(body)
		if err != nil || !proto.Equal(got, r) {
			t.Fatalf("ParseRequest = %v, %v, want %v", got, err, r)
		}
	})
}

func TestAdvertised(t *testing.T) {
	from := netip.MustParseAddr("192.0.2.7")
	for _, tt := range []struct{ in, want string }{
		{":2377", "192.0.2.7:2377"},
		{"10.0.0.1:1", "10.0.0.1:1"},
		{"[2001:db8::1]:65535", "[2001:db8::1]:65535"},
		{"manager-1.example:2377", "manager-1.example:2377"},
	} {
		if got, err := join.Advertised(tt.in, from); err != nil || got != tt.want {
			t.Errorf("Advertised(%q) = %q, %v, want %q", tt.in, got, err, tt.want)
		}
	}
	for _, bad := range []string{"", ":", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:02377", "10.0.0.1:+2377", "10.0.0.1:http",
		"0.0.0.0:2377", "[::]:2377", "224.0.0.1:2377", "[::ffff:10.0.0.1]:2377", "[fe80::1%eth0]:2377", "a b:2377", "a/b:2377", "a\x00:2377",
		"user@host:2377", strings.Repeat("a", 300) + ":2377", "2001:db8::1:2377"} {
		if got, err := join.Advertised(bad, from); warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" {
			t.Errorf("Advertised(%q) = %q, %v, want [invalid] with a hint", bad, got, err)
		}
	}
	if got, err := join.Advertised(":2377", netip.MustParseAddr("2001:db8::9")); err != nil || got != "[2001:db8::9]:2377" {
		t.Errorf("Advertised from IPv6 = %q, %v", got, err)
	}
	if got, err := join.Advertised(":2377", netip.Addr{}); err == nil {
		t.Errorf("Advertised from nowhere = %q", got)
	}
}
