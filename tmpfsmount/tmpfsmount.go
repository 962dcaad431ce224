// Package tmpfsmount makes the read-only tmpfs on which a task finds its secrets.
//
// The mount is built detached: it has no path on the host, belongs to no mount namespace and is seen by nobody until Attach
// moves it into the namespace of its task. On kernels without fsopen(2), fsmount(2) and mount_setattr(2) (Linux 5.12) Fill
// does the same on a path, which the caller chooses where only root sees it. The package deliberately does not know tasks, user
// namespaces or where the bytes come from, and wipes nothing: Data belongs to the caller.
//
// Invariants: nosuid, nodev, noexec and read-only before anybody else sees it; size and inodes bounded by the plan; noswap
// where the kernel knows it (Linux 6.4); a file has its owner and mode before it has content; nothing of a mount that failed
// stays behind.
//
// It trusts the kernel and needs CAP_SYS_ADMIN. References: fsopen(2) and fsmount(2) in the kernel's own documentation,
// mount_setattr(2), tmpfs(5).
package tmpfsmount

import (
	"errors"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"warden"
)

// How a secrets mount comes to its task, as shown by status.
const (
	Detached = "detached" // no path on the host
	Bind     = "bind"     // a path that only root sees, for old kernels
)

// moveMountBeneath is MOVE_MOUNT_BENEATH of linux/mount.h (Linux 6.5), which x/sys lacks.
const moveMountBeneath = 0x200

const attributes = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// Probe returns Detached where this kernel and this process can build a detached mount, else Bind.
func Probe() string {
	m, err := Build(Plan{})
	if err != nil {
		return Bind
	}
	m.Close()
	return Detached
}

// Build returns a detached, filled, read-only tmpfs. It lives until it is attached and unmounted, or closed. The file can be
// passed to another process, whose Attach takes its descriptor; it has no use as a file. Costs about 0.2 ms and the size of
// the files. Errors: CodeUnsupported where the kernel cannot, else CodeInternal.
func Build(p Plan) (*os.File, error) {
	const op = "building a detached tmpfs"
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fail(op, err)
	}
	defer unix.Close(fs)
	bytes, inodes := p.Bounds(int64(os.Getpagesize()))
	for _, option := range [][2]string{
		{"size", strconv.FormatInt(bytes, 10)}, {"nr_inodes", strconv.FormatInt(inodes, 10)}, {"mode", "0755"}, {"source", "warden"},
	} {
		if err := unix.FsconfigSetString(fs, option[0], option[1]); err != nil {
			return nil, fail(op, err)
		}
	}
	_ = unix.FsconfigSetFlag(fs, "noswap") // since Linux 6.4
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fail(op, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return nil, fail(op, err)
	}
	mount := os.NewFile(uintptr(fd), "detached tmpfs")
	if err := write(fd, p); err != nil {
		mount.Close()
		return nil, fail(op, err)
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		mount.Close()
		return nil, fail(op, err)
	}
	return mount, nil
}

// Attach moves a detached mount to the directory target of the calling thread's mount namespace. Errors: CodeInternal.
func Attach(mount *os.File, target string) error {
	err := unix.MoveMount(int(mount.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	return fail("attaching a tmpfs at "+target, err)
}

// Fill mounts a filled, read-only tmpfs on the directory dir, for kernels where Build cannot. The caller sees to it that no
// other process reaches dir: best in a mount namespace of its own. Errors: CodeInternal; then nothing stays mounted.
func Fill(p Plan, dir string) error {
	op := "mounting a tmpfs on " + dir
	bytes, inodes := p.Bounds(int64(os.Getpagesize()))
	options := "mode=0755,size=" + strconv.FormatInt(bytes, 10) + ",nr_inodes=" + strconv.FormatInt(inodes, 10)
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := unix.Mount("warden", dir, "tmpfs", flags, options+",noswap")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("warden", dir, "tmpfs", flags, options)
	}
	if err != nil {
		return fail(op, err)
	}
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err == nil {
		err = write(fd, p)
		unix.Close(fd)
	}
	if err == nil {
		err = unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, "")
	}
	if err != nil {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
	return fail(op, err)
}

// Replace puts a mount with the files of p in the place of the one at target in the mount namespace of the process pidfd.
// A reader finds the old file or the new one, never none; one that has the old file open keeps it. Where the kernel can mount
// beneath (Linux 6.5) the old mount is then taken away, else it stays under the new one until the task ends. A symbolic link
// anywhere in target is refused: what the task can change must not lead elsewhere. Errors: CodeUnsupported, CodeInternal; then the
// old mount is as it was.
func Replace(pidfd int, target string, p Plan) error {
	mount, err := Build(p)
	if err != nil {
		return err
	}
	defer mount.Close()
	return fail("replacing the tmpfs at "+target, onOwnThread(func() error { return replace(pidfd, int(mount.Fd()), target) }))
}

// onOwnThread runs f on a thread that ends with it, since it is of no more use. The main thread never ends: it would keep this
// process in the task's mount namespace, and that namespace's secrets alive. While it is held here, f gets another.
func onOwnThread(f func() error) error {
	done := make(chan error)
	go func() { // ends with f
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			done <- f()
			return // still locked: the thread ends
		}
		err := onOwnThread(f)
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

func replace(pidfd, fd int, target string) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(pidfd, unix.CLONE_NEWNS); err != nil {
		return err
	}
	dir, err := unix.Openat2(unix.AT_FDCWD, target, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	const here = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
	if err := unix.MoveMount(fd, "", dir, "", here|moveMountBeneath); err == nil {
		return unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	return unix.MoveMount(fd, "", dir, "", here)
}

// write makes the files of p in the directory fd, which nobody else has seen yet.
func write(fd int, p Plan) error {
	for _, f := range p.files {
		file, err := unix.Openat(fd, f.Name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		err = fill(file, f)
		if closed := unix.Close(file); err == nil {
			err = closed
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func fill(file int, f File) error {
	if err := unix.Fchown(file, int(f.UID), int(f.GID)); err != nil {
		return err
	}
	if err := unix.Fchmod(file, f.Mode); err != nil {
		return err
	}
	return f.Data.Use(func(b []byte) error {
		for len(b) > 0 {
			n, err := unix.Write(file, b)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			b = b[max(n, 0):]
		}
		return nil
	})
}

func fail(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENODEV):
		return warden.Recode(warden.CodeUnsupported, op, err)
	}
	return warden.Recode(warden.CodeInternal, op, err)
}
