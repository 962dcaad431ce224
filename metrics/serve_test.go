package metrics_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	"warden"
	"warden/api"
	"warden/metrics"
)

func TestAddress(t *testing.T) {
	for _, c := range []struct {
		flag, want string
		exposed    bool
	}{
		{"9377", "127.0.0.1:9377", false},
		{":9377", "127.0.0.1:9377", false},
		{"0", "127.0.0.1:0", false},
		{"localhost:9377", "localhost:9377", false},
		{"127.66.0.1:1", "127.66.0.1:1", false},
		{"[::1]:9377", "[::1]:9377", false},
		{"0.0.0.0:9377", "0.0.0.0:9377", true},
		{"[::]:9377", "[::]:9377", true},
		{"10.0.0.5:9377", "10.0.0.5:9377", true},
		{"node7:9377", "node7:9377", true},
	} {
		if got, exposed, err := metrics.Address(c.flag); got != c.want || exposed != c.exposed || err != nil {
			t.Errorf("Address(%q) = %q, %v, %v; want %q, %v", c.flag, got, exposed, err, c.want, c.exposed)
		}
	}
	for _, bad := range []string{"", "x", "10.0.0.5", "99999", ":99999", ":http", "a:b:1", "-1"} {
		if got, _, err := metrics.Address(bad); warden.CodeOf(err) != warden.CodeUsage || warden.HintOf(err) == "" {
			t.Errorf("Address(%q) = %q, %v; want a usage error with a hint", bad, got, err)
		}
	}
}

// Listen warns where others than this host may scrape, and says why.
func TestListenWarns(t *testing.T) {
	for flag, want := range map[string]bool{"0": false, "0.0.0.0:0": true} {
		var log bytes.Buffer
		l, err := metrics.Listen(flag, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		if l.Close(); strings.Contains(log.String(), "level=WARN") != want || strings.Contains(log.String(), "without authentication") != want {
			t.Errorf("Listen(%q) logs %s, want a warning = %v", flag, log.String(), want)
		}
		if _, err := metrics.Listen(l.Addr().String()+"9", slog.New(slog.DiscardHandler)); warden.CodeOf(err) != warden.CodeUsage {
			t.Errorf("Listen on port 9 times too large = %v", err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := metrics.Listen(l.Addr().String(), slog.New(slog.DiscardHandler)); warden.CodeOf(err) != warden.CodeUnavailable || warden.HintOf(err) == "" {
		t.Errorf("Listen where another does = %v", err)
	}
}

// Serve answers until its context ends, whoever holds connections open, and closes them then.
func TestServe(t *testing.T) {
	l, err := metrics.Listen("0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- metrics.Serve(ctx, l, func() *api.Facts { return full() }, slog.New(slog.DiscardHandler))
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for range 100 { // more than may be open at once
		resp, err := client.Get("http://" + l.Addr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || !bytes.Contains(b, []byte("warden_build_info")) {
			t.Fatalf("GET = %q, %v", b, err)
		}
		resp.Body.Close()
	}
	var held []net.Conn
	for range 40 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve = %v", err)
	}
	for _, c := range held {
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Error("a connection outlived Serve")
		}
		c.Close()
	}
}
