// Command warden is the daemon: manager, worker or both, as `wardenctl swarm init` or `swarm join` tell it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"warden"
	"warden/executor/docker"
	"warden/executor/process"
)

// version is set by the build.
var version = "dev"

func main() {
	if process.Main(os.Args) || docker.Main(os.Args) {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole program. It returns the exit code: 0 done, 1 failed, 2 usage, 3 refused.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	debug.SetTraceback("none")                                         // a crash prints no memory
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)                   // nor dumps it, nor lets others attach
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 0, Max: 0}) //
	root := &cobra.Command{
		Use:           "warden",
		Short:         "Security-first PKI and secrets orchestrator: the daemon",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return warden.Recode(warden.CodeUsage, "", err) })
	root.AddCommand(runCommand(), devCommand(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "warden", version) },
	})
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := warden.CodeOf(err)
	if code == warden.CodeInternal && (strings.HasPrefix(err.Error(), "unknown command") || strings.Contains(err.Error(), "arg(s)")) {
		code = warden.CodeUsage
	}
	fmt.Fprintf(stderr, "warden: error: %v [%s]\n", err, code)
	if h := warden.HintOf(err); h != "" {
		fmt.Fprintf(stderr, "warden: hint: %s\n", h)
	}
	switch {
	case code == warden.CodeUsage:
		return 2
	case code.Refusal():
		return 3
	}
	return 1
}
