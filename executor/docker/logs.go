package docker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/moby/moby/client"

	"warden"
	"warden/executor"
)

// Bounds of reading logs.
const (
	frameHead  = 8                     // bytes before each piece
	frameMax   = 1 << 20               // bytes of one piece that the engine sends; its own are 16 KiB
	resumeMin  = 50 * time.Millisecond // before a stream that broke is opened again
	resumeMax  = 5 * time.Second
	followTime = 24 * time.Hour // one stream
)

// Logs calls f with lines of output. The engine splits lines where the interface does. A stream that breaks while the task runs, since
// the engine starts anew, is taken up again where it broke. After Remove there are no lines. Errors: CodeUnavailable where there is
// no engine and nothing is followed.
func (t *task) Logs(ctx context.Context, o executor.LogOptions, f func(executor.Line) error) error {
	op := "reading the log of task " + t.id
	if o.Tail > warden.TailLogMax {
		return warden.Errorf(warden.CodeInvalid, op, "at most %d lines can be asked for, or all", warden.TailLogMax)
	}
	if o.Tail == 0 && !o.Follow {
		return nil
	}
	r := &logReader{t: t, options: client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true, Timestamps: true, Follow: o.Follow, Tail: "all"}, f: f}
	if o.Tail >= 0 {
		r.options.Tail = strconv.FormatInt(o.Tail, 10)
	}
	if o.Tail == 0 {
		r.last = time.Now() // from here on, however long the engine takes to begin
	}
	for backoff := resumeMin; ; backoff = min(2*backoff, resumeMax) {
		over := t.hasEnded() // asked before reading: what the engine has then is all
		read, err := r.read(ctx)
		switch {
		case r.stopped != nil:
			return r.stopped
		case ctx.Err() != nil:
			return ctx.Err()
		case warden.CodeOf(err) == warden.CodeNotFound, warden.CodeOf(err) == warden.CodeConflict: // removed, or about to be
			return nil
		case err == nil && (!o.Follow || over), err != nil && !o.Follow, err != nil && over:
			return warden.Wrap(op, err)
		}
		if read > 0 {
			backoff = resumeMin
		}
		wait := time.NewTimer(backoff)
		select {
		case <-t.done:
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
	}
}

func (t *task) hasEnded() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

// logReader reads a log, if need be in several streams.
type logReader struct {
	t       *task
	options client.ContainerLogsOptions
	f       func(executor.Line) error
	stopped error       // what f returned
	idle    *time.Timer // ends a stream that is not followed and says nothing

	last  time.Time // the latest of the lines that f got
	count int       // lines of that time that f got
	skip  int       // lines of that time in the present stream that f has had from the one before
}

// read reads one stream to its end and says how many lines it had for f. With options.Follow that is the task's end, or the engine's.
func (r *logReader) read(ctx context.Context) (lines int, err error) {
	const op = "reading the engine's log"
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !r.options.Follow {
		r.idle = time.AfterFunc(workTime, cancel)
		defer r.idle.Stop()
	}
	if !r.last.IsZero() {
		r.options.Since, r.options.Tail, r.skip = fmt.Sprintf("%d.%09d", r.last.Unix(), r.last.Nanosecond()), "all", r.count
	}
	err = r.t.e.engine.call(ctx, followTime, op, func(ctx context.Context, cli *client.Client) error {
		stream, err := cli.ContainerLogs(ctx, r.t.record.Container, r.options)
		if err != nil {
			return err
		}
		defer stream.Close()
		lines, err = r.frames(stream)
		return err
	})
	return lines, err
}

// frames reads what the engine sends: "<1 or 2> 0 0 0 <length, 4 bytes>", then "<time> <piece of a line>".
func (r *logReader) frames(stream io.Reader) (lines int, err error) {
	in := bufio.NewReaderSize(stream, 64<<10)
	var head [frameHead]byte
	for {
		if _, err := io.ReadFull(in, head[:]); errors.Is(err, io.EOF) {
			return lines, nil
		} else if err != nil {
			return lines, err
		}
		size := binary.BigEndian.Uint32(head[4:])
		if size > frameMax || head[0] != 1 && head[0] != 2 {
			return lines, errors.New("the engine's log is not in the format of its API")
		}
		text := make([]byte, size)
		if _, err := io.ReadFull(in, text); err != nil {
			return lines, err
		}
		stamp, data, _ := bytes.Cut(text, []byte(" "))
		at, err := time.Parse(time.RFC3339Nano, string(stamp))
		if err != nil {
			return lines, errors.New("a line of the engine's log has no time")
		}
		if r.idle != nil {
			r.idle.Reset(workTime)
		}
		if r.had(at) {
			continue
		}
		lines++
		data = bytes.TrimSuffix(data, []byte("\n"))
		for first := true; first || len(data) > 0; first = false {
			n := min(len(data), warden.LogLineMax)
			if err := r.f(executor.Line{Time: at.UTC(), Stderr: head[0] == 2, Data: data[:n:n]}); err != nil {
				r.stopped = err
				return lines, err
			}
			data = data[n:]
		}
	}
}

// had reports whether f got this line from an earlier stream, and counts it where not. Lines of both outputs may come a little out of
// order.
func (r *logReader) had(at time.Time) bool {
	switch {
	case at.Equal(r.last) && r.skip > 0:
		r.skip--
		return true
	case at.Equal(r.last):
		r.count++
	case at.After(r.last):
		r.last, r.count, r.skip = at, 1, 0
	}
	return false
}
