package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// patience is how long what ends has to be gone after the last test.
const patience = 10 * time.Second

// machine is what tests could leave on the machine. What carries the path of the run's temporary folder is the run's; of the rest, the
// run's is what was not there before.
type machine struct {
	tmp    string
	before map[string]bool
}

func look(tmp string) machine { return machine{tmp, shared()} }

// awaitLeft waits until nothing is left, and returns what still is.
func (m machine) awaitLeft(patience time.Duration) []string {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(patience); ; {
		found := m.left()
		if len(found) == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline:
			return found
		}
	}
}

func (m machine) left() []string {
	found := slices.Concat(m.processes(), m.mounts(), m.files())
	after := shared()
	maps.DeleteFunc(after, func(name string, _ bool) bool { return m.before[name] })
	return append(found, slices.Sorted(maps.Keys(after))...)
}

// processes returns the processes that got the run's temporary folder in their environment, or as an argument. They hold the namespaces
// that no mount holds.
func (m machine) processes() (found []string) {
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range all {
		line, _ := os.ReadFile(filepath.Join(proc, "cmdline"))
		env, _ := os.ReadFile(filepath.Join(proc, "environ"))
		if proc != fmt.Sprintf("/proc/%d", os.Getpid()) && (bytes.Contains(line, []byte(m.tmp)) || bytes.Contains(env, []byte(m.tmp))) {
			found = append(found, fmt.Sprintf("process %s: %q", filepath.Base(proc), strings.Fields(strings.ReplaceAll(string(line), "\x00", " "))))
		}
	}
	return found
}

func (m machine) mounts() (found []string) {
	list, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(list)) {
		if strings.Contains(line, m.tmp) {
			found = append(found, "mount "+strings.TrimSpace(line))
		}
	}
	return found
}

func (m machine) files() (found []string) {
	list, err := os.ReadDir(m.tmp)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		found = append(found, err.Error())
	}
	for _, e := range list {
		found = append(found, "file "+filepath.Join(m.tmp, e.Name()))
	}
	return found
}

// shared returns what does not say whose it is: named network namespaces, bridges and tunnels, cgroups of tasks in which nothing runs, and
// what the Docker Engine has.
func shared() map[string]bool {
	all := map[string]bool{}
	namespaces, _ := filepath.Glob("/run/netns/*")
	for _, n := range namespaces {
		all["network namespace "+n] = true
	}
	links, _ := filepath.Glob("/sys/class/net/*")
	for _, l := range links {
		if name := filepath.Base(l); !strings.HasPrefix(name, "veth") { // of a container, which is found by itself
			all["network device "+name] = true
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/warden-*", "/sys/fs/cgroup/*/warden-*"} {
		groups, _ := filepath.Glob(pattern)
		for _, g := range groups {
			if isEmpty(g) {
				all["cgroup "+g] = true
			}
		}
	}
	for noun, args := range map[string][]string{"container": {"ps", "-a", "--format", "{{.ID}} {{.Image}} {{.Names}}"},
		"Docker network": {"network", "ls", "--format", "{{.Name}}"}, "volume": {"volume", "ls", "-q"}, "image": {"image", "ls", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"}} {
		out, err := exec.Command("docker", args...).Output()
		if err != nil {
			continue // no engine, so nothing of it is left
		}
		for line := range strings.Lines(string(out)) {
			all[noun+" "+strings.TrimSpace(line)] = true
		}
	}
	return all
}

// isEmpty tells whether no process is in a cgroup or one of those in it.
func isEmpty(group string) bool {
	empty := true
	_ = filepath.WalkDir(group, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && filepath.Base(path) == "cgroup.procs" {
			b, _ := os.ReadFile(path)
			empty = empty && len(b) == 0
		}
		return nil
	})
	return empty
}
