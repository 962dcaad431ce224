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
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// childEnv names, in a child process, what it is: "manager" or "nodes".
const childEnv = "WARDEN_PEERS_CHILD"

// managerConfig is what the process of one manager reads from its standard input, as one line of JSON.
type managerConfig struct {
	Product, Dir, Listen, Socket, Hostname string
	Join, Token                            string // of a running manager; empty: this one makes the cluster
}

// serveManager is the main of a manager's process: it says "ready" once the manager serves, and ends with its standard input.
func serveManager() {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	var cfg managerConfig
	if err == nil {
		err = json.Unmarshal(line, &cfg)
	}
	if err == nil {
		err = products[cfg.Product].manage(context.Background(), cfg)
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, in)
}

// managerProcess is one manager's process, as the harness sees it.
type managerProcess struct {
	cfg managerConfig
	cmd *exec.Cmd
	in  io.Closer
	cc  *grpc.ClientConn // to its local socket
	op  operator
}

func child(kind string) (*exec.Cmd, io.WriteCloser, io.Reader, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+kind)
	cmd.Stderr = os.Stderr
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
	cmd, in, out, err := child("manager")
	if err != nil {
		return nil, err
	}
	m := &managerProcess{cfg: cfg, cmd: cmd, in: in}
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		said <- strings.TrimSpace(line)
	}()
	if err := json.NewEncoder(in).Encode(cfg); err != nil {
		m.kill()
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
		m.cc, err = dialSocket(cfg.Socket, products[cfg.Product].creds)
	}
	if err != nil {
		m.kill()
		return nil, err
	}
	m.op = products[cfg.Product].operator(m.cc)
	return m, nil
}

// kill ends the process at once, as kill -9 does, and waits.
func (m *managerProcess) kill() {
	if m.cmd == nil {
		return
	}
	m.cmd.Process.Kill()
	m.cmd.Wait()
	m.in.Close()
	m.cmd = nil
	if m.cc != nil {
		m.cc.Close()
	}
}

// dialSocket reaches a daemon's local socket. It connects when it is first used.
func dialSocket(path string, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(creds),
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
