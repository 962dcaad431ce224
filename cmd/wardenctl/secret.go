package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"warden"
	"warden/api"
)

func (c *cli) secretCommand() *cobra.Command {
	return group("secret", "Manage secrets", "  wardenctl secret create db-password ./password.txt\n  wardenctl secret ls",
		c.secretCreateCommand(), c.secretListCommand(), c.secretInspectCommand(), c.secretRemoveCommand())
}

func (c *cli) secretCreateCommand() *cobra.Command {
	request, labels := &api.CreateSecretRequest{}, pairs{}
	cmd := &cobra.Command{
		Use:   "create [flags] NAME FILE|-",
		Short: "Create a secret from a file or standard input",
		Long: fmt.Sprintf(`Create a secret from a file or standard input ("-"): up to %d KiB, taken byte by byte (the newline of echo too). On a terminal
"-" asks for one line without showing it.

With --zone only nodes of these zones ever get the secret; without, nodes of any zone may.`, warden.SecretBytesMax>>10),
		Example: `  wardenctl secret create db-password ./password.txt
  head -c 32 /dev/urandom | wardenctl secret create --zone pci --label team=payments card-key -`,
		Args: takes(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, err := c.readSecret(cmd.Context(), "value of the secret", args[1], warden.SecretBytesMax)
			if err != nil {
				return err
			}
			defer clear(data)
			request.Name, request.Data, request.Labels = args[0], data, labels
			return c.with(func(ctx context.Context, d *daemon, _ []string) error {
				reply, err := d.control.CreateSecret(ctx, request)
				if err != nil {
					return err
				}
				c.changed(reply)
				fmt.Fprintln(c.stdout, reply.GetId())
				return nil
			})(cmd, args)
		},
	}
	cmd.Flags().VarP(labels, "label", "l", "label of the secret (repeatable)")
	cmd.Flags().StringArrayVar(&request.Zones, "zone", nil, "zone that the secret may enter (repeatable)")
	return cmd
}

func (c *cli) secretListCommand() *cobra.Command {
	var flags listFlags
	keys := []string{"id", "name", "label", "zone"}
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List secrets",
		Example: "  wardenctl secret ls\n  wardenctl secret ls --filter label=team=payments -q",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			f, err := parseFilters(flags.filters, keys...)
			if err != nil {
				return err
			}
			secrets, err := listed(ctx, d, api.Kind_KIND_SECRET, flags.local, (*api.Object).GetSecret)
			if err != nil {
				return err
			}
			return flags.print(c, secretListing(secrets, f, time.Now()))
		}),
	}
	flags.add(cmd, keys...)
	return cmd
}

// secretListing sorts by name; IDs are whole, as Docker's. Pure.
func secretListing(secrets []*api.Secret, f filters, now time.Time) listing {
	l := listing{
		fields: []string{"ID", "Name", "Zones", "Version", "Labels", "CreatedAt", "UpdatedAt"},
		shown:  []string{"ID", "Name", "Zones", "Version", "CreatedAt", "UpdatedAt"},
	}
	secrets = slices.SortedFunc(slices.Values(secrets), func(a, b *api.Secret) int { return cmp.Compare(a.GetName(), b.GetName()) })
	for _, s := range secrets {
		if !f.fits("id", prefix(s.GetId())) || !f.fits("name", prefix(s.GetName())) || !f.fits("label", label(s.GetLabels())) ||
			!f.fits("zone", func(want string) bool { return slices.Contains(s.GetZones(), want) }) {
			continue
		}
		l.rows = append(l.rows, row{
			"ID": s.GetId(), "Name": s.GetName(), "Zones": strings.Join(s.GetZones(), ","), "Version": fmt.Sprint(s.GetCurrentVersion()),
			"Labels": labelText(s.GetLabels()), "CreatedAt": ago(s.GetMeta().GetCreatedNs(), now), "UpdatedAt": ago(s.GetMeta().GetUpdatedNs(), now),
		})
	}
	return l
}

func (c *cli) secretInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:               "inspect SECRET...",
		Short:             "Show one or more secrets as JSON, never their values",
		Example:           "  wardenctl secret inspect db-password\n  wardenctl secret inspect --format '{{join .Spec.Zones \",\"}}' db-password",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SECRET),
		RunE: c.with(c.inspecting(&format, func(ctx context.Context, d *daemon, ref string) (object, error) {
			secrets, err := listed(ctx, d, api.Kind_KIND_SECRET, false, (*api.Object).GetSecret, ref)
			if err != nil {
				return nil, err
			}
			if len(secrets) != 1 {
				return nil, noObject("secret", ref)
			}
			return secretView(secrets[0]), nil
		})),
	}
	formatFlag(cmd, &format)
	return cmd
}

func (c *cli) secretRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm SECRET...",
		Aliases:           []string{"remove"},
		Short:             "Remove secrets that no service uses",
		Example:           "  wardenctl secret rm db-password",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SECRET),
		RunE: c.with(c.removal(func(d *daemon) func(context.Context, *api.ReferenceRequest, ...grpc.CallOption) (*api.ChangeReply, error) {
			return d.control.RemoveSecret
		})),
	}
}
