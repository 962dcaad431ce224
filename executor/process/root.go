package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"warden"
	"warden/tmpfsmount"
)

// Sizes of the writable file systems of a task. Their pages count towards its memory limit.
const (
	TmpBytesMax  = 256 << 20
	ShmBytesMax  = 64 << 20
	RunBytesMax  = 16 << 20
	TmpFilesMax  = 64 << 10
	rootBytesMax = 1 << 20
)

// base is where the new root is put together. It lies in the mount namespace of the task, over the host's own /tmp.
const base = "/tmp"

// hostDirs are the parts of the host that a task sees, read-only, where they exist. Each may be a link, as /bin is to usr/bin.
var hostDirs = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc"}

// hiddenFiles and hiddenDirs are masked wherever they exist; so is each entry of /etc and /etc/ssl that not everybody may
// read. The task's uid could not open these anyway.
var (
	hiddenFiles = []string{"/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/krb5.keytab",
		"/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/kmsg", "/proc/latency_stats", "/proc/sched_debug", "/proc/sysrq-trigger",
		"/proc/timer_list", "/proc/kpagecount", "/proc/kpageflags", "/proc/kpagecgroup"}
	hiddenDirs = []string{"/etc/ssh", "/etc/ssl/private", "/etc/sudoers.d", "/etc/warden", "/proc/acpi", "/proc/scsi", "/proc/bus", "/proc/fs"}
	devices    = []string{"null", "zero", "full", "random", "urandom"}
	readOnly   = []string{"/proc/sys", "/proc/irq"}
)

const hardened = unix.MS_NOSUID | unix.MS_NODEV

// enterRoot makes the root of a task in the calling process's own mount namespace and changes to it. uid and gid are the
// task's as seen here. secrets is a detached mount, or nil; secretsDir a directory with them, or "".
func enterRoot(uid, gid int, secrets *os.File, secretsDir string) error {
	b := &builder{}
	b.do("making mounts private", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	resolv, resolvErr := resolvConf()
	if secretsDir != "" { // which the new root may hide
		fd, err := unix.Open(secretsDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		b.do("finding the secrets", err)
		defer unix.Close(fd)
		secretsDir = fmt.Sprintf("/proc/self/fd/%d", fd)
	}
	b.tmpfs("", "0755", hardened, rootBytesMax, 0, 0)
	b.mkdir("/.masked.d", 0o555)
	b.file("/.masked", 0)
	for _, dir := range hostDirs {
		b.host(dir)
	}
	b.proc()
	b.dev(uid, gid)
	b.tmpfs("/tmp", "1777", hardened, TmpBytesMax, uid, gid)
	b.tmpfs("/run", "0755", hardened, RunBytesMax, uid, gid)
	if resolvErr == nil && resolv.target != "" {
		b.do("making /etc/resolv.conf", os.MkdirAll(base+filepath.Dir(resolv.target), 0o755))
		b.do("making /etc/resolv.conf", os.WriteFile(base+resolv.target, resolv.content, 0o644))
	}
	b.mask()
	if secrets != nil || secretsDir != "" {
		b.mkdir(warden.SecretsDir, 0o755)
	}
	if b.err == nil && secrets != nil {
		b.err = tmpfsmount.Attach(secrets, base+warden.SecretsDir)
	}
	if secretsDir != "" {
		b.mount(secretsDir, warden.SecretsDir, "", unix.MS_BIND, "")
	}
	b.do("entering the new root", os.Chdir(base))
	if b.err == nil {
		b.do("changing the root", unix.PivotRoot(".", "."))
	}
	if b.err == nil {
		b.do("leaving the host's root", unix.Unmount(".", unix.MNT_DETACH))
		b.do("making the root read-only", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|hardened, ""))
		b.do("entering /tmp", os.Chdir("/tmp"))
	}
	return b.err
}

// builder does one step after the other until one fails.
type builder struct{ err error }

func (b *builder) do(op string, err error) {
	if b.err == nil && err != nil {
		b.err = warden.Recode(warden.CodeInternal, op, err)
	}
}

func (b *builder) mkdir(path string, mode fs.FileMode) {
	if b.err == nil {
		b.do("making "+path, os.Mkdir(base+path, mode))
	}
}

func (b *builder) file(path string, mode fs.FileMode) {
	if b.err == nil {
		b.do("making "+path, os.WriteFile(base+path, nil, mode))
	}
}

// mount is mount(2) with the target under the new root.
func (b *builder) mount(source, target, kind string, flags uintptr, data string) {
	if b.err == nil {
		b.do("mounting "+target, unix.Mount(source, base+target, kind, flags, data))
	}
}

func (b *builder) tmpfs(path, mode string, flags uintptr, size int64, uid, gid int) {
	if path != "" {
		b.mkdir(path, 0o755)
	}
	b.mount("warden", path, "tmpfs", flags, fmt.Sprintf("mode=%s,size=%d,nr_inodes=%d,uid=%d,gid=%d", mode, size, TmpFilesMax, uid, gid))
}

// seal makes a mount and those under it read-only and takes suid and devices from them.
func (b *builder) seal(path string) {
	if b.err == nil {
		b.do("making "+path+" read-only", unix.MountSetattr(unix.AT_FDCWD, base+path, unix.AT_RECURSIVE,
			&unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}))
	}
}

// host shows one part of the host.
func (b *builder) host(dir string) {
	info, err := os.Lstat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) || b.err != nil:
	case err != nil:
		b.do("looking at "+dir, err)
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(dir)
		b.do("reading "+dir, err)
		b.do("linking "+dir, os.Symlink(target, base+dir))
	case info.IsDir():
		b.mkdir(dir, 0o755)
		b.mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, "")
		b.seal(dir)
	}
}

func (b *builder) proc() {
	const flags = hardened | unix.MS_NOEXEC
	b.mkdir("/proc", 0o555)
	if b.err != nil {
		return
	}
	err := unix.Mount("proc", base+"/proc", "proc", flags, "hidepid=2")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("proc", base+"/proc", "proc", flags, "")
	}
	b.do("mounting /proc", err)
	for _, path := range readOnly {
		if _, err := os.Lstat(base + path); err == nil {
			b.mount(base+path, path, "", unix.MS_BIND|unix.MS_REC, "")
			b.mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, "")
		}
	}
}

func (b *builder) dev(uid, gid int) {
	b.tmpfs("/dev", "0755", hardened|unix.MS_NOEXEC, rootBytesMax, 0, 0)
	for _, name := range devices {
		b.file("/dev/"+name, 0o666)
		b.mount("/dev/"+name, "/dev/"+name, "", unix.MS_BIND, "")
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if b.err == nil {
			b.do("linking /dev/"+name, os.Symlink(target, base+"/dev/"+name))
		}
	}
	b.tmpfs("/dev/shm", "1777", hardened|unix.MS_NOEXEC, ShmBytesMax, uid, gid)
	b.mount("", "/dev", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|hardened|unix.MS_NOEXEC, "")
}

// mask hides what must not be read: a file becomes an empty one of mode 0, a directory an empty one.
func (b *builder) mask() {
	hidden := append(append([]string{}, hiddenFiles...), hiddenDirs...)
	for _, dir := range []string{"/etc", "/etc/ssl"} {
		entries, _ := os.ReadDir(base + dir)
		for _, e := range entries {
			if info, err := e.Info(); err == nil && info.Mode()&fs.ModeSymlink == 0 && info.Mode().Perm()&0o004 == 0 {
				hidden = append(hidden, dir+"/"+e.Name())
			}
		}
	}
	done := map[string]bool{}
	for _, path := range hidden {
		info, err := os.Lstat(base + path)
		if err != nil || done[path] || info.Mode()&fs.ModeSymlink != 0 {
			continue
		}
		done[path] = true
		source := base + "/.masked"
		if info.IsDir() {
			source += ".d"
		}
		b.mount(source, path, "", unix.MS_BIND, "")
		b.mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|hardened|unix.MS_NOEXEC, "")
	}
}

type resolver struct {
	target  string // path in the task's /run, "" where /etc has the file itself
	content []byte
}

// resolvConf returns what /etc/resolv.conf leads to where it is a link into the host's /run, which tasks do not see.
func resolvConf() (resolver, error) {
	target, err := os.Readlink("/etc/resolv.conf")
	if err != nil {
		return resolver{}, nil // a file, or none
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join("/etc", target)
	}
	if !strings.HasPrefix(target, "/run/") {
		return resolver{}, nil
	}
	content, err := os.ReadFile("/etc/resolv.conf")
	return resolver{target: target, content: content}, err
}
