package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tried counts what was tried; reached what worked, and should not.
var tried, reached int

// try says where something works that must not.
func try(what string, err error) {
	tried++
	if err == nil {
		reached++
		fmt.Println("REACHED", what)
	}
}

// read tries to read a file, and says what is in it.
func read(path string) {
	f, err := os.Open(path)
	if err != nil {
		try(path, err)
		return
	}
	defer f.Close()
	b := make([]byte, 4096)
	n, err := f.Read(b)
	if n == 0 && err == nil {
		err = io.EOF
	}
	if err == io.EOF { // opened, and empty: /dev/null over it, say
		err = errors.New("empty")
	}
	try(fmt.Sprintf("%s: %.80q", path, b[:n]), err)
}

func write(path, what string) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = io.WriteString(f, what)
		f.Close()
	}
	try("writes "+path, err)
}

func list(path string) {
	entries, err := os.ReadDir(path)
	if err == nil && len(entries) == 0 {
		err = errors.New("empty")
	}
	try("lists "+path, err)
}

func call(number uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

// process tries all that one process can do to another.
func process(pid int) {
	p := func(name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }
	for _, name := range []string{"environ", "mem", "maps", "smaps", "pagemap", "auxv", "io", "stack", "syscall", "personality", "mountstats", "clear_refs", "timers"} {
		if name == "mem" {
			f, err := os.OpenFile(p(name), os.O_RDWR, 0)
			try(p(name), err)
			f.Close()
			continue
		}
		read(p(name))
	}
	for _, name := range []string{"fd", "fdinfo", "map_files", "root/", "cwd/", "root/run/secrets"} {
		list(p(name))
	}
	for _, name := range []string{"exe", "cwd", "root", "ns/mnt", "ns/user", "ns/pid"} {
		_, err := os.Readlink(p(name))
		try("reads the link "+p(name), err)
	}
	for fd := range 16 {
		read(p(fmt.Sprint("fd/", fd)))
	}
	for _, name := range []string{"oom_score_adj", "coredump_filter", "clear_refs", "uid_map", "setgroups", "comm", "timerslack_ns"} {
		write(p(name), "0")
	}
	for _, s := range []unix.Signal{0, unix.SIGCONT, unix.SIGUSR1, unix.SIGTERM, unix.SIGKILL, unix.SIGSTOP} {
		try(fmt.Sprintf("signal %d to %d", s, pid), unix.Kill(pid, s))
	}
	for name, err := range map[string]error{
		"ptrace (attach)":   call(unix.SYS_PTRACE, unix.PTRACE_ATTACH, uintptr(pid)),
		"ptrace (seize)":    call(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid)),
		"prlimit":           call(unix.SYS_PRLIMIT64, uintptr(pid), unix.RLIMIT_CORE, uintptr(unsafe.Pointer(&unix.Rlimit{})), 0),
		"setpriority":       call(unix.SYS_SETPRIORITY, unix.PRIO_PROCESS, uintptr(pid), 19),
		"sched_setaffinity": call(unix.SYS_SCHED_SETAFFINITY, uintptr(pid), 8, uintptr(unsafe.Pointer(&[1]uint64{1}))),
		"move_pages":        call(unix.SYS_MOVE_PAGES, uintptr(pid), 0, 0, 0, 0, 0),
		"kcmp":              call(unix.SYS_KCMP, uintptr(pid), uintptr(os.Getpid()), 0, 0, 0),
		"perf_event_open":   call(unix.SYS_PERF_EVENT_OPEN, uintptr(unsafe.Pointer(&unix.PerfEventAttr{Type: 1, Size: 112})), uintptr(pid), ^uintptr(0), ^uintptr(0), 0),
	} {
		try(fmt.Sprintf("%s of %d", name, pid), err)
	}
	buf := make([]byte, 64)
	_, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &buf[0], Len: 64}}, []unix.RemoteIovec{{Base: 0xc000000000, Len: 64}}, 0)
	try(fmt.Sprintf("process_vm_readv of %d", pid), err)
	if fd, err := unix.PidfdOpen(pid, 0); err == nil { // a pidfd alone gives nothing
		try(fmt.Sprintf("pidfd_send_signal to %d", pid), unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0))
		for n := range 16 {
			_, err := unix.PidfdGetfd(fd, n, 0)
			try(fmt.Sprintf("pidfd_getfd %d of %d", n, pid), err)
		}
		for _, ns := range []int{unix.CLONE_NEWNS, unix.CLONE_NEWUSER, unix.CLONE_NEWPID} {
			try(fmt.Sprintf("setns %x of %d", ns, pid), unix.Setns(fd, ns))
		}
		unix.Close(fd)
	}
}

// connect tries a Unix socket: a connection is enough.
func connect(path string) {
	c, err := net.DialTimeout("unix", path, 2*time.Second)
	try("connects to "+path, err)
	if err == nil {
		c.Close()
	}
}

// walk tries all files below a directory, as far as it is let.
func walk(root string) {
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			tried++
			return nil
		case d.IsDir():
			return nil
		case d.Type() == fs.ModeSocket:
			connect(path)
		default:
			read(path)
		}
		write(path, "x")
		return nil
	})
	try("makes a file in "+root, os.WriteFile(filepath.Join(root, "planted"), nil, 0o600))
	try("renames "+root, os.Rename(root, root+".gone"))
}

// user is a local user who is not root. His arguments are what he is after: files, directories, sockets, process IDs, cgroups.
func user(args []string) {
	fmt.Printf("I am uid %d of groups %v\n", os.Getuid(), groups())
	for _, arg := range args {
		if pid, err := strconv.Atoi(arg); err == nil {
			process(pid)
			continue
		}
		info, err := os.Stat(arg)
		if strings.Contains(arg, "cgroup") { // may be looked at, not changed
			for _, name := range []string{"cgroup.procs", "tasks", "memory.limit_in_bytes", "memory.max", "pids.max", "freezer.state", "cgroup.kill", "cgroup.freeze"} {
				write(filepath.Join(arg, name), strconv.Itoa(os.Getpid()))
			}
			try("makes a cgroup in "+arg, os.Mkdir(filepath.Join(arg, "planted"), 0o700))
			continue
		}
		switch {
		case err != nil: // a directory above is shut
			read(arg)
			list(arg)
			connect(arg)
		case info.Mode().Type() == fs.ModeSocket:
			connect(arg)
			try("removes "+arg, os.Remove(arg))
		default:
			list(arg)
			walk(arg)
		}
	}
	abstract()
	fmt.Printf("tried %d, reached %d\n", tried, reached)
}

func groups() []int { g, _ := os.Getgroups(); return g }

// abstract tries the abstract sockets of this network namespace that have our name in theirs: there should be none.
func abstract() {
	b, _ := os.ReadFile("/proc/net/unix")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 7 && strings.HasPrefix(f[7], "@") && strings.Contains(f[7], "warden") {
			connect(f[7])
		}
	}
}

// Where a victim leaves what an attacker looks for.
const (
	shmKey  = 0x77617264
	shmFile = "/dev/shm/victims"
	tmpFile = "/tmp/victims"
)

// victim is a task that keeps its secrets in every place that others might look at: its memory, shared memory of all sorts, files. It
// waits for its end.
func victim() {
	var all []byte
	entries, _ := os.ReadDir("/run/secrets")
	for _, e := range entries {
		b, _ := os.ReadFile("/run/secrets/" + e.Name())
		all = append(all, b...)
	}
	os.WriteFile(shmFile, all, 0o666)
	os.WriteFile(tmpFile, all, 0o666)
	id, err := unix.SysvShmGet(shmKey, 4096, unix.IPC_CREAT|0o666)
	if err == nil {
		var mem []byte
		if mem, err = unix.SysvShmAttach(id, 0, 0); err == nil {
			copy(mem, all)
		}
	}
	fmt.Printf("victim: %d bytes of secrets, shared memory: %v\n", len(all), err)
	for {
		time.Sleep(time.Hour)
	}
}

// task is a task that tries to reach what others on its node have. Its arguments are process IDs of the host: its node's daemon, and its victim's.
func task(args []string) {
	if b, err := os.ReadFile("/run/secrets/own"); err == nil {
		fmt.Printf("I have a secret of my own of %d bytes\n", len(b))
	}
	entries, _ := os.ReadDir("/run/secrets")
	for _, e := range entries {
		if e.Name() != "own" {
			read("/run/secrets/" + e.Name())
		}
	}
	// Processes: by what /proc shows, and by the host's numbers, which may be its own in its namespace.
	seen := map[int]bool{os.Getpid(): true, os.Getppid(): true}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(d))
		if !seen[pid] && pid != 1 {
			try(fmt.Sprintf("sees process %d", pid), nil)
			process(pid)
		}
		seen[pid] = true
	}
	for _, arg := range args {
		if pid, err := strconv.Atoi(arg); err == nil && !seen[pid] {
			process(pid)
		}
	}
	for _, name := range []string{"environ", "mem", "maps", "root/", "fd/0", "fd/3", "cwd/"} { // of its init, which made the mounts
		read("/proc/1/" + name)
	}
	_, err := unix.ProcessVMReadv(1, []unix.Iovec{{Base: new(byte), Len: 1}}, []unix.RemoteIovec{{Base: 0xc000000000, Len: 1}}, 0)
	try("process_vm_readv of its init", err)
	try("ptrace of its init", call(unix.SYS_PTRACE, unix.PTRACE_ATTACH, 1))
	// Memory and files that a victim shares with whoever is let.
	_, err = unix.SysvShmGet(shmKey, 4096, 0o666)
	try("shared memory of a victim", err)
	read(shmFile)
	read(tmpFile)
	// Mounts.
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && (strings.Contains(f[3], "warden") || strings.Contains(f[4], "warden") || strings.Contains(line, "/docker/containers")) && !strings.Contains(line, "/.warden") && strings.Contains(f[3], "secret") {
			try("sees the mount "+strings.TrimSpace(line), nil)
		}
	}
	name := func(s string) uintptr { b := append([]byte(s), 0); return uintptr(unsafe.Pointer(&b[0])) }
	for what, err := range map[string]error{
		"mount proc":         unix.Mount("proc", "/tmp", "proc", 0, ""),
		"mount tmpfs":        unix.Mount("x", "/tmp", "tmpfs", 0, ""),
		"mount cgroup":       unix.Mount("x", "/tmp", "cgroup2", 0, ""),
		"bind /":             unix.Mount("/", "/tmp", "", unix.MS_BIND|unix.MS_REC, ""),
		"remount /":          unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, ""),
		"umount secrets":     unix.Unmount("/run/secrets", unix.MNT_DETACH),
		"chroot":             unix.Chroot("/tmp"),
		"pivot_root":         unix.PivotRoot("/", "/tmp"),
		"unshare user":       unix.Unshare(unix.CLONE_NEWUSER),
		"unshare mount":      unix.Unshare(unix.CLONE_NEWNS),
		"fsopen":             call(unix.SYS_FSOPEN, name("tmpfs"), 0),
		"open_tree (clone)":  call(unix.SYS_OPEN_TREE, ^uintptr(99), name("/"), 1),
		"open_by_handle_at":  call(unix.SYS_OPEN_BY_HANDLE_AT, ^uintptr(99), name("\x08\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00"), 0),
		"keyctl":             call(unix.SYS_KEYCTL, 0, ^uintptr(2), 0),
		"add_key":            call(unix.SYS_ADD_KEY, name("user"), name("x"), name("y"), 1, ^uintptr(2)),
		"bpf":                call(unix.SYS_BPF, 0, name(strings.Repeat("\x00", 72)), 72),
		"userfaultfd":        call(unix.SYS_USERFAULTFD, 1),
		"io_uring_setup":     call(unix.SYS_IO_URING_SETUP, 1, name(strings.Repeat("\x00", 120))),
		"fanotify_init":      call(unix.SYS_FANOTIFY_INIT, 0, 0),
		"a packet socket":    call(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0x300),
		"a raw socket":       call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW, 1),
		"setuid of the host": call(unix.SYS_SETUID, 0xfffffffe),
		"mknod of memory":    unix.Mknod("/tmp/mem", unix.S_IFCHR|0o600, 1<<8|1),
		"init_module":        call(unix.SYS_INIT_MODULE, name("x"), 1, name("")),
		"kexec_load":         call(unix.SYS_KEXEC_LOAD, 0, 0, 0, 0),
		"reboot":             call(unix.SYS_REBOOT, 0, 0, 0, 0),
		"swapon":             call(unix.SYS_SWAPON, name("/tmp/x"), 0),
	} {
		try(what, err)
	}
	for _, path := range []string{"/proc/kcore", "/dev/mem", "/dev/kmsg", "/proc/kmsg", "/proc/keys", "/proc/sysrq-trigger", "/proc/timer_list", "/proc/kpageflags", "/etc/shadow"} {
		read(path)
	}
	for _, path := range []string{"/sys/fs/cgroup", "/sys/kernel/debug", "/var/lib/warden", "/var/lib/docker", "/run/warden", "/run/docker", "/run/containerd", "/root", "/proc/1/root/run", "/proc/1/map_files"} {
		if strings.HasPrefix(path, "/sys/fs/cgroup") { // of a container: its own, to look at
			for _, kind := range []string{"", "memory", "pids", "cpu", "freezer"} {
				dir := filepath.Join(path, kind)
				write(filepath.Join(dir, "cgroup.procs"), "0")
				write(filepath.Join(dir, "tasks"), "0")
				try("makes a cgroup in "+dir, os.Mkdir(filepath.Join(dir, "planted"), 0o755))
			}
			continue
		}
		list(path)
	}
	for _, path := range []string{"/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/warden/warden.sock"} {
		connect(path)
	}
	for _, port := range []string{"2375", "2376"} { // an engine's API over TCP
		c, err := net.DialTimeout("tcp", "127.0.0.1:"+port, time.Second)
		try("connects to an engine at port "+port, err)
		if err == nil {
			c.Close()
		}
	}
	abstract()
	// What its own process holds that it did not open.
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, e := range fds {
		n, _ := strconv.Atoi(e.Name())
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if n > 2 && !strings.Contains(target, "anon_inode") && !strings.HasPrefix(target, "/proc/") && !strings.HasPrefix(target, "/sys/fs/cgroup/") && target != "" { // those are of Go's runtime
			try("holds "+target, nil)
		}
	}
	fmt.Printf("tried %d, reached %d\n", tried, reached)
	for {
		time.Sleep(time.Hour)
	}
}
