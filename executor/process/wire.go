package process

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"warden"
	"warden/executor"
	"warden/executor/confine"
	"warden/internal/sensitive"
	"warden/tmpfsmount"
)

// What the three processes tell each other, over inherited pipes: a frame is the length of a JSON document in four bytes
// and the document. The values of secrets follow the job as they are: they are never in a document.

// frameMax bounds a document: a command and an environment at their limits, escaped at worst.
const frameMax = 64 << 20

// job is what the daemon hands to a supervisor.
type job struct {
	Dir       string // of this task
	TaskID    string
	Command   []string
	Env       []string
	Limits    limits
	Dirs      map[string]string // cgroup hierarchies
	Parent    string            // cgroup of this state directory
	IDBase    uint32            // first uid and gid of the host that are this task's
	UserNS    bool
	Mounts    string // tmpfsmount.Detached or Bind
	Secrets   []secretHeader
	ProbeOnly bool // build the root, run nothing
}

func (j job) cgroup() cgroup { return cgroup{dirs: j.Dirs, parent: j.Parent, task: j.TaskID} }

// hostID translates a uid or gid as the task sees it. Without a user namespace the task has one uid, and 0 means that.
func (j job) hostID(id uint32) (uint32, error) {
	switch {
	case j.UserNS && id < confine.IDsPerTask:
		return j.IDBase + id, nil
	case !j.UserNS && id == 0:
		return j.IDBase, nil
	case !j.UserNS:
		return 0, warden.Errorf(warden.CodeInvalid, "placing a secret", "this node cannot give a file to uid or gid %d: it has no user namespaces", id)
	}
	return 0, warden.Errorf(warden.CodeInvalid, "placing a secret", "uid or gid %d is not below %d", id, confine.IDsPerTask)
}

type secretHeader struct {
	Target         string
	UID, GID, Mode uint32
	Size           int
}

// initJob is what a supervisor hands to the task's init.
type initJob struct {
	Hostname   string
	Command    []string
	Env        []string
	ID         int // uid and gid of the task as its init sees them: 0 in a user namespace
	SecretsFD  bool
	SecretsDir string
	ProbeOnly  bool
}

// report is what init tells the supervisor, and the supervisor the daemon: first that the program runs, or why not; then
// (init only) how it ended.
type report struct {
	Running bool        `json:",omitempty"`
	Code    warden.Code `json:",omitempty"`
	Op      string      `json:",omitempty"`
	Cause   string      `json:",omitempty"`
	Hint    string      `json:",omitempty"`
	Exit    *ended      `json:",omitempty"`
}

// ended is how the program ended, as wait(2) tells.
type ended struct{ Code, Signal int }

func reportOf(err error) report {
	if err == nil {
		return report{Running: true}
	}
	return report{Code: warden.CodeOf(err), Cause: err.Error(), Hint: warden.HintOf(err)}
}

func (r report) err() error {
	if r.Code == "" {
		return nil
	}
	err := warden.Errorf(r.Code, r.Op, "%s", r.Cause)
	if r.Hint != "" {
		err = warden.Hint(err, r.Hint)
	}
	return err
}

func writeFrame(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

func readFrame(r io.Reader, v any) error {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > frameMax {
		return fmt.Errorf("frame of %d bytes is over %d", n, frameMax)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// send writes the job and the values of its secrets.
func (j job) send(w io.Writer, secrets []executor.SecretFile) error {
	if err := writeFrame(w, j); err != nil {
		return err
	}
	for _, s := range secrets {
		if err := s.Data.Use(func(b []byte) error { _, err := w.Write(b); return err }); err != nil {
			return err
		}
	}
	return nil
}

// receive is the inverse of send. The caller wipes the plan's data with wipe.
func receive(r io.Reader) (j job, plan tmpfsmount.Plan, wipe func(), err error) {
	var files []tmpfsmount.File
	wipe = func() {
		for _, f := range files {
			f.Data.Wipe()
		}
	}
	if err := readFrame(r, &j); err != nil {
		return j, plan, wipe, err
	}
	for _, s := range j.Secrets {
		if s.Size < 0 || s.Size > warden.SecretBytesMax {
			return j, plan, wipe, warden.Errorf(warden.CodeTooLarge, "receiving a secret", "%d bytes", s.Size)
		}
		value := make([]byte, s.Size)
		_, err := io.ReadFull(r, value)
		file := tmpfsmount.File{Name: s.Target, Mode: s.Mode, Data: sensitive.New(value)}
		files = append(files, file)
		if err != nil {
			return j, plan, wipe, err
		}
		at := &files[len(files)-1]
		if at.UID, err = j.hostID(s.UID); err != nil {
			return j, plan, wipe, err
		}
		if at.GID, err = j.hostID(s.GID); err != nil {
			return j, plan, wipe, err
		}
	}
	plan, err = tmpfsmount.NewPlan(files)
	return j, plan, wipe, err
}

// Files of a task's directory. None holds a secret, a command or an environment. They need not survive a loss of power,
// since no task does: they are renamed into place, not synced.
const (
	lockFile   = "lock"       // locked by the supervisor for as long as it lives
	recordFile = "task.json"  // record
	exitFile   = "exit.json"  // executor.Exit
	stopFile   = "stop.json"  // stopOrder
	panicFile  = "supervisor" // standard error of the supervisor
	logFile    = "log"
	oldLogFile = "log.1"
	mountDir   = "secrets" // mount point in the supervisor's own namespace, for tmpfsmount.Bind
)

// record is what a daemon that starts again needs to find a task's supervisor. The supervisor writes it, while it holds the
// lock; so whoever opens a pidfd for PID and then finds the lock held knows that it is the supervisor's.
type record struct {
	TaskID string
	PID    int
	IDBase uint32
	Start  time.Time
	Probe  bool `json:",omitempty"` // nobody's task: New was trying the machine
}

// stopOrder says how long the program has after SIGTERM.
type stopOrder struct{ Grace time.Duration }

func writeJSON(dir, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	temp := filepath.Join(dir, name+".new")
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, filepath.Join(dir, name))
}

func readJSON(dir, name string, v any) error {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
