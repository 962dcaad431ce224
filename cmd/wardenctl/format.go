package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"text/template"
	"unicode"

	"github.com/spf13/cobra"

	"warden"
)

// row holds the cells of one line by placeholder: strings, but for a few booleans.
type row map[string]any

// listing is a list to print: every placeholder that --format may use, those that the default table shows, and the rows.
type listing struct {
	fields []string
	shown  []string
	rows   []row
}

// listFlags are the flags that every list has.
type listFlags struct {
	format  string
	quiet   bool
	noTrunc bool
	local   bool
	filters []string
}

// add declares the flags on cmd; filterKeys are named in the help.
func (f *listFlags) add(cmd *cobra.Command, filterKeys ...string) {
	flags := cmd.Flags()
	flags.StringVar(&f.format, "format", "", `print by a Go template: "table {{.ID}}\t{{.Name}}", "{{.Name}}" or "json"`)
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print IDs only")
	flags.BoolVar(&f.noTrunc, "no-trunc", false, "print whole IDs")
	flags.BoolVar(&f.local, "local", false, "read the replica of the manager that is asked, without asking the leader")
	if len(filterKeys) > 0 {
		flags.StringArrayVarP(&f.filters, "filter", "f", nil, "show only what fits KEY=VALUE; keys: "+strings.Join(filterKeys, ", "))
	}
}

// id shortens an ID unless --no-trunc was given.
func (f *listFlags) id(id string) string {
	if f.noTrunc {
		return id
	}
	return shortID(id)
}

// print writes the listing as the flags want it. Errors: CodeUsage for a bad --format.
func (f *listFlags) print(c *cli, l listing) error {
	if f.local {
		fmt.Fprintln(c.stderr, "wardenctl: note: read from this manager's replica, which may be behind the leader")
	}
	if f.quiet {
		for _, r := range l.rows {
			fmt.Fprintln(c.stdout, r["ID"])
		}
		return nil
	}
	return l.write(c.stdout, f.format)
}

// write prints by a template, as a table where format is empty or starts with "table", as one JSON object a line where it is
// "json". A placeholder that does not exist is refused even where there are no rows. Errors: CodeUsage.
func (l listing) write(w io.Writer, format string) error {
	if format == "json" {
		format = "{{json .}}"
	}
	columns, isTable := strings.CutPrefix(format, "table")
	if format == "" || isTable && strings.TrimSpace(columns) == "" {
		isTable = true
		columns = "{{." + strings.Join(l.shown, "}}\t{{.") + "}}"
	}
	tmpl, err := parseTemplate(unescape(strings.TrimSpace(columns)))
	if err != nil {
		return err
	}
	header := make(row, len(l.fields))
	for _, f := range l.fields {
		header[f] = headerOf(f)
	}
	var head, out bytes.Buffer
	if err := tmpl.Execute(&head, header); err != nil {
		return l.badPlaceholder(err)
	}
	for _, r := range l.rows {
		safe := make(row, len(r))
		for k, v := range r {
			if s, ok := v.(string); ok && format != "{{json .}}" {
				v = clean(s) // JSON escapes by itself
			}
			safe[k] = v
		}
		if err := tmpl.Execute(&out, safe); err != nil {
			return l.badPlaceholder(err)
		}
		out.WriteByte('\n')
	}
	if !isTable {
		_, err = w.Write(out.Bytes())
		return writeFailed(err)
	}
	head.WriteByte('\n')
	tw := tabwriter.NewWriter(w, 10, 1, 3, ' ', 0)
	tw.Write(append(head.Bytes(), out.Bytes()...))
	return writeFailed(tw.Flush())
}

func (l listing) badPlaceholder(err error) error {
	return warden.Hint(warden.Errorf(warden.CodeUsage, "executing --format", "%s", templateReason(err)),
		"placeholders: ."+strings.Join(l.fields, " ."))
}

// templateReason takes the engine's position out of a template's error.
func templateReason(err error) string {
	s := err.Error()
	if i := strings.LastIndex(s, ">: "); i >= 0 {
		s = s[i+3:]
	}
	if key, ok := strings.CutPrefix(s, `map has no entry for key "`); ok {
		return "there is no placeholder ." + strings.TrimSuffix(key, `"`)
	}
	return s
}

func writeFailed(err error) error {
	if err != nil {
		return warden.Errorf(warden.CodeInternal, "writing the output", "%w", err)
	}
	return nil
}

// unescape makes the two escapes of a format that shells pass on literally.
func unescape(format string) string {
	return strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(format)
}

// headerOf makes a column's head of its placeholder: "ManagerStatus" gives "MANAGER STATUS", "CreatedAt" "CREATED".
func headerOf(field string) string {
	var b strings.Builder
	runes := []rune(field)
	for i, r := range runes {
		if i > 0 && unicode.IsUpper(r) && !unicode.IsUpper(runes[i-1]) {
			b.WriteByte(' ')
		}
		b.WriteRune(unicode.ToUpper(r))
	}
	return strings.TrimSuffix(b.String(), " AT")
}

func parseTemplate(text string) (*template.Template, error) {
	tmpl, err := template.New("").Option("missingkey=error").Funcs(template.FuncMap{
		"json":  jsonText,
		"join":  joinText,
		"split": strings.Split,
		"upper": strings.ToUpper,
		"lower": strings.ToLower,
		"title": title,
		"truncate": func(s string, n int) string {
			if r := []rune(s); n >= 0 && len(r) > n {
				return string(r[:n])
			}
			return s
		},
	}).Parse(text)
	if err != nil {
		return nil, warden.Hint(warden.Errorf(warden.CodeUsage, "parsing --format", "%s", strings.TrimPrefix(err.Error(), "template: ")),
			`write a Go template such as "{{.ID}} {{.Name}}", or "json"; functions: json, join, split, upper, lower, title, truncate`)
	}
	return tmpl, nil
}

func jsonText(v any) (string, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return "", err
	}
	return strings.TrimSuffix(b.String(), "\n"), nil
}

// joinText joins a list of any element type.
func joinText(list any, sep string) (string, error) {
	switch l := list.(type) {
	case []string:
		return strings.Join(l, sep), nil
	case []any:
		words := make([]string, len(l))
		for i, v := range l {
			words[i] = fmt.Sprint(v)
		}
		return strings.Join(words, sep), nil
	case nil:
		return "", nil
	}
	return "", fmt.Errorf("join wants a list, got %T", list)
}

// member is one field of an object; objects print as JSON in the order of their members.
type member struct {
	Key   string
	Value any
}

// object is what inspect prints of a record. Only what is named in a view is in it.
type object []member

// MarshalJSON keeps the order of the members. An object that is absent is null.
func (o object) MarshalJSON() ([]byte, error) {
	if o == nil {
		return []byte("null"), nil
	}
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		value, err := jsonText(m.Value)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%q:%s", m.Key, value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// plain returns the object as maps, for templates.
func (o object) plain() map[string]any {
	out := make(map[string]any, len(o))
	for _, m := range o {
		switch v := m.Value.(type) {
		case object:
			if v == nil {
				out[m.Key] = nil
				continue
			}
			out[m.Key] = v.plain()
		case []object:
			list := make([]any, len(v))
			for i := range v {
				list[i] = v[i].plain()
			}
			out[m.Key] = list
		default:
			out[m.Key] = v
		}
	}
	return out
}

// writeObjects prints an indented JSON array, or each object by the template ("json": each on one line). Errors: CodeUsage.
func writeObjects(w io.Writer, objects []object, format string) error {
	if format == "" {
		if objects == nil {
			objects = []object{}
		}
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "    ")
		if err := enc.Encode(objects); err != nil {
			return warden.Errorf(warden.CodeInternal, "writing JSON", "%w", err)
		}
		_, err := w.Write(b.Bytes())
		return writeFailed(err)
	}
	if format == "json" {
		for _, o := range objects {
			text, err := jsonText(o)
			if err != nil {
				return warden.Errorf(warden.CodeInternal, "writing JSON", "%w", err)
			}
			fmt.Fprintln(w, text)
		}
		return nil
	}
	tmpl, err := parseTemplate(unescape(format))
	if err != nil {
		return err
	}
	for _, o := range objects {
		var out bytes.Buffer
		if err := tmpl.Execute(&out, o.plain()); err != nil {
			return warden.Hint(warden.Errorf(warden.CodeUsage, "executing --format", "%s", templateReason(err)),
				"see all fields without --format")
		}
		if _, err := fmt.Fprintln(w, cleanLines(out.String())); err != nil {
			return writeFailed(err)
		}
	}
	return nil
}

// writeObject prints one object as indented JSON.
func writeObject(w io.Writer, o object) error {
	text, err := jsonText(o)
	if err != nil {
		return warden.Errorf(warden.CodeInternal, "writing JSON", "%w", err)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, []byte(text), "", "    "); err != nil {
		return warden.Errorf(warden.CodeInternal, "writing JSON", "%w", err)
	}
	b.WriteByte('\n')
	_, err = w.Write(b.Bytes())
	return writeFailed(err)
}

// inspecting makes an inspect command's action: each reference is looked up on its own; what was found is printed even where
// another was not.
func (c *cli) inspecting(format *string, view func(ctx context.Context, d *daemon, reference string) (object, error)) action {
	return func(ctx context.Context, d *daemon, args []string) error {
		var found []object
		err := c.each(args, func(ref string) (string, error) {
			o, err := view(ctx, d, ref)
			if err == nil {
				found = append(found, o)
			}
			return "", err
		})
		if printErr := writeObjects(c.stdout, found, *format); printErr != nil {
			return printErr
		}
		return err
	}
}
