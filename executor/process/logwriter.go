package process

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"warden"
)

// logWriter keeps a task's output in two files of which the older is thrown away, warden.TaskLogMax in all. A record is
// "<nanoseconds since 1970> <o or e> <line>\n". When the disk is full lines are lost; the task is not held up. One that writes
// faster than logRate is: its supervisor, which no limit of the task holds, is not to be made to burn the host's CPU and disk.
type logWriter struct {
	pace *rate.Limiter

	mu   sync.Mutex // guards the fields below; held across the write of a record
	dir  string
	file *os.File
	size int64
}

// logRate is how many bytes of records a task may have written in a second, and at once.
const logRate = 8 << 20

func newLogWriter(dir string) (*logWriter, error) {
	w := &logWriter{dir: dir, pace: rate.NewLimiter(logRate, logRate)}
	return w, w.open()
}

func (w *logWriter) open() (err error) {
	w.file, err = os.OpenFile(filepath.Join(w.dir, logFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	w.size = 0
	return err
}

// append writes whole records, so that a reader finds a record's end before another's start.
func (w *logWriter) append(records []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.size+int64(len(records)) > warden.TaskLogMax/2 && w.size > 0 {
		w.file.Close()
		_ = os.Rename(filepath.Join(w.dir, logFile), filepath.Join(w.dir, oldLogFile))
		if w.open() != nil {
			return
		}
	}
	n, err := w.file.Write(records)
	w.size += int64(n)
	if err != nil && n > 0 { // a torn record would swallow the next one
		_, _ = w.file.Write([]byte("\n"))
	}
}

// copy reads r to its end and writes its lines as records of stream.
func (w *logWriter) copy(r io.Reader, stream byte) {
	chunk, held, records := make([]byte, 32<<10), []byte(nil), []byte(nil)
	for {
		n, err := r.Read(chunk)
		now := time.Now().UnixNano()
		held = append(held, chunk[:n]...)
		records = records[:0]
		for len(held) > 0 {
			line, rest, whole := bytes.Cut(held, []byte("\n"))
			switch {
			case len(line) > warden.LogLineMax:
				line, rest = held[:warden.LogLineMax], held[warden.LogLineMax:]
			case !whole && err == nil:
				line = nil
			}
			if line == nil {
				break
			}
			records = strconv.AppendInt(records, now, 10)
			records = append(append(append(records, ' ', stream, ' '), line...), '\n')
			held = rest
		}
		if len(records) > 0 {
			w.append(records)
			_ = w.pace.WaitN(context.Background(), min(len(records), logRate)) // fails for more than logRate alone
		}
		held = append([]byte(nil), held...)
		if err != nil {
			return
		}
	}
}
