package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// kind is a way to flood: what is said on each connection. It may return to have the next one.
type kind struct {
	door  string // whose handshake comes first; empty: none
	short int    // bytes that the handshake is cut off after, if any
	alone bool   // from one address
	say   func(i int, conn net.Conn)
}

var kinds = map[string]kind{
	// Before the hello.
	"half-open":  {say: hold},
	"slow-hello": {say: slowHello},
	"garbage":    {say: garbage},
	// In the handshake.
	"big-certificate": {door: "warden-node/1", short: 240 << 10, say: hold},
	// Behind the door of joins, without a certificate.
	"join-silent":  {door: "warden-join/1", alone: true, say: hold},
	"join-slow":    {door: "warden-join/1", say: slowRequest},
	"join-garbage": {door: "warden-join/1", say: joinGarbage},
	// Behind the doors, with one.
	"node-silent":  {door: "warden-node/1", say: hold},
	"node-frames":  {door: "warden-node/1", say: nodeFrames},
	"node-giant":   {door: "warden-node/1", say: nodeGiant},
	"peer-silent":  {door: "warden-peer/1", say: hold},
	"peer-streams": {door: "warden-peer/1", say: peerStreams},
	"peer-giant":   {door: "warden-peer/1", say: peerGiant},
	"raft-silent":  {door: "warden-raft/1", say: hold},
	"raft-garbage": {door: "warden-raft/1", say: raftGarbage},
	"raft-giant":   {door: "warden-raft/1", say: raftGiant},
}

// Key is what a key file holds.
type Key struct {
	Chain [][]byte // leaf first, DER
	Key   []byte   // DER
}

// pause is between the end of a connection and the next in its place; longer where a handshake takes both sides' processors, which here
// are the same.
const pause, shakingPause = 2 * time.Second, 10 * time.Second

// flood keeps so many connections open until its standard input ends, each from one of 40 addresses or all from one. It says "begun" once each was tried, and at
// its end how many there were.
func flood(args []string) {
	if len(args) < 3 {
		usage()
	}
	k, known := kinds[args[0]]
	n, err := strconv.Atoi(args[2])
	if !known || err != nil {
		usage()
	}
	cfg := &tls.Config{NextProtos: []string{k.door}, InsecureSkipVerify: true}
	switch {
	case len(args) > 3:
		cfg.Certificates = []tls.Certificate{readKey(args[3])}
	case k.short > 0:
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			log.Fatal(err)
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{make([]byte, 250<<10)}, PrivateKey: key}, nil
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	wait := pause
	if len(args) > 3 {
		wait = shakingPause
	}
	var wg sync.WaitGroup
	var tried, opened, through, failed atomic.Int64
	for i := range n {
		from := &net.TCPAddr{IP: net.IPv4(127, 150, byte(1+i%4), byte(1+i/4%10))}
		if k.alone {
			from.IP = net.IPv4(127, 149, 1, 1)
		}
		wg.Go(func() {
			for first := true; ctx.Err() == nil; first = false {
				dialler := net.Dialer{Timeout: 10 * time.Second, LocalAddr: from}
				conn, err := dialler.DialContext(ctx, "tcp", args[1])
				if first && tried.Add(1) == int64(n) {
					fmt.Println("begun")
				}
				if err != nil {
					failed.Add(1)
				} else {
					opened.Add(1)
					stop := context.AfterFunc(ctx, func() { conn.Close() })
					if k.door != "" {
						under := conn
						if k.short > 0 {
							under = &cutOff{conn, k.short}
						}
						c := tls.Client(under, cfg)
						if c.HandshakeContext(ctx) == nil {
							through.Add(1)
							k.say(i, c)
						}
					} else {
						k.say(i, conn)
					}
					stop()
					conn.Close()
				}
				select {
				case <-ctx.Done():
				case <-time.After(wait):
				}
			}
		})
	}
	wg.Wait()
	fmt.Printf("opened %d, through the handshake %d, failed %d\n", opened.Load(), through.Load(), failed.Load())
}

func readKey(path string) tls.Certificate {
	b, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	var k Key
	if err := json.Unmarshal(b, &k); err != nil {
		log.Fatal(err)
	}
	return certificate(k)
}

// cutOff lets so many bytes out and swallows the rest.
type cutOff struct {
	net.Conn
	left int
}

func (c *cutOff) Write(p []byte) (int, error) {
	n := min(len(p), c.left)
	c.left -= n
	if n > 0 {
		if _, err := c.Conn.Write(p[:n]); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// hold says nothing and reads what comes.
func hold(_ int, conn net.Conn) { io.Copy(io.Discard, conn) }

// drain reads what comes, so that the other side never waits to write.
func drain(conn net.Conn) { go io.Copy(io.Discard, conn) }

// drip writes b a byte at a time.
func drip(conn net.Conn, b []byte) {
	for i := range b {
		if _, err := conn.Write(b[i : i+1]); err != nil {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func slowHello(_ int, conn net.Conn) {
	drain(conn)
	hello := append([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), make([]byte, 500)...)
	drip(conn, hello)
}

// garbage is what no TLS client says first.
func garbage(i int, conn net.Conn) {
	said := []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + strings.Repeat("a", 40), // SSL 2
		"\x16\x03\x01\xff\xff" + strings.Repeat("b", 1<<16),                      // a record that is too long
		"\x16\x03\x01\x00\x04\x01\xff\xff\xff",                                   // a hello of 16 MiB
		"\x17\x03\x03\x00\x05hello",                                              // data before a handshake
		"\x15\x03\x03\x00\x02\x01\x00",                                           // an alert before a handshake
		strings.Repeat("\x16\x03\x01\x00\x00", 1000),                             // empty records
		"\x16\x03\x01\x00\x2b\x01\x00\x00\x27\x03\x03" + strings.Repeat("r", 32) + "\x00\x00\x02\x13\x01\x01\x00", // no extensions
	}
	io.WriteString(conn, said[i%len(said)])
	conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	io.Copy(io.Discard, conn)
}

func slowRequest(_ int, conn net.Conn) {
	drain(conn)
	drip(conn, append([]byte{0, 0, 0x3f, 0xff}, make([]byte, 1000)...))
}

// joinGarbage is what no joiner sends: frames of 1 GiB, of nothing, of no message.
func joinGarbage(i int, conn net.Conn) {
	said := []string{
		"\x40\x00\x00\x00" + strings.Repeat("g", 1<<16),
		"\xff\xff\xff\xff",
		"\x00\x00\x00\x00",
		"\x00\x00\x00\x08garbage!",
		"\x00\x00\x40\x00" + strings.Repeat("\x0a\x00", 1<<13),
		"GET / HTTP/1.1\r\n\r\n",
	}
	io.WriteString(conn, said[i%len(said)])
	conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	io.Copy(io.Discard, conn)
}

// HTTP/2 frames.
const (
	settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	preface  = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings
)

func frame(kind, flags byte, stream uint32, payload string) string {
	head := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))[1:]
	head = append(head, kind, flags)
	return string(binary.BigEndian.AppendUint32(head, stream)) + payload
}

// literal is a header that is sent without a table.
func literal(name, value string) string {
	return "\x00" + string(rune(len(name))) + name + string(rune(len(value))) + value
}

const (
	status200 = "\x88"
	grpcType  = "\x0f\x10\x10application/grpc"
)

// nodeFrames is HTTP/2 that no node speaks, as the server that it is on a session.
func nodeFrames(i int, conn net.Conn) {
	drain(conn)
	var streams, pushes strings.Builder
	for id := uint32(2); id <= 20_000; id += 2 {
		streams.WriteString(frame(1, 4, id, status200+grpcType))
		pushes.WriteString(frame(5, 4, 1, string(binary.BigEndian.AppendUint32(nil, id))+status200))
	}
	said := []string{
		settings + streams.String(), // 10,000 streams of a server's own
		settings + pushes.String(),
		settings + frame(1, 0, 1, status200) + strings.Repeat(frame(9, 0, 1, strings.Repeat("\x00\x01a\x01b", 3000)), 500), // headers without end
		settings + strings.Repeat(frame(4, 0, 0, "\x00\x04\x7f\xff\xff\xff"), 10_000),
		settings + strings.Repeat(frame(6, 0, 0, "12345678"), 10_000),
		settings + strings.Repeat(frame(3, 0, 1, "\x00\x00\x00\x08"), 10_000),
		settings + "\xff\xff\xff\x00\x00\x00\x00\x00\x01" + strings.Repeat("x", 1<<20), // a frame of 16 MiB
		settings + strings.Repeat(frame(8, 0, 0, "\x7f\xff\xff\xff"), 10_000),
		frame(7, 0, 0, "\x00\x00\x00\x00\x00\x00\x00\x00") + settings,
		strings.Repeat("220 smtp ready\r\n", 1000),
	}
	io.WriteString(conn, said[i%len(said)])
	time.Sleep(2 * time.Second)
}

// giant is a gRPC message of 1 GiB, in frames, until nobody reads it any more.
func giant(conn net.Conn, stream uint32) {
	chunk := frame(0, 0, stream, strings.Repeat("g", 16<<10))
	_, err := io.WriteString(conn, frame(0, 0, stream, "\x00\x40\x00\x00\x00"))
	for n := 0; err == nil && n < 1<<30; n += 16 << 10 {
		conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
		_, err = io.WriteString(conn, chunk)
	}
}

// nodeGiant answers the manager's first call with a message of 1 GiB.
func nodeGiant(_ int, conn net.Conn) {
	if _, err := io.WriteString(conn, settings); err != nil {
		return
	}
	head := make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	if _, err := io.ReadFull(conn, head); err != nil {
		return
	}
	for f := make([]byte, 9); ; {
		if _, err := io.ReadFull(conn, f); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(f[0])<<16|int64(f[1])<<8|int64(f[2])); err != nil {
			return
		}
		if f[3] == 1 { // headers: a call
			break
		}
	}
	drain(conn)
	io.WriteString(conn, frame(4, 1, 0, "")+frame(1, 4, 1, status200+grpcType))
	giant(conn, 1)
	time.Sleep(time.Second)
}

func begin(stream uint32, path string) string {
	return frame(1, 4, stream, "\x83\x86"+"\x04"+string(rune(len(path)))+path+"\x01\x01x"+grpcType+literal("te", "trailers"))
}

// peerStreams begins 10,000 calls and ends none.
func peerStreams(_ int, conn net.Conn) {
	drain(conn)
	var b strings.Builder
	b.WriteString(preface)
	for id := uint32(1); id <= 20_000; id += 2 {
		b.WriteString(begin(id, "/warden.v1.Peer/Forward"))
	}
	io.WriteString(conn, b.String())
	time.Sleep(8 * time.Second)
}

func peerGiant(_ int, conn net.Conn) {
	drain(conn)
	io.WriteString(conn, preface+begin(1, "/warden.v1.Peer/Forward"))
	giant(conn, 1)
	time.Sleep(time.Second)
}

func raftGarbage(i int, conn net.Conn) {
	said := []string{
		"GET / HTTP/1.1\r\n\r\n",
		"\x00\xc1",
		"\x00" + strings.Repeat("\x91", 1<<20),          // nested as deep as it goes
		"\x00\x81\xa7Entries\xdd\xff\xff\xff\xff",       // four billion entries
		"\x00\x81\xa7Entries\x91\xc0",                   // an empty one
		"\x03\x81\xadConfiguration\xc6\xff\xff\xff\xff", // a configuration of 4 GiB
		"\x03\x82\xa4Size\xcf\x7f\xff\xff\xff\xff\xff\xff\xff\xafSnapshotVersion\x01", // a snapshot without end
		"\x01\x81\xa4Term\xcf\xff\xff\xff\xff\xff\xff\xff\xff",                        // a vote without a name, of the last term
		"\x04\x80", // take over now
		"\xff",
	}
	io.WriteString(conn, said[i%len(said)])
	conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	io.Copy(io.Discard, conn)
}

// raftGiant sends an append of 1,024 entries of 1 MiB.
func raftGiant(_ int, conn net.Conn) {
	drain(conn)
	entry := "\x81\xa4Data\xc6\x00\x10\x00\x00" + strings.Repeat("x", 1<<20)
	_, err := io.WriteString(conn, "\x00\x81\xa7Entries\xdd\x00\x00\x04\x00")
	for n := 0; err == nil && n < 1024; n++ {
		_, err = io.WriteString(conn, entry)
	}
}
