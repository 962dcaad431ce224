package powerloss_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"warden/internal/durable"
)

// The content of a file before and after, of more than a page.
var (
	oldData = bytes.Repeat([]byte("old"), 2000)
	newData = bytes.Repeat([]byte("new"), 3000)
)

// replace returns a way to replace the file with the steps that are not left out.
func replace(leaveOut string) func(string, func(string, ...any)) error {
	return func(base string, note func(string, ...any)) error {
		path, temp := filepath.Join(state(base), "file"), filepath.Join(state(base), "temp")
		if leaveOut == "rename" {
			temp = path
		}
		f, err := os.Create(temp)
		if err == nil {
			_, err = f.Write(newData)
		}
		if leaveOut != "fsync" {
			err = errors.Join(err, f.Sync())
		}
		if temp != path {
			err = errors.Join(err, os.Rename(temp, path))
		}
		if leaveOut != "fsync of the directory" {
			err = errors.Join(err, durable.SyncDir(state(base)))
		}
		note("replaced")
		return err
	}
}

func init() {
	for _, step := range []string{"nothing", "fsync", "fsync of the directory", "rename"} {
		sequences["replace without "+step] = replace(step)
	}
}

// TestModel: a file that is replaced in the right way is the old one or the new, and each step that is left out shows in its own way.
func TestModel(t *testing.T) {
	for step, want := range map[string]string{"nothing": "", "fsync": "neither", "fsync of the directory": "lost", "rename": "neither"} {
		s := &scene{t: t, dir: scratch(t)}
		s.base = s.folder()
		if err := os.WriteFile(filepath.Join(state(s.base), "file"), oldData, 0o600); err != nil {
			t.Fatal(err)
		}
		full, _ := s.trace("replace without "+step, s.base, 0, nil)
		found, olds, news := map[string]bool{}, 0, 0
		for st := range full.Record.States(full.Record.Points(0), seed) {
			switch got := st.Tree["file"].Data; {
			case bytes.Equal(got, newData):
				news++
			case bytes.Equal(got, oldData):
				olds++
				if len(full.Record.Notes(st.Ops)) > 0 {
					found["lost"] = true
				}
			default:
				found["neither"] = true
			}
		}
		if len(found) > 0 != (want != "") || want != "" && !found[want] || olds == 0 || news == 0 {
			t.Errorf("without %s: found %v, %d times the old file and %d times the new, want %q", step, found, olds, news, want)
		}
	}
}

// TestModelTears: a page that is not synced may be there in part, and a file may have grown without its data.
func TestModelTears(t *testing.T) {
	s := &scene{t: t, dir: scratch(t)}
	s.base = s.folder()
	full, _ := s.trace("replace without fsync", s.base, 0, nil)
	var half, zeros, hole bool
	for st := range full.Record.States(full.Record.Points(0), seed) {
		switch got := string(st.Tree["file"].Data); {
		case len(got) == len(newData) && strings.Trim(got, "\x00") == "":
			zeros = true
		case len(got) == len(newData) && strings.HasPrefix(got, strings.Repeat("\x00", 4096)) && got[4096] != 0:
			hole = true
		case len(got)%4096 != 0 && len(got) < len(newData) && strings.HasPrefix(string(newData), got):
			half = true
		}
	}
	if !half || !zeros || !hole {
		t.Errorf("half a page %t, zeros %t, a hole %t, want all", half, zeros, hole)
	}
}
