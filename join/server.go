package join

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/tokens"
)

// Admission is a request to join that has proven its token and that the token's rule admits.
type Admission struct {
	TokenID      string
	CSR          []byte   // parses; only its public key is to be used (I1)
	Parsed       *ca.CSR  // that key; ca.Authority.Vet takes it without a second check of its signature
	KeyHash      [32]byte // SHA-256 of that key's SubjectPublicKeyInfo; with TokenID it makes a repeated join the same join
	Hostname     string   // the joiner's word
	IP           netip.Addr
	Advertise    string // managers: host:port; workers: empty
	Availability api.Availability
	Version      string
}

// Server answers at the join door. Its fields are set before the first Serve. Safe for concurrent use.
type Server struct {
	// Admit commits the node, issues its leaf, and returns the grant. It must be idempotent by (TokenID, KeyHash), and it alone
	// counts the token's uses, in the commit: a used-up token is still passed to it, since the request may be the repeat of a
	// join whose reply was lost. It gives CodeUsedUp where it is not, and CodeUnavailable where no leader can be asked.
	Admit func(ctx context.Context, a Admission) (*api.JoinGrant, error)
	// Token returns what the state holds of a token.
	Token func(id string) (key [32]byte, rule tokens.Rule, ok bool)
	// Now is the clock by which joiners and rules are judged. nil: time.Now.
	Now func() time.Time
	// Limiter bounds attempts. nil: they are not bounded here.
	Limiter *Limiter
	Logger  *slog.Logger
}

// attempt is one connection at the door.
type attempt struct {
	conn    *tls.Conn
	a       Admission // as far as it is known
	key     [32]byte  // of the token, once it is proven
	export  []byte
	proven  bool // the limiter knows that the token is
	reached bool // Admit was asked: an error may be this side's fault, and the node may exist
}

// Serve takes one request from the connection, answers it, and closes the connection, all within JoinTimeout, the first byte
// within HandshakeTimeout. The error is what was answered, or why nothing could be; it has been logged. It ends early when ctx
// does.
func (s *Server) Serve(ctx context.Context, conn *tls.Conn) error {
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, warden.JoinTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.NetConn().Close() })()
	conn.SetReadDeadline(time.Now().Add(warden.HandshakeTimeout))
	t := &attempt{conn: conn, a: Admission{IP: remoteIP(conn)}}
	if s.Limiter == nil {
		return s.answer(ctx, t)
	}
	if err := s.Limiter.begin(t.a.IP, time.Now()); err != nil {
		return s.refuse(t, err)
	}
	err := s.answer(ctx, t)
	s.Limiter.end(t.a.IP, time.Now(), t.proven, err != nil && warden.CodeOf(err) != warden.CodeLimited && (!t.reached || warden.CodeOf(err).Refusal()))
	return err
}

// answer sends a grant with its MAC, or what refuse makes of the error.
func (s *Server) answer(ctx context.Context, t *attempt) error {
	grant, err := s.judge(ctx, t)
	if err != nil {
		return s.refuse(t, err)
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(grant)
	if err != nil {
		return s.refuse(t, warden.Errorf(warden.CodeInternal, "marshalling grant", "%w", err))
	}
	if len(body) > grantMax {
		return s.refuse(t, warden.Errorf(warden.CodeInternal, "marshalling grant", "%d bytes, at most %d fit", len(body), grantMax))
	}
	err = writeFrame(t.conn, &api.JoinReply{Grant: body, Mac: tokens.ProveGrant(t.key, t.export, body)}, warden.JoinReplyMax)
	about := []any{"node_id", grant.GetNodeId(), "role", grant.GetRole().Word(), "zone", grant.GetZone(),
		"remote_ip", t.a.IP, "token_id", t.a.TokenID, "hostname", t.a.Hostname}
	if err != nil {
		s.Logger.Warn("lost the reply to a join", append(about, "error", err)...)
		return err
	}
	s.Logger.Info("admitted node", about...)
	return nil
}

// refuse logs the error, answers with it and nothing else, and returns it. What went wrong inside is for the log alone.
// That the answer may not arrive changes nothing.
func (s *Server) refuse(t *attempt, err error) error {
	code := warden.CodeOf(err)
	level := slog.LevelWarn
	if code == warden.CodeLimited { // anybody can cause these by the thousand
		level = slog.LevelDebug
	}
	s.Logger.Log(context.Background(), level, "refused join", "remote_ip", t.a.IP, "token_id", t.a.TokenID, "hostname", t.a.Hostname, "code", code, "error", err)
	detail := api.Detail(err)
	if code == warden.CodeInternal {
		detail.Text, detail.Hint = "the manager failed", "its log says why"
	}
	detail.TimeNs = s.now().UnixNano()
	writeFrame(t.conn, &api.JoinReply{Error: detail}, warden.JoinReplyMax)
	return err
}

// judge reads the request and takes it through every check to Admit, the cheap ones first.
func (s *Server) judge(ctx context.Context, t *attempt) (*api.JoinGrant, error) {
	r, err := s.receive(ctx, t)
	if err != nil {
		return nil, err
	}
	t.a.TokenID, t.a.Hostname, t.a.Availability, t.a.Version = r.TokenId, r.Hostname, r.Availability, r.Version
	rule, err := s.prove(t, r)
	if err != nil {
		return nil, err
	}
	if s.Limiter != nil {
		if err := s.Limiter.proven(t.a.IP); err != nil {
			return nil, err
		}
		t.proven = true
	}
	now := s.now()
	if theirs := time.Unix(0, r.TimeNs); theirs.Sub(now).Abs() > SkewMax {
		return nil, warden.Hint(warden.Errorf(warden.CodeClock, "comparing clocks", "they differ by more than %s: the joiner's says %s, the manager's %s",
			SkewMax, stamp(theirs), stamp(now)), "set the clocks of both hosts (NTP), then join again")
	}
	used := rule.Admit(tokens.Attempt{Hostname: r.Hostname, IP: t.a.IP, Now: now})
	if used != nil && warden.CodeOf(used) != warden.CodeUsedUp {
		return nil, used
	}
	csr, err := ca.ParseCSR(r.Csr)
	if err != nil {
		return nil, err
	}
	t.a.CSR, t.a.Parsed, t.a.KeyHash = r.Csr, csr, csr.KeyHash
	if rule.Role == ca.RoleManager {
		if t.a.Advertise, err = Advertised(r.Advertise, t.a.IP); err != nil {
			return nil, err
		}
	}
	t.reached = true
	grant, err := s.Admit(ctx, t.a)
	switch {
	case used != nil && warden.CodeOf(err) == warden.CodeUsedUp:
		return nil, used // says the same, with the hint
	case err != nil:
		return nil, err
	case grant == nil:
		return nil, warden.Errorf(warden.CodeInternal, "admitting", "there is no grant")
	}
	return grant, nil
}

// receive checks the connection, takes its exporter, and reads the request.
func (s *Server) receive(ctx context.Context, t *attempt) (*api.JoinRequest, error) {
	if err := t.conn.HandshakeContext(ctx); err != nil {
		return nil, network("shaking hands", err)
	}
	cs := t.conn.ConnectionState()
	if err := checkDoor(&cs); err != nil {
		return nil, err
	}
	var err error
	if t.export, err = exporter(&cs); err != nil {
		return nil, err
	}
	n, err := readLength(t.conn, warden.JoinFrameMax)
	if err != nil {
		return nil, err
	}
	t.conn.SetReadDeadline(time.Now().Add(warden.JoinTimeout - warden.HandshakeTimeout))
	body, err := readBody(t.conn, n)
	if err != nil {
		return nil, err
	}
	return ParseRequest(body)
}

// prove looks the token up and checks the proof. An unknown token costs and says the same as a wrong secret: its proof is
// checked against a key that nobody knows.
func (s *Server) prove(t *attempt, r *api.JoinRequest) (tokens.Rule, error) {
	var nobody [32]byte
	rand.Read(nobody[:]) // never fails (crypto/rand since Go 1.24)
	key, rule, ok := s.Token(r.TokenId)
	if !ok {
		key = nobody
	}
	if proven := tokens.CheckProof(key, t.export, r.Csr, r.Proof); !proven || !ok {
		return tokens.Rule{}, warden.Hint(warden.Errorf(warden.CodeUnknownToken, "proving the token", "no such token here, or its secret is wrong"),
			"copy the whole token again, or ask for a new one: wardenctl swarm join-token")
	}
	t.key = key
	return rule, nil
}

func (s *Server) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

func remoteIP(conn *tls.Conn) netip.Addr {
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap().WithZone("")
	}
	ap, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap().WithZone("")
}
