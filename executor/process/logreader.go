package process

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"warden"
	"warden/executor"
)

// followPeriod is how often a follower looks for more. Polling has no per-user limit, as inotify has.
const followPeriod = 100 * time.Millisecond

// readLogs calls f with the lines of the log in dir, and with follow also with those to come until ended is closed.
func readLogs(ctx context.Context, dir string, o executor.LogOptions, ended <-chan struct{}, f func(executor.Line) error) error {
	if o.Tail > warden.TailLogMax {
		return warden.Errorf(warden.CodeInvalid, "reading logs", "at most %d lines can be asked for, or all", warden.TailLogMax)
	}
	r := &logReader{ctx: ctx, dir: dir}
	defer r.close()
	if err := r.start(); err != nil {
		return err
	}
	emit := f
	var tail []executor.Line
	if o.Tail >= 0 {
		emit = func(l executor.Line) error {
			if tail = append(tail, l); int64(len(tail)) > o.Tail {
				tail = tail[1:]
			}
			return nil
		}
	}
	if err := r.drain(emit); err != nil {
		return err
	}
	for _, l := range tail {
		if err := f(l); err != nil {
			return err
		}
	}
	if !o.Follow {
		return nil
	}
	tick := time.NewTicker(followPeriod)
	defer tick.Stop()
	for {
		over := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ended:
			over = true
		case <-tick.C:
		}
		if err := r.drain(f); err != nil || over {
			return err
		}
	}
}

// logReader reads the two files in order and goes over to a new one when the writer has.
type logReader struct {
	ctx   context.Context
	dir   string
	files []*os.File // to be read, oldest first; the last is, or was, the current one
	held  []byte     // the start of a record whose end is not there yet
}

func (r *logReader) close() {
	for _, f := range r.files {
		f.Close()
	}
}

func (r *logReader) openFile(name string) (*os.File, error) {
	f, err := os.Open(filepath.Join(r.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// start opens both files as they are at one moment.
func (r *logReader) start() error {
	for {
		current, err := r.openFile(logFile)
		if err != nil {
			return warden.Recode(warden.CodeInternal, "opening a task's log", err)
		}
		old, err := r.openFile(oldLogFile)
		r.files = nil
		for _, f := range []*os.File{old, current} {
			if f != nil {
				r.files = append(r.files, f)
			}
		}
		if err != nil {
			return warden.Recode(warden.CodeInternal, "opening a task's log", err)
		}
		if current == nil || !r.rotated(current) {
			return nil
		}
		r.close()
	}
}

// rotated reports whether the writer has gone over to another file than f. In the middle of a rotation it has not yet.
func (r *logReader) rotated(f *os.File) bool {
	now, err := os.Stat(filepath.Join(r.dir, logFile))
	if err != nil {
		return false
	}
	mine, err := f.Stat()
	return err == nil && !os.SameFile(mine, now)
}

func same(a, b *os.File) bool {
	x, errX := a.Stat()
	y, errY := b.Stat()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// drain reads all that is there now.
func (r *logReader) drain(f func(executor.Line) error) error {
	for {
		for len(r.files) > 1 {
			if err := r.read(r.files[0], f); err != nil {
				return err
			}
			r.files[0].Close()
			r.files, r.held = r.files[1:], nil
		}
		if len(r.files) == 0 {
			if err := r.start(); err != nil || len(r.files) == 0 {
				return err
			}
			continue
		}
		last := r.files[0]
		rotated := r.rotated(last) // asked before reading: what is then at the end of last is its end
		if err := r.read(last, f); err != nil || !rotated {
			return err
		}
		r.held = nil
		err := r.start()
		if err == nil && len(r.files) > 1 && same(r.files[0], last) {
			r.files[0].Close()
			r.files = r.files[1:]
		}
		last.Close()
		if err != nil {
			return err
		}
	}
}

func (r *logReader) read(file *os.File, f func(executor.Line) error) error {
	chunk := make([]byte, 64<<10)
	for {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		n, err := file.Read(chunk)
		r.held = append(r.held, chunk[:n]...)
		for {
			text, rest, whole := bytes.Cut(r.held, []byte("\n"))
			if !whole {
				break
			}
			r.held = rest
			if line, ok := parseRecord(text); ok {
				if err := f(line); err != nil {
					return err
				}
			}
		}
		r.held = bytes.Clone(r.held)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return warden.Recode(warden.CodeInternal, "reading a task's log", err)
		}
	}
}

// parseRecord is the inverse of what logWriter.copy writes; a torn record is none.
func parseRecord(text []byte) (executor.Line, bool) {
	stamp, rest, ok := bytes.Cut(text, []byte(" "))
	ns, err := strconv.ParseInt(string(stamp), 10, 64)
	if !ok || err != nil || len(rest) < 2 || rest[1] != ' ' || rest[0] != 'o' && rest[0] != 'e' {
		return executor.Line{}, false
	}
	return executor.Line{Time: time.Unix(0, ns).UTC(), Stderr: rest[0] == 'e', Data: bytes.Clone(rest[2:])}, true
}
