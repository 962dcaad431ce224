package conformance

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor"
	"warden/internal/sensitive"
)

func testLogs(t *testing.T, s suite) {
	long := warden.LogLineMax + 10
	task := s.start(t, s.spec(fmt.Sprintf("echo one; echo; echo two >&2; printf 'a\\000b\\n'; head -c %d /dev/zero | tr '\\0' x; echo; printf tail", long)))
	wait(t, task)
	stdout, stderr := output(t, task)
	want := "one\n\na\x00b\n" + strings.Repeat("x", warden.LogLineMax) + "\n" + strings.Repeat("x", 10) + "\ntail\n"
	if stdout != want || stderr != "two\n" {
		t.Errorf("Logs() = %q, %q", stdout, stderr)
	}
	for tail, want := range map[int64]string{0: "", 1: "tail", 2: "xxxxxxxxxx tail"} {
		var got []string
		err := task.Logs(t.Context(), executor.LogOptions{Tail: tail}, func(l executor.Line) error {
			got = append(got, string(l.Data))
			return nil
		})
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("Logs(Tail: %d) = %q, %v", tail, got, err)
		}
	}
	if err := task.Logs(t.Context(), executor.LogOptions{Tail: warden.TailLogMax + 1}, nil); warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("Logs(Tail over the bound) = %v", err)
	}
	if err := task.Logs(t.Context(), executor.LogOptions{Tail: -1}, func(executor.Line) error { return io.ErrClosedPipe }); err != io.ErrClosedPipe {
		t.Errorf("Logs(f fails) = %v", err)
	}
}

func testLogsFollow(t *testing.T, s suite) {
	task := s.start(t, s.spec("trap 'echo three; exit' TERM; echo one; echo two; while :; do sleep 0.01; done"))
	line, end := follow(t, task, -1)
	if a, b := line(), line(); a != "one" || b != "two" {
		t.Errorf("Logs(Follow) = %q, %q", a, b)
	}
	last, lastEnd := follow(t, task, 1)
	if got := last(); got != "two" {
		t.Errorf("Logs(Follow, Tail: 1) = %q", got)
	}
	if err := task.Stop(t.Context(), warden.StopGraceDefault); err != nil {
		t.Fatal(err)
	}
	for _, next := range []func() string{line, last} {
		if got := next(); got != "three" {
			t.Errorf("Logs(Follow) after Stop = %q", got)
		}
		if got := next(); got != "" {
			t.Errorf("Logs(Follow) after the end = %q", got)
		}
	}
	for _, end := range []func() error{end, lastEnd} {
		if err := end(); err != nil {
			t.Errorf("Logs(Follow) = %v", err)
		}
	}

	ticks := s.start(t, s.spec("echo one; while sleep 0.05; do echo tick; done"))
	if before, _ := follow(t, ticks, 1); before() == "" {
		t.Error("Logs(Follow, Tail: 1) ended")
	}
	if now, _ := follow(t, ticks, 0); now() != "tick" {
		t.Error("Logs(Follow, Tail: 0) begins with what was there before")
	}
	if err := ticks.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
}

// testLogsBounded: of more output than is kept the newest stays, without a gap.
func testLogsBounded(t *testing.T, s suite) {
	const lines, width = 16_000, 1000 // 16 MB
	task := s.start(t, s.spec(fmt.Sprintf("seq -f '%%0%d.0f' %d", width, lines)))
	wait(t, task)
	var first, last, size int
	err := task.Logs(t.Context(), executor.LogOptions{Tail: -1}, func(l executor.Line) error {
		n, err := strconv.Atoi(strings.TrimLeft(string(l.Data), "0"))
		if err != nil || first != 0 && n != last+1 {
			return fmt.Errorf("line %d follows %d", n, last)
		}
		if first == 0 {
			first = n
		}
		last, size = n, size+len(l.Data)
		return nil
	})
	if err != nil || last != lines || size > warden.TaskLogMax || size < warden.TaskLogMax/3 {
		t.Errorf("Logs() = lines %d to %d, %d bytes, %v", first, last, size, err)
	}
}

func testSecrets(t *testing.T, s suite) {
	file, canary := secret("password")
	spec := s.spec("")
	spec.Command, spec.Secrets = []string{"/bin/cat", "/run/secrets/password"}, []executor.SecretFile{file} // the first thing the program does
	task := s.start(t, spec)
	wait(t, task)
	if out, errs := output(t, task); out != canary+"\n" {
		t.Errorf("secret = %q, %q", out, errs)
	}

	empty := executor.SecretFile{Target: "empty", Mode: 0o444, Data: sensitive.New(nil)}
	big := executor.SecretFile{Target: "big.key", Mode: 0o440, Data: sensitive.New(bytes.Repeat([]byte("b"), warden.SecretBytesMax))}
	file, canary = secret("password")
	got := s.sh(t, `set -e; cd /run/secrets; cat password; echo; stat -c '%n %a %s' *; grep ' /run/secrets ' /proc/mounts | cut -d' ' -f3,4
		test -r password; test $(stat -c %u password) = $(id -u); test $(stat -c %g password) = $(id -g)
		! touch new; ! rm -f password; ! chmod 600 password; ! sh -c 'echo x > password'; ! cp /bin/true x`, file, empty, big)
	want := fmt.Sprintf("%s\nbig.key 440 %d\nempty 444 0\npassword 400 %d\n", canary, warden.SecretBytesMax, len(canary))
	if rest, ok := strings.CutPrefix(got, want); !ok {
		t.Errorf("secrets = %q, want %q first", got, want)
	} else {
		for _, option := range []string{"tmpfs ", "ro", "nosuid", "nodev", "noexec", "size=", "nr_inodes="} {
			if !strings.Contains(rest, option) {
				t.Errorf("mount of secrets %q lacks %q", rest, option)
			}
		}
	}
	if s.IDs {
		file, _ = secret("other")
		file.UID, file.GID, file.Mode = 1000, 1001, 0o440
		got := s.sh(t, `stat -c '%u %g %a' /run/secrets/other; ! cat /run/secrets/other`, file)
		if got != "1000 1001 440\n" {
			t.Errorf("secret of another uid = %q", got)
		}
		file, _ = secret("nobody")
		file.UID = 1 << 16
		spec := s.spec("true")
		spec.Secrets = []executor.SecretFile{file}
		if _, err := s.e.Start(t.Context(), spec); warden.CodeOf(err) != warden.CodeInvalid {
			t.Errorf("Start(uid out of range) = %v", err)
		}
	}
	if out := s.sh(t, "ls -A /run/secrets 2>/dev/null || true"); out != "" {
		t.Errorf("without secrets /run/secrets has %q", out)
	}
}

// testSecretsNowhereElse searches the host for a canary while its task runs, and when it has ended (I7, I10).
func testSecretsNowhereElse(t *testing.T, s suite) {
	file, canary := secret("password")
	spec := s.spec("trap 'exit 0' TERM; cat /run/secrets/password > /dev/null && echo ready; while :; do sleep 0.01; done")
	spec.Secrets = []executor.SecretFile{file}
	mountsBefore := hostMounts(t)
	task := s.start(t, spec)
	line, _ := follow(t, task, -1)
	if got := line(); got != "ready" {
		t.Fatalf("first line = %q", got)
	}
	for _, when := range []string{"while it runs", "after its end"} {
		for _, path := range s.Paths(s.e) {
			search(t, path, canary, when)
		}
		for _, name := range []string{"environ", "cmdline"} {
			all, _ := filepath.Glob("/proc/[0-9]*/" + name)
			for _, path := range all {
				if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(canary)) {
					t.Errorf("%s: the secret is in %s", when, path)
				}
			}
		}
		for line, at := range hostMounts(t) {
			if _, before := mountsBefore[line]; !before { // of this task, or of whoever else mounts on this machine: its content says
				search(t, at, canary, when)
				if strings.Contains(line, task.ID()) || strings.Contains(line, " /run/secrets ") {
					t.Errorf("%s: the host has a new mount: %s", when, line)
				}
			}
		}
		if err := task.Stop(t.Context(), warden.StopGraceDefault); err != nil {
			t.Fatal(err)
		}
	}
}

// hostMounts returns the mounts of this process's namespace of the kind that secrets are on, and where each is.
func hostMounts(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	tmpfs := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, " - tmpfs ") {
			tmpfs[line] = strings.Fields(line)[4] // proc_pid_mountinfo(5)
		}
	}
	return tmpfs
}

func search(t *testing.T, root, canary, when string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // gone meanwhile, or not a file
		}
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b, []byte(canary)) {
			t.Errorf("%s: the secret is in %s", when, path)
		}
		return nil
	})
	if err != nil {
		t.Errorf("searching %s: %v", root, err)
	}
}

// testSecretsOfOthers: a task does not see the secrets of one that runs beside it.
func testSecretsOfOthers(t *testing.T, s suite) {
	file, canary := secret("password")
	spec := s.spec("sleep 60")
	spec.Secrets = []executor.SecretFile{file}
	s.start(t, spec)
	got := s.sh(t, "cat /run/secrets/* /proc/[0-9]*/root/run/secrets/* /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'; cat /proc/mounts")
	if strings.Contains(got, canary) || strings.Contains(got, "/run/secrets") {
		t.Errorf("another task's secrets are seen: %q", got)
	}
}

func testIsolation(t *testing.T, s suite) {
	hidden := filepath.Join(t.TempDir(), "host-file")
	if err := os.WriteFile(hidden, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.sh(t, fmt.Sprintf(`hostfiles=%t; fail() { echo "$*" >&2; bad=1; }
		status() { grep "^$1:" /proc/self/status | tr -d ' \t' | cut -d: -f2; }
		for c in CapInh CapPrm CapEff CapBnd CapAmb; do test "$(status $c)" = 0000000000000000 || fail "$c $(status $c)"; done
		test "$(status NoNewPrivs)" = 1 || fail no_new_privs
		test "$(status Seccomp)" = 2 || fail seccomp
		test -z "$(status Groups)" || test "$(status Groups)" = $(id -g) || fail "groups $(status Groups)"
		test $(ls -d /proc/[0-9]* | wc -l) -le 5 || fail "sees processes $(ls -d /proc/[0-9]*)"
		test -e %s && fail 'sees a file of the host'
		for d in /root /home /var /sys /boot /mnt; do $hostfiles && ls $d >/dev/null 2>&1 && fail "sees $d"; done
		for f in /etc/shadow /etc/shadow- /etc/gshadow /proc/kcore /proc/1/environ /proc/1/mem /proc/1/root/etc /proc/1/fd; do
			cat $f >/dev/null 2>&1 && fail "reads $f"; ls $f/ >/dev/null 2>&1 && fail "lists $f"; done
		test -z "$(find /etc/ssh /etc/ssl/private -mindepth 1 2>/dev/null)" || fail 'sees ssh or ssl/private'
		for f in / /usr /bin/ /etc /dev /proc/sys/kernel/hostname /proc/sysrq-trigger; do
			( touch $f/x || echo x > $f ) 2>/dev/null && fail "writes $f"; done
		mount -t tmpfs x /tmp 2>/dev/null && fail mounts
		umount /etc/shadow 2>/dev/null && fail unmounts
		mount -o remount,rw / 2>/dev/null && fail remounts
		mknod /tmp/null c 1 3 2>/dev/null && fail 'makes a device'
		unshare -r true 2>/dev/null && fail 'makes a user namespace'
		unshare -m true 2>/dev/null && fail 'makes a mount namespace'
		hostname x 2>/dev/null && fail 'names the host'
		kill -KILL 1 2>/dev/null; kill -STOP 1 2>/dev/null
		cp /bin/true /dev/shm/x 2>/dev/null; /dev/shm/x 2>/dev/null && fail 'runs a file of /dev/shm'
		head -c 1 /dev/urandom >/dev/null && echo x > /dev/null && echo x > /tmp/x || fail devices
		grep -v ' \(/dev/[a-z]*\) ' /proc/mounts | grep -v '[ ,]nosuid' && $hostfiles && fail 'a mount is suid'
		test -z "$bad"`, !s.OwnFiles, hidden))
}

// testSystemCalls tries calls that the filter must refuse although a process without capabilities could make them.
func testSystemCalls(t *testing.T, s suite) {
	if _, err := os.Stat("/usr/bin/perl"); err != nil {
		t.Skip("no perl on this host")
	}
	script := "use Errno; my $bad = 0; sub call { my ($name, $want, @args) = @_; $! = 0; my $r = syscall($args[0], @args[1..$#args]);" +
		" my $e = $r == -1 ? $!+0 : 0; if ($e != $want) { print \"$name: $e, want $want\\n\"; $bad = 1 } }\n"
	for _, c := range []struct {
		name string
		want unix.Errno
		args []int
	}{
		{"unshare", unix.EPERM, []int{unix.SYS_UNSHARE, unix.CLONE_NEWUSER}},
		{"clone with namespaces", unix.EPERM, []int{unix.SYS_CLONE, unix.CLONE_NEWUSER | int(unix.SIGCHLD), 0, 0, 0, 0}},
		{"clone3", unix.ENOSYS, []int{unix.SYS_CLONE3, 0, 0}},
		{"ptrace", unix.EPERM, []int{unix.SYS_PTRACE, unix.PTRACE_TRACEME, 0, 0, 0}},
		{"keyctl", unix.EPERM, []int{unix.SYS_KEYCTL, 0, -3, 0, 0, 0}},
		{"add_key", unix.EPERM, []int{unix.SYS_ADD_KEY, 0, 0, 0, 0, 0}},
		{"bpf", unix.EPERM, []int{unix.SYS_BPF, 0, 0, 0}},
		{"io_uring_setup", unix.EPERM, []int{unix.SYS_IO_URING_SETUP, 1, 0}},
		{"userfaultfd", unix.EPERM, []int{unix.SYS_USERFAULTFD, 1}},
		{"perf_event_open", unix.EPERM, []int{unix.SYS_PERF_EVENT_OPEN, 0, 0, 0, 0, 0}},
		{"process_vm_readv", unix.EPERM, []int{unix.SYS_PROCESS_VM_READV, 1, 0, 0, 0, 0, 0}},
		{"open_by_handle_at", unix.EPERM, []int{unix.SYS_OPEN_BY_HANDLE_AT, 0, 0, 0}},
		{"fsopen", unix.EPERM, []int{unix.SYS_FSOPEN, 0, 0}},
		{"socket AF_ALG", unix.EPERM, []int{unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET, 0}},
		{"socket AF_VSOCK", unix.EPERM, []int{unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0}},
		{"ioctl TIOCSTI", unix.EPERM, []int{unix.SYS_IOCTL, 0, unix.TIOCSTI, 0}},
		{"a call of the future", unix.ENOSYS, []int{900}},
		{"socket AF_INET", 0, []int{unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0}},
		{"getpid", 0, []int{unix.SYS_GETPID}},
	} {
		script += fmt.Sprintf("call('%s', %d, %s);\n", c.name, int(c.want), strings.Trim(strings.Join(strings.Fields(fmt.Sprint(c.args)), ","), "[]"))
	}
	spec := s.spec("")
	spec.Command = []string{"/usr/bin/perl", "-e", script + "exit $bad;"}
	task := s.start(t, spec)
	if exit := wait(t, task); exit.Code != 0 {
		out, errs := output(t, task)
		t.Errorf("ended with %+v\n%s%s", exit, out, errs)
	}
	if unix.SYS_GETPID != 39 {
		return // x32 exists beside amd64 only
	}
	spec = s.spec("")
	spec.Command = []string{"/usr/bin/perl", "-e", "syscall(0x40000000 | 39); exit 0"}
	if exit := wait(t, s.start(t, spec)); exit.Signal != "SIGSYS" {
		t.Errorf("a call of the x32 architecture ended with %+v, want SIGSYS", exit)
	}
}

func testMemoryLimit(t *testing.T, s suite) {
	if !s.Memory {
		t.Skip("no writable memory cgroup on this machine")
	}
	spec := s.spec("")
	spec.Command = []string{"/usr/bin/perl", "-e", "my $x = 'x' x (256 << 20); print 'survived'"}
	spec.LimitMemoryBytes = 64 << 20
	task := s.start(t, spec)
	if exit := wait(t, task); exit.Signal != "SIGKILL" || !exit.OutOfMemory {
		t.Errorf("a task over its memory limit ended with %+v", exit)
	}
	spec = s.spec("perl -e 'my $x = \"x\" x (256 << 20)'; echo $?; exit 3") // a child alone is killed
	spec.LimitMemoryBytes = 64 << 20
	task = s.start(t, spec)
	exit := wait(t, task)
	if out, _ := output(t, task); exit.Code != 3 || !exit.OutOfMemory || out != "137\n" {
		t.Errorf("a task whose child was over the memory limit ended with %+v, output %q", exit, out)
	}
	spec = s.spec("dd if=/dev/zero of=/tmp/x bs=1M count=200 2>/dev/null; exit 0") // tmpfs counts too
	spec.LimitMemoryBytes = 64 << 20
	if exit := wait(t, s.start(t, spec)); !exit.OutOfMemory {
		t.Errorf("a task that filled /tmp over its memory limit ended with %+v", exit)
	}
}

func testPidsLimit(t *testing.T, s suite) {
	if s.Pids == 0 {
		t.Skip("no writable pids cgroup on this machine")
	}
	spec := s.spec("")
	spec.Command = []string{"/usr/bin/perl", "-e",
		"my $n = 0; while ($n < 2000) { my $p = fork; last unless defined $p; if (!$p) { sleep 60; exit } $n++ } print \"$n\\n\"; exit 0"}
	task := s.start(t, spec)
	wait(t, task)
	out, _ := output(t, task)
	if n, err := strconv.Atoi(strings.TrimSpace(out)); err != nil || n < s.Pids/2 || n > s.Pids {
		t.Errorf("a task started %q processes, want at most %d", out, s.Pids)
	}
}
