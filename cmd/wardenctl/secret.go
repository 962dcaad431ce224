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
		c.secretCreateCommand(), c.secretRotateCommand(), c.secretListCommand(), c.secretInspectCommand(), c.secretRemoveCommand())
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

func (c *cli) secretRotateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate NAME FILE|-",
		Short: "Give a secret a new value",
		Long: fmt.Sprintf(`Give a secret a new value, from a file or standard input ("-"), as create takes it: it becomes the next version and the current one.

Tasks of services that follow the secret are replaced at once, each service by its own update policy. Services that pin a
version (--secret NAME@3) keep it. Old versions stay until they are removed with "secret rm NAME@3"; a secret has at most %d.`, warden.SecretVersionsMax),
		Example: `  wardenctl secret rotate db-password ./password.txt
  head -c 32 /dev/urandom | base64 | wardenctl secret rotate db-password -`,
		Args:              takes(2, 2),
		ValidArgsFunction: c.names(api.Kind_KIND_SECRET),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, err := c.readSecret(cmd.Context(), "new value of the secret", args[1], warden.SecretBytesMax)
			if err != nil {
				return err
			}
			defer clear(data)
			return c.with(func(ctx context.Context, d *daemon, _ []string) error {
				reply, err := d.control.RotateSecret(ctx, &api.RotateSecretRequest{Reference: args[0], Data: data})
				if err != nil {
					return err
				}
				fmt.Fprintf(c.stdout, "%s: %s\n", clean(args[0]), rotated(reply))
				return nil
			})(cmd, args)
		},
	}
}

// rotated says what a rotation did. Pure.
func rotated(reply *api.RotateSecretReply) string {
	line := fmt.Sprintf("version %d", reply.GetVersion())
	if services := reply.GetServices(); len(services) > 0 {
		line += "; tasks are replaced: " + clean(some(services))
	}
	return line
}

// namesShown bounds how many names a line holds.
const namesShown = 10

func some(names []string) string {
	if n := len(names) - namesShown; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:namesShown], ", "), n)
	}
	return strings.Join(names, ", ")
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
			reply, err := d.list(ctx, api.Kind_KIND_SECRET, flags.local)
			if err != nil {
				return err
			}
			return flags.print(c, secretListing(pick(reply, (*api.Object).GetSecret), reply.GetUses(), f, time.Now()))
		}),
	}
	flags.add(cmd, keys...)
	return cmd
}

// secretListing sorts by name; IDs are whole, as Docker's. Pure.
func secretListing(secrets []*api.Secret, uses []*api.SecretUse, f filters, now time.Time) listing {
	l := listing{
		fields: []string{"ID", "Name", "Zones", "Version", "Versions", "Users", "Labels", "CreatedAt", "UpdatedAt"},
		shown:  []string{"ID", "Name", "Zones", "Version", "Versions", "Users", "CreatedAt", "UpdatedAt"},
	}
	byID := usesByID(uses)
	secrets = slices.SortedFunc(slices.Values(secrets), func(a, b *api.Secret) int { return cmp.Compare(a.GetName(), b.GetName()) })
	for _, s := range secrets {
		if !f.fits("id", prefix(s.GetId())) || !f.fits("name", prefix(s.GetName())) || !f.fits("label", label(s.GetLabels())) ||
			!f.fits("zone", func(want string) bool { return slices.Contains(s.GetZones(), want) }) {
			continue
		}
		l.rows = append(l.rows, row{
			"ID": s.GetId(), "Name": s.GetName(), "Zones": strings.Join(s.GetZones(), ","), "Version": fmt.Sprint(s.GetCurrentVersion()),
			"Versions": fmt.Sprint(len(byID[s.GetId()])), "Users": users(byID[s.GetId()]),
			"Labels": labelText(s.GetLabels()), "CreatedAt": ago(s.GetMeta().GetCreatedNs(), now), "UpdatedAt": ago(s.GetMeta().GetUpdatedNs(), now),
		})
	}
	return l
}

func usesByID(uses []*api.SecretUse) map[string][]*api.SecretUse {
	byID := map[string][]*api.SecretUse{}
	for _, u := range uses {
		byID[u.GetSecretId()] = append(byID[u.GetSecretId()], u)
	}
	return byID
}

// users names the services that use a secret, in whatever version; where only tasks do, how many. Pure.
func users(uses []*api.SecretUse) string {
	const shown = 3
	var names []string
	tasks := 0
	for _, u := range uses {
		names, tasks = append(names, u.GetServices()...), tasks+int(u.GetTasks())
	}
	slices.Sort(names)
	names = slices.Compact(names)
	switch n := len(names); {
	case n == 0 && tasks > 0:
		return plural(tasks, "task", "tasks")
	case n > shown:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ","), n-shown)
	}
	return strings.Join(names, ",")
}

func (c *cli) secretInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:               "inspect SECRET...",
		Short:             "Show one or more secrets as JSON, never their values",
		Long:              "Show one or more secrets as JSON: their versions with the services and the number of tasks that use each. Never their values.",
		Example:           "  wardenctl secret inspect db-password\n  wardenctl secret inspect --format '{{range .Versions}}{{.Version}}: {{.Tasks}} tasks {{end}}' db-password",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SECRET),
		RunE: c.with(c.inspecting(&format, func(ctx context.Context, d *daemon, ref string) (object, error) {
			reply, err := d.list(ctx, api.Kind_KIND_SECRET, false, ref)
			if err != nil {
				return nil, err
			}
			secrets := pick(reply, (*api.Object).GetSecret)
			if len(secrets) != 1 {
				return nil, noObject("secret", ref)
			}
			return secretView(secrets[0], reply.GetUses()), nil
		})),
	}
	formatFlag(cmd, &format)
	return cmd
}

func (c *cli) secretRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm SECRET[@VERSION]...",
		Aliases: []string{"remove"},
		Short:   "Remove secrets, or versions of them, that nothing uses",
		Long: `Remove secrets with all their versions, or single versions, that nothing uses. A version stays while it is the current one, while
a service pins it, or while a task that has not ended has it.`,
		Example:           "  wardenctl secret rm db-password\n  wardenctl secret rm db-password@2",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SECRET),
		RunE: c.with(c.removal(func(d *daemon) func(context.Context, *api.ReferenceRequest, ...grpc.CallOption) (*api.ChangeReply, error) {
			return d.control.RemoveSecret
		})),
	}
}
