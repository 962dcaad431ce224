package process

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"warden"
)

// PidsMax is the most processes and threads that a task may have.
const PidsMax = 512

const cpuPeriod = 100_000 // microseconds

// removeTime is how long the kernel is given to end what a cgroup holds: a process that was killed may be slow to go.
const removeTime = 10 * time.Second

// limits are what a task's cgroup holds it to; 0: no limit.
type limits struct{ NanoCPUs, MemoryBytes int64 }

// hierarchies returns the directories under which tasks' cgroups are made, by controller: the three mounts of cgroup v1, or
// one of v2 three times. A controller without a writable hierarchy is not in it. v1 directories lie at the top, as Docker's
// do; v2 ones under the daemon's own cgroup, which systemd delegates.
func hierarchies() map[string]string {
	found := map[string]string{}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return found
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 || unix.Access(f[1], unix.W_OK) != nil {
			continue
		}
		switch f[2] {
		case "cgroup":
			for option := range strings.SplitSeq(f[3], ",") {
				if option == "cpu" || option == "memory" || option == "pids" {
					found[option] = f[1]
				}
			}
		case "cgroup2":
			dir := unified(f[1])
			controllers, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
			for c := range strings.FieldsSeq(string(controllers)) {
				if (c == "cpu" || c == "memory" || c == "pids") && found[c] == "" {
					found[c] = dir
				}
			}
		}
	}
	return found
}

// unified returns the daemon's own directory in the v2 hierarchy at mount. A daemon restarted by systemd's Delegate=yes may sit
// in the leaf that delegate made.
func unified(mount string) string {
	own, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(own)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			dir := filepath.Join(mount, strings.TrimSuffix(path, "/"+daemonLeaf))
			if _, err := os.Stat(dir); err == nil {
				return dir
			}
		}
	}
	return mount
}

// daemonLeaf is where delegate moves the daemon, since a v2 cgroup that has processes cannot hand controllers on.
const daemonLeaf = "warden-daemon"

// cgroup is the cgroup of one task, or with parent alone the one of all tasks of a state directory.
type cgroup struct {
	dirs   map[string]string // controller -> hierarchy
	parent string
	task   string
}

func (c cgroup) paths() map[string]string {
	paths := map[string]string{}
	for controller, dir := range c.dirs {
		paths[controller] = filepath.Join(dir, c.parent, c.task)
	}
	return paths
}

// create makes the cgroup and sets l. Errors: CodeUnsupported for a limit that this machine cannot enforce.
func (c cgroup) create(l limits) error {
	const op = "creating the task's cgroup"
	for controller, want := range map[string]bool{"cpu": l.NanoCPUs > 0, "memory": l.MemoryBytes > 0} {
		if want && c.dirs[controller] == "" {
			return warden.Hint(warden.Errorf(warden.CodeUnsupported, op, "no writable %s hierarchy to enforce the limit with", controller),
				"give the daemon a writable cgroup (systemd: Delegate=yes), or drop the limit")
		}
	}
	for controller, path := range c.paths() {
		err := os.MkdirAll(path, 0o755)
		v2 := err == nil && isUnified(path)
		if v2 {
			err = c.delegate(controller)
		}
		for _, setting := range settings(controller, v2, l) {
			if err == nil {
				err = set(filepath.Join(path, setting[0]), setting[1])
			}
		}
		if err != nil {
			return warden.Recode(warden.CodeInternal, op, err)
		}
	}
	return nil
}

// delegate hands controller down from the hierarchy's directory to the task's, moving the processes of the former into a
// leaf if the kernel wants so.
func (c cgroup) delegate(controller string) error {
	top := c.dirs[controller]
	enable := func(dir string) error { return set(filepath.Join(dir, "cgroup.subtree_control"), "+"+controller) }
	err := enable(top)
	if errors.Is(err, unix.EBUSY) {
		leaf := filepath.Join(top, daemonLeaf)
		if err = os.Mkdir(leaf, 0o755); err == nil || errors.Is(err, fs.ErrExist) {
			for _, pid := range members(top) {
				_ = set(filepath.Join(leaf, "cgroup.procs"), pid) // may have ended
			}
			err = enable(top)
		}
	}
	if err != nil {
		return err
	}
	return enable(filepath.Join(top, c.parent))
}

func settings(controller string, v2 bool, l limits) (s [][2]string) {
	quota := strconv.FormatInt(max(l.NanoCPUs*cpuPeriod/1e9, 1000), 10) // the kernel refuses less than a millisecond
	memory := strconv.FormatInt(l.MemoryBytes, 10)
	switch {
	case controller == "pids":
		return [][2]string{{"pids.max", strconv.Itoa(PidsMax)}}
	case controller == "cpu" && l.NanoCPUs > 0 && v2:
		return [][2]string{{"cpu.max", fmt.Sprintf("%s %d", quota, cpuPeriod)}}
	case controller == "cpu" && l.NanoCPUs > 0:
		return [][2]string{{"cpu.cfs_period_us", strconv.Itoa(cpuPeriod)}, {"cpu.cfs_quota_us", quota}}
	case controller == "memory" && l.MemoryBytes > 0 && v2:
		return [][2]string{{"memory.max", memory}, {"memory.swap.max?", "0"}}
	case controller == "memory" && l.MemoryBytes > 0:
		return [][2]string{{"memory.limit_in_bytes", memory}, {"memory.memsw.limit_in_bytes?", memory}}
	}
	return nil
}

// set writes a control file. A name that ends in '?' is of a file that not every kernel has.
func set(path, value string) error {
	path, optional := strings.CutSuffix(path, "?")
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func isUnified(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
}

func members(dir string) []string {
	pids, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return strings.Fields(string(pids))
}

// start starts the process that make describes in the cgroup, and returns it. To move a process that runs, the kernel holds up all
// forks and exits of the machine until every processor has noticed: some 10 ms. So the calling thread itself enters a v1 cgroup, which
// waits for nobody, and goes back once it has forked; into a v2 one the kernel puts the new process (Linux 5.7). A process is moved
// only where that can't be done. The caller has locked its goroutine to its thread; make may be called twice.
func (c cgroup) start(make func() *exec.Cmd) (_ *exec.Cmd, err error) {
	const op = "starting the task's init in its cgroup"
	var homes []*os.File // where the thread goes back to
	defer func() {
		for _, f := range homes {
			if _, herr := f.WriteString("0"); herr != nil { // it would be killed with the task
				err = errors.Join(err, warden.Recode(warden.CodeInternal, "leaving the task's cgroup", herr))
			}
			f.Close()
		}
	}()
	cmd, into, late := make(), "", []string{}
	for controller, path := range c.paths() {
		if isUnified(path) {
			into = path // of all its controllers
			continue
		}
		home, herr := os.OpenFile(filepath.Join(ownGroup(controller, c.dirs[controller]), threadsFile), os.O_WRONLY, 0)
		if herr == nil && set(filepath.Join(path, threadsFile), "0") == nil {
			homes = append(homes, home)
			continue
		}
		home.Close() // nil is fine
		late = append(late, path)
	}
	if into != "" {
		dir, err := os.Open(into)
		if err != nil {
			return nil, warden.Recode(warden.CodeInternal, op, err)
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
		if cmd.Start() == nil {
			return cmd, c.add(cmd.Process.Pid, late)
		}
		cmd, late = make(), append(late, into)
	}
	if err := cmd.Start(); err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	return cmd, c.add(cmd.Process.Pid, late)
}

// threadsFile lists the threads in a v1 cgroup; "0" is the one that writes.
const threadsFile = "tasks"

// ownGroup returns the directory of the calling thread's cgroup in the v1 hierarchy of a controller that is mounted on mount. In a container
// that sees its own part of the hierarchy alone, that is the mount itself.
func ownGroup(controller, mount string) string {
	b, _ := os.ReadFile("/proc/thread-self/cgroup")
	for line := range strings.Lines(string(b)) { // ID:controllers:path, cgroups(7)
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && slices.Contains(strings.Split(f[1], ","), controller) {
			dir := filepath.Join(mount, f[2])
			if _, err := os.Stat(dir); err == nil {
				return dir
			}
		}
	}
	return mount
}

// add moves the process pid into the directories of the cgroup.
func (c cgroup) add(pid int, paths []string) error {
	for _, path := range paths {
		if err := set(filepath.Join(path, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return warden.Recode(warden.CodeInternal, "moving the task into its cgroup", err)
		}
	}
	return nil
}

// outOfMemory reports whether the kernel killed something in the cgroup for its memory limit.
func (c cgroup) outOfMemory() bool {
	path, ok := c.paths()["memory"]
	if !ok {
		return false
	}
	for _, file := range []string{"memory.oom_control", "memory.events"} {
		b, _ := os.ReadFile(filepath.Join(path, file))
		for line := range bytes.Lines(b) {
			if count, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("oom_kill ")); ok && string(count) != "0" {
				return true
			}
		}
	}
	return false
}

// remove kills what is left in the cgroup and takes it away, and the parent with the last one. What is not there is no error.
func (c cgroup) remove() error {
	var failed error
	for _, path := range c.paths() {
		if err := removeGroup(path); err != nil {
			failed = errors.Join(failed, err)
		}
		_ = os.Remove(filepath.Dir(path)) // succeeds for the last one only
	}
	return warden.Wrap("removing the task's cgroup", failed)
}

// removeGroup removes one directory. The kernel lets go of a cgroup a little after its last process is gone.
func removeGroup(path string) error {
	deadline := time.Now().Add(removeTime)
	for {
		for _, text := range members(path) {
			if pid, err := strconv.Atoi(text); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		err := os.Remove(path)
		if err == nil || errors.Is(err, fs.ErrNotExist) || time.Now().After(deadline) {
			return ignoreNotExist(err)
		}
		time.Sleep(time.Millisecond)
	}
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// sweep removes the cgroups under parent of tasks that are not in keep.
func (c cgroup) sweep(keep map[string]bool) error {
	var failed error
	for _, dir := range c.dirs {
		entries, _ := os.ReadDir(filepath.Join(dir, c.parent))
		for _, e := range entries {
			if e.IsDir() && !keep[e.Name()] {
				failed = errors.Join(failed, removeGroup(filepath.Join(dir, c.parent, e.Name())))
			}
		}
		if len(keep) == 0 {
			_ = os.Remove(filepath.Join(dir, c.parent))
		}
	}
	return failed
}
