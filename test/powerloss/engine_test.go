package powerloss_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"warden"
	"warden/internal/durable"
)

// engine answers like a Docker Engine, as far as the docker executor asks. Its containers are processes that outlive it, and what it knows of
// them is in base/engine.json: the next engine of that folder goes on with it. It loses nothing but what runs.
type engine struct {
	base string

	mu         sync.Mutex // guards containers; held across starts and ends of them
	containers map[string]*box
}

// box is a container.
type box struct {
	Task            string
	Command, Mounts []string // Mounts: source and target, in turns
	User            string
	PID             int
	Ticks           string // when that process began: a later one may have its number
	StartedAt       string
}

// openEngine starts the engine of a folder, which ends with this process, and returns its address.
func openEngine(base string) (*engine, string, error) {
	e := &engine{base: base, containers: map[string]*box{}}
	b, err := os.ReadFile(filepath.Join(base, "engine.json"))
	if err == nil {
		err = json.Unmarshal(b, &e.containers)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, "", err
	}
	socket := base + ".engine"
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, "", err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, "", err
	}
	go func() { _ = http.Serve(l, e.routes()) }()
	return e, "unix://" + socket, nil
}

func (e *engine) routes() http.Handler {
	routes := http.NewServeMux()
	on := func(pattern string, f func(r *http.Request) (status int, answer any)) {
		routes.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			e.mu.Lock()
			status, answer := f(r)
			e.mu.Unlock()
			w.Header().Set("Api-Version", "1.51")
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			if answer != nil {
				_ = json.NewEncoder(w).Encode(answer)
			}
		})
	}
	one := func(pattern string, f func(id string, c *box) (status int, answer any)) {
		on(pattern, func(r *http.Request) (int, any) {
			id := r.PathValue("id")
			if c := e.containers[id]; c != nil {
				return f(id, c)
			}
			return http.StatusNotFound, map[string]string{"message": "no such container"}
		})
	}
	failed := func(err error) (int, any) {
		return http.StatusInternalServerError, map[string]string{"message": err.Error()}
	}
	on("/_ping", func(*http.Request) (int, any) { return http.StatusOK, nil })
	on("GET /{v}/info", func(*http.Request) (int, any) {
		return http.StatusOK, map[string]any{"MemoryLimit": true, "CpuCfsQuota": true, "CpuCfsPeriod": true, "PidsLimit": true}
	})
	on("GET /{v}/images/{name}/json", func(*http.Request) (int, any) {
		return http.StatusOK, map[string]any{"Id": "sha256:app", "Config": map[string]any{}}
	})
	on("POST /{v}/containers/create", func(r *http.Request) (int, any) {
		var asked struct {
			container.Config
			HostConfig container.HostConfig
		}
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
			return failed(err)
		}
		c := &box{Task: asked.Labels["warden.task"], Command: append(asked.Entrypoint, asked.Cmd...), User: asked.User}
		for _, m := range asked.HostConfig.Mounts {
			c.Mounts = append(c.Mounts, m.Source, m.Target)
		}
		id := warden.NewID()
		e.containers[id] = c
		if err := e.save(); err != nil {
			return failed(err)
		}
		return http.StatusCreated, container.CreateResponse{ID: id}
	})
	on("GET /{v}/containers/json", func(r *http.Request) (int, any) { // the mark of the state directory is not looked at: tests move it
		list := []container.Summary{}
		for id, c := range e.containers {
			filter := r.FormValue("filters")
			if !strings.Contains(filter, `"warden.task=`) || strings.Contains(filter, `"warden.task=`+c.Task+`"`) {
				list = append(list, container.Summary{ID: id, Labels: map[string]string{"warden.task": c.Task}})
			}
		}
		return http.StatusOK, list
	})
	one("POST /{v}/containers/{id}/start", func(_ string, c *box) (int, any) {
		if err := errors.Join(c.start(e.base), e.save()); err != nil {
			return failed(err)
		}
		return http.StatusNoContent, nil
	})
	one("GET /{v}/containers/{id}/json", func(id string, c *box) (int, any) {
		state := &container.State{Running: c.runs(), StartedAt: c.StartedAt}
		if state.Running {
			state.Pid = c.PID
		} else {
			state.ExitCode = 137
		}
		return http.StatusOK, container.InspectResponse{ID: id, Image: "sha256:app", State: state, Config: &container.Config{}, HostConfig: &container.HostConfig{}}
	})
	one("GET /{v}/containers/{id}/logs", func(string, *box) (int, any) { return http.StatusOK, nil })
	one("POST /{v}/containers/{id}/kill", func(_ string, c *box) (int, any) { c.kill(); return http.StatusNoContent, nil })
	one("DELETE /{v}/containers/{id}", func(id string, c *box) (int, any) {
		c.kill()
		delete(e.containers, id)
		if err := e.save(); err != nil {
			return failed(err)
		}
		return http.StatusNoContent, nil
	})
	return routes
}

// save writes down what the engine knows. Called with mu held.
func (e *engine) save() error {
	b, err := json.Marshal(e.containers)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(e.base, "engine.json"), b, 0o600)
}

// running returns the tasks whose containers run.
func (e *engine) running() map[string]bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	found := map[string]bool{}
	for _, c := range e.containers {
		if c.runs() {
			found[c.Task] = true
		}
	}
	return found
}

// left returns how many containers there are.
func (e *engine) left() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.containers)
}

// forget ends all containers and drops them.
func (e *engine) forget() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.containers {
		c.kill()
	}
	clear(e.containers)
	return e.save()
}

// start starts the process: this program again, which makes itself a container.
func (c *box) start(base string) error {
	root := base + ".root." + c.Task
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	told, err := json.Marshal(child{"container", root})
	if err != nil {
		return err
	}
	box, err := json.Marshal(c)
	if err != nil {
		return err
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = []string{childVar + "=" + string(told), boxVar + "=" + string(box), "PATH=/usr/bin:/bin", "GORACE=atexit_sleep_ms=0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	if err := cmd.Start(); err != nil {
		return err
	}
	c.PID, c.Ticks, c.StartedAt = cmd.Process.Pid, ticks(cmd.Process.Pid), time.Now().UTC().Format(time.RFC3339Nano)
	go func() { _ = cmd.Wait() }() // ends with the container
	return nil
}

func (c *box) runs() bool { return c.PID > 0 && ticks(c.PID) == c.Ticks }

// kill ends the container: all of it ends with its process 1.
func (c *box) kill() {
	for c.runs() {
		_ = syscall.Kill(c.PID, syscall.SIGKILL)
		<-time.After(time.Millisecond)
	}
}

// ticks returns when a process began, "" for one that has ended: fields 22 and 3 of proc_pid_stat(5).
func ticks(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return ""
	}
	return fields[19]
}

const boxVar = "WARDEN_POWERLOSS_BOX"

func init() {
	// container makes this process one, in its mount namespace: a root with the host's programs and what the engine was told to mount. Then it
	// runs the gate, which is this program too.
	sequences["container"] = func(root string, _ func(string, ...any)) error {
		var c box
		if err := json.Unmarshal([]byte(os.Getenv(boxVar)), &c); err != nil {
			return err
		}
		user, _, _ := strings.Cut(c.User, ":")
		uid, err := strconv.Atoi(user)
		if err != nil {
			return err
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		err = errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", root, "tmpfs", 0, "mode=0755"))
		for _, name := range []string{"bin", "dev", "etc", "lib", "lib64", "proc", "usr"} {
			if to, linkErr := os.Readlink("/" + name); linkErr == nil {
				err = errors.Join(err, os.Symlink(to, filepath.Join(root, name)))
			} else if _, statErr := os.Stat("/" + name); statErr == nil {
				err = errors.Join(err, os.Mkdir(filepath.Join(root, name), 0o755), unix.Mount("/"+name, filepath.Join(root, name), "", unix.MS_BIND|unix.MS_REC, ""))
			}
		}
		for i := 0; i+1 < len(c.Mounts); i += 2 {
			source, at := c.Mounts[i], filepath.Join(root, c.Mounts[i+1])
			if filepath.Base(source) == "gate" {
				source = self
			}
			err = errors.Join(err, os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, nil, 0o600), unix.Mount(source, at, "", unix.MS_BIND, ""))
		}
		secrets := filepath.Join(root, warden.SecretsDir)
		err = errors.Join(err, os.MkdirAll(secrets, 0o755), unix.Mount("tmpfs", secrets, "tmpfs", 0, "mode=0755"), os.Chdir(root), unix.PivotRoot(".", "."),
			unix.Unmount(".", unix.MNT_DETACH), os.Chdir("/"), syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid))
		if err != nil {
			return err
		}
		return unix.Exec(c.Command[0], c.Command, []string{"PATH=/usr/bin:/bin", "GORACE=atexit_sleep_ms=0"})
	}
}
