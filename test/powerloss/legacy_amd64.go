package powerloss

import "golang.org/x/sys/unix"

// legacy decodes the calls that newer machines have in their newer form only.
func (tr *Tracer) legacy(tid int, i info) func(int64) {
	a := i.args
	switch i.nr {
	case unix.SYS_OPEN:
		return tr.open(tid, atCWD, a[0], a[1])
	case unix.SYS_CREAT:
		return tr.open(tid, atCWD, a[0], unix.O_CREAT|unix.O_TRUNC)
	case unix.SYS_MKDIR:
		return tr.mkdir(tid, atCWD, a[0])
	case unix.SYS_RENAME:
		return tr.rename(tid, atCWD, a[0], atCWD, a[1])
	case unix.SYS_LINK:
		return tr.link(tid, atCWD, a[0], atCWD, a[1])
	case unix.SYS_UNLINK, unix.SYS_RMDIR:
		return tr.unlink(tid, atCWD, a[0])
	case unix.SYS_CHMOD:
		if path, ok := tr.path(tid, atCWD, a[0]); ok {
			return tr.chmod(path)
		}
	case unix.SYS_SYMLINK:
		tr.refusePath(tid, atCWD, a[1], "symlink")
	case unix.SYS_MKNOD:
		tr.refusePath(tid, atCWD, a[0], "mknod")
	}
	return nil
}
