package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"warden/api"
)

func (c *cli) zoneCommand() *cobra.Command {
	return group("zone", "Manage security zones", "  wardenctl zone create pci\n  wardenctl zone ls",
		c.zoneCreateCommand(), c.zoneListCommand(), c.zoneInspectCommand(), c.zoneRemoveCommand())
}

func (c *cli) zoneCreateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "create NAME",
		Short: "Declare a zone",
		Long: `Declare a zone. Nodes, services, secrets and join tokens can only name zones that exist, so that a mistyped one is refused
rather than made.`,
		Example: "  wardenctl zone create pci",
		Args:    takes(1, 1),
		RunE: c.with(func(ctx context.Context, d *daemon, args []string) error {
			reply, err := d.control.CreateZone(ctx, &api.CreateZoneRequest{Name: args[0]})
			if err != nil {
				return err
			}
			c.changed(reply)
			fmt.Fprintln(c.stdout, args[0])
			return nil
		}),
	}
}

func (c *cli) zoneListCommand() *cobra.Command {
	var flags listFlags
	keys := []string{"id", "name"}
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List zones",
		Example: "  wardenctl zone ls\n  wardenctl zone ls --format '{{.Name}}'",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			f, err := parseFilters(flags.filters, keys...)
			if err != nil {
				return err
			}
			zones, err := listed(ctx, d, api.Kind_KIND_ZONE, flags.local, (*api.Object).GetZone)
			if err != nil {
				return err
			}
			return flags.print(c, zoneListing(zones, f, time.Now()))
		}),
	}
	flags.add(cmd, keys...)
	return cmd
}

// zoneListing sorts by name. Pure.
func zoneListing(zones []*api.Zone, f filters, now time.Time) listing {
	l := listing{fields: []string{"ID", "Name", "CreatedAt"}, shown: []string{"ID", "Name", "CreatedAt"}}
	zones = slices.SortedFunc(slices.Values(zones), func(a, b *api.Zone) int { return cmp.Compare(a.GetName(), b.GetName()) })
	for _, z := range zones {
		if f.fits("id", prefix(z.GetId())) && f.fits("name", prefix(z.GetName())) {
			l.rows = append(l.rows, row{"ID": z.GetId(), "Name": z.GetName(), "CreatedAt": ago(z.GetMeta().GetCreatedNs(), now)})
		}
	}
	return l
}

func (c *cli) zoneInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:               "inspect ZONE...",
		Short:             "Show one or more zones as JSON",
		Example:           "  wardenctl zone inspect pci",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_ZONE),
		RunE: c.with(c.inspecting(&format, func(ctx context.Context, d *daemon, ref string) (object, error) {
			zones, err := listed(ctx, d, api.Kind_KIND_ZONE, false, (*api.Object).GetZone, ref)
			if err != nil {
				return nil, err
			}
			if len(zones) != 1 {
				return nil, noObject("zone", ref)
			}
			return zoneView(zones[0]), nil
		})),
	}
	formatFlag(cmd, &format)
	return cmd
}

func (c *cli) zoneRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm ZONE...",
		Aliases:           []string{"remove"},
		Short:             "Remove zones that nothing uses",
		Example:           "  wardenctl zone rm pci",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_ZONE),
		RunE: c.with(c.removal(func(d *daemon) func(context.Context, *api.ReferenceRequest, ...grpc.CallOption) (*api.ChangeReply, error) {
			return d.control.RemoveZone
		})),
	}
}
