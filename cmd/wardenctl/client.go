package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"warden"
	"warden/api"
)

// replyBytesMax bounds one reply. A list of every task of a full cluster is far over warden.MessageMax, and the other end of a
// local socket is trusted.
const replyBytesMax = 256 << 20

// daemon is a connection to the daemon behind the socket.
type daemon struct {
	control api.ControlClient
	local   api.LocalClient
	conn    *grpc.ClientConn
	socket  string
	dialErr atomic.Pointer[error]
}

// socketPath returns the path in --host or WARDEN_HOST, or the default. Errors: CodeUsage, CodeUnsupported.
func socketPath(flag, env string) (string, error) {
	host := flag
	if host == "" {
		host = env
	}
	if host == "" {
		return warden.DefaultSocket, nil
	}
	if strings.HasPrefix(host, "tcp://") {
		return "", warden.Hint(warden.Errorf(warden.CodeUnsupported, "reading --host", "operators over TCP are not there yet"),
			"run wardenctl on a manager's host, with --host unix:///path of its socket")
	}
	path, ok := strings.CutPrefix(host, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return "", warden.Hint(warden.Errorf(warden.CodeUsage, "reading --host", "%q is not the address of a socket", host),
			"write it as unix:///path/to/warden.sock")
	}
	return path, nil
}

// connect prepares the connection; nothing is dialled before the first call.
func (c *cli) connect() (*daemon, error) {
	path, err := socketPath(c.host, os.Getenv("WARDEN_HOST"))
	if err != nil {
		return nil, err
	}
	d := &daemon{socket: path}
	d.conn, err = grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(replyBytesMax)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
			if err != nil {
				d.dialErr.Store(&err)
			}
			return conn, err
		}))
	if err != nil {
		return nil, warden.Errorf(warden.CodeUsage, "reading --host", "%w", err)
	}
	d.control, d.local = api.NewControlClient(d.conn), api.NewLocalClient(d.conn)
	return d, nil
}

// action is the body of a command.
type action func(ctx context.Context, d *daemon, args []string) error

// with makes a command's RunE of an action: it connects, applies --timeout, and gives errors their codes.
func (c *cli) with(f action) func(*cobra.Command, []string) error { return c.call(f, false) }

// streaming is with for actions that last until they are interrupted: --timeout counts only if it was given, and both an
// interrupt and the timeout are a normal end.
func (c *cli) streaming(f action) func(*cobra.Command, []string) error { return c.call(f, true) }

func (c *cli) call(f action, stream bool) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		d, err := c.connect()
		if err != nil {
			return err
		}
		defer d.conn.Close()
		ctx := cmd.Context()
		if c.timeout > 0 && (!stream || cmd.Flags().Changed("timeout")) {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, c.timeout)
			defer cancel()
		}
		err = f(ctx, d, args)
		if err != nil && stream && ctx.Err() != nil {
			return nil
		}
		if err != nil && cmd.Context().Err() != nil {
			return warden.Hint(warden.Errorf(warden.CodeUnavailable, "", "interrupted"), "the change may have been made: look before you repeat it")
		}
		return d.explain(cmd.Context(), err)
	}
}

// explain turns what a call returned into an error with a code: why no daemon could be reached, what the daemon said, or what
// kind of daemon it is that does not know the call.
func (d *daemon) explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if many, ok := errors.AsType[several](err); ok {
		for i := range many {
			many[i] = d.explain(ctx, many[i])
		}
		return many
	}
	if _, ok := errors.AsType[*warden.Error](err); ok {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return warden.Recode(warden.CodeOf(err), "", err)
	}
	if dialErr := d.dialErr.Load(); dialErr != nil && st.Code() == codes.Unavailable {
		return unreachable(d.socket, *dialErr)
	}
	if st.Code() == codes.DeadlineExceeded && len(st.Details()) == 0 {
		return warden.Hint(warden.Errorf(warden.CodeTimeout, "waiting for the daemon at "+d.socket, "no answer in time; the outcome is unknown"),
			"look before you repeat a change; --timeout waits longer")
	}
	if st.Code() == codes.Unimplemented && len(st.Details()) == 0 {
		if info, infoErr := d.local.Info(ctx, &api.InfoRequest{}); infoErr == nil {
			return notServing(info)
		}
	}
	return api.FromError(err)
}

// unreachable explains a failed dial of the socket.
func unreachable(socket string, err error) error {
	op := "connecting to the daemon at " + socket
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return warden.Hint(warden.Errorf(warden.CodeUnavailable, op, "there is no such socket"),
			"start a daemon with `warden run`, or name the socket of a running one with --host unix:///path")
	case errors.Is(err, fs.ErrPermission):
		return warden.Hint(warden.Errorf(warden.CodeDenied, op, "permission denied"), "run as root or as a member of the group warden")
	case errors.Is(err, syscall.ECONNREFUSED):
		return warden.Hint(warden.Errorf(warden.CodeUnavailable, op, "nothing answers there"),
			"the daemon has ended: start it with `warden run` and read its log")
	}
	return warden.Hint(warden.Errorf(warden.CodeUnavailable, op, "%w", err), "check the path given with --host or WARDEN_HOST")
}

// notServing says why a daemon in this state serves no Control API.
func notServing(info *api.InfoReply) error {
	switch info.GetState() {
	case "uninitialized":
		return warden.Hint(warden.Errorf(warden.CodeUninitialized, "", "this daemon belongs to no cluster"),
			"start a cluster with `wardenctl swarm init` or enter one with `wardenctl swarm join`")
	case "locked":
		return warden.Hint(warden.Errorf(warden.CodeLocked, "", "this manager is locked"), unlockHint(info))
	case "running":
		return warden.Hint(warden.Errorf(warden.CodeNotManager, "", "this node is no manager"), "ask a manager")
	}
	return warden.Hint(warden.Errorf(warden.CodeUnavailable, "", "the daemon is %s", info.GetState()), "see `wardenctl status`")
}

func unlockHint(info *api.InfoReply) string {
	hint := "unlock it with `wardenctl swarm unlock`"
	if id := info.GetUnlockKeyId(); id != "" {
		hint += " and the key " + id
	}
	return hint
}

// list returns the records of a kind that the references name, or all where there are none.
func (d *daemon) list(ctx context.Context, kind api.Kind, local bool, references ...string) (*api.ListReply, error) {
	return d.control.List(ctx, &api.ListRequest{Kind: kind, Local: local, References: references})
}

// pick takes the records of one kind out of a reply.
func pick[T any](reply *api.ListReply, get func(*api.Object) *T) []*T {
	var out []*T
	for _, o := range reply.GetObjects() {
		if v := get(o); v != nil {
			out = append(out, v)
		}
	}
	return out
}

// listed lists one kind and picks its records.
func listed[T any](ctx context.Context, d *daemon, kind api.Kind, local bool, get func(*api.Object) *T, references ...string) ([]*T, error) {
	reply, err := d.list(ctx, kind, local, references...)
	if err != nil {
		return nil, err
	}
	return pick(reply, get), nil
}

// hostnames returns the host name of every node by ID.
func (d *daemon) hostnames(ctx context.Context, local bool) (map[string]string, error) {
	nodes, err := listed(ctx, d, api.Kind_KIND_NODE, local, (*api.Object).GetNode)
	if err != nil {
		return nil, err
	}
	names := make(map[string]string, len(nodes))
	for _, n := range nodes {
		names[n.GetId()] = n.GetHostname()
	}
	return names, nil
}

// self returns this daemon's node ID for the word "self", and any other reference as it is.
func (d *daemon) self(ctx context.Context, reference string) (string, error) {
	if reference != "self" {
		return reference, nil
	}
	info, err := d.local.Info(ctx, &api.InfoRequest{})
	if err != nil {
		return "", err
	}
	if info.GetNodeId() == "" {
		return "", notServing(info)
	}
	return info.GetNodeId(), nil
}

// each does f for every target and prints what it returns; it goes on after a failure and returns all errors.
func (c *cli) each(targets []string, f func(target string) (string, error)) error {
	var failed several
	for _, target := range targets {
		line, err := f(target)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		if line != "" {
			fmt.Fprintln(c.stdout, line)
		}
	}
	if len(failed) == 1 {
		return failed[0]
	}
	if len(failed) > 1 {
		return failed
	}
	return nil
}

// removal is the body of "rm REFERENCE...": it prints each reference as it was given.
func (c *cli) removal(remove func(*daemon) func(context.Context, *api.ReferenceRequest, ...grpc.CallOption) (*api.ChangeReply, error)) action {
	return func(ctx context.Context, d *daemon, args []string) error {
		return c.each(args, func(ref string) (string, error) {
			reply, err := remove(d)(ctx, &api.ReferenceRequest{Reference: ref})
			if err != nil {
				return "", err
			}
			c.changed(reply)
			return ref, nil
		})
	}
}

// changed prints the warnings of a change.
func (c *cli) changed(reply *api.ChangeReply) {
	for _, w := range reply.GetWarnings() {
		c.warn("%s", w)
	}
	c.silent(reply.GetSilentManagers())
}

// silent warns of managers that have not acknowledged a change.
func (c *cli) silent(managers []string) {
	for _, id := range managers {
		c.warn("manager %s did not acknowledge the change; its lease has ended, so it pushes nothing until it has caught up", id)
	}
}
