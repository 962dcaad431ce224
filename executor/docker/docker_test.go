package docker_test

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"warden"
	"warden/executor"
	"warden/executor/conformance"
	"warden/executor/docker"
	"warden/internal/sensitive"
	"warden/internal/testcluster"
)

func TestConformance(t *testing.T) {
	l := engineLab(t)
	conformance.Run(t, func(t *testing.T) executor.Executor { return l.executor(t, tasksDir(t)) }, conformance.Host{
		Image: l.base, OwnFiles: true, IDs: true, Memory: true, Pids: docker.PidsMax,
		Reopen:  func(t *testing.T, e executor.Executor) executor.Executor { return l.executor(t, e.(opened).dir) },
		Residue: func(t *testing.T, e executor.Executor, id string) []string { return l.residue(t, e.(opened).dir, id) },
		Paths:   func(e executor.Executor) []string { return []string{e.(opened).dir, "/dev/shm", "/run"} },
	})
}

func password() (executor.SecretFile, string) {
	canary := "canary-" + warden.NewID()
	return executor.SecretFile{Target: "password", Mode: 0o400, Data: sensitive.New([]byte(canary))}, canary
}

// TestSecretsLeaveNoTrace searches all that an engine keeps and shows of a container for its secret, while it runs and after its end:
// inspect, export, diff, the image's layers, its folders under the data root and the run directories, arguments and environments.
func TestSecretsLeaveNoTrace(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	file, canary := password()
	task := start(t, e, executor.Spec{Command: script("trap 'exit 0' TERM; test $(cat /run/secrets/password | wc -c) = 32 && echo ready; while :; do sleep 0.01; done"),
		Secrets: []executor.SecretFile{file}})
	if got := firstLine(t, task); got != "ready" {
		t.Fatalf("first line = %q", got)
	}
	info, err := l.cli.Info(t.Context(), client.InfoOptions{})
	if err != nil {
		t.Fatal(err)
	}
	root := info.Info.DockerRootDir
	id := l.inspect(t, task.ID()).ID
	held, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", l.inspect(t, task.ID()).State.Pid)) // until the end: the kernel gives its number to another at once
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	namespace, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", held.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"while it runs", "after its end"} {
		check := func(where string, b []byte, err error) {
			t.Helper()
			if err != nil {
				t.Errorf("%s: %s: %v", when, where, err)
			}
			if bytes.Contains(b, []byte(canary)) {
				t.Errorf("%s: the secret is in %s", when, where)
			}
		}
		raw, err := l.cli.ContainerInspect(t.Context(), id, client.ContainerInspectOptions{Size: true})
		check("inspect", raw.Raw, err)
		list, err := l.cli.ContainerDiff(t.Context(), id, client.ContainerDiffOptions{})
		check("diff", fmt.Append(nil, list.Changes), err)
		export, err := l.cli.ContainerExport(t.Context(), id, client.ContainerExportOptions{})
		if err != nil {
			t.Fatal(err)
		}
		exported, err := io.ReadAll(export)
		check("export", exported, errors.Join(err, export.Close()))
		if err := secretsEmpty(exported); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if _, err := l.cli.CopyFromContainer(t.Context(), id, client.CopyFromContainerOptions{SourcePath: "/run/secrets/password"}); !errdefs.IsNotFound(err) {
			t.Errorf("%s: docker cp of the secret = %v, want not found", when, err)
		}
		paths := []string{e.dir, "/run", "/dev/shm", filepath.Join(root, "containers", id), filepath.Join(root, "volumes"), filepath.Join(root, "network")}
		paths = append(paths, layers(t, root, id, raw.Container)...)
		files := 0
		for _, path := range paths {
			_ = filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					if b, err := os.ReadFile(path); err == nil {
						files++
						check(path, b, nil)
					}
				}
				return nil // gone meanwhile, or not a file
			})
		}
		if files < 20 {
			t.Errorf("%s: only %d files searched in %q", when, files, paths)
		}
		processes, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		environments, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, path := range append(processes, environments...) {
			if b, err := os.ReadFile(path); err == nil {
				check(path, b, nil)
			}
		}
		if err := task.Stop(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	threads, err := filepath.Glob("/proc/[0-9]*/task/*/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range threads { // the mount ends with the last of them
		if ns, err := os.Readlink(path); err == nil && ns == namespace {
			t.Errorf("%s holds the mount namespace of the task that has ended", path)
		}
	}
}

// layers returns the folders of a container's own layers, whatever the storage driver. The image's are below them.
func layers(t *testing.T, root, id string, c container.InspectResponse) (dirs []string) {
	t.Helper()
	mounts, err := filepath.Glob(filepath.Join(root, "image", "*", "layerdb", "mounts", id, "*-id"))
	if err != nil || len(mounts) == 0 {
		t.Fatalf("container %s has no layers under %s: %v", id, root, err)
	}
	for _, path := range mounts {
		layer, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found, err := filepath.Glob(filepath.Join(root, c.Driver, string(layer)))
		if err != nil || len(found) != 1 {
			t.Fatalf("layer %s = %q, %v", layer, found, err)
		}
		dirs = append(dirs, found...)
	}
	return dirs
}

// secretsEmpty wants nothing under run/secrets of an exported container.
func secretsEmpty(exported []byte) error {
	for r := tar.NewReader(bytes.NewReader(exported)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if strings.HasPrefix(h.Name, "run/secrets/") && h.Name != "run/secrets/" {
			return fmt.Errorf("export has %s", h.Name)
		}
	}
}

// TestContainerIsConfined holds what the engine is told of every container.
func TestContainerIsConfined(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	image := l.image(t, "HEALTHCHECK --interval=1s CMD /bin/true", "LABEL warden.task=stray")
	task := start(t, e, executor.Spec{Image: image, Command: []string{"sleep", "60"}, ServiceName: "web", Labels: map[string]string{"tier": "front", "warden.task": "stray"},
		LimitNanoCPUs: 250_000_000, LimitMemoryBytes: 64 << 20, StopGrace: 1500 * time.Millisecond})
	c := l.inspect(t, task.ID())
	h := c.HostConfig
	switch {
	case h.Privileged, h.PublishAllPorts, h.AutoRemove, len(h.CapAdd) > 0, len(h.Binds) > 0, len(h.PortBindings) > 0, h.PidMode != "", h.UTSMode != "", h.UsernsMode != "":
		t.Errorf("the container has rights: %+v", h)
	case !slices.Equal(h.CapDrop, []string{"ALL"}), !slices.Equal(h.SecurityOpt, []string{"no-new-privileges"}), !h.ReadonlyRootfs, h.RestartPolicy.Name != "no",
		h.IpcMode != "none", h.CgroupnsMode != "private", *h.PidsLimit != docker.PidsMax, *h.Init, h.LogConfig.Type != "local":
		t.Errorf("the container is not confined: %+v", h)
	case h.NanoCPUs != 250_000_000, h.Memory != 64<<20, h.MemorySwap != 64<<20, *c.Config.StopTimeout != 2:
		t.Errorf("limits = %d, %d, %d, %d s", h.NanoCPUs, h.Memory, h.MemorySwap, *c.Config.StopTimeout)
	case c.State.Health != nil && c.State.Health.Status != container.NoHealthcheck, c.Config.Labels["warden.service"] != "web", c.Config.Labels["tier"] != "front":
		t.Errorf("config = %+v, health %+v", c.Config, c.State.Health)
	case c.Name != "/warden-"+task.ID(), c.Config.Image != image:
		t.Errorf("name = %s, image %s", c.Name, c.Config.Image)
	}
	for pid, want := range map[string]string{fmt.Sprint(c.State.Pid): "0", child(t, c.State.Pid): "500"} { // whom the kernel takes first
		if b, err := os.ReadFile("/proc/" + pid + "/oom_score_adj"); err != nil || strings.TrimSpace(string(b)) != want {
			t.Errorf("oom_score_adj of %s = %q, %v, want %s", pid, b, err, want)
		}
	}
	for _, m := range c.Mounts {
		if m.RW {
			t.Errorf("the container can write to the host's %s", m.Source)
		}
	}
}

// hostIDs returns the uids and gids of a container's processes as the host sees them, of init and of the program.
func hostIDs(t *testing.T, pid int) (all []string) {
	t.Helper()
	for _, name := range []string{fmt.Sprint(pid), child(t, pid)} {
		b, err := os.ReadFile("/proc/" + name + "/status")
		if err != nil {
			t.Fatal(err)
		}
		ids := ""
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); f[0] == "Uid:" || f[0] == "Gid:" {
				ids += strings.Join(slices.Compact(f[1:]), ",") + " "
			}
		}
		all = append(all, strings.TrimSpace(ids))
	}
	return all
}

func child(t *testing.T, pid int) string {
	t.Helper()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err == nil && len(strings.Fields(string(children))) == 1 {
		return strings.Fields(string(children))[0]
	}
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range all {
		b, _ := os.ReadFile(path)
		if f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:])); len(f) > 1 && f[1] == fmt.Sprint(pid) {
			return filepath.Base(filepath.Dir(path))
		}
	}
	t.Fatalf("process %d has no child", pid)
	return ""
}

// TestUsers: a task runs as the user of its image, but never as uid 0 of the host; its secrets are that user's.
func TestUsers(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	seen := map[string]bool{}
	for _, c := range []struct{ user, want string }{
		{"", ""}, {"root", ""}, {"0", ""}, {"0:1235", ""}, {"1234:1235", "1234 1235"}, {"app", "1234 1235"}, {"4321", "4321 0"},
	} {
		image := l.base
		if c.user != "" {
			image = l.image(t, "USER "+c.user)
		}
		file, canary := password()
		task := start(t, e, executor.Spec{Image: image, Command: script("read -r s < /run/secrets/password; echo $s $HOME; exec sleep 60"), Secrets: []executor.SecretFile{file}})
		got, home, _ := strings.Cut(firstLine(t, task), " ")
		if got != canary {
			t.Errorf("USER %q: secret = %q", c.user, got)
		}
		ids := hostIDs(t, l.inspect(t, task.ID()).State.Pid)
		var uid, gid int
		if _, err := fmt.Sscan(ids[0], &uid, &gid); err != nil || ids[0] != ids[1] {
			t.Fatalf("USER %q: ids = %q, %v", c.user, ids, err)
		}
		if c.want == "" && (uid < 100_000 || uid != gid || seen[ids[0]] || home != "/tmp") || c.want != "" && ids[0] != c.want {
			t.Errorf("USER %q: ids = %q, home %q", c.user, ids, home)
		}
		seen[ids[0]] = true
	}
	for _, user := range []string{"toor", "nobody-knows-it"} { // the first is uid 0 by another name
		id := warden.NewID()
		_, err := e.Start(t.Context(), executor.Spec{TaskID: id, Image: l.image(t, "USER "+user), Command: []string{"sleep", "60"}})
		if warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "" {
			t.Errorf("Start(USER %s) = %v (hint: %s)", user, err, warden.HintOf(err))
		}
		if left := l.residue(t, e.dir, id); len(left) > 0 {
			t.Errorf("Start(USER %s) left %q", user, left)
		}
	}
}

// TestCommands: arguments take the place of the image's CMD and follow its ENTRYPOINT, as with docker run.
func TestCommands(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	const entrypoint, cmd = `ENTRYPOINT ["/bin/sh","-c","echo $0 $* $COLOUR $SIZE"]`, `CMD ["a","b c"]`
	for _, c := range []struct {
		lines, command []string
		want           string
	}{
		{[]string{entrypoint, cmd}, nil, "a b c blue 7"}, {[]string{entrypoint, cmd}, []string{"x"}, "x blue 7"}, {[]string{`CMD ["printf","of image"]`}, nil, "of image"},
		{[]string{`CMD ["printf","of image"]`}, []string{"printf", "of task"}, "of task"}, {[]string{"CMD printf shell"}, nil, "shell"},
	} {
		task := start(t, e, executor.Spec{Image: l.image(t, append(c.lines, "ENV COLOUR=red SIZE=7")...), Command: c.command, Env: []string{"COLOUR=blue"}})
		if exit := wait(t, task); exit.Code != 0 || strings.TrimSpace(logs(t, task)) != c.want {
			t.Errorf("%q with %q ended with %+v, log %q", c.lines, c.command, exit, logs(t, task))
		}
	}
}

// TestRefusals: what can never run is rejected, with a hint, and leaves nothing.
func TestRefusals(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	sleep := []string{"sleep", "60"}
	file, _ := password()
	for name, spec := range map[string]executor.Spec{
		"image host":         {Image: "host", Command: sleep},
		"no image":           {Image: "", Command: sleep},
		"path as image":      {Image: "../containers/x", Command: sleep},
		"query as image":     {Image: "a?b=c", Command: sleep},
		"neither command":    {Image: l.base},
		"link to secrets":    {Image: l.image(t, `RUN ["/usr/bin/perl","-e","mkdir('/elsewhere') && symlink('/elsewhere','/run') or die $!"]`), Command: sleep, Secrets: []executor.SecretFile{file}},
		"volume for secrets": {Image: l.image(t, "VOLUME /run/secrets"), Command: sleep},
	} {
		spec.TaskID = warden.NewID()
		_, err := e.Start(t.Context(), spec)
		if warden.CodeOf(err) != warden.CodeInvalid {
			t.Errorf("Start(%s) = %v, want code %s", name, err, warden.CodeInvalid)
		}
		if left := l.residue(t, e.dir, spec.TaskID); len(left) > 0 {
			t.Errorf("Start(%s) left %q", name, left)
		}
	}
	if _, err := docker.New(tasksDir(t), self, "tcp://127.0.0.1:2375", nil); warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("New(tcp) = %v", err)
	}
}

// TestFromScratch: an image that has nothing but a static program runs behind the real gate, which is static too.
func TestFromScratch(t *testing.T) {
	l := engineLab(t)
	program, err := os.ReadFile(filepath.Join(staticProgram(t), "program"))
	if err != nil {
		t.Fatal(err)
	}
	file, canary := password()
	task := start(t, l.realGate(t), executor.Spec{Image: l.build(t, "FROM scratch\nADD root.tar /\nENTRYPOINT [\"/program\"]\n", tarOf(t, "program", program)),
		Command: []string{"/run/secrets/password"}, Secrets: []executor.SecretFile{file}})
	if exit := wait(t, task); exit.Code != 7 || logs(t, task) != canary+"\n" {
		t.Errorf("ended with %+v, log %q", exit, logs(t, task))
	}
	// A gate that cannot run in the image is told of, and waited for no longer.
	dynamic := l.executor(t, tasksDir(t))
	if interp, err := exec.Command("ldd", "/proc/self/exe").Output(); err == nil && bytes.Contains(interp, []byte("=>")) {
		_, err := dynamic.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: l.image(t, "FROM scratch", "COPY Dockerfile /"), Command: []string{"x"}})
		if warden.CodeOf(err) != warden.CodeInternal || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("Start(gate that cannot run) = %v", err)
		}
	}
}

// staticProgram builds testdata/program and returns the folder that it is in.
func staticProgram(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-o", dir, "./testdata/program")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	return dir
}

// TestForeignProgram: a program whose every call the filter would answer with SIGSYS is refused with a reason.
func TestForeignProgram(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	spec := executor.Spec{TaskID: warden.NewID(), Image: l.build(t, "FROM "+l.base+"\nADD root.tar /\n", tarOf(t, "program", program32(t))), Command: []string{"/program"}}
	if _, err := e.Start(t.Context(), spec); warden.CodeOf(err) != warden.CodeInvalid || !strings.Contains(warden.HintOf(err), runtime.GOARCH) {
		t.Errorf("Start(32-bit program) = %v (hint: %s)", err, warden.HintOf(err))
	}
	if left := l.residue(t, e.dir, spec.TaskID); len(left) > 0 {
		t.Errorf("Start(32-bit program) left %q", left)
	}
}

// program32 returns a program that a machine of ours may run, but that would be killed by the filter: exit(0) of i386.
func program32(t *testing.T) []byte {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("the program is for i386")
	}
	const base, head = 0x8048000, 52 + 32
	code := []byte{0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80} // mov eax, 1; xor ebx, ebx; int 0x80
	size := uint32(head + len(code))
	h := elf.Header32{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_386), Version: 1, Entry: base + head, Phoff: 52, Ehsize: 52, Phentsize: 32, Phnum: 1}
	copy(h.Ident[:], elf.ELFMAG+"\x01\x01\x01") // 32 bits, little-endian, version 1
	p := elf.Prog32{Type: uint32(elf.PT_LOAD), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Flags: uint32(elf.PF_R | elf.PF_X), Align: 0x1000}
	var b bytes.Buffer
	if err := errors.Join(binary.Write(&b, binary.LittleEndian, h), binary.Write(&b, binary.LittleEndian, p), second(b.Write(code))); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func tarOf(t *testing.T, name string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))}), second(w.Write(data)), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestStopSignal: a task is asked to end by its image's STOPSIGNAL.
func TestStopSignal(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	for signal, code := range map[string]int{"SIGUSR1": 3, "12": 4, "SIGRTMIN+3": 5, "SIGTERM": 6} {
		task := start(t, e, executor.Spec{Image: l.image(t, "STOPSIGNAL "+signal), Command: []string{"/usr/bin/perl", "-e",
			"$SIG{USR1} = sub { exit 3 }; $SIG{USR2} = sub { exit 4 }; $SIG{NUM37} = sub { exit 5 }; $SIG{TERM} = sub { exit 6 }; $| = 1; print qq(ready\\n); select undef, undef, undef, 0.01 while 1"}})
		if got := firstLine(t, task); got != "ready" {
			t.Fatalf("first line = %q", got)
		}
		if err := task.Stop(t.Context(), 20*time.Second); err != nil {
			t.Fatal(err)
		}
		if exit := wait(t, task); exit.Code != code {
			t.Errorf("STOPSIGNAL %s: ended with %+v, want code %d", signal, exit, code)
		}
	}
}

// TestPausedByHand: a container that somebody froze is stopped all the same.
func TestPausedByHand(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	task := start(t, e, executor.Spec{Command: []string{"sleep", "60"}})
	if _, err := l.cli.ContainerPause(t.Context(), l.inspect(t, task.ID()).ID, client.ContainerPauseOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := task.Stop(t.Context(), 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code < 128 {
		t.Errorf("ended with %+v", exit)
	}
}

// TestRestartedByHand: a container that somebody starts again does not run, with or without its secrets, and its task has ended.
func TestRestartedByHand(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	for _, down := range []bool{false, true} { // the daemon, meanwhile
		file, canary := password()
		task := start(t, e, executor.Spec{Command: script("cat /run/secrets/password || echo naked; echo; exec sleep 60"), Secrets: []executor.SecretFile{file}})
		if got := firstLine(t, task); got != canary {
			t.Fatalf("first line = %q", got)
		}
		id, zero := l.inspect(t, task.ID()).ID, 0
		if _, err := l.cli.ContainerRestart(t.Context(), id, client.ContainerRestartOptions{Timeout: &zero}); err == nil {
			t.Error("the container could be started again")
		}
		if _, err := l.cli.ContainerStart(t.Context(), id, client.ContainerStartOptions{}); err == nil {
			t.Error("the container could be started again")
		}
		handle := task
		if down {
			tasks, err := l.executor(t, e.dir).Adopt(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			handle = tasks[slices.IndexFunc(tasks, func(a executor.Task) bool { return a.ID() == task.ID() })]
		}
		if exit := wait(t, handle); exit.Code == 0 {
			t.Errorf("ended with %+v", exit)
		}
		if l.inspect(t, task.ID()).State.Running || strings.Contains(logs(t, task), "naked") {
			t.Errorf("the container ran again: %q", logs(t, task))
		}
	}
}

// TestRestartedBehindTheSocket: even with a file in the place of the socket, so that the engine starts the container again, the gate
// lets nothing run, and the next daemon does not take it for its task.
func TestRestartedBehindTheSocket(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	file, canary := password()
	task := start(t, e, executor.Spec{Command: script("cat /run/secrets/password || echo naked; echo; exec sleep 60"), Secrets: []executor.SecretFile{file}})
	if got := firstLine(t, task); got != canary {
		t.Fatalf("first line = %q", got)
	}
	if err := os.WriteFile(filepath.Join(e.dir, task.ID(), "gate.sock"), nil, 0o666); err != nil {
		t.Fatal(err)
	}
	id, zero := l.inspect(t, task.ID()).ID, 0
	if _, err := l.cli.ContainerRestart(t.Context(), id, client.ContainerRestartOptions{Timeout: &zero}); err != nil {
		t.Fatal(err)
	}
	await(t, limit, func() error {
		if l.inspect(t, task.ID()).State.Running {
			return errors.New("the container runs")
		}
		return nil
	})
	if exit := wait(t, task); exit.Code == 0 {
		t.Errorf("ended with %+v", exit)
	}
	if said := logs(t, task); strings.Contains(said, "naked") || !strings.Contains(said, "started once") {
		t.Errorf("log = %q", said)
	}
	tasks, err := l.executor(t, e.dir).Adopt(t.Context())
	if err != nil || len(tasks) != 1 {
		t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	if exit := wait(t, tasks[0]); exit.Code == 0 {
		t.Errorf("adopted task ended with %+v", exit)
	}
}

// TestRemovedByHand: a task whose container somebody removed has ended, and says why.
func TestRemovedByHand(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	task := start(t, e, executor.Spec{Command: []string{"sleep", "60"}})
	if _, err := l.cli.ContainerRemove(t.Context(), l.inspect(t, task.ID()).ID, client.ContainerRemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, task); exit.Code == 0 {
		t.Errorf("ended with %+v", exit)
	}
	tasks, err := l.executor(t, e.dir).Adopt(t.Context())
	if err != nil || len(tasks) != 1 {
		t.Fatalf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	if out := logs(t, tasks[0]); out != "" {
		t.Errorf("Logs() = %q", out)
	}
}

// TestVolumesGo: the anonymous volumes of an image go with its task.
func TestVolumesGo(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	image := l.image(t, "VOLUME /data")
	task, err := e.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: image, Command: []string{"sleep", "60"}})
	if err != nil {
		t.Fatal(err)
	}
	var volumes []string
	for _, m := range l.inspect(t, task.ID()).Mounts {
		if m.Name != "" {
			volumes = append(volumes, m.Name)
		}
	}
	if err := task.Remove(t.Context()); err != nil || len(volumes) != 1 {
		t.Fatalf("Remove() = %v, volumes %q", err, volumes)
	}
	if _, err := l.cli.VolumeInspect(t.Context(), volumes[0], client.VolumeInspectOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("volume %s is still there: %v", volumes[0], err)
	}
}

// TestTwoDaemons: daemons with folders of their own on one engine leave each other's containers alone.
func TestTwoDaemons(t *testing.T) {
	l := engineLab(t)
	one, other := l.executor(t, tasksDir(t)), l.executor(t, tasksDir(t))
	task := start(t, one, executor.Spec{Command: []string{"sleep", "60"}})
	if tasks, err := other.Adopt(t.Context()); err != nil || len(tasks) != 0 {
		t.Errorf("Adopt() of another daemon = %d tasks, %v", len(tasks), err)
	}
	if !l.inspect(t, task.ID()).State.Running {
		t.Error("another daemon ended the task")
	}
}

// TestStrayContainer: a container of this folder that has no record is removed.
func TestStrayContainer(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	task := start(t, e, executor.Spec{Command: []string{"sleep", "60"}})
	if err := os.RemoveAll(filepath.Join(e.dir, task.ID())); err != nil {
		t.Fatal(err)
	}
	if tasks, err := l.executor(t, e.dir).Adopt(t.Context()); err != nil || len(tasks) != 0 {
		t.Errorf("Adopt() = %d tasks, %v", len(tasks), err)
	}
	await(t, limit, func() error { // an engine that takes its time is asked again later
		if left := l.residue(t, e.dir, task.ID()); len(left) > 0 {
			return fmt.Errorf("Adopt() left %q", left)
		}
		return nil
	})
	if exit := wait(t, task); exit.Code == 0 {
		t.Errorf("ended with %+v", exit)
	}
}

// TestLogsOfBytes: output that is no text comes as it is.
func TestLogsOfBytes(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	task := start(t, e, executor.Spec{Command: script(`printf '\377\376\r\001\n\n' >&2`)})
	wait(t, task)
	if got := logs(t, task); got != "\xff\xfe\r\x01\n\n" {
		t.Errorf("Logs() = %q", got)
	}
}

// realGate opens an executor whose gates are the real program.
func (l *lab) realGate(t testing.TB) opened {
	t.Helper()
	dir := tasksDir(t)
	e, err := docker.New(dir, filepath.Join(testcluster.Bin(t), "warden"), l.host, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("New() = %v", err)
	}
	return opened{e, l, dir}
}

// TestSecretsReplaced: new secrets take the place of the old ones in a running task, as they came.
func TestSecretsReplaced(t *testing.T) {
	l := engineLab(t)
	e := l.executor(t, tasksDir(t))
	old, first := password()
	task := start(t, e, executor.Spec{Command: script("trap 'cat /run/secrets/password; echo; grep -c /run/secrets /proc/mounts; exit' TERM; cat /run/secrets/password; echo; while :; do sleep 0.01; done"),
		Secrets: []executor.SecretFile{old}})
	if got := firstLine(t, task); got != first {
		t.Fatalf("first line = %q", got)
	}
	next, second := password()
	if err := docker.Inject(task, []executor.SecretFile{next}); err != nil {
		t.Fatal(err)
	}
	if err := task.Stop(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := logs(t, task); got != first+"\n"+second+"\n1\n" {
		t.Errorf("log = %q", got)
	}
}

// BenchmarkStart: from Start to its return with the program running, a secret in place. The engine takes nearly all of it.
func BenchmarkStart(b *testing.B) {
	l := engineLab(b)
	e := l.realGate(b)
	file, _ := password()
	for b.Loop() {
		task, err := e.Start(b.Context(), executor.Spec{TaskID: warden.NewID(), Image: l.base, Command: []string{"/bin/sleep", "60"}, Secrets: []executor.SecretFile{file}})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := task.Remove(context.Background()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkSecretIntoContainer: one secret of 32 bytes into the mount namespace of a container that runs.
func BenchmarkSecretIntoContainer(b *testing.B) {
	l := engineLab(b)
	e := l.executor(b, tasksDir(b))
	file, _ := password()
	task := start(b, e, executor.Spec{Command: []string{"sleep", "600"}, Secrets: []executor.SecretFile{file}})
	for b.Loop() {
		if err := docker.Inject(task, []executor.SecretFile{file}); err != nil {
			b.Fatal(err)
		}
	}
}
