package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

// labConfig is what a lab reads from its standard input, as one line of JSON.
type labConfig struct {
	Runner           string // name in runners
	Dir              string // on a disk
	Cgroup           string // that all containers are below, in every hierarchy
	Dockerd, Warden  string // programs
	Probe            []byte // the program of the image
	Containers, Warm int
}

// kit is what labs need.
type kit struct {
	dir, dockerd, warden string
	probe                []byte
}

//go:embed probe/main.go
var probeSource []byte

// build builds the daemon as its users do, and the program of the image.
func (k *kit) build(ctx context.Context, dir string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("a Docker Engine of its own needs root")
	}
	if k.dockerd, err = exec.LookPath("dockerd"); err != nil {
		return err
	}
	if k.dir, err = os.MkdirTemp(dir, "kit"); err != nil {
		return err
	}
	source, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "warden").Output()
	if err != nil {
		return fmt.Errorf("looking for Warden's source (run this in bench/peers): %w", err)
	}
	if err := os.WriteFile(filepath.Join(k.dir, "probe.go"), probeSource, 0o600); err != nil {
		return err
	}
	k.warden = filepath.Join(k.dir, "warden")
	for _, b := range []struct {
		dir, out, what string
	}{{strings.TrimSpace(string(source)), k.warden, "./cmd/warden"}, {k.dir, "probe", "probe.go"}} {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", b.out, b.what)
		cmd.Dir, cmd.Env = b.dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", b.what, err, out)
		}
	}
	k.probe, err = os.ReadFile(filepath.Join(k.dir, "probe"))
	return err
}

func (k *kit) remove() {
	if k.dir != "" {
		os.RemoveAll(k.dir)
	}
}

// runLab has a runner run containers on a Docker Engine of its own, and returns how long it took until all ran. Engine, runner and
// containers are in a process namespace of their own: whatever happens, they end with its process 1.
func runLab(ctx context.Context, k *kit, runner, dir string, containers int) (took time.Duration, err error) {
	cfg := labConfig{Runner: runner, Dockerd: k.dockerd, Warden: k.warden, Probe: k.probe, Containers: containers, Warm: 1}
	if cfg.Dir, err = os.MkdirTemp(dir, "peers"); err != nil {
		return 0, err
	}
	cfg.Cgroup = filepath.Base(cfg.Dir)
	cmd, in, out, err := startChild("lab", &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID})
	if err != nil {
		os.RemoveAll(cfg.Dir)
		return 0, err
	}
	defer func() {
		cmd.Process.Kill()
		in.Close()
		cmd.Wait() // the kernel has ended all that ran in the namespace by then
		clean, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		err = errors.Join(err, await(clean, "the lab is removed", 20*time.Millisecond, func(context.Context) (bool, error) {
			err := errors.Join(os.RemoveAll(cfg.Dir), removeCgroups(cfg.Cgroup))
			return err == nil, err
		}))
	}()
	if err := json.NewEncoder(in).Encode(cfg); err != nil {
		return 0, err
	}
	said := make(chan labResult, 1)
	go func() { // ends with the process
		var r labResult
		if err := json.NewDecoder(out).Decode(&r); err != nil {
			r.Failed = "it ended: " + err.Error()
		}
		said <- r
	}()
	select {
	case r := <-said:
		if r.Failed != "" {
			return 0, fmt.Errorf("%s: %s", runner, r.Failed)
		}
		return r.Took, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("%s: %w", runner, ctx.Err())
	}
}

// labResult is what a lab says.
type labResult struct {
	Took   time.Duration
	Failed string
}

// removeCgroups removes a cgroup and all below it in every hierarchy.
func removeCgroups(name string) (failed error) {
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + name, "/sys/fs/cgroup/" + name} {
		roots, _ := filepath.Glob(pattern)
		for _, root := range roots {
			var dirs []string
			_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) {
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					failed = errors.Join(failed, err)
				}
			}
		}
	}
	return failed
}

// What follows runs in the lab.

// serveLab is the main of a lab's process 1.
func serveLab() {
	if os.Getpid() != 1 { // or endAll would end all of the machine
		fmt.Fprintln(os.Stderr, "a lab is process 1 of a namespace of its own")
		os.Exit(1)
	}
	var cfg labConfig
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &cfg)
	}
	var r labResult
	if err == nil {
		go func() {
			io.Copy(io.Discard, in)
			os.Exit(1)
		}()
		r.Took, err = (&lab{labConfig: cfg}).measure(context.Background())
	}
	if err != nil {
		r.Failed = err.Error()
	}
	endAll()
	json.NewEncoder(os.Stdout).Encode(r)
}

// endAll ends and reaps all other processes of the namespace. The kernel would end them, too, but not count the time that they took as ours.
func endAll() {
	if os.Getpid() != 1 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_ = await(ctx, "all have ended", 10*time.Millisecond, func(context.Context) (bool, error) {
		unix.Kill(-1, unix.SIGKILL)
		all, err := filepath.Glob("/proc/[0-9]*")
		return len(all) == 1, err
	})
}

// lab is an engine and whoever runs containers on it.
type lab struct {
	labConfig
	cli   *client.Client
	image string       // its ID: nobody asks a registry for that
	live  atomic.Int64 // connections of probes
}

// Addresses in the lab's own network namespace.
const (
	bridge    = "10.80.0.1"
	probePort = "7000"
)

func (l *lab) measure(ctx context.Context) (took time.Duration, err error) {
	if err := ownPlace(); err != nil {
		return 0, fmt.Errorf("making a place of its own: %w", err)
	}
	reapOrphans()
	if err := l.listen(); err != nil {
		return 0, err
	}
	if err := l.startEngine(ctx); err != nil {
		return 0, err
	}
	if err := l.importImage(ctx); err != nil {
		return 0, fmt.Errorf("importing the image: %w", err)
	}
	r, err := runners[l.Runner](ctx, l)
	if err != nil {
		return 0, err
	}
	if _, err := l.run(ctx, r, "warm", l.Warm); err != nil {
		return 0, err
	}
	if err := r.remove(ctx, "warm"); err != nil {
		return 0, err
	}
	if err := await(ctx, "no container is left", 20*time.Millisecond, func(ctx context.Context) (bool, error) {
		all, err := l.cli.ContainerList(ctx, client.ContainerListOptions{All: true})
		return len(all.Items) == 0 && l.live.Load() == 0, err
	}); err != nil {
		return 0, err
	}
	return l.run(ctx, r, "measured", l.Containers)
}

// run has so many containers run, and returns how long it took from the first call until the program of each had said that it runs, and
// the runner said so of all.
func (l *lab) run(ctx context.Context, r runner, name string, containers int) (time.Duration, error) {
	start := time.Now()
	if err := r.create(ctx, name, containers); err != nil {
		return 0, err
	}
	err := await(ctx, fmt.Sprintf("%d containers run", containers), pollPeriod, func(ctx context.Context) (bool, error) {
		if l.live.Load() != int64(containers) {
			return false, nil
		}
		n, err := r.running(ctx, name)
		return n == containers, err
	})
	return time.Since(start), err
}

// ownPlace gives this process mounts and a loopback interface of its own.
func ownPlace() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	if err := unix.Mount("peers", "/run", "tmpfs", 0, "mode=0755"); err != nil { // engines keep sockets at fixed places there
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// reapOrphans is what a process 1 has to do. Nobody else here waits for a child.
func reapOrphans() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	go func() { // ends with the process
		for range children {
			for {
				if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}()
}

// listen counts the connections of probes.
func (l *lab) listen() error {
	listener, err := net.Listen("tcp", ":"+probePort)
	if err != nil {
		return err
	}
	go func() { // ends with the process
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			if from := c.RemoteAddr().(*net.TCPAddr).IP; from.IsLoopback() || from.Equal(net.ParseIP(bridge)) {
				c.Close() // a container without a network of its own is not the same work
				continue
			}
			l.live.Add(1)
			go func() {
				io.Copy(io.Discard, c)
				l.live.Add(-1)
			}()
		}
	}()
	return nil
}

// start starts a program that runs until the lab ends.
func (l *lab) start(name string, env []string, program string, args ...string) error {
	log, err := os.Create(l.log(name))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), env...), log, log
	cmd.Env = slices.DeleteFunc(cmd.Env, func(v string) bool { return strings.HasPrefix(v, childEnv+"=") })
	return cmd.Start()
}

func (l *lab) log(name string) string { return filepath.Join(l.Dir, name+".log") }

// lastWords adds the end of a program's log to an error.
func (l *lab) lastWords(name string, err error) error {
	if err == nil {
		return nil
	}
	b, _ := os.ReadFile(l.log(name))
	return fmt.Errorf("%w\n%s", err, b[max(0, len(b)-2000):])
}

func (l *lab) engine() string { return "unix://" + filepath.Join(l.Dir, "docker.sock") }

// startEngine starts the engine and waits until it answers. All that runs containers finds it as it is here.
func (l *lab) startEngine(ctx context.Context) (err error) {
	config := filepath.Join(l.Dir, "daemon.json")
	if err := os.WriteFile(config, []byte(`{"log-driver":"local"}`), 0o600); err != nil {
		return err
	}
	at := func(name string) string { return filepath.Join(l.Dir, name) }
	if err := l.start("dockerd", nil, l.Dockerd, "-H", l.engine(), "--data-root", at("data"), "--exec-root", at("exec"), "--pidfile", at("pid"),
		"--config-file", config, "--cgroup-parent", "/"+l.Cgroup, "--bip", bridge+"/16"); err != nil {
		return err
	}
	if l.cli, err = client.New(client.WithHost(l.engine())); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return l.lastWords("dockerd", await(ctx, "the engine answers", 20*time.Millisecond, func(ctx context.Context) (bool, error) {
		_, err := l.cli.Ping(ctx, client.PingOptions{})
		return err == nil, err
	}))
}

// importImage makes an image of the probe alone.
func (l *lab) importImage(ctx context.Context) error {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: "probe", Mode: 0o755, Size: int64(len(l.Probe))})
	if err == nil {
		_, err = w.Write(l.Probe)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return err
	}
	reply, err := l.cli.ImageImport(ctx, client.ImageImportSource{Source: &b, SourceName: "-"}, "", client.ImageImportOptions{Changes: []string{`ENTRYPOINT ["/probe"]`}})
	if err != nil {
		return err
	}
	defer reply.Close()
	for d := json.NewDecoder(reply); ; {
		var said struct{ Status, Error string }
		if err := d.Decode(&said); err != nil {
			return err
		}
		if said.Error != "" {
			return errors.New(said.Error)
		}
		if strings.HasPrefix(said.Status, "sha256:") {
			l.image = said.Status
			return nil
		}
	}
}
