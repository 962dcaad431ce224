package main

import (
	"context"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"warden/api"
)

// version is set by the linker: -X main.version=1.2.3.
var version = "dev"

func (c *cli) versionCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the versions of wardenctl and of the daemon",
		Example: "  wardenctl version\n  wardenctl version --format '{{.Server.Version}}'",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			client := object{{"Version", version}, {"GoVersion", runtime.Version()}, {"Os", runtime.GOOS}, {"Arch", runtime.GOARCH}}
			var server object
			info, err := d.local.Info(ctx, &api.InfoRequest{})
			if err == nil {
				server = object{{"Version", info.GetVersion()}, {"Executor", info.GetExecutor()}}
			}
			if format != "" {
				if printErr := writeObjects(c.stdout, []object{{{"Client", client}, {"Server", server}}}, format); printErr != nil {
					return printErr
				}
				return err
			}
			fmt.Fprintf(c.stdout, "Client:\n Version:    %s\n Go version: %s\n OS/Arch:    %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			if err == nil {
				fmt.Fprintf(c.stdout, "\nServer:\n Version:    %s\n Executor:   %s\n", clean(info.GetVersion()), clean(info.GetExecutor()))
			}
			return err
		}),
	}
	formatFlag(cmd, &format)
	return cmd
}
