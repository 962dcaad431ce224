package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
)

// childEnv names, in a child process, what it is: "manager", "nodes" or "lab".
const childEnv = "WARDEN_PEERS_CHILD"

// managerConfig is what the process of one manager reads from its standard input, as one line of JSON.
type managerConfig struct {
	Product, Dir, Listen, Socket, Hostname string
	Join, Token                            string // of a running manager; empty: this one makes the cluster
	Again                                  bool   // Dir has the state of a manager that ran before: nothing is made or joined
	UnlockKey                              []byte // for Again, where the product takes it before it starts
}

// serveManager is the main of a manager's process: it says "ready" once the manager serves, stops in order at SIGTERM, and ends at
// once with its standard input.
func serveManager() {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	var cfg managerConfig
	if err == nil {
		err = json.Unmarshal(line, &cfg)
	}
	if err == nil {
		go func() {
			io.Copy(io.Discard, in)
			os.Exit(1)
		}()
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		err = products[cfg.Product].manage(ctx, cfg, func() { fmt.Println("ready") })
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

// managerProcess is one manager's process, as the harness sees it.
type managerProcess struct {
	cfg managerConfig
	cmd *exec.Cmd
	in  io.Closer
	cc  *grpc.ClientConn // to its local socket
	op  operator
}

func startChild(kind string, attr *syscall.SysProcAttr) (*exec.Cmd, io.WriteCloser, io.Reader, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+kind)
	cmd.Stderr, cmd.SysProcAttr = os.Stderr, attr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, nil, err
	}
	return cmd, in, out, cmd.Start()
}

// startManager starts the process and waits until its manager serves.
func startManager(ctx context.Context, cfg managerConfig) (*managerProcess, error) {
	m, said, err := spawnManager(cfg)
	if err != nil {
		return nil, err
	}
	select {
	case line := <-said:
		if line != "ready" {
			err = fmt.Errorf("starting a manager of %s: %s", cfg.Product, line)
		}
	case <-ctx.Done():
		err = fmt.Errorf("starting a manager of %s: %w", cfg.Product, ctx.Err())
	}
	if err == nil {
		err = m.dial()
	}
	if err != nil {
		m.kill()
		return nil, err
	}
	return m, nil
}

// spawnManager starts the process. said is the one line that it says.
func spawnManager(cfg managerConfig) (m *managerProcess, said <-chan string, err error) {
	cmd, in, out, err := startChild("manager", nil)
	if err != nil {
		return nil, nil, err
	}
	line := make(chan string, 1)
	go func() { // ends with the process
		text, _ := bufio.NewReader(out).ReadString('\n')
		line <- strings.TrimSpace(text)
	}()
	m = &managerProcess{cfg: cfg, cmd: cmd, in: in}
	if err := json.NewEncoder(in).Encode(cfg); err != nil {
		m.kill()
		return nil, nil, err
	}
	return m, line, nil
}

// dial reaches the manager's local socket.
func (m *managerProcess) dial() (err error) {
	if m.cc, err = dialSocket(m.cfg.Socket, products[m.cfg.Product].creds); err == nil {
		m.op = products[m.cfg.Product].operator(m.cc)
	}
	return err
}

// kill ends the process at once, as kill -9 does, and waits.
func (m *managerProcess) kill() {
	if m.cmd == nil {
		return
	}
	m.cmd.Process.Kill()
	m.gone()
}

// stop ends the process in order, as an init system does, and waits.
func (m *managerProcess) stop() {
	m.cmd.Process.Signal(syscall.SIGTERM)
	patience := time.AfterFunc(stopPatience, func() { m.cmd.Process.Kill() })
	m.cmd.Wait()
	patience.Stop()
	m.gone()
}

// stopPatience is how long a manager may take to stop.
const stopPatience = 30 * time.Second

func (m *managerProcess) gone() {
	m.cmd.Wait()
	m.in.Close()
	m.cmd = nil
	if m.cc != nil {
		m.cc.Close()
	}
}

// dialSocket reaches a daemon's local socket. It connects when it is first used, and tries again soon: gRPC's own second between tries
// would be measured, too.
func dialSocket(path string, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(creds),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: pollPeriod, Multiplier: 1, MaxDelay: pollPeriod}, MinConnectTimeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<28), grpc.WaitForReady(true)))
}

// freePort returns a loopback address that nobody listens at.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// await calls ok every so often until it is true. An error of ok is one more reason to wait; the last one is told when ctx ends.
func await(ctx context.Context, what string, every time.Duration, ok func(context.Context) (bool, error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		done, err := ok(ctx)
		if done && err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waited in vain: %s", what), err)
		case <-tick.C:
		}
	}
}
