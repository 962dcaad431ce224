package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"warden"
	"warden/api"
)

func devCommand() *cobra.Command {
	var managers, workers int
	var dir string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a whole cluster of separate daemons on this host's loopback",
		Long: `Run a whole cluster of separate daemons on this host's loopback, until Ctrl-C.

Each daemon is a process of its own with its own state directory, socket and 127.0.0.0/8 address. On Ctrl-C all of them
leave the cluster, which ends their tasks, and a folder that dev made itself is removed.`,
		Example: `  warden dev
  warden dev --managers 3 --workers 3 --dir /tmp/dev`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if managers < 1 || managers > 7 || workers < 0 || workers > 50 {
				return warden.Errorf(warden.CodeUsage, "reading the flags", "want 1 to 7 managers and 0 to 50 workers")
			}
			return dev(cmd.Context(), managers, workers, dir, cmd.OutOrStdout())
		},
	}
	cmd.Flags().IntVar(&managers, "managers", 1, "how many managers")
	cmd.Flags().IntVar(&workers, "workers", 2, "how many workers")
	cmd.Flags().StringVar(&dir, "dir", "", "folder for state, sockets and logs (default: a temporary one, removed at the end)")
	return cmd
}

// devNode is one daemon of the cluster.
type devNode struct {
	name, address, socket, log string
	cmd                        *exec.Cmd
	exited                     chan struct{}
	conn                       *grpc.ClientConn
}

func dev(ctx context.Context, managers, workers int, dir string, out io.Writer) (err error) {
	if dir == "" {
		if dir, err = os.MkdirTemp("", "warden-dev-"); err != nil {
			return warden.Recode(warden.CodeInternal, "making a folder", err)
		}
		defer os.RemoveAll(dir)
	} else if dir, err = filepath.Abs(dir); err != nil {
		return warden.Recode(warden.CodeInvalid, "reading --dir", err)
	}
	var nodes []*devNode
	defer func() {
		fmt.Fprintln(out, "stopping")
		stopAll(nodes)
	}()
	for i := range managers + workers {
		n := &devNode{name: fmt.Sprintf("manager-%d", i+1), address: fmt.Sprintf("127.0.0.%d:2377", 11+i), exited: make(chan struct{})}
		if i >= managers {
			n.name = fmt.Sprintf("worker-%d", i-managers+1)
		}
		if err := n.start(dir); err != nil {
			return err
		}
		nodes = append(nodes, n)
	}
	for _, n := range nodes {
		if err := n.awaitSocket(ctx); err != nil {
			return err
		}
	}
	first := api.NewLocalClient(nodes[0].conn)
	if _, err := first.Init(ctx, &api.InitRequest{}); err != nil {
		return api.FromError(err)
	}
	if err := joinAll(ctx, nodes, managers); err != nil {
		return err
	}
	fmt.Fprintf(out, "cluster of %d managers and %d workers is up; talk to it with\n\n  export WARDEN_HOST=unix://%s\n  wardenctl status\n\n", managers, workers, nodes[0].socket)
	for _, n := range nodes {
		fmt.Fprintf(out, "%-10s  pid %-7d  %s  log %s\n", n.name, n.cmd.Process.Pid, n.socket, n.log)
	}
	fmt.Fprintln(out, "\nCtrl-C ends it.")
	<-ctx.Done()
	return nil
}

// start runs one daemon as a process of its own, in a session of its own so that Ctrl-C reaches this program alone.
func (n *devNode) start(dir string) error {
	op := "starting " + n.name
	base := filepath.Join(dir, n.name)
	if err := os.MkdirAll(base, 0o700); err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	n.socket, n.log = filepath.Join(base, "warden.sock"), filepath.Join(base, "log")
	log, err := os.Create(n.log)
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	defer log.Close()
	self, err := os.Executable()
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	n.cmd = exec.Command(self, "run", "--state-dir", filepath.Join(base, "state"), "--socket", n.socket, "--listen", n.address, "--hostname", n.name,
		"--executor", "process")
	n.cmd.Stdout, n.cmd.Stderr = log, log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := n.cmd.Start(); err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	go func() { _ = n.cmd.Wait(); close(n.exited) }()
	n.conn, err = grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	return err
}

func (n *devNode) awaitSocket(ctx context.Context) error {
	deadline := time.After(20 * time.Second)
	for {
		if c, err := net.Dial("unix", n.socket); err == nil {
			return c.Close()
		}
		select {
		case <-n.exited:
			return warden.Errorf(warden.CodeUnavailable, "starting "+n.name, "it ended at once: %s", lastLine(n.log))
		case <-deadline:
			return warden.Errorf(warden.CodeTimeout, "starting "+n.name, "no socket; see %s", n.log)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func lastLine(path string) (last string) {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		last = s.Text()
	}
	return last
}

// joinAll lets the other managers join one by one and the workers all at once, each role with a token of its own.
func joinAll(ctx context.Context, nodes []*devNode, managers int) error {
	control := api.NewControlClient(nodes[0].conn)
	join := func(n *devNode, token string) error {
		_, err := api.NewLocalClient(n.conn).Join(ctx, &api.LocalJoinRequest{Token: token, Addresses: []string{nodes[0].address}})
		return warden.Wrap("joining "+n.name, api.FromError(err))
	}
	for _, role := range []struct {
		role  api.Role
		nodes []*devNode
	}{{api.Role_ROLE_MANAGER, nodes[1:managers]}, {api.Role_ROLE_WORKER, nodes[managers:]}} {
		if len(role.nodes) == 0 {
			continue
		}
		token, err := control.CreateToken(ctx, &api.CreateTokenRequest{Role: role.role, UsesMax: uint64(len(role.nodes))})
		if err != nil {
			return api.FromError(err)
		}
		for _, n := range role.nodes {
			if err := join(n, token.Token); err != nil {
				return err
			}
		}
	}
	return nil
}

// stopAll lets every node leave, which ends its tasks, workers first, then ends the daemons.
func stopAll(nodes []*devNode) {
	var wg sync.WaitGroup
	for i := len(nodes) - 1; i >= 0; i-- {
		n := nodes[i]
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			_, _ = api.NewLocalClient(n.conn).Leave(ctx, &api.LeaveRequest{Force: true}) // one that can't leave is ended all the same
			_ = n.cmd.Process.Signal(syscall.SIGTERM)
			select {
			case <-n.exited:
			case <-ctx.Done():
				_ = n.cmd.Process.Kill()
			}
			n.conn.Close()
		})
	}
	wg.Wait()
}
