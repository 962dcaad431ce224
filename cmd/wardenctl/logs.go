package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"warden/api"
)

func (c *cli) serviceLogsCommand() *cobra.Command {
	request := &api.ControlLogsRequest{Tail: -1}
	var timestamps, raw bool
	cmd := &cobra.Command{
		Use:   "logs SERVICE|TASK...",
		Short: "Show the logs of services or tasks",
		Long: `Show the logs of services or tasks, wherever they run. What tasks wrote to their standard error goes to standard error.
Lines are printed as the tasks wrote them.`,
		Example:           "  wardenctl service logs --tail 100 web\n  wardenctl service logs -f web",
		Args:              takes(1, -1),
		ValidArgsFunction: c.names(api.Kind_KIND_SERVICE),
		RunE: func(cmd *cobra.Command, args []string) error {
			wrap := c.with
			if request.GetFollow() {
				wrap = c.streaming
			}
			return wrap(func(ctx context.Context, d *daemon, args []string) error {
				request.References = args
				return c.copyLogs(ctx, d, request, timestamps, raw)
			})(cmd, args)
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&request.Follow, "follow", "f", false, "go on with new lines, until interrupted")
	flagOf(flags, &request.Tail, "tail", "N|all", "start with the last N lines of each task (default all)", parseTail)
	flags.BoolVarP(&timestamps, "timestamps", "t", false, "show when each line was written")
	flags.BoolVar(&raw, "raw", false, "leave out which task wrote a line")
	return cmd
}

// copyLogs prints lines until the stream ends.
func (c *cli) copyLogs(ctx context.Context, d *daemon, request *api.ControlLogsRequest, timestamps, raw bool) error {
	stream, err := d.control.Logs(ctx, request)
	if err != nil {
		return err
	}
	origins := origins{d: d, names: map[string]string{}}
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		line := logLine(chunk, timestamps)
		if !raw {
			line = origins.of(ctx, chunk) + "    | " + line
		}
		var out io.Writer = c.stdout
		if chunk.GetStderr() {
			out = c.stderr
		}
		if _, err := io.WriteString(out, line+"\n"); err != nil {
			return writeFailed(err)
		}
	}
}

// logLine returns one line without its end.
func logLine(chunk *api.LogChunk, timestamps bool) string {
	line := string(chunk.GetData())
	if timestamps {
		line = time.Unix(0, chunk.GetTimeNs()).UTC().Format(time.RFC3339Nano) + " " + line
	}
	return line
}

// origins names the tasks that write lines. Not safe for concurrent use.
type origins struct {
	d     *daemon
	names map[string]string
}

// of returns "service.slot.task@host". A task that was not seen before is looked up once.
func (o *origins) of(ctx context.Context, chunk *api.LogChunk) string {
	id := chunk.GetTaskId()
	if name, ok := o.names[id]; ok {
		return name
	}
	name := shortID(id)
	if tasks, err := listed(ctx, o.d, api.Kind_KIND_TASK, true, (*api.Object).GetTask, id); err == nil && len(tasks) == 1 {
		name = taskName(tasks[0]) + "." + name
	}
	host := shortID(chunk.GetNodeId())
	if nodes, err := listed(ctx, o.d, api.Kind_KIND_NODE, true, (*api.Object).GetNode, chunk.GetNodeId()); err == nil && len(nodes) == 1 {
		host = cmp.Or(nodes[0].GetHostname(), host)
	}
	o.names[id] = clean(fmt.Sprintf("%s@%s", name, host))
	return o.names[id]
}
