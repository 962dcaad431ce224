package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"warden"
	"warden/api"
)

// eventKinds are the words of --filter type=.
var eventKinds = map[string]api.Kind{
	"cluster":        api.Kind_KIND_CLUSTER,
	"node":           api.Kind_KIND_NODE,
	"tombstone":      api.Kind_KIND_TOMBSTONE,
	"zone":           api.Kind_KIND_ZONE,
	"token":          api.Kind_KIND_TOKEN,
	"service":        api.Kind_KIND_SERVICE,
	"task":           api.Kind_KIND_TASK,
	"secret":         api.Kind_KIND_SECRET,
	"secret-version": api.Kind_KIND_SECRET_VERSION,
	"exposure":       api.Kind_KIND_EXPOSURE,
}

func (c *cli) eventsCommand() *cobra.Command {
	var (
		raw    []string
		format string
		keys   = []string{"type", "event", "id", "name"}
	)
	cmd := &cobra.Command{
		Use:     "events",
		Short:   "Watch committed changes of the cluster",
		Long:    "Watch committed changes as this manager applies them, until interrupted or --timeout has passed.",
		Example: "  wardenctl events\n  wardenctl events --filter type=node --filter type=task --format '{{.Type}} {{.Action}} {{.Name}}'",
		Args:    takes(0, 0),
		RunE: c.streaming(func(ctx context.Context, d *daemon, _ []string) error {
			f, err := parseFilters(raw, keys...)
			if err != nil {
				return err
			}
			request, err := eventsRequest(f)
			if err != nil {
				return err
			}
			stream, err := d.control.Events(ctx, request)
			if err != nil {
				return err
			}
			for {
				event, err := stream.Recv()
				switch {
				case errors.Is(err, io.EOF):
					return nil
				case err != nil:
					return err
				case !eventFits(event, f):
					continue
				}
				if err := writeEvent(c.stdout, event, format); err != nil {
					return err
				}
			}
		}),
	}
	cmd.Flags().StringArrayVarP(&raw, "filter", "f", nil, "show only what fits KEY=VALUE; keys: "+strings.Join(keys, ", "))
	cmd.Flags().StringVar(&format, "format", "", `print by a Go template: "{{.Type}} {{.ID}}" or "json"`)
	return cmd
}

// eventsRequest leaves to the manager what it can filter. Errors: CodeUsage. Pure.
func eventsRequest(f filters) (*api.EventsRequest, error) {
	request := &api.EventsRequest{}
	for _, w := range f["type"] {
		kind, ok := eventKinds[w]
		if !ok {
			words := make([]string, 0, len(eventKinds))
			for w := range eventKinds {
				words = append(words, w)
			}
			slices.Sort(words)
			return nil, warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --filter", "type can't be %q", w), "type is one of "+strings.Join(words, ", "))
		}
		request.Kinds = append(request.Kinds, kind)
	}
	return request, nil
}

// eventFits does the rest of the filtering. A resync (changes were missed) always shows. Pure.
func eventFits(e *api.Event, f filters) bool {
	return e.GetAction() == "resync" || f.fits("event", word(e.GetAction())) && f.fits("id", prefix(e.GetId())) && f.fits("name", prefix(e.GetName()))
}

func kindWord(kind api.Kind) string {
	for w, k := range eventKinds {
		if k == kind {
			return w
		}
	}
	return "cluster"
}

// writeEvent prints one event: "TIME type action ID (name=…, detail)", or by the template. Errors: CodeUsage.
func writeEvent(w io.Writer, e *api.Event, format string) error {
	if format != "" {
		l := listing{
			fields: []string{"Time", "Type", "Action", "ID", "Name", "Detail", "Index"},
			rows: []row{{"Time": stamp(e.GetTimeNs()), "Type": kindWord(e.GetKind()), "Action": e.GetAction(), "ID": e.GetId(), "Name": e.GetName(),
				"Detail": e.GetDetail(), "Index": fmt.Sprint(e.GetIndex())}},
		}
		return l.write(w, strings.TrimPrefix(format, "table "))
	}
	details := []string{}
	if e.GetName() != "" {
		details = append(details, "name="+e.GetName())
	}
	if e.GetDetail() != "" {
		details = append(details, e.GetDetail())
	}
	line := fmt.Sprintf("%s %s %s %s", time.Unix(0, e.GetTimeNs()).UTC().Format("2006-01-02T15:04:05.000000000Z07:00"), kindWord(e.GetKind()), e.GetAction(), e.GetId())
	if len(details) > 0 {
		line += " (" + strings.Join(details, ", ") + ")"
	}
	_, err := fmt.Fprintln(w, clean(line))
	return writeFailed(err)
}
