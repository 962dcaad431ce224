package main

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"warden"
	"warden/daemon"
	"warden/internal/collector"
)

// options of `warden run`. Each is also an environment variable: WARDEN_STATE_DIR for --state-dir.
type options struct {
	stateDir, listen, advertise, socket, executor, hostname, metrics, logLevel, logFormat string
	engineLabels                                                                          []string
}

func runCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon in the foreground",
		Long: `Run the daemon in the foreground.

It starts uninitialised and does nothing until "wardenctl swarm init" or "wardenctl swarm join" tells it what it is. Tasks
that run when it stops go on, and are found again when it starts.

Each flag is also an environment variable: --state-dir is WARDEN_STATE_DIR. A flag wins over its variable. DOCKER_HOST names
the socket of a Docker Engine on this machine (unix:///path).`,
		Example: `  warden run
  warden run --state-dir /srv/warden --listen 10.0.0.5:2377 --engine-label rack=r7`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := fromEnvironment(cmd.Flags()); err != nil {
				return err
			}
			cfg, err := o.config(cmd)
			if err != nil {
				return err
			}
			collector.Tune(cmd.Context())
			return daemon.Run(cmd.Context(), cfg)
		},
	}
	host, _ := os.Hostname()
	f := cmd.Flags()
	f.StringVar(&o.stateDir, "state-dir", warden.DefaultStateDir, "folder of everything that must survive a restart")
	f.StringVar(&o.listen, "listen", "0.0.0.0:2377", "address of a manager's one port; workers open none")
	f.StringVar(&o.advertise, "advertise", "", "address[:port] where others reach this node (default: found out)")
	f.StringVar(&o.socket, "socket", warden.DefaultSocket, "path of the local socket")
	f.StringVar(&o.executor, "executor", "auto", "what runs tasks: auto, docker or process; auto is docker where an engine answers at the start")
	f.StringVar(&o.hostname, "hostname", host, "name that this node reports")
	f.StringArrayVar(&o.engineLabels, "engine-label", nil, "label k=v that this node reports of itself; never trusted for security")
	f.StringVar(&o.metrics, "metrics", "", "address[:port] where Prometheus is shown metrics; a port alone is on loopback (default: nowhere)")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", "text", "text or json")
	return cmd
}

// fromEnvironment sets the flags that were not given from WARDEN_… variables.
func fromEnvironment(flags *pflag.FlagSet) (err error) {
	flags.VisitAll(func(f *pflag.Flag) {
		name := "WARDEN_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v, ok := os.LookupEnv(name); ok && !f.Changed && err == nil {
			if serr := flags.Set(f.Name, v); serr != nil {
				err = warden.Recode(warden.CodeUsage, "reading "+name, serr)
			}
		}
	})
	return err
}

func (o options) config(cmd *cobra.Command) (daemon.Config, error) {
	cfg := daemon.Config{
		StateDir: o.stateDir, Listen: o.listen, Advertise: o.advertise, Socket: o.socket, Hostname: o.hostname, Version: version, Metrics: o.metrics,
		EngineLabels: map[string]string{},
	}
	usage := func(op, format string, args ...any) error {
		return warden.Errorf(warden.CodeUsage, op, format, args...)
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return cfg, usage("reading --log-level", "%q is not debug, info, warn or error", o.logLevel)
	}
	switch opts := (&slog.HandlerOptions{Level: level}); o.logFormat {
	case "text":
		cfg.Logger = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), opts))
	case "json":
		cfg.Logger = slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), opts))
	default:
		return cfg, usage("reading --log-format", "%q is not text or json", o.logFormat)
	}
	if _, _, err := net.SplitHostPort(o.listen); err != nil {
		return cfg, usage("reading --listen", "%v", err)
	}
	if cfg.Hostname == "" || len(cfg.Hostname) > warden.HostnameMax {
		return cfg, usage("reading --hostname", "want 1 to %d characters", warden.HostnameMax)
	}
	if len(o.engineLabels) > warden.LabelsMax {
		return cfg, usage("reading --engine-label", "at most %d", warden.LabelsMax)
	}
	for _, l := range o.engineLabels {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" || len(k) > warden.LabelKeyMax || len(v) > warden.LabelValueMax {
			return cfg, usage("reading --engine-label", "%q is not k=v within bounds", l)
		}
		cfg.EngineLabels[k] = v
	}
	dir, err := filepath.Abs(o.stateDir)
	if err != nil {
		return cfg, usage("reading --state-dir", "%v", err)
	}
	cfg.StateDir = dir
	cfg.Executor, err = o.newExecutor(cmd.Context(), filepath.Join(dir, "tasks"), cfg.Logger)
	return cfg, err
}
