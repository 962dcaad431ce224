package metrics

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"warden"
	"warden/api"
)

// Bounds of the endpoint.
const (
	connsMax     = 32 // open at once; the next waits
	scrapesMax   = 4  // under way at once; the next is refused
	headerMax    = 8 << 10
	readTimeout  = 5 * time.Second
	writeTimeout = 15 * time.Second
	idleTimeout  = 2 * time.Minute // longer than most scrape intervals
)

// Address returns where to listen for what --metrics says: "9377" and ":9377" are on loopback; another host must be named.
// exposed says that others than this host may reach it. Errors: CodeUsage.
func Address(flag string) (addr string, exposed bool, err error) {
	host, port := "", flag
	if _, perr := strconv.ParseUint(flag, 10, 16); perr != nil {
		if host, port, err = net.SplitHostPort(flag); err != nil {
			return "", false, bad(flag)
		}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", false, bad(flag)
	}
	switch ip := net.ParseIP(host); {
	case host == "":
		host = "127.0.0.1"
	case ip == nil && host != "localhost", ip != nil && !ip.IsLoopback():
		exposed = true
	}
	return net.JoinHostPort(host, port), exposed, nil
}

func bad(flag string) error {
	return warden.Hint(warden.Errorf(warden.CodeUsage, "reading the address for metrics", "%.100q is neither a port nor host:port", flag),
		"9377 or :9377 listens on loopback; to listen elsewhere name the address, as in 10.0.0.5:9377")
}

// Listen opens the address that flag gives, and warns where others may reach it. Errors: CodeUsage, CodeUnavailable.
func Listen(flag string, logger *slog.Logger) (net.Listener, error) {
	addr, exposed, err := Address(flag)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, warden.Hint(warden.Recode(warden.CodeUnavailable, "opening "+addr+" for metrics", err),
			"another program has it, or the address is not on this host: choose another with --metrics")
	}
	if exposed {
		logger.Warn("opened metrics to others", "address", l.Addr().String(),
			"reason", "plain HTTP without authentication: whoever reaches it reads versions, IDs of managers, and how nodes, tasks and certificates stand")
	} else {
		logger.Info("opened metrics", "address", l.Addr().String())
	}
	return l, nil
}

// Handler answers GET /metrics with the facts and those of Go's runtime and of the process, and refuses all else.
func Handler(facts func() *api.Facts, logger *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(NewCollector(facts), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: scrapesMax, ErrorHandling: promhttp.ContinueOnError, ErrorLog: failures{logger},
	}))
	return mux
}

// failures logs what could not be collected.
type failures struct{ logger *slog.Logger }

// Println implements promhttp.Logger.
func (f failures) Println(v ...any) { f.logger.Warn("failed to collect metrics", "error", v) }

// Serve answers scrapes on l until ctx ends, then closes it and every connection. Errors: CodeUnavailable where l fails.
func Serve(ctx context.Context, l net.Listener, facts func() *api.Facts, logger *slog.Logger) error {
	server := &http.Server{
		Handler: Handler(facts, logger), MaxHeaderBytes: headerMax, ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	err := server.Serve(&bounded{Listener: l, room: make(chan struct{}, connsMax), closed: make(chan struct{})})
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return warden.Recode(warden.CodeUnavailable, "serving metrics", err)
}

// bounded is a listener that has at most connsMax connections open.
type bounded struct {
	net.Listener
	room   chan struct{}
	once   sync.Once
	closed chan struct{}
}

// Accept implements net.Listener.
func (b *bounded) Accept() (net.Conn, error) {
	select {
	case b.room <- struct{}{}:
	case <-b.closed:
		return nil, net.ErrClosed
	}
	c, err := b.Listener.Accept()
	if err != nil {
		<-b.room
		return nil, err
	}
	return &conn{Conn: c, leave: sync.OnceFunc(func() { <-b.room })}, nil
}

// Close implements net.Listener.
func (b *bounded) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Listener.Close()
}

type conn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
