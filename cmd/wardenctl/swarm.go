package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"warden"
	"warden/api"
	"warden/internal/courier"
)

func (c *cli) swarmCommand() *cobra.Command {
	return group("swarm", "Manage the cluster", "  wardenctl swarm init --advertise-addr 192.0.2.1:2377\n  wardenctl swarm join-token worker",
		c.swarmInitCommand(), c.swarmJoinCommand(), c.joinTokenCommand(), c.tokenCommand(), c.swarmUnlockCommand(), c.unlockKeyCommand(), c.swarmUpdateCommand(),
		c.rotateDEKCommand(), c.caCommand(), c.swarmLeaveCommand(), c.statusCommand())
}

func (c *cli) swarmInitCommand() *cobra.Command {
	var (
		request api.InitRequest
		expiry  time.Duration
	)
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Start a cluster with this node as its first manager",
		Long: `Start a cluster with this node as its first manager.

With --autolock the unlock key is printed this once and kept nowhere: a manager that restarts stays locked until it is given.
Managers take no tasks unless --availability is active.`,
		Example: "  wardenctl swarm init --autolock --advertise-addr 192.0.2.1:2377\n  wardenctl swarm init --cert-expiry 30d",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			request.LeafTtlNs = int64(expiry)
			if !request.Autolock {
				reply, err := d.local.Init(ctx, &request)
				if err != nil {
					return err
				}
				return writeInit(c.stdout, reply, nil)
			}
			if _, err := d.local.Info(ctx, &api.InfoRequest{}); err != nil { // nobody there: a key would only confuse
				return err
			}
			var reply *api.InitReply
			return c.withNewKey(ctx, d, func(recipient []byte) (err error) {
				request.UnlockRecipient = recipient
				reply, err = d.local.Init(ctx, &request)
				return err
			}, nil, func(id string, key []byte) error {
				if reply == nil {
					return writeNewKey(c.stdout, id, key)
				}
				return writeInit(c.stdout, reply, key)
			})
		}),
	}
	flags := cmd.Flags()
	flags.StringVar(&request.Advertise, "advertise-addr", "", "HOST[:PORT] where other nodes reach this manager")
	flags.BoolVar(&request.Autolock, "autolock", false, "lock managers that restart until the unlock key is given")
	flagOf(flags, &expiry, "cert-expiry", "duration", "life of node certificates, such as 12h or 90d (default 90d)", parseDuration)
	flagOf(flags, &request.Availability, "availability", "active|pause|drain", "whether this node takes tasks (default drain)", parseAvailability)
	return cmd
}

// writeInit prints what was made; the unlock key is shown here and nowhere else. Pure but for w.
func writeInit(w io.Writer, reply *api.InitReply, unlockKey []byte) error {
	fmt.Fprintf(w, `Swarm initialized: current node (%s) is now a manager.

To add a worker to this swarm, run "wardenctl swarm join-token worker" and follow the instructions.
To add a manager to this swarm, run "wardenctl swarm join-token manager" and follow the instructions.
`, reply.GetNodeId())
	if len(unlockKey) == 0 {
		return nil
	}
	return writeNewKey(w, reply.GetUnlockKeyId(), unlockKey)
}

func (c *cli) swarmJoinCommand() *cobra.Command {
	var (
		request         api.LocalJoinRequest
		token, fromFile string
	)
	cmd := &cobra.Command{
		Use:   "join (--token TOKEN | --token-file FILE) ADDR...",
		Short: "Enter a cluster with this node",
		Long: `Enter a cluster with this node. ADDR is HOST[:PORT] of a manager; of several, the first that answers is taken. Role and zone
come from the token. The manager must present the root that the token pins, and the token's secret never crosses the wire.

Other users of this host can read command lines: --token-file reads the token from a file, or from standard input where FILE is
"-" (on a terminal without showing it).`,
		Example: "  wardenctl swarm join --token WDNTKN-1-... 192.0.2.1:2377\n  wardenctl swarm join --token-file - 192.0.2.1:2377 192.0.2.2:2377 < token",
		Args:    takes(1, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if fromFile != "" {
				text, err := c.readSecret(cmd.Context(), "join token", fromFile, warden.TokenTextMax+16)
				if err != nil {
					return err
				}
				token = string(bytes.TrimSpace(text))
			}
			if token == "" {
				return usage(cmd, "the join token is empty")
			}
			request.Token, request.Addresses = token, nil
			for _, arg := range args {
				address, err := withPort(arg)
				if err != nil {
					return err
				}
				request.Addresses = append(request.Addresses, address)
			}
			return c.with(func(ctx context.Context, d *daemon, _ []string) error {
				reply, err := d.local.Join(ctx, &request)
				if err != nil {
					return err
				}
				fmt.Fprintf(c.stdout, "This node joined a swarm as a %s.\nNode ID: %s, zone: %s\n", reply.GetRole().Word(), reply.GetNodeId(), clean(reply.GetZone()))
				return nil
			})(cmd, args)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&token, "token", "", "join token (visible to other users of this host: see --token-file)")
	flags.StringVar(&fromFile, "token-file", "", `file with the join token, "-" for standard input`)
	flags.StringVar(&request.Advertise, "advertise-addr", "", "HOST[:PORT] where other nodes reach this node, for managers")
	flagOf(flags, &request.Availability, "availability", "active|pause|drain", "whether this node takes tasks (default: workers active, managers drain)", parseAvailability)
	cmd.MarkFlagsOneRequired("token", "token-file")
	cmd.MarkFlagsMutuallyExclusive("token", "token-file")
	return cmd
}

// withPort returns HOST:PORT; a missing port is the default one. Errors: CodeUsage, without the text: it could be a token.
func withPort(address string) (string, error) {
	bad := warden.Hint(warden.Errorf(warden.CodeUsage, "reading the address of a manager", "want HOST or HOST:PORT"), `such as "192.0.2.1:2377" or "[2001:db8::1]:2377"`)
	if address == "" || len(address) > warden.HostnameMax+8 {
		return "", bad
	}
	if ip := net.ParseIP(address); ip != nil {
		return net.JoinHostPort(address, strconv.Itoa(warden.DefaultPort)), nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		host, port, err = net.SplitHostPort(address + ":" + strconv.Itoa(warden.DefaultPort))
	}
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
		return "", bad
	}
	return net.JoinHostPort(host, port), nil
}

func (c *cli) swarmUnlockCommand() *cobra.Command {
	var keyFile string
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Unlock this manager after a restart",
		Long: `Unlock this manager after a restart. The key is asked for on a terminal without showing it, and otherwise read from standard
input or --key-file. It is never an argument: other users of this host can read command lines.`,
		Example: "  wardenctl swarm unlock\n  wardenctl swarm unlock --key-file /media/usb/unlock-key\n  pass show warden/unlock | wardenctl swarm unlock",
		Args:    takes(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := c.readSecret(cmd.Context(), "unlock key", keyFile, warden.UnlockKeyTextMax+16)
			if err != nil {
				return err
			}
			defer clear(key)
			text := bytes.TrimSpace(key)
			if len(text) == 0 {
				return usage(cmd, "the unlock key is empty")
			}
			return c.with(func(ctx context.Context, d *daemon, _ []string) error {
				info, err := d.local.Info(ctx, &api.InfoRequest{})
				if err != nil {
					return err
				}
				request := &api.UnlockRequest{}
				if to := info.GetUnlockInbox(); len(to) > 0 { // else it is not locked, and says so itself
					if request.SealedKey, err = courier.Seal(to, text); err != nil {
						return err
					}
				}
				reply, err := d.local.Unlock(ctx, request)
				if err != nil {
					return err
				}
				fmt.Fprintf(c.stdout, "Manager %s unlocked.\n", reply.GetNodeId())
				return nil
			})(cmd, args)
		},
	}
	cmd.Flags().StringVar(&keyFile, "key-file", "-", `file with the unlock key, "-" for the terminal or standard input`)
	return cmd
}

func (c *cli) swarmUpdateCommand() *cobra.Command {
	var (
		expiry time.Duration
		lock   bool
	)
	cmd := &cobra.Command{
		Use:   "update",
		Short: "Change settings of the cluster",
		Long: `Change settings of the cluster. A new --cert-expiry reaches every node within a minute: their certificates are renewed.

--autolock=true makes an unlock key and prints it, this once: from then on a manager that restarts stays locked until it is given,
and its disk is closed to whoever has no key. ` + rotationReach + `

--autolock=false has managers write their keys in clear.`,
		Example: "  wardenctl swarm update --cert-expiry 30d\n  wardenctl swarm update --autolock=true",
		Args:    takes(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(func(ctx context.Context, d *daemon, _ []string) error {
				request := &api.UpdateClusterRequest{LeafTtlNs: int64(expiry)}
				if cmd.Flags().Changed("autolock") {
					return c.updateAutolock(ctx, d, request, lock)
				}
				if expiry == 0 {
					return warden.Hint(warden.Errorf(warden.CodeUsage, "", "there is nothing to change"), "give --cert-expiry or --autolock")
				}
				reply, err := d.control.UpdateCluster(ctx, request)
				if err != nil {
					return err
				}
				c.changed(reply)
				fmt.Fprintln(c.stdout, "Swarm updated.")
				return nil
			})(cmd, args)
		},
	}
	flagOf(cmd.Flags(), &expiry, "cert-expiry", "duration", "life of node certificates, such as 12h or 90d", parseDuration)
	cmd.Flags().BoolVar(&lock, "autolock", false, "lock managers that restart until the unlock key is given")
	return cmd
}

func (c *cli) swarmLeaveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "Take this node out of its cluster",
		Long: `Take this node out of its cluster: its tasks stop, and keys, secrets and state are wiped from its disk.

A manager leaves only with --force; where the last manager leaves, the cluster and all its secrets are gone.`,
		Example: "  wardenctl swarm leave\n  wardenctl swarm leave --force",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			reply, err := d.local.Leave(ctx, &api.LeaveRequest{Force: force})
			if err != nil {
				return err
			}
			for _, w := range reply.GetWarnings() {
				c.warn("%s", w)
			}
			fmt.Fprintln(c.stdout, "Node left the swarm.")
			return nil
		}),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "leave even as a manager, or where no manager can be told")
	return cmd
}
