package bed

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// engine is a Docker Engine that one host has for itself: data, sockets, network, and the namespaces that outlive it, without
// which a killed engine's containers lose what it mounted for them.
type engine struct {
	dir, log string
	program
}

// NeedEngine skips the test where no Docker Engine can be started.
func NeedEngine(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("dockerd"); err != nil {
		t.Skipf("needs dockerd (Debian: docker.io; `make setup-engine`): %v", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(os.TempDir(), &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		t.Skipf("needs a folder on a disk for the data of a Docker Engine: %s is not (set TMPDIR)", os.TempDir())
	}
}

// WithEngine gives the host a Docker Engine of its own, on which the daemon runs its tasks. It starts before the daemon does for the
// first time; call NeedEngine before.
func WithEngine() Option {
	return func(h *Host) error {
		e := &engine{dir: filepath.Join(h.dir, engineDir), log: filepath.Join(h.dir, "engine.log")}
		if err := os.Mkdir(e.dir, 0o711); err != nil {
			return err
		}
		// The folder of its plugins is fixed.
		if err := h.ns.client.Call("Holder.Mount", Disk{Path: "/run/docker", Bytes: 1 << 20, Make: true}, nil); err != nil {
			return err
		}
		h.engine, h.args = e, append(h.args, "--executor", "docker")
		h.env = append(h.env, "DOCKER_HOST="+h.EngineHost())
		return nil
	}
}

// engineDir is the folder of an engine, in that of its host.
const engineDir = "engine"

// engineCgroup is the cgroup of all containers of the engine in dir.
func engineCgroup(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return "warden-bed-" + hex.EncodeToString(sum[:6])
}

// EngineHost returns where the engine answers, as DOCKER_HOST says it; from outside of the host, too.
func (h *Host) EngineHost() string { return "unix://" + h.engineSock() }

func (h *Host) engineSock() string { return filepath.Join(h.engine.dir, "sock") }

// StartEngine starts the engine and waits until it answers.
func (h *Host) StartEngine() {
	h.b.t.Helper()
	if err := h.startEngine(); err != nil {
		h.b.t.Fatal(err)
	}
}

func (h *Host) startEngine() error {
	e := h.engine
	path, err := exec.LookPath("dockerd")
	if err != nil {
		return err
	}
	config := filepath.Join(e.dir, "daemon.json")
	if err := os.WriteFile(config, []byte("{}"), 0o600); err != nil { // not the machine's
		return err
	}
	err = e.start(h, "the engine", Program{Path: path, Log: e.log, Argv: []string{"dockerd", "-H", h.EngineHost(), "--data-root", filepath.Join(e.dir, "data"),
		"--exec-root", filepath.Join(e.dir, "exec"), "--pidfile", filepath.Join(e.dir, "pid"), "--config-file", config,
		"--cgroup-parent", "/" + engineCgroup(e.dir), "--live-restore", "--shutdown-timeout", "2"}})
	if err != nil {
		return fmt.Errorf("starting the engine of %s: %w", h.Name, err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for {
		conn, err := net.Dial("unix", h.engineSock()) // it listens before it serves: who asks waits for the answer
		if err == nil {
			return conn.Close()
		}
		select {
		case <-e.ended:
			err = errors.New("it ended at its start")
		case <-deadline:
		case <-tick.C:
			continue
		}
		log, _ := os.ReadFile(e.log)
		return fmt.Errorf("the engine of %s does not answer: %w\n%s", h.Name, err, log[max(0, len(log)-2000):])
	}
}

// KillEngine ends the engine by SIGKILL and waits. Its containers go on.
func (h *Host) KillEngine() {
	h.b.t.Helper()
	h.engine.end(h, "the engine", syscall.SIGKILL)
}
