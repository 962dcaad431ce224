package join_test

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"io"
	"math/big"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/internal/testcluster"
	"warden/join"
	"warden/tokens"
)

// TestI2TrustIsDecidedInTheHandshake: whoever does not prove to be a manager under the pinned root gets no byte from the
// joiner.
func TestI2TrustIsDecidedInTheHandshake(t *testing.T) {
	c, other := newCluster(t), newCluster(t)
	now, day := time.Now(), 24*time.Hour
	good := c.manager(t)
	foreign := other.manager(t)
	beside := *foreign
	beside.Certificate = append(beside.Certificate[:3:3], c.rootDER)
	noRoot := *good
	noRoot.Certificate = good.Certificate[:2]
	for _, tt := range []struct {
		name string
		cert *tls.Certificate
		want warden.Code
	}{
		{"good", good, ""},
		{"another cluster", foreign, warden.CodeWrongRoot},
		{"another cluster's leaf beside the pinned root", &beside, warden.CodeWrongCluster},
		{"root not sent", &noRoot, warden.CodeWrongRoot},
		{"expired leaf", c.certificate(t, ca.RoleManager, now.Add(-10*day), day), warden.CodeExpired},
		{"leaf not yet valid", c.certificate(t, ca.RoleManager, now.Add(10*day), day), warden.CodeClock},
		{"worker posing as a manager", c.certificate(t, ca.RoleWorker, now, day), warden.CodeWrongRole},
		{"root posing as a manager", &tls.Certificate{Certificate: [][]byte{c.rootDER}, PrivateKey: c.rootKey}, warden.CodeUnauthentic},
		{"self-signed beside the pinned root", selfSigned(t, c), warden.CodeUnauthentic},
	} {
		received := make(chan int64, 1)
		addr := listen(t, func(conn net.Conn) {
			n, _ := io.CopyN(io.Discard, tls.Server(conn, serverConfig(tt.cert)), 1)
			received <- n
		})
		_, err := join.Join(t.Context(), addr, c.mint(t, tokens.Rule{}), newRequest(t), nil)
		if n := <-received; (n != 0) != (tt.want == "") {
			t.Errorf("%s: the joiner sent %d bytes", tt.name, n)
		}
		if tt.want == "" {
			continue // the manager hung up after one byte
		}
		wantCode(t, tt.name, err, tt.want)
		if times := strings.Count(err.Error(), "Z"); (tt.want == warden.CodeExpired || tt.want == warden.CodeClock) && times < 2 {
			t.Errorf("%s: error %q does not show both times", tt.name, err)
		}
	}
}

func selfSigned(t testing.TB, c *cluster) *tls.Certificate {
	key := must[crypto.Signer](t)(ca.NewKey())
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		Subject: pkix.Name{CommonName: warden.NewID(), Organization: []string{c.id}, OrganizationalUnit: []string{ca.RoleManager}}}
	der := must[[]byte](t)(x509.CreateCertificate(nil, template, template, key.Public(), key))
	return &tls.Certificate{Certificate: [][]byte{der, c.rootDER}, PrivateKey: key}
}

// TestOtherServers: what listens is no join door at all.
func TestOtherServers(t *testing.T) {
	c := newCluster(t)
	cert := c.manager(t)
	tok := c.mint(t, tokens.Rule{})
	old := serverConfig(cert)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	otherDoor, noDoor := serverConfig(cert), serverConfig(cert)
	otherDoor.NextProtos, noDoor.NextProtos = []string{warden.DoorNode}, nil
	drain := func(cfg *tls.Config) func(net.Conn) {
		return func(conn net.Conn) { io.Copy(io.Discard, tls.Server(conn, cfg)) }
	}
	for _, tt := range []struct {
		name  string
		serve func(net.Conn)
		want  warden.Code
	}{
		{"TLS 1.2", drain(old), warden.CodeUnavailable},
		{"another door", drain(otherDoor), warden.CodeUnavailable},
		{"no door", drain(noDoor), warden.CodeUnsupported},
		{"no TLS", func(conn net.Conn) { io.WriteString(conn, "220 mail ESMTP\r\n") }, warden.CodeUnavailable},
		{"closes at once", func(net.Conn) {}, warden.CodeUnavailable},
	} {
		_, err := join.Join(t.Context(), listen(t, tt.serve), tok, newRequest(t), nil)
		wantCode(t, tt.name, err, tt.want)
		if warden.HintOf(err) == "" {
			t.Errorf("%s: no hint", tt.name)
		}
	}
	_, err := join.Join(t.Context(), testcluster.Address(2377), tok, newRequest(t), nil)
	wantCode(t, "nobody listens", err, warden.CodeUnavailable)
}

// TestRelayInTheMiddle: an evicted manager still has a leaf and its key. It answers the joiner and relays to a real manager.
func TestRelayInTheMiddle(t *testing.T) {
	c := newCluster(t)
	realManager := c.serve(t, c.manager(t))
	evicted := c.manager(t)
	var relayed atomic.Int64
	addr := listen(t, func(conn net.Conn) {
		in := tls.Server(conn, serverConfig(evicted))
		out, err := tls.Dial("tcp", realManager, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{warden.DoorJoin}})
		if err != nil {
			return
		}
		defer out.Close()
		go func() {
			n, _ := io.Copy(out, in)
			relayed.Add(n)
		}()
		io.Copy(in, out)
		in.Close()
	})
	_, err := join.Join(t.Context(), addr, c.mint(t, tokens.Rule{}), newRequest(t), nil)
	wantCode(t, "relayed", err, warden.CodeUnknownToken)
	if len(c.admitted) != 0 {
		t.Error("the relay was admitted")
	}
}

// TestReplayOnAnotherConnection: the bytes of a request that was granted prove nothing elsewhere.
func TestReplayOnAnotherConnection(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	first := dialRaw(t, addr)
	captured := frameOf(t, first.valid(t, c.mint(t, tokens.Rule{})))
	first.Write(captured)
	if reply := readReply(t, first); reply.Error != nil || len(reply.Grant) == 0 {
		t.Fatalf("the first request got %v", reply.Error)
	}
	second := dialRaw(t, addr)
	second.Write(captured)
	if reply := readReply(t, second); reply.GetError().GetCode() != string(warden.CodeUnknownToken) {
		t.Errorf("the replay got %v", reply)
	}
	if len(c.admitted) != 1 {
		t.Errorf("%d were admitted", len(c.admitted))
	}
}

// TestOneRequestPerConnection: what follows the first request is never read.
func TestOneRequestPerConnection(t *testing.T) {
	c := newCluster(t)
	r := dialRaw(t, c.serve(t, c.manager(t)))
	tok := c.mint(t, tokens.Rule{})
	r.Write(append(frameOf(t, r.valid(t, tok)), frameOf(t, r.valid(t, tok))...))
	if reply := readReply(t, r); reply.Error != nil {
		t.Errorf("the first request got %v", reply.Error)
	}
	if len(c.admitted) != 1 {
		t.Errorf("%d were admitted", len(c.admitted))
	}
}

// TestServerWantsItsDoor: Go lets a client in that offers no ALPN protocol.
func TestServerWantsItsDoor(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	conn := must[*tls.Conn](t)(tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true}))
	defer conn.Close()
	r := &raw{conn, exporterOf(t, conn)}
	r.Write(frameOf(t, r.valid(t, c.mint(t, tokens.Rule{}))))
	head := make([]byte, 4)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Fatal(err)
	}
	reply := new(api.JoinReply)
	body := make([]byte, binary.BigEndian.Uint32(head))
	if _, err := io.ReadFull(r, body); err != nil || proto.Unmarshal(body, reply) != nil || reply.GetError().GetCode() != string(warden.CodeUnsupported) {
		t.Errorf("answered %v, %v, want [unsupported]", reply, err)
	}
	if len(c.admitted) != 0 {
		t.Error("admitted")
	}
}

func TestHostileFrames(t *testing.T) {
	c := newCluster(t)
	addr := c.serve(t, c.manager(t))
	tok := c.mint(t, tokens.Rule{})
	for _, tt := range []struct {
		name string
		make func(r *raw) []byte
		want warden.Code
	}{
		{"good", func(r *raw) []byte { return frameOf(t, r.valid(t, tok)) }, ""},
		{"nothing", func(*raw) []byte { return nil }, warden.CodeUnavailable},
		{"half a length", func(*raw) []byte { return []byte{0, 0} }, warden.CodeInvalid},
		{"length zero", func(*raw) []byte { return []byte{0, 0, 0, 0} }, warden.CodeInvalid},
		{"4 GiB announced", func(*raw) []byte { return []byte{255, 255, 255, 255} }, warden.CodeTooLarge},
		{"one byte too many", func(*raw) []byte { return binary.BigEndian.AppendUint32(nil, warden.JoinFrameMax+1) }, warden.CodeTooLarge},
		{"truncated", func(r *raw) []byte { b := frameOf(t, r.valid(t, tok)); return b[:len(b)-1] }, warden.CodeInvalid},
		{"garbage", func(*raw) []byte { return frame([]byte("GET / HTTP/1.1\r\n\r\n")) }, warden.CodeInvalid},
		{"zeros", func(*raw) []byte { return frame(make([]byte, warden.JoinFrameMax)) }, warden.CodeInvalid},
		{"unknown field", func(r *raw) []byte {
			return frame(append(must[[]byte](t)(proto.Marshal(r.valid(t, tok))), 0xfa, 0x01, 1, 'x'))
		}, warden.CodeInvalid},
		{"no proof", func(r *raw) []byte { m := r.valid(t, tok); m.Proof = nil; return frameOf(t, m) }, warden.CodeInvalid},
		{"long proof", func(r *raw) []byte { m := r.valid(t, tok); m.Proof = append(m.Proof, 0); return frameOf(t, m) }, warden.CodeInvalid},
		{"wrong proof", func(r *raw) []byte { m := r.valid(t, tok); m.Proof[0] ^= 1; return frameOf(t, m) }, warden.CodeUnknownToken},
		{"CSR not covered by the proof", func(r *raw) []byte {
			m := r.valid(t, tok)
			m.Csr = r.valid(t, tok).Csr
			return frameOf(t, m)
		}, warden.CodeUnknownToken},
		{"CSR that is none", func(r *raw) []byte {
			m := r.valid(t, tok)
			m.Csr = []byte("not a CSR")
			m.Proof = tokens.Prove(tok.Key(), r.export, m.Csr)
			return frameOf(t, m)
		}, warden.CodeInvalid},
		{"no time", func(r *raw) []byte { m := r.valid(t, tok); m.TimeNs = 0; return frameOf(t, m) }, warden.CodeClock},
		{"the end of time", func(r *raw) []byte { m := r.valid(t, tok); m.TimeNs = -1 << 63; return frameOf(t, m) }, warden.CodeClock},
	} {
		before := len(c.admitted)
		r := dialRaw(t, addr)
		r.Write(tt.make(r))
		r.CloseWrite()
		reply := readReply(t, r)
		if got := warden.Code(reply.GetError().GetCode()); got != tt.want {
			t.Errorf("%s: answered %v, want [%s]", tt.name, reply.Error, tt.want)
		}
		if (len(c.admitted) != before) != (tt.want == "") {
			t.Errorf("%s: %d more were admitted", tt.name, len(c.admitted)-before)
		}
	}
}

// TestHostileReplies: a manager under the pinned root that does not hold the token, or holds it and lies.
func TestHostileReplies(t *testing.T) {
	c := newCluster(t)
	cert := c.manager(t)
	tok := c.mint(t, tokens.Rule{})
	grant := []byte{1}
	for _, tt := range []struct {
		name  string
		reply func(export []byte) []byte
		want  warden.Code
	}{
		{"nothing", func([]byte) []byte { return nil }, warden.CodeUnavailable},
		{"truncated", func([]byte) []byte { return []byte{0, 0, 0, 9, 1} }, warden.CodeInvalid},
		{"too large", func([]byte) []byte { return binary.BigEndian.AppendUint32(nil, warden.JoinReplyMax+1) }, warden.CodeTooLarge},
		{"garbage", func([]byte) []byte { return frame([]byte{255, 255}) }, warden.CodeInvalid},
		{"neither grant nor error", func([]byte) []byte { return frameOf(t, &api.JoinReply{Mac: make([]byte, 32)}) }, warden.CodeUnauthentic},
		{"grant without a MAC", func([]byte) []byte { return frameOf(t, &api.JoinReply{Grant: grant}) }, warden.CodeUnauthentic},
		{"MAC with another key", func(export []byte) []byte {
			return frameOf(t, &api.JoinReply{Grant: grant, Mac: tokens.ProveGrant([32]byte{}, export, grant)})
		}, warden.CodeUnauthentic},
		{"MAC of another connection", func([]byte) []byte {
			return frameOf(t, &api.JoinReply{Grant: grant, Mac: tokens.ProveGrant(tok.Key(), make([]byte, 32), grant)})
		}, warden.CodeUnauthentic},
		{"good MAC over garbage", func(export []byte) []byte {
			return frameOf(t, &api.JoinReply{Grant: grant, Mac: tokens.ProveGrant(tok.Key(), export, grant)})
		}, warden.CodeInvalid},
		{"good MAC over an empty grant", func(export []byte) []byte {
			return frameOf(t, &api.JoinReply{Mac: tokens.ProveGrant(tok.Key(), export, nil)})
		}, warden.CodeInvalid},
		{"error beside a grant", func(export []byte) []byte {
			return frameOf(t, &api.JoinReply{Grant: grant, Mac: tokens.ProveGrant(tok.Key(), export, grant), Error: &api.ErrorDetail{Code: "denied", Text: "no"}})
		}, warden.CodeDenied},
		{"error that confuses a terminal", func([]byte) []byte {
			return frameOf(t, &api.JoinReply{Error: &api.ErrorDetail{Code: "denied", Text: "\x1b[2Jgone\n\u202e" + strings.Repeat("x", 5000)}})
		}, warden.CodeDenied},
	} {
		addr := listen(t, func(conn net.Conn) {
			tc := tls.Server(conn, serverConfig(cert))
			if _, err := io.ReadFull(tc, make([]byte, 64)); err != nil {
				return
			}
			tc.Write(tt.reply(exporterOf(t, tc)))
			tc.CloseWrite()
			io.Copy(io.Discard, tc)
		})
		_, err := join.Join(t.Context(), addr, tok, newRequest(t), nil)
		wantCode(t, tt.name, err, tt.want)
		if s := err.Error(); strings.ContainsAny(s, "\x1b\n\u202e") || len(s) > 2000 {
			t.Errorf("%s: error %.80q… of %d bytes", tt.name, s, len(s))
		}
	}
}

// TestGrantsThatDoNotHold: the manager holds the token, and grants something else than it should.
func TestGrantsThatDoNotHold(t *testing.T) {
	c, other := newCluster(t), newCluster(t)
	addr := c.serve(t, c.manager(t))
	elsewhere := other.manager(t).Certificate
	for _, tt := range []struct {
		name  string
		alter func(*api.JoinGrant)
		want  warden.Code
	}{
		{"good", func(*api.JoinGrant) {}, ""},
		{"no chain", func(g *api.JoinGrant) { g.Chain = nil }, warden.CodeInvalid},
		{"another's leaf", func(g *api.JoinGrant) { g.Chain = c.manager(t).Certificate }, warden.CodeWrongKey},
		{"another cluster's chain", func(g *api.JoinGrant) { g.Chain = elsewhere }, warden.CodeWrongCluster},
		{"another root at the end", func(g *api.JoinGrant) { g.Chain = append(g.Chain, elsewhere[2]) }, warden.CodeWrongRoot},
		{"no root", func(g *api.JoinGrant) { g.Chain = g.Chain[:2] }, warden.CodeWrongRoot},
		{"another ID", func(g *api.JoinGrant) { g.NodeId = warden.NewID() }, warden.CodeUnauthentic},
		{"another role", func(g *api.JoinGrant) { g.Role = api.Role_ROLE_WORKER }, warden.CodeUnauthentic},
		{"another zone", func(g *api.JoinGrant) { g.Zone = "pci" }, warden.CodeUnauthentic},
		{"another cluster's ID", func(g *api.JoinGrant) { g.ClusterId = other.id }, warden.CodeUnauthentic},
		{"no lock state", func(g *api.JoinGrant) { g.Lock = nil }, warden.CodeInvalid},
		{"locked without a recipient", func(g *api.JoinGrant) { g.Lock = &api.LockState{Autolock: true} }, warden.CodeInvalid},
		{"locked", func(g *api.JoinGrant) { g.Lock = &api.LockState{Autolock: true, Recipient: make([]byte, 32)} }, ""},
	} {
		c.alter = tt.alter
		g, err := join.Join(t.Context(), addr, c.mint(t, tokens.Rule{Role: ca.RoleManager, Zone: "default"}), newRequest(t), nil)
		wantCode(t, tt.name, err, tt.want)
		if (g == nil) == (tt.want == "") {
			t.Errorf("%s: Join = %v beside error %v", tt.name, g, err)
		}
	}
}
