package adversary

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/door"
	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/join"
	"warden/store/rafttransport"
	"warden/tokens"
)

// still does a round of honest work, with what the attacker holds in place, and compares.
func (a *arena) still(t *testing.T) {
	t.Helper()
	took := a.honest(t, 1)
	t.Logf("without:%s; beside the attacker:%s", a.quiet, took)
	a.compare(t, took)
	a.alive(t)
}

// TestAdversaries runs all attacks on one cluster but that of containers. The last are those that need a manager's key: from there on two are left.
func TestAdversaries(t *testing.T) {
	a := newArena(t)
	m := a.m[0]
	m.Ctl("zone", "create", "pci")
	m.Ctl("service", "create", "--name", "target", "--constraint", "node.hostname==w1", "host", "sleep", "1000")

	t.Run("StolenTokenOfAnotherRole", a.stolenTokens)
	t.Run("ReplayedJoin", a.replayedJoin)
	t.Run("ManInTheMiddle", a.manInTheMiddle)
	t.Run("OtherNodesTasks", a.otherNodesTasks)
	t.Run("AnotherZoneLabelOrID", a.claims)
	t.Run("Descriptions", a.descriptions)
	t.Run("HeldAfterEviction", a.heldAfterEviction)
	t.Run("OnTheNode", a.onTheNode)
	t.Run("Floods", a.floods)
	t.Run("DemotedManager", a.demotedManager)
}

func parse(t testing.TB, token string) tokens.Token {
	t.Helper()
	tk, err := tokens.Parse(token)
	if err != nil {
		t.Fatal(err)
	}
	return tk
}

func frameOf(t testing.TB, r *api.JoinRequest) []byte {
	t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// request makes what a joiner sends on conn with a token.
func request(t testing.TB, conn *tls.Conn, token tokens.Token, csr []byte) *api.JoinRequest {
	t.Helper()
	cs := conn.ConnectionState()
	exporter, err := cs.ExportKeyingMaterial("EXPORTER-warden-join", nil, 32)
	if err != nil {
		t.Fatal(err)
	}
	return &api.JoinRequest{TokenId: token.ID, Csr: csr, Proof: tokens.Prove(token.Key(), exporter, csr), Hostname: "liar", TimeNs: time.Now().UnixNano(), Version: "test"}
}

// ask sends a frame at the join door and returns the answer.
func (a *arena) ask(t testing.TB, conn *tls.Conn, frame []byte) *api.JoinReply {
	t.Helper()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(frame); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(conn)
	if err != nil || len(b) < 4 {
		t.Fatalf("read %d bytes: %v", len(b), err)
	}
	reply := new(api.JoinReply)
	if err := proto.Unmarshal(b[4:], reply); err != nil {
		t.Fatal(err)
	}
	return reply
}

// knock shakes hands at the join door.
func (a *arena) knock(t testing.TB, from string) *tls.Conn {
	t.Helper()
	conn, err := thief.Member{}.Dial(t.Context(), from, a.m[0].Address, warden.DoorJoin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// boastful makes a CSR that names another node, role and zone.
func boastful(t testing.TB, key *ecdsa.PrivateKey, clusterID, nodeID string) []byte {
	t.Helper()
	u, _ := url.Parse(ca.SPIFFEID(clusterID, nodeID))
	zone := append([]byte{0x0c, 3}, "pci"...)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: nodeID, Organization: []string{clusterID}, OrganizationalUnit: []string{ca.RoleManager}},
		URIs:    []*url.URL{u}, DNSNames: []string{"m1"}, ExtraExtensions: []pkix.Extension{{Id: ca.ZoneOID, Value: zone}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// stolenTokens: a worker's token makes a worker, whatever the request claims; a manager's token takes no worker's key, and is of no use
// where it was not meant for.
func (a *arena) stolenTokens(t *testing.T) {
	m := a.m[0]
	w1 := thief.Steal(t, a.w[0].State)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	conn := a.knock(t, "")
	r := request(t, conn, a.token, boastful(t, key, w1.ClusterID, w1.NodeID))
	r.Advertise = "127.0.0.1:2377" // as managers say
	reply := a.ask(t, conn, frameOf(t, r))
	var grant api.JoinGrant
	if err := proto.Unmarshal(reply.Grant, &grant); err != nil || reply.Error != nil {
		t.Fatalf("the join = %v, %v", reply.Error, err)
	}
	leaf, err := x509.ParseCertificate(grant.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	id, err := ca.Read(leaf)
	if err != nil || id.Role != ca.RoleWorker || id.Zone != warden.DefaultZone || id.NodeID == w1.NodeID || len(leaf.DNSNames) != 0 || grant.Role != api.Role_ROLE_WORKER {
		t.Errorf("a worker's token gave the leaf of %+v, %v", id, err)
	}
	rogue := thief.Member{NodeID: id.NodeID, Key: key, Cert: &tls.Certificate{Certificate: grant.Chain, PrivateKey: key}}
	for door, word := range map[string]string{warden.DoorPeer: "peer", warden.DoorRaft: "raft", warden.DoorControl: "control"} {
		before := a.refusals(m, word, warden.CodeWrongRole)
		if rogue.Refused(m.Address, door) == nil {
			t.Errorf("a worker stays at %s", door)
		}
		a.counted(t, m, word, warden.CodeWrongRole, before, 1)
	}

	managers := parse(t, m.Token("manager"))
	for _, c := range []struct {
		what  string
		token tokens.Token
		key   *ecdsa.PrivateKey
		code  warden.Code
	}{
		{"a worker's own key, with a manager's token", managers, key, warden.CodeWrongKey},
		{"a token of another network", parse(t, m.Token("manager", "--cidr", "192.0.2.0/24")), nil, warden.CodeBinding},
		{"a token of another host", parse(t, m.Token("manager", "--node-name", "m9")), nil, warden.CodeBinding},
	} {
		if c.key == nil {
			if c.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
				t.Fatal(err)
			}
		}
		csr, err := ca.NewCSR(c.key)
		if err != nil {
			t.Fatal(err)
		}
		before := a.refusals(m, "join", c.code)
		conn := a.knock(t, "")
		r := request(t, conn, c.token, csr)
		r.Advertise = "127.0.0.1:2377"
		if reply := a.ask(t, conn, frameOf(t, r)); warden.Code(reply.GetError().GetCode()) != c.code || len(reply.Grant) != 0 {
			t.Errorf("%s: %v, want [%s]", c.what, reply.Error, c.code)
		}
		a.counted(t, m, "join", c.code, before, 1)
	}
	a.still(t)
}

// replayedJoin: what a joiner said, said again on another connection, in clear or as it crossed the wire, joins nobody.
func (a *arena) replayedJoin(t *testing.T) {
	m := a.m[0]
	nodes := func() int { return strings.Count(m.Ctl("node", "ls", "-q"), "\n") }
	key, err := ca.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	wire := &recording{}
	req := join.Request{Key: key, Hostname: "overheard"}
	if _, err := join.Join(t.Context(), m.Address, a.token, req, func(ctx context.Context, addr string) (net.Conn, error) {
		c, err := thief.DialFrom("")(ctx, addr)
		wire.Conn = c
		return wire, err
	}); err != nil {
		t.Fatal(err)
	}
	before, was := nodes(), a.refusals(m, "join", warden.CodeUnauthentic)
	raw, err := thief.DialFrom("")(t.Context(), m.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := raw.Write(wire.sent.Bytes()); err != nil {
		t.Fatal(err)
	}
	if thief.Ended(raw, 20*time.Second) == nil {
		t.Error("the replay of a join's bytes stays")
	}
	a.counted(t, m, "join", warden.CodeUnauthentic, was, 1)

	was = a.refusals(m, "join", warden.CodeUnknownToken)
	csr, err := ca.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	conn := a.knock(t, "")
	said := frameOf(t, request(t, conn, a.token, csr))
	for range 2 {
		if reply := a.ask(t, a.knock(t, ""), said); warden.Code(reply.GetError().GetCode()) != warden.CodeUnknownToken || len(reply.Grant) != 0 {
			t.Errorf("the replay of a join's request = %v", reply)
		}
	}
	a.counted(t, m, "join", warden.CodeUnknownToken, was, 2)
	if now := nodes(); now != before {
		t.Errorf("%d nodes, were %d before the replays", now, before)
	}
	a.still(t)
}

// recording keeps what is sent.
type recording struct {
	net.Conn
	sent bytes.Buffer
}

func (r *recording) Write(p []byte) (int, error) {
	r.sent.Write(p)
	return r.Conn.Write(p)
}

// middle is a man in the middle at a join: he ends TLS with a certificate that he has, and answers, or passes on what he hears.
type middle struct {
	cert   *tls.Certificate
	answer func(request []byte) []byte

	mu    sync.Mutex // guards heard
	heard []byte     // in clear
}

// listen serves until the test ends, and returns where.
func (m *middle) listen(t testing.TB) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*m.cert}, NextProtos: []string{warden.DoorJoin}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(30 * time.Second))
				buf := make([]byte, 32<<10)
				n, _ := conn.Read(buf)
				m.mu.Lock()
				m.heard = append(m.heard, buf[:n]...)
				m.mu.Unlock()
				if n > 0 && m.answer != nil {
					conn.Write(m.answer(buf[:n]))
				}
			})
		}
	})
	return l.Addr().String()
}

// manInTheMiddle: a real joiner, a real daemon, whose way to the manager somebody has.
func (a *arena) manInTheMiddle(t *testing.T) {
	m, late := a.m[0], a.Host("late")
	token := m.Token("worker")
	stranger := selfSigned(t)
	worker, manager := thief.Steal(t, a.w[0].State), thief.Steal(t, a.m[2].State)
	passOn := func(b []byte) []byte {
		conn := a.knock(t, "")
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		conn.Write(b)
		reply, _ := io.ReadAll(conn)
		return reply
	}
	forge := func([]byte) []byte {
		grant, _ := proto.Marshal(&api.JoinGrant{ClusterId: manager.ClusterID, NodeId: warden.NewID(), Chain: manager.Cert.Certificate, Role: api.Role_ROLE_MANAGER, Zone: "pci"})
		b, _ := proto.Marshal(&api.JoinReply{Grant: grant, Mac: make([]byte, 32)})
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
	}
	was := a.refusals(m, "join", warden.CodeUnknownToken)
	for _, c := range []struct {
		what   string
		middle *middle
		code   warden.Code
		silent bool // the joiner says nothing
	}{
		{"a stranger", &middle{cert: stranger}, warden.CodeWrongRoot, true},
		{"a stranger with the root beside", &middle{cert: &tls.Certificate{Certificate: append(stranger.Certificate[:1:1], manager.Cert.Certificate[1:]...), PrivateKey: stranger.PrivateKey}}, warden.CodeUnauthentic, true},
		{"a worker", &middle{cert: worker.Cert}, warden.CodeWrongRole, true},
		{"who stole a manager's key, and passes on", &middle{cert: manager.Cert, answer: passOn}, warden.CodeUnknownToken, false},
		{"who stole a manager's key, and answers", &middle{cert: manager.Cert, answer: forge}, warden.CodeUnauthentic, false},
	} {
		at := c.middle.listen(t)
		_, stderr, code := late.Try("swarm", "join", "--token", token, at)
		if code == 0 || !strings.Contains(stderr, "["+string(c.code)+"]") {
			t.Errorf("%s in the middle: exit %d, %s; want [%s]", c.what, code, stderr, c.code)
		}
		c.middle.mu.Lock()
		if c.silent == (len(c.middle.heard) > 0) {
			t.Errorf("%s in the middle heard %d bytes", c.what, len(c.middle.heard))
		}
		if secret := strings.Split(token, "-")[4]; bytes.Contains(c.middle.heard, []byte(secret)) {
			t.Errorf("%s in the middle heard the token's secret", c.what)
		}
		c.middle.mu.Unlock()
	}
	a.counted(t, m, "join", warden.CodeUnknownToken, was, 1)
	if _, err := os.Stat(filepath.Join(late.State, "identity", "node.key")); err == nil {
		t.Error("the joiner has an identity from the man in the middle")
	}
	late.Ctl("swarm", "join", "--token", token, m.Address)
	a.still(t)
}

func selfSigned(t testing.TB) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "manager"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// session joins a thief and runs its agent at the attacked manager.
func (a *arena) session(t *testing.T, name string, ag *thief.Agent) (thief.Member, <-chan struct{}) {
	t.Helper()
	rogue, err := a.join("", a.token, name)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rogue.Dial(t.Context(), "", a.m[0].Address, warden.DoorNode)
	if err != nil {
		t.Fatal(err)
	}
	return rogue, ag.Serve(t, conn)
}

func (a *arena) awaitRunning(t testing.TB, service string) (taskID string) {
	t.Helper()
	testcluster.Await(t, 30*time.Second, func() error {
		out, stderr, _ := a.m[0].Try("service", "ps", "--no-trunc", service, "--filter", "desired-state=running", "--format", "{{.ID}} {{.CurrentState}}")
		f := strings.Fields(out)
		if len(f) < 2 || f[1] != "Running" {
			return errors.New(out + stderr)
		}
		taskID = f[0]
		return nil
	})
	return taskID
}

// otherNodesTasks: a worker reports the task of another as failed, ended, or running elsewhere.
func (a *arena) otherNodesTasks(t *testing.T) {
	m := a.m[0]
	id := a.awaitRunning(t, "target")
	before := a.refusals(m, "node", warden.CodeDenied)
	ag := thief.NewAgent()
	for _, s := range []api.TaskState{api.TaskState_TASK_FAILED, api.TaskState_TASK_COMPLETE, api.TaskState_TASK_REJECTED, api.TaskState_TASK_SHUTDOWN} {
		ag.Reports = append(ag.Reports, &api.TaskReport{TaskId: id, Status: &api.TaskStatus{State: s, Error: "lie", TimeNs: time.Now().UnixNano()}})
	}
	a.session(t, "gossip", ag)
	a.counted(t, m, "node", warden.CodeDenied, before, 4)
	a.still(t)
	if now := a.awaitRunning(t, "target"); now != id {
		t.Errorf("another node's report ended task %s: now there is %s", id, now)
	}
	if out := m.Ctl("service", "ps", "target"); strings.Contains(out, "lie") {
		t.Errorf("another node's report is believed:\n%s", out)
	}
}

// claims: a worker says of itself that it is another, elsewhere, and has what attracts tasks.
func (a *arena) claims(t *testing.T) {
	m := a.m[0]
	w1 := thief.Steal(t, a.w[0].State)
	m.CtlIn("for-pci", "secret", "create", "--zone", "pci", "pci-secret", "-")
	m.CtlIn("for-w1", "secret", "create", "w1-secret", "-")
	m.CtlIn("for-labelled", "secret", "create", "label-secret", "-")
	ag := thief.NewAgent()
	ag.Says = &api.NodeDescription{Hostname: "w1", Os: "linux", Arch: "amd64", NanoCpus: 64e9, MemoryBytes: 1 << 40,
		EngineLabels: map[string]string{"zone": "pci", "node.zone": "pci", "trusted": "yes", "node.labels.trusted": "yes", "node.role": "manager"}}
	rogue, _ := a.session(t, "pretender", ag)
	ag.Await(t, "its session", func(thief.Got) bool { return true })
	m.Ctl("service", "create", "--name", "in-pci", "--zone", "pci", "--secret", "pci-secret", "host", "sleep", "1000")
	m.Ctl("service", "create", "--name", "on-w1", "--constraint", "node.hostname==w1", "--replicas", "3", "--secret", "w1-secret", "host", "sleep", "1000")
	m.Ctl("service", "create", "--name", "labelled", "--constraint", "node.labels.trusted==yes", "--secret", "label-secret", "host", "sleep", "1000")
	m.Ctl("service", "create", "--name", "bait", "--constraint", "engine.labels.trusted==yes", "host", "sleep", "1000")
	ag.Await(t, "the bait, which engine labels attract: so it could have had the others", func(g thief.Got) bool { return len(g.Tasks) > 0 })
	testcluster.Await(t, 30*time.Second, func() error {
		if out, stderr, _ := m.Try("service", "ps", "on-w1", "--format", "{{.CurrentState}}"); strings.Count(out, "Running") != 3 {
			return errors.New(out + stderr)
		}
		return nil
	})
	a.still(t)
	for _, secret := range []string{"for-pci", "for-w1", "for-labelled"} {
		if ag.Got().Secrets[secret] {
			t.Errorf("the pretender was sent the secret %s", secret)
		}
	}
	if n := len(ag.Got().Tasks); n != 1 {
		t.Errorf("the pretender was assigned %d tasks, want the bait alone", n)
	}
	if out := m.Ctl("node", "ls", "--format", "{{.ID}} {{.Hostname}}", "--no-trunc"); !strings.Contains(out, rogue.NodeID+" pretender") {
		t.Errorf("node ls =\n%s\nwant the pretender under the name that it joined with", out)
	}

	// A joiner chooses its host name, also one that is taken: what must go to one node names its ID, or a label.
	namesake := thief.NewAgent()
	second, _ := a.session(t, "w1", namesake)
	m.Ctl("node", "update", "--label-add", "trusted=yes", w1.NodeID)
	m.Ctl("service", "scale", "labelled=4")
	m.Ctl("service", "create", "--name", "by-id", "--constraint", "node.id=="+w1.NodeID, "--replicas", "4", "--secret", "w1-secret", "host", "sleep", "1000")
	testcluster.Await(t, 30*time.Second, func() error {
		for _, service := range []string{"by-id", "labelled"} {
			if out, stderr, _ := m.Try("service", "ps", service, "--format", "{{.CurrentState}}"); strings.Count(out, "Running") != 4 {
				return errors.New(out + stderr)
			}
		}
		return nil
	})
	for _, secret := range []string{"for-w1", "for-labelled"} {
		if namesake.Got().Secrets[secret] || ag.Got().Secrets[secret] {
			t.Errorf("a namesake was sent the secret %s", secret)
		}
	}
	m.Ctl("node", "rm", "--force", second.NodeID) // or it attracts what honest work has for w1

	// An ID is claimed in a certificate alone: of a CA of one's own, or another's chain without its key.
	before := a.refusals(m, "node", warden.CodeUnauthentic)
	u, _ := url.Parse(ca.SPIFFEID(w1.ClusterID, w1.NodeID))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: w1.Root.Subject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	real, err := x509.ParseCertificate(w1.Cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: real.SerialNumber, Subject: real.Subject, URIs: []*url.URL{u}, NotBefore: real.NotBefore, NotAfter: real.NotAfter, ExtKeyUsage: real.ExtKeyUsage, KeyUsage: real.KeyUsage}
	der, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	for what, chain := range map[string][][]byte{
		"a leaf of another CA":                     {der, rootDER},
		"a leaf of another CA, with the real ones": append([][]byte{der}, w1.Cert.Certificate[1:]...),
		"another's chain without its key":          w1.Cert.Certificate,
	} {
		if (thief.Member{Cert: &tls.Certificate{Certificate: chain, PrivateKey: key}}).Refused(m.Address, warden.DoorNode) == nil {
			t.Errorf("%s stays", what)
		}
	}
	a.counted(t, m, "node", warden.CodeUnauthentic, before, 3)
	if v := a.value(m, "warden_manager_alarms"); v != 0 {
		t.Errorf("%v alarms: a stranger can raise them in another's name", v)
	}
	m.Ctl("service", "rm", "in-pci", "on-w1", "labelled", "bait", "by-id")
}

// pausing is a connection whose client stops in the middle of its handshake until it is told to go on.
type pausing struct {
	net.Conn
	writes int
	goOn   <-chan struct{}
}

func (p *pausing) Write(b []byte) (int, error) {
	if p.writes++; p.writes == 2 { // the first is the hello
		<-p.goOn
	}
	return p.Conn.Write(b)
}

// heldAfterEviction: a node that was removed has a session, a connection on which it never spoke, and one whose handshake it
// finishes afterwards.
func (a *arena) heldAfterEviction(t *testing.T) {
	m := a.m[0]
	ag := thief.NewAgent()
	rogue, closed := a.session(t, "leech", ag)
	m.CtlIn("leeched", "secret", "create", "leech-secret", "-")
	m.Ctl("node", "update", "--label-add", "leech=yes", rogue.NodeID)
	m.Ctl("service", "create", "--name", "leech", "--constraint", "node.labels.leech==yes", "--secret", "leech-secret", "host", "sleep", "1000")
	ag.Await(t, "the secret of its task", func(g thief.Got) bool { return g.Secrets["leeched"] })
	silent, err := rogue.Dial(t.Context(), "", m.Address, warden.DoorNode)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	raw, err := thief.DialFrom("")(t.Context(), m.Address)
	if err != nil {
		t.Fatal(err)
	}
	goOn := make(chan struct{})
	half := tls.Client(&pausing{Conn: raw, goOn: goOn}, rogue.Config(warden.DoorNode))
	shaken := make(chan error, 1)
	go func() { shaken <- half.Handshake() }() // ends with goOn
	defer half.Close()

	before := a.refusals(m, "node", warden.CodeEvicted)
	begin := time.Now()
	m.Ctl("node", "rm", "--force", rogue.NodeID)
	t.Logf("node rm took %s", time.Since(begin).Round(time.Millisecond))
	select {
	case <-closed:
	case <-time.After(30 * time.Second):
		t.Error("the session of a removed node lives on")
	}
	if thief.Ended(silent, 10*time.Second) == nil {
		t.Error("a silent connection of a removed node lives on")
	}
	close(goOn)
	if err := <-shaken; err == nil {
		late := thief.NewAgent()
		select {
		case <-late.Serve(t, half):
		case <-time.After(30 * time.Second):
			t.Error("a removed node has a connection whose handshake it finished afterwards")
		}
		if got := late.Got(); got.Evictions() != 1 || len(got.Tasks) != 0 || len(got.Secrets) != 0 {
			t.Errorf("a removed node was told %d times to wipe, and sent %d tasks and %d secrets", got.Evictions(), len(got.Tasks), len(got.Secrets))
		}
	}
	a.counted(t, m, "node", warden.CodeEvicted, before, 1)
	m.CtlIn("after", "secret", "create", "leech-after", "-")
	for range 5 {
		again := thief.NewAgent()
		conn, err := rogue.Dial(t.Context(), "", m.Address, warden.DoorNode)
		if err != nil {
			continue
		}
		select {
		case <-again.Serve(t, conn):
		case <-time.After(30 * time.Second):
			t.Fatal("a removed node has a session")
		}
		if got := again.Got(); len(got.Tasks)+len(got.Secrets) != 0 {
			t.Error("a removed node is served")
		}
	}
	a.counted(t, m, "node", warden.CodeEvicted, before, 5)
	a.still(t)
	m.Ctl("service", "rm", "leech")
}

// demotedManager: the old certificate of a manager that was demoted, on connections from before and on new ones, at every door.
func (a *arena) demotedManager(t *testing.T) {
	a.m[2].Kill() // and so are the floods'
	rogue, m := thief.Steal(t, a.m[2].State), a.leader(t)
	leader := thief.Steal(t, m.State).NodeID
	expect := door.Expect{Root: rogue.Root, NodeID: leader, Loose: true}
	calls := func(t *testing.T) api.PeerClient {
		cc, err := grpc.NewClient("passthrough:///m1", grpc.WithTransportCredentials(door.Credentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return door.Dial(ctx, m.Address, warden.DoorPeer, rogue.Cert, expect)
		}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cc.Close() })
		return api.NewPeerClient(cc)
	}
	target := a.awaitRunning(t, "target")
	held := calls(t)
	try := func(client api.PeerClient) map[string]error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		errs := map[string]error{}
		_, errs["Recipient"] = client.Recipient(ctx, &api.RecipientRequest{})
		_, errs["Report"] = client.Report(ctx, &api.ReportRequest{TimeNs: time.Now().UnixNano(), LockState: "unlocked"})
		secret, _ := proto.Marshal(&api.CreateSecretRequest{Name: "planted", Data: []byte("x")})
		_, errs["Forward"] = client.Forward(ctx, &api.ForwardRequest{Method: "/warden.v1.Control/CreateSecret", Request: secret, Caller: &api.Actor{Kind: "uid", Name: "0"}, RequestId: warden.NewID()})
		_, errs["Propose"] = client.Propose(ctx, &api.Command{Actor: &api.Actor{Kind: "system", Name: "x"}, RequestId: warden.NewID(),
			Operations: []*api.Operation{{Of: &api.Operation_Put{Put: &api.Put{Object: &api.Object{Of: &api.Object_Zone{Zone: &api.Zone{Id: warden.NewID(), Name: "planted"}}}}}}}})
		logs, err := client.Relay(ctx, &api.LogsRequest{TaskId: target, Tail: -1})
		if err == nil {
			if _, err = logs.Recv(); err == io.EOF || err != nil && strings.Contains(err.Error(), "no session with this manager") { // it may be another's
				err = nil
			}
		}
		errs["Relay"] = err
		return errs
	}
	for call, err := range try(held) {
		if err != nil {
			t.Fatalf("before the demotion %s = %v", call, err)
		}
	}
	m.Ctl("secret", "rm", "planted")
	m.Ctl("zone", "rm", "planted")
	transport := rafttransport.New(rogue.NodeID, func(ctx context.Context, _ string) (net.Conn, error) {
		return door.Dial(ctx, m.Address, warden.DoorRaft, rogue.Cert, expect)
	}, slog.New(slog.DiscardHandler))
	defer transport.Close()
	term := a.value(m, "warden_raft_term")
	h := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(rogue.NodeID), Addr: []byte(rogue.NodeID)}
	preVote := func() error {
		return transport.RequestPreVote(raft.ServerID(leader), raft.ServerAddress(leader), &raft.RequestPreVoteRequest{RPCHeader: h, Term: uint64(term) + 1}, &raft.RequestPreVoteResponse{})
	}
	if err := preVote(); err != nil {
		t.Fatalf("before the demotion a vote = %v", err)
	}
	raftConn, err := rogue.Dial(t.Context(), "", m.Address, warden.DoorRaft)
	if err != nil {
		t.Fatal(err)
	}
	defer raftConn.Close()

	m.Ctl("node", "demote", "m3")
	if thief.Ended(raftConn, 10*time.Second) == nil {
		t.Error("a connection at the raft door outlives the demotion")
	}
	before := map[string]float64{"peer": a.refusals(m, "peer", warden.CodeWrongRole), "raft": a.refusals(m, "raft", warden.CodeWrongRole), "control": a.refusals(m, "control", warden.CodeWrongRole)}
	for round, client := range []api.PeerClient{held, calls(t)} {
		for call, err := range try(client) {
			if err == nil {
				t.Errorf("round %d: after the demotion %s is served", round, call)
			}
		}
	}
	for range 3 { // one of a pool of connections may be known as closed only by its use
		if err := preVote(); err == nil {
			t.Error("after the demotion a vote is answered")
		}
	}
	vote := transport.RequestVote(raft.ServerID(leader), raft.ServerAddress(leader), &raft.RequestVoteRequest{RPCHeader: h, Term: uint64(term) + 100, LastLogIndex: 1 << 40, LeadershipTransfer: true}, &raft.RequestVoteResponse{})
	if vote == nil {
		t.Error("after the demotion a vote for a new leader is answered")
	}
	for word, name := range map[string]string{"peer": warden.DoorPeer, "raft": warden.DoorRaft, "control": warden.DoorControl} {
		for i, h := range a.m[:2] {
			if rogue.Refused(h.Address, name) == nil {
				t.Errorf("manager %d keeps a demoted manager's connection at %s", i, name)
			}
		}
		a.counted(t, m, word, warden.CodeWrongRole, before[word], 1)
	}
	if now := a.value(m, "warden_raft_term"); now >= term+100 {
		t.Errorf("the term is %v, was %v: a demoted manager made an election", now, term)
	}
	if out := m.Ctl("secret", "ls") + m.Ctl("zone", "ls"); strings.Contains(out, "planted") {
		t.Errorf("a demoted manager's call was run:\n%s", out)
	}

	// The node door exists to replace the leaf: by a worker's.
	ag := thief.NewAgent()
	conn, err := rogue.Dial(t.Context(), "", m.Address, warden.DoorNode)
	if err != nil {
		t.Fatal(err)
	}
	ag.Serve(t, conn)
	ag.Await(t, "a new leaf", func(g thief.Got) bool { return g.Leaf != nil })
	got := ag.Got()
	id, err := ca.Read(got.Leaf)
	if err != nil || id.Role != ca.RoleWorker || id.NodeID != rogue.NodeID {
		t.Errorf("a demoted manager's leaf is renewed as %+v, %v", id, err)
	}
	if len(got.Secrets) != 0 {
		t.Error("a demoted manager was sent secrets")
	}
	a.still(t)

	// Its own daemon, started again with all that it had: what somebody asks at its socket it passes on to nobody.
	conn.Close()
	back := a.m[2]
	back.StartOnly()
	testcluster.Await(t, 60*time.Second, func() error {
		_, stderr, code := back.TryIn("x", "secret", "create", "relayed", "-")
		if code == 0 {
			t.Fatal("a demoted manager passes calls on")
		}
		if !strings.Contains(stderr, "["+string(warden.CodeNotManager)+"]") {
			return errors.New(stderr)
		}
		return nil
	})
	if out := m.Ctl("secret", "ls"); strings.Contains(out, "relayed") {
		t.Errorf("a call by way of a demoted manager was run:\n%s", out)
	}
}
