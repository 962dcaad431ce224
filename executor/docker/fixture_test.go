package docker_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"warden"
	"warden/executor"
	"warden/executor/docker"
	"warden/internal/leaktest"
)

const self = "/proc/self/exe"

// daemonVerb makes the test binary a daemon that starts one task and waits to be killed.
const daemonVerb = "test-daemon"

func TestMain(m *testing.M) {
	docker.Main(os.Args)
	if len(os.Args) > 1 && os.Args[1] == daemonVerb {
		daemon(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == holderVerb {
		holder()
	}
	// An executor lives as long as its process; what it sweeps for a while after a restart goes on after its test.
	os.Exit(leaktest.Run(clean{m}, "warden/executor/docker.(*Executor).sweepLater.func1"))
}

// clean is a testing.M that removes what its tests share.
type clean struct{ m *testing.M }

func (c clean) Run() int {
	defer shared.remove()
	return c.m.Run()
}

// lab is one engine and the images that tests made on it.
type lab struct {
	host string
	cli  *client.Client
	base string // image without a user, with the programs of this machine that the tests need

	mu     sync.Mutex // guards images
	images []string
}

var shared lab // on the machine's own engine

// engineLab returns the lab of the machine's own engine.
func engineLab(t testing.TB) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the docker executor needs root")
	}
	if !docker.Answers(t.Context(), docker.DefaultHost, 5*time.Second) {
		t.Skip("no Docker Engine answers at " + docker.DefaultHost)
	}
	shared.mu.Lock()
	ready := shared.cli != nil
	shared.mu.Unlock()
	if !ready {
		shared.open(t, docker.DefaultHost)
	}
	return &shared
}

// open connects to the engine and makes the base image.
func (l *lab) open(t testing.TB, host string) {
	t.Helper()
	cli, err := client.New(client.WithHost(host))
	if err != nil {
		t.Fatal(err)
	}
	l.host, l.cli = host, cli
	root, err := rootFiles()
	if err != nil {
		t.Fatal(err)
	}
	l.base = l.build(t, "FROM scratch\nADD root.tar /\nENV PATH=/usr/bin\nWORKDIR /tmp\n", root)
}

// image makes an image on top of the base one, or of scratch.
func (l *lab) image(t testing.TB, lines ...string) string {
	t.Helper()
	text := strings.Join(lines, "\n")
	if !strings.HasPrefix(text, "FROM ") {
		text = "FROM " + l.base + "\n" + text
	}
	return l.build(t, text+"\n", nil)
}

func (l *lab) build(t testing.TB, dockerfile string, root []byte) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name string, data []byte) {
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}), second(w.Write(data))); err != nil {
			t.Fatal(err)
		}
	}
	add("Dockerfile", []byte(dockerfile))
	if root != nil {
		add("root.tar", root)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	name := "warden-test-" + warden.NewID() + ":latest"
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	r, err := l.cli.ImageBuild(ctx, &b, client.ImageBuildOptions{Tags: []string{name}, Remove: true, ForceRemove: true, NoCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	said, err := io.ReadAll(r.Body)
	if err != nil || !strings.Contains(string(said), "Successfully tagged") {
		t.Fatalf("building an image: %v\n%s", err, said)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.images = append(l.images, name)
	return name
}

func second[T any](_ T, err error) error { return err }

// remove removes the images, the newest first.
func (l *lab) remove() {
	for i := len(l.images) - 1; i >= 0; i-- {
		if _, err := l.cli.ImageRemove(context.Background(), l.images[i], client.ImageRemoveOptions{Force: true, PruneChildren: true}); err != nil {
			fmt.Fprintln(os.Stderr, "left an image behind:", err)
		}
	}
}

// programs are what the scripts of the tests call.
var programs = []string{"sh", "cat", "chmod", "cp", "cut", "date", "dd", "env", "find", "grep", "head", "hostname", "id", "kill", "ls", "mkdir", "mknod",
	"mount", "perl", "printf", "rm", "seq", "setsid", "sleep", "stat", "tail", "touch", "tr", "true", "umount", "unshare", "wc"}

// rootFiles returns a tar of a small system, made of this machine's files.
func rootFiles() ([]byte, error) {
	files := map[string]string{} // in the image: here
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			return nil, err
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, err
		}
		files["usr/bin/"+name] = path
		out, err := exec.Command("ldd", path).Output()
		if err != nil {
			return nil, fmt.Errorf("ldd %s: %w", path, err)
		}
		for word := range strings.FieldsSeq(string(out)) {
			if !strings.HasPrefix(word, "/") {
				continue
			}
			inside := strings.TrimPrefix(word, "/")
			if !strings.HasPrefix(inside, "usr/") {
				inside = "usr/" + inside
			}
			files[inside] = word
		}
	}
	modules, err := filepath.Glob("/usr/lib/*/perl-base")
	if err != nil {
		return nil, err
	}
	for _, dir := range modules {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				files[strings.TrimPrefix(path, "/")] = path
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	dirs := map[string]bool{}
	var mkdir func(name string, mode int64) error
	mkdir = func(name string, mode int64) error {
		if name == "." || dirs[name] {
			return nil
		}
		dirs[name] = true
		return errors.Join(mkdir(filepath.Dir(name), 0o755), w.WriteHeader(&tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: mode}))
	}
	add := func(name string, mode int64, data []byte) error {
		return errors.Join(mkdir(filepath.Dir(name), 0o755), w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data))}), second(w.Write(data)))
	}
	for _, link := range []string{"bin", "lib", "lib64"} {
		err = errors.Join(err, mkdir("usr/"+link, 0o755), w.WriteHeader(&tar.Header{Name: link, Typeflag: tar.TypeSymlink, Linkname: "usr/" + link}))
	}
	err = errors.Join(err, mkdir("tmp", 0o1777), mkdir("data", 0o755), mkdir("root", 0o700),
		add("etc/passwd", 0o644, []byte("root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/data:/bin/sh\ntoor:x:0:0::/root:/bin/sh\n")),
		add("etc/group", 0o644, []byte("root:x:0:\napp:x:1235:\n")), add("etc/shadow", 0o640, []byte("root:*:1::::::\n")))
	for name, path := range files {
		data, readErr := os.ReadFile(path)
		err = errors.Join(err, readErr, add(name, 0o755, data))
	}
	return b.Bytes(), errors.Join(err, w.Close())
}

// opened is an executor with what its constructor was told.
type opened struct {
	*docker.Executor
	lab *lab
	dir string
}

func (l *lab) executor(t testing.TB, dir string) opened {
	t.Helper()
	e, err := docker.New(dir, self, l.host, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("New() = %v", err)
	}
	return opened{e, l, dir}
}

func tasksDir(t testing.TB) string { return filepath.Join(t.TempDir(), "tasks") }

// containers returns the IDs of the containers of a task.
func (l *lab) containers(t testing.TB, taskID string) (ids []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := l.cli.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", "warden.task="+taskID)})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Items {
		ids = append(ids, c.ID)
	}
	return ids
}

// inspect returns the one container of a task.
func (l *lab) inspect(t testing.TB, taskID string) container.InspectResponse {
	t.Helper()
	ids := l.containers(t, taskID)
	if len(ids) != 1 {
		t.Fatalf("task %s has containers %q, want one", taskID, ids)
	}
	r, err := l.cli.ContainerInspect(t.Context(), ids[0], client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Container
}

// residue names what is left of a task.
func (l *lab) residue(t testing.TB, dir, taskID string) (left []string) {
	t.Helper()
	for _, id := range l.containers(t, taskID) {
		left = append(left, "container "+id)
	}
	found, err := filepath.Glob(filepath.Join(dir, "*"+taskID+"*"))
	if err != nil {
		t.Fatal(err)
	}
	return append(left, found...)
}

// start starts a task that is removed at the end of the test.
func start(t testing.TB, e opened, spec executor.Spec) executor.Task {
	t.Helper()
	if spec.TaskID == "" {
		spec.TaskID = warden.NewID()
	}
	if spec.Image == "" {
		spec.Image = e.lab.base
	}
	task, err := e.Start(t.Context(), spec)
	if err != nil {
		t.Fatalf("Start(%q) = %v (hint: %s)", spec.Command, err, warden.HintOf(err))
	}
	cleanUp(t, e, task)
	return task
}

func cleanUp(t testing.TB, e opened, task executor.Task) {
	t.Helper()
	t.Cleanup(func() { // t.Context is done by then
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		// In a test that plays a restart the executor of before still writes how its tasks end, maybe while this removes the folder.
		await(t, time.Minute, func() error { return task.Remove(ctx) })
		if left := e.lab.residue(t, e.dir, task.ID()); len(left) > 0 {
			t.Errorf("Remove() left %q", left)
		}
	})
}

func script(text string) []string { return []string{"/bin/sh", "-c", text} }

func wait(t testing.TB, task executor.Task) executor.Exit {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	exit, err := task.Wait(ctx)
	if err != nil {
		t.Fatalf("Wait() = %v", err)
	}
	return exit
}

func logs(t testing.TB, task executor.Task) string {
	t.Helper()
	var all strings.Builder
	err := task.Logs(t.Context(), executor.LogOptions{Tail: -1}, func(l executor.Line) error { fmt.Fprintln(&all, string(l.Data)); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// firstLine waits for the task's first line of output.
func firstLine(t testing.TB, task executor.Task) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var first string
	_ = task.Logs(ctx, executor.LogOptions{Follow: true, Tail: -1}, func(l executor.Line) error { first = string(l.Data); return io.EOF })
	return first
}

// await asks until ask returns nil.
func await(t testing.TB, limit time.Duration, ask func() error) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited %s: %v", limit, err)
		}
	}
}
