// Command wardenctl is the operator's command line: it turns arguments into calls on the Unix socket of a Warden daemon and
// replies into Docker-like tables, templates and JSON.
//
// It decides nothing: names, bounds, permissions and placement are judged by the daemon, and what is checked here only makes
// a mistyped command fail sooner. It keeps no state and reads no configuration but --host and WARDEN_HOST.
//
// Invariants: no secret is taken from an environment variable, echoed, or printed (but for a join token and an unlock key when
// they are made); what nodes report is cleaned of control characters before it reaches a table; inspect shows only fields that
// a view names. It trusts the daemon behind the socket, and the files it is told to read.
//
// References: DESIGN §8 (the command line is a contract), the docker command line reference.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"warden"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3
)

// cli is what the commands of one run share.
type cli struct {
	stdin   io.Reader
	stdout  *checkedWriter
	stderr  io.Writer
	host    string
	timeout time.Duration
}

// run does one command line and returns the exit code: 0 done, 1 failed, 2 usage, 3 refused.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &cli{stdin: stdin, stdout: &checkedWriter{w: stdout}, stderr: stderr}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(c.stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil && c.stdout.err != nil && !errors.Is(c.stdout.err, syscall.EPIPE) {
		err = warden.Errorf(warden.CodeInternal, "writing the output", "%w", c.stdout.err)
	}
	return report(stderr, cmd, err)
}

// root returns the whole tree of commands.
func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "wardenctl",
		Short: "Operate a Warden cluster",
		Long: `Operate a Warden cluster through the Unix socket of one of its daemons.

Exit codes: 0 done, 1 failed, 2 usage, 3 refused.`,
		Example: `  wardenctl swarm init --autolock
  wardenctl swarm join-token worker
  wardenctl secret create db-password ./password.txt
  wardenctl service create --name db --secret db-password host redis-server
  wardenctl status`,
		SilenceUsage:               true,
		SilenceErrors:              true,
		SuggestionsMinimumDistance: 2,
	}
	asGroup(root)
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), "{{if .Runnable}}", "{{if and .Runnable (not .HasAvailableSubCommands)}}"))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage(cmd, "%w", err) })
	root.PersistentFlags().StringVarP(&c.host, "host", "H", "", "socket of the daemon, unix:///path (default WARDEN_HOST or unix://"+warden.DefaultSocket+")")
	root.PersistentFlags().DurationVar(&c.timeout, "timeout", time.Minute, "give up after this time, 0 for never (streams: never, unless given)")
	root.AddCommand(c.swarmCommand(), c.nodeCommand(), c.serviceCommand(), c.secretCommand(), c.zoneCommand(), c.taskCommand(),
		c.eventsCommand(), c.statusCommand(), c.versionCommand())
	root.SetHelpCommand(helpCommand())
	root.InitDefaultCompletionCmd()
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		asGroup(completion)
		completion.Example = "  source <(wardenctl completion bash)"
	}
	return root
}

func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "help [COMMAND]",
		Short:   "Help about any command",
		Example: "  wardenctl help service create",
		RunE: func(cmd *cobra.Command, args []string) error {
			found, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usage(cmd, "there is no command %q", strings.Join(args, " "))
			}
			found.InitDefaultHelpFlag()
			return found.Help()
		},
	}
}

// group returns a command that only holds others: alone it prints its help, and an unknown word is a usage error.
func group(use, short, example string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Example: example, SuggestionsMinimumDistance: 2}
	asGroup(cmd)
	cmd.AddCommand(subs...)
	return cmd
}

func asGroup(cmd *cobra.Command) {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		err := usage(cmd, "%q is not a command of %q", args[0], cmd.CommandPath())
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			err = warden.Hint(err, fmt.Sprintf("did you mean %q?", near[0]))
		}
		return err
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
}

// takes returns a check that a command has from least to most arguments (most < 0: any number). The message names the arguments
// and never repeats what was typed: it could be a key.
func takes(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= least && (most < 0 || len(args) <= most) {
			return nil
		}
		want := fmt.Sprintf("%d arguments", least)
		switch {
		case most == 0:
			want = "no arguments"
		case most < 0 && least == 1:
			want = "at least 1 argument"
		case most < 0:
			want = fmt.Sprintf("at least %d arguments", least)
		case most > least:
			want = fmt.Sprintf("%d to %d arguments", least, most)
		case least == 1:
			want = "1 argument"
		}
		return usage(cmd, "%q takes %s, got %d", cmd.CommandPath(), want, len(args))
	}
}

// usage returns a CodeUsage error that points to the command's help.
func usage(cmd *cobra.Command, format string, args ...any) error {
	return warden.Hint(warden.Errorf(warden.CodeUsage, "", format, args...), fmt.Sprintf("see `%s --help`", cmd.CommandPath()))
}

// several is what commands with many targets return: one error for each that failed.
type several []error

func (s several) Error() string { return errors.Join(s...).Error() }

// exitError forces an exit code that is not the one of its error's code.
type exitError struct {
	error
	exit int
}

func (e exitError) Unwrap() error { return e.error }

// report prints err and returns the exit code. Errors that no Warden made come from the command line parser.
func report(stderr io.Writer, cmd *cobra.Command, err error) int {
	if err == nil {
		return exitDone
	}
	if many, ok := errors.AsType[several](err); ok {
		exit := exitFailed
		for _, e := range many {
			exit = max(exit, report(stderr, cmd, e))
		}
		return exit
	}
	if _, ok := errors.AsType[*warden.Error](err); !ok {
		err = usage(cmd, "%w", err)
	}
	code := warden.CodeOf(err)
	fmt.Fprintf(stderr, "wardenctl: error: %s [%s]\n", redact(clean(err.Error())), code)
	if hint := warden.HintOf(err); hint != "" {
		fmt.Fprintf(stderr, "wardenctl: hint: %s\n", redact(clean(hint)))
	}
	if forced, ok := errors.AsType[exitError](err); ok {
		return forced.exit
	}
	switch {
	case code == warden.CodeUsage:
		return exitUsage
	case code.Refusal():
		return exitRefused
	}
	return exitFailed
}

// warn prints a warning; the command goes on.
func (c *cli) warn(format string, args ...any) {
	fmt.Fprintf(c.stderr, "wardenctl: warning: %s\n", redact(clean(fmt.Sprintf(format, args...))))
}

var secretText = regexp.MustCompile(`(WDNTKN|WDNKEY)-[0-9A-Za-z-]+`)

// redact takes join tokens and unlock keys out of a message: a user may have typed one where a name belongs.
func redact(s string) string { return secretText.ReplaceAllString(s, "$1-REDACTED") }

// checkedWriter remembers the first failed write, so that output that never arrived is not reported as success.
type checkedWriter struct {
	w   io.Writer
	err error
}

func (c *checkedWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	if err != nil && c.err == nil {
		c.err = err
	}
	return n, err
}
