package process

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor"
	"warden/executor/confine"
	"warden/tmpfsmount"
)

// Descriptors of a supervisor, after the standard ones.
const (
	jobFD    = 3 // job, from the daemon
	reportFD = 4 // report, to the daemon
	lockFD   = 5 // the lock file, locked
)

// drainTime is how long a supervisor reads on when all of the task is gone: only a program that handed its output to a
// process of another task can make it wait.
const drainTime = 5 * time.Second

// supervise is the life of a supervisor: it starts the task's init, is with it until its end, and writes down how it ended.
// It holds no secret once the task's mount is made.
func supervise() int {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	orders := make(chan os.Signal, 8)
	signal.Notify(orders, unix.SIGTERM)
	_ = unix.Umask(0o077)
	daemon := os.NewFile(reportFD, "report")
	for _, fd := range []int{jobFD, reportFD, lockFD} {
		unix.CloseOnExec(fd)
	}
	if err := hide(); err != nil {
		_ = writeFrame(daemon, reportOf(warden.Recode(warden.CodeInternal, "hiding the supervisor", err)))
		return 1
	}
	j, plan, wipe, err := receive(os.NewFile(jobFD, "job"))
	if j.Dir == "" { // the daemon died
		wipe()
		return 1
	}
	s := &supervisor{job: j}
	if err == nil {
		err = writeJSON(j.Dir, recordFile, record{TaskID: j.TaskID, PID: os.Getpid(), IDBase: j.IDBase, Start: time.Now().UTC(), Probe: j.ProbeOnly})
	}
	if err == nil {
		err = s.start(plan)
	}
	wipe()
	exit := executor.Exit{At: time.Now().UTC()}
	switch {
	case err != nil:
		s.kill()
		exit.Error = err.Error()
		_ = writeFrame(daemon, reportOf(err))
	default:
		_ = writeFrame(daemon, reportOf(nil)) // a daemon that died will ask for the record
		daemon.Close()
		exit = s.attend(orders)
	}
	if err := j.cgroup().remove(); err != nil {
		fmt.Fprintln(os.Stderr, err) // the next Adopt or Remove tries again
	}
	if err := writeJSON(j.Dir, exitFile, exit); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// supervisor is what one has in hand while its task lives.
type supervisor struct {
	job      job
	init     *exec.Cmd
	lifeline *os.File // init dies when this closes
	reports  *bufio.Reader
	logs     sync.WaitGroup
	outputs  []*os.File
}

// start brings the task to the point where its program runs. Errors carry what Start returns.
func (s *supervisor) start(plan tmpfsmount.Plan) error {
	ij := initJob{Hostname: hostname(s.job.TaskID), Command: s.job.Command, Env: s.job.Env, ID: int(s.job.IDBase), ProbeOnly: s.job.ProbeOnly}
	if s.job.UserNS {
		ij.ID = 0
	}
	var secrets *os.File
	if !plan.Empty() {
		var err error
		if s.job.Mounts == tmpfsmount.Detached {
			secrets, err = tmpfsmount.Build(plan)
			ij.SecretsFD = true
		} else {
			ij.SecretsDir, err = fillPrivately(plan, filepath.Join(s.job.Dir, mountDir))
		}
		if err != nil {
			return err
		}
		defer secrets.Close() // nil is fine
	}
	log, err := newLogWriter(s.job.Dir)
	if err != nil {
		return warden.Recode(warden.CodeInternal, "opening the task's log", err)
	}
	if err := s.job.cgroup().create(s.job.Limits); err != nil {
		return err
	}
	toInit, err := s.spawn(log, secrets)
	if err != nil {
		return warden.Recode(warden.CodeInternal, "starting the task's init", err)
	}
	// The program starts with a higher oom_score_adj than its init, so that not the whole task goes with one process.
	adjust := fmt.Sprintf("/proc/%d/oom_score_adj", s.init.Process.Pid)
	_ = set(adjust, "500")
	defer set(adjust, "0")
	if err := writeFrame(toInit, ij); err != nil {
		return warden.Recode(warden.CodeInternal, "telling the task's init", err)
	}
	var r report
	if err := readFrame(s.reports, &r); err != nil {
		return warden.Errorf(warden.CodeInternal, "starting the task", "its init ended early%s", s.lastWords())
	}
	return r.err()
}

// spawn starts init in its namespaces and the copying of the task's output. init waits for its job before it does anything.
func (s *supervisor) spawn(log *logWriter, secrets *os.File) (toInit *os.File, err error) {
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	pipe := func() (r, w *os.File) {
		if err == nil {
			r, w, err = os.Pipe()
		}
		return r, w
	}
	jobR, jobW := pipe()
	reportR, reportW := pipe()
	outR, outW := pipe()
	errR, errW := pipe()
	if err != nil {
		return nil, err
	}
	theirs = []*os.File{jobR, reportW, outW, errW}
	extra := []*os.File{jobR, reportW}
	if secrets != nil {
		extra = append(extra, secrets)
	}
	cmd, err := s.job.cgroup().start(func() *exec.Cmd {
		attr := &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			Setsid:     true, Pdeathsig: unix.SIGKILL, Credential: &syscall.Credential{},
		}
		if s.job.UserNS {
			ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(s.job.IDBase), Size: confine.IDsPerTask}}
			attr.Cloneflags |= unix.CLONE_NEWUSER
			attr.UidMappings, attr.GidMappings = ids, ids
			attr.GidMappingsEnableSetgroups = true // so that the daemon's groups can be given up
		}
		return &exec.Cmd{Path: "/proc/self/exe", Args: []string{"warden", initVerb}, Stdout: outW, Stderr: errW, Dir: "/", Env: []string{"GOMAXPROCS=1"},
			ExtraFiles: extra, SysProcAttr: attr}
	})
	if cmd == nil {
		return nil, err
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	s.init, s.lifeline, s.reports, s.outputs = cmd, jobW, bufio.NewReader(reportR), []*os.File{outR, errR}
	s.logs.Go(func() { log.copy(outR, 'o') }) // each ends with the last holder of the pipe's other end, or by s.drain
	s.logs.Go(func() { log.copy(errR, 'e') })
	return jobW, nil
}

// attend waits for the end of the task and obeys orders to stop meanwhile.
func (s *supervisor) attend(orders <-chan os.Signal) executor.Exit {
	end := make(chan report, 1)
	go func() { // ends when init has reported or died
		var r report
		_ = readFrame(s.reports, &r)
		end <- r
	}()
	var kill <-chan time.Time
	var killAt time.Time
	asked := false
	for {
		select {
		case <-orders:
			o := stopOrder{Grace: warden.StopGraceDefault} // of whoever signals without a word: the system, shutting down
			_ = readJSON(s.job.Dir, stopFile, &o)
			if o.Grace > 0 && !asked {
				_ = s.init.Process.Signal(unix.SIGTERM)
				asked = true
			}
			if at := time.Now().Add(o.Grace); kill == nil || at.Before(killAt) {
				kill, killAt = time.After(o.Grace), at
			}
		case <-kill:
			_ = s.init.Process.Kill() // the pid namespace goes with it
		case r := <-end:
			s.drain()
			return s.exit(r)
		}
	}
}

// exit says how the task ended. Without init's word it was killed from outside.
func (s *supervisor) exit(r report) executor.Exit {
	e := executor.Exit{At: time.Now().UTC(), OutOfMemory: s.job.cgroup().outOfMemory()}
	switch {
	case r.Exit == nil:
		e.Code, e.Signal = 128+int(unix.SIGKILL), unix.SignalName(unix.SIGKILL)
	case r.Exit.Signal != 0:
		e.Code, e.Signal = 128+r.Exit.Signal, unix.SignalName(syscall.Signal(r.Exit.Signal))
	default:
		e.Code = r.Exit.Code
	}
	return e
}

// drain waits for init, with which all of the task is gone, and for the rest of its output.
func (s *supervisor) drain() {
	_ = s.init.Wait()
	s.lifeline.Close()
	timer := time.AfterFunc(drainTime, func() {
		for _, f := range s.outputs {
			f.Close()
		}
	})
	s.logs.Wait()
	timer.Stop()
}

// kill ends what a failed start left.
func (s *supervisor) kill() {
	if s.init != nil {
		_ = s.init.Process.Kill()
		s.drain()
	}
}

// lastWords returns what an init that died left in the log, which is then its own.
func (s *supervisor) lastWords() string {
	s.kill()
	s.init = nil
	b, _ := os.ReadFile(filepath.Join(s.job.Dir, logFile))
	for line := range strings.Lines(string(b)) {
		if l, ok := parseRecord([]byte(strings.TrimSuffix(line, "\n"))); ok && len(l.Data) > 0 {
			return fmt.Sprintf(": %.200q", l.Data)
		}
	}
	return ""
}

// fillPrivately mounts the secrets on dir in a mount namespace that only this process and the task's init are in.
func fillPrivately(plan tmpfsmount.Plan, dir string) (string, error) {
	const op = "leaving the host's mount namespace"
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return "", warden.Recode(warden.CodeInternal, op, err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return "", warden.Recode(warden.CodeInternal, op, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", warden.Recode(warden.CodeInternal, op, err)
	}
	return dir, tmpfsmount.Fill(plan, dir)
}

// hostname is what a task sees as its host's: the start of its ID, as with Docker.
func hostname(taskID string) string { return taskID[:min(len(taskID), 12)] }
