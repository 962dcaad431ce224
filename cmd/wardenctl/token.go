package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

func (c *cli) joinTokenCommand() *cobra.Command {
	var (
		request api.CreateTokenRequest
		ttl     time.Duration
		quiet   bool
	)
	cmd := &cobra.Command{
		Use:   "join-token [flags] worker|manager",
		Short: "Make a join token",
		Long: fmt.Sprintf(`Make a join token and print the command that uses it. Each call makes a new one; it is shown this once.

The token gives its role and zone to whoever holds it, until it expires (after %s unless --ttl says otherwise), is used up
(--uses) or revoked, and only on the host or network that it is bound to (--node-name, --cidr).`, warden.TokenTTLDefault),
		Example: `  wardenctl swarm join-token worker
  wardenctl swarm join-token -q --ttl 10m --uses 1 --zone pci --cidr 192.0.2.0/24 worker
  wardenctl swarm join-token --rotate manager`,
		Args:      takes(1, 1),
		ValidArgs: []string{"worker", "manager"},
		RunE: func(cmd *cobra.Command, args []string) error {
			role, err := parseRole(args[0])
			if err != nil {
				return usage(cmd, "%w", err)
			}
			request.Role, request.TtlNs = role, int64(ttl)
			return c.with(func(ctx context.Context, d *daemon, _ []string) error {
				reply, err := d.control.CreateToken(ctx, &request)
				if err != nil {
					return err
				}
				if quiet {
					_, err := fmt.Fprintln(c.stdout, reply.GetToken())
					return writeFailed(err)
				}
				return writeToken(c.stdout, &request, reply, time.Now())
			})(cmd, args)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&request.Rotate, "rotate", false, "revoke all outstanding tokens of the role first")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print only the token")
	flagOf(flags, &ttl, "ttl", "duration", "how long the token can be used (default "+warden.TokenTTLDefault.String()+")", parseDuration)
	flags.Uint64Var(&request.UsesMax, "uses", 0, "how many nodes may join with it (0: any number)")
	flags.StringVar(&request.Zone, "zone", "", `zone of the nodes that join with it (default "`+warden.DefaultZone+`")`)
	flags.StringVar(&request.Hostname, "node-name", "", "only a node of this host name may join")
	flags.StringVar(&request.Cidr, "cidr", "", "only from this network, such as 192.0.2.0/24")
	return cmd
}

// writeToken prints a new token as Docker does, and its limits. Pure but for w.
func writeToken(w io.Writer, request *api.CreateTokenRequest, reply *api.CreateTokenReply, now time.Time) error {
	role := request.GetRole().Word()
	if request.GetRotate() {
		fmt.Fprintf(w, "Successfully rotated %s join token: %s revoked.\n\n", role, plural(int(reply.GetRevoked()), "token", "tokens"))
	}
	addresses := strings.Join(reply.GetAddresses(), " ")
	if addresses == "" {
		addresses = fmt.Sprintf("MANAGER:%d", warden.DefaultPort)
	}
	fmt.Fprintf(w, "To add a %s to this swarm, run the following command:\n\n    wardenctl swarm join --token %s %s\n\n", role, reply.GetToken(), clean(addresses))
	limits := "The token " + shortID(reply.GetId())
	if ns := reply.GetExpiresNs(); ns != 0 {
		limits += fmt.Sprintf(" expires at %s (in %s)", moment(ns), span(max(0, time.Unix(0, ns).Sub(now).Round(time.Second))))
	} else {
		limits += " does not expire"
	}
	if n := request.GetUsesMax(); n > 0 {
		limits += ", admits " + plural(int(n), "node", "nodes")
	}
	if request.GetZone() != "" {
		limits += ", zone " + request.GetZone()
	}
	if bound := boundTo(request.GetHostname(), request.GetCidr()); bound != "" {
		limits += ", only " + bound
	}
	_, err := fmt.Fprintln(w, limits+".")
	return writeFailed(err)
}

func boundTo(hostname, cidr string) string {
	return strings.Join(slices.DeleteFunc([]string{hostname, cidr}, func(s string) bool { return s == "" }), " ")
}

func (c *cli) tokenCommand() *cobra.Command {
	revoke := &cobra.Command{
		Use:               "revoke TOKEN-ID...",
		Short:             "Revoke join tokens",
		Long:              "Revoke join tokens by their IDs. Nodes that have joined stay; see \"wardenctl node rm\".",
		Example:           "  wardenctl swarm token revoke 7kq0d2m4x1zz",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_TOKEN),
		RunE: c.with(c.removal(func(d *daemon) func(context.Context, *api.ReferenceRequest, ...grpc.CallOption) (*api.ChangeReply, error) {
			return d.control.RevokeToken
		})),
	}
	return group("token", "Manage outstanding join tokens", "  wardenctl swarm token ls\n  wardenctl swarm token revoke 7kq0d2m4x1zz", c.tokenListCommand(), revoke)
}

func (c *cli) tokenListCommand() *cobra.Command {
	var flags listFlags
	keys := []string{"id", "role", "zone"}
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List join tokens, never their secrets",
		Example: "  wardenctl swarm token ls\n  wardenctl swarm token ls --filter role=manager -q",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			f, err := parseFilters(flags.filters, keys...)
			if err == nil {
				err = f.oneOf("role", "manager", "worker")
			}
			if err != nil {
				return err
			}
			tokens, err := listed(ctx, d, api.Kind_KIND_TOKEN, flags.local, (*api.Object).GetToken)
			if err != nil {
				return err
			}
			return flags.print(c, tokenListing(tokens, f, time.Now()))
		}),
	}
	flags.add(cmd, keys...)
	return cmd
}

// tokenListing sorts by the end of the tokens. Pure.
func tokenListing(tokens []*api.Token, f filters, now time.Time) listing {
	l := listing{
		fields: []string{"ID", "Role", "Zone", "Uses", "BoundTo", "Status", "ExpiresAt", "CreatedAt"},
		shown:  []string{"ID", "Role", "Zone", "Uses", "BoundTo", "Status", "ExpiresAt", "CreatedAt"},
	}
	tokens = slices.SortedFunc(slices.Values(tokens), func(a, b *api.Token) int {
		return cmp.Or(cmp.Compare(a.GetExpiresNs(), b.GetExpiresNs()), cmp.Compare(a.GetId(), b.GetId()))
	})
	for _, t := range tokens {
		zone := cmp.Or(t.GetZone(), warden.DefaultZone)
		if !f.fits("id", prefix(t.GetId())) || !f.fits("role", word(t.GetRole().Word())) || !f.fits("zone", word(zone)) {
			continue
		}
		uses := fmt.Sprint(t.GetUses())
		if t.GetUsesMax() > 0 {
			uses += fmt.Sprintf("/%d", t.GetUsesMax())
		}
		l.rows = append(l.rows, row{
			"ID": t.GetId(), "Role": t.GetRole().Word(), "Zone": zone, "Uses": uses, "BoundTo": boundTo(t.GetHostname(), t.GetCidr()),
			"Status": tokenStatus(t, now), "ExpiresAt": moment(t.GetExpiresNs()), "CreatedAt": ago(t.GetMeta().GetCreatedNs(), now),
		})
	}
	return l
}

func tokenStatus(t *api.Token, now time.Time) string {
	switch {
	case t.GetRevokedNs() != 0:
		return "revoked"
	case t.GetExpiresNs() != 0 && t.GetExpiresNs() <= now.UnixNano():
		return "expired"
	case t.GetUsesMax() > 0 && t.GetUses() >= t.GetUsesMax():
		return "used up"
	}
	return "valid"
}
