// Package executor says what an executor is: that which runs one task's program on this machine, away from other tasks,
// with its secrets.
//
// It holds the interface and its values only; executor/docker and executor/process are the implementations,
// executor/conformance the suite that each must pass. An executor deliberately knows nothing of services, nodes, restarts or zones: a task is started once,
// ends once and is removed.
//
// Invariants that every implementation keeps: secrets are in place before the program's first instruction, are seen by
// their task alone and end with it; they are in no argument, environment, log, error or file on disk; the death of the daemon
// changes neither task nor secret; no task runs as uid 0 of the host.
package executor

import (
	"context"
	"time"

	"warden/internal/sensitive"
)

// SecretFile is one file under warden.SecretsDir of a task. UID and GID are as the task sees them, Mode has permission bits.
type SecretFile struct {
	Target         string // one path element
	UID, GID, Mode uint32
	Data           sensitive.Bytes
}

// Spec is what Start needs to know of a task.
type Spec struct {
	TaskID           string
	ServiceName      string
	Image            string
	Command          []string
	Env              []string // KEY=value
	Labels           map[string]string
	LimitNanoCPUs    int64 // billionths of a CPU; 0: no limit
	LimitMemoryBytes int64 // 0: no limit
	StopGrace        time.Duration
	Secrets          []SecretFile
}

// Exit is how a task ended.
type Exit struct {
	Code        int       // of the program; 128 + number where a signal ended it
	Signal      string    // its name, "SIGKILL"; else ""
	Error       string    // why the program never ran, or what ended it in its stead; else ""
	OutOfMemory bool      // the memory limit was hit and something of the task was killed for it
	At          time.Time // UTC
}

// Executor runs tasks. Safe for concurrent use.
type Executor interface {
	// Name is the name that the operator chooses it by: "docker" or "process".
	Name() string
	// SecretMounts tells how secrets come to tasks: tmpfsmount.Detached or tmpfsmount.Bind.
	SecretMounts() string
	// Start returns when the program runs. On an error nothing is left behind: CodeInvalid says that this task can never
	// run here (rejected), any other code that it failed. Spec.Secrets stay the caller's to wipe.
	Start(ctx context.Context, spec Spec) (Task, error)
	// Adopt returns the tasks of this state directory that still exist, running or ended, sorted by ID: for a daemon that
	// starts again. It also clears away what dead daemons left half made.
	Adopt(ctx context.Context) ([]Task, error)
}

// Task is one started task. Safe for concurrent use; several handles of one task may exist.
type Task interface {
	ID() string
	// Wait returns when the task has ended and nothing of it runs any more.
	Wait(ctx context.Context) (Exit, error)
	// Stop asks the program to end (SIGTERM, or what its image names), kills all of the task after grace, and returns when it has ended. Stopping a
	// task that has ended is no error. A second Stop with a shorter grace counts. If ctx ends first the order still stands.
	Stop(ctx context.Context, grace time.Duration) error
	// Logs calls f with each line, oldest first. It returns f's first error; or nil at the end of the log, which with Follow
	// is the end of the task.
	Logs(ctx context.Context, o LogOptions, f func(Line) error) error
	// Remove kills what still runs and wipes all of the task, logs included. The handle's Wait keeps its answer.
	Remove(ctx context.Context) error
}

// LogOptions choose lines of a log.
type LogOptions struct {
	Follow bool
	Tail   int64 // the last so many of the lines that exist; negative: all
}

// Line is one line of output, without its end. A line longer than warden.LogLineMax comes in several.
type Line struct {
	Time   time.Time // when it was read, UTC
	Stderr bool
	Data   []byte
}
