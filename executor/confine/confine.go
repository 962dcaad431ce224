// Package confine is what keeps the tasks of every executor to themselves: the filter of their system calls, uids that nobody else
// has, and the wait of their process 1.
//
// It makes no namespaces, users or cgroups and knows no task: executors do.
//
// Invariants: a filter can't be undone and holds for all that the process starts; filters stack, so an engine's own goes on to count;
// a call that this package does not know does not exist for a task; no uid that is drawn belongs to a user of the host.
//
// It trusts the kernel. References: seccomp(2), clone(2), subuid(5).
package confine

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// newestCall is the highest system call number that the deny list was checked against (Linux 6.17); what is newer does not
// exist for a task.
const newestCall = 469

const (
	seccompKill  = 0x80000000 // SECCOMP_RET_KILL_PROCESS
	seccompErrno = 0x00050000 // SECCOMP_RET_ERRNO
	seccompAllow = 0x7fff0000 // SECCOMP_RET_ALLOW
)

// newNamespaces are the bits of clone(2)'s flags that make a namespace. CLONE_NEWTIME is none of them: in clone(2) its bit
// belongs to the exit signal.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// deniedCalls answer EPERM: what reaches into other processes, mounts, namespaces, the kernel's code and clocks, keys, and
// interfaces whose past holes make them too dear for what tasks need them for. archDeniedCalls adds those of one architecture.
var deniedCalls = []uint32{
	unix.SYS_ACCT, unix.SYS_ADD_KEY, unix.SYS_ADJTIMEX, unix.SYS_BPF, unix.SYS_CHROOT, unix.SYS_CLOCK_ADJTIME, unix.SYS_CLOCK_SETTIME,
	unix.SYS_DELETE_MODULE, unix.SYS_FANOTIFY_INIT, unix.SYS_FINIT_MODULE, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSOPEN,
	unix.SYS_FSPICK, unix.SYS_GET_MEMPOLICY, unix.SYS_INIT_MODULE, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_IO_URING_SETUP, unix.SYS_KCMP, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_KEXEC_LOAD, unix.SYS_KEYCTL, unix.SYS_LOOKUP_DCOOKIE,
	unix.SYS_MBIND, unix.SYS_MIGRATE_PAGES, unix.SYS_MOUNT, unix.SYS_MOUNT_SETATTR, unix.SYS_MOVE_MOUNT, unix.SYS_MOVE_PAGES,
	unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_NFSSERVCTL, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_OPEN_TREE, unix.SYS_PERF_EVENT_OPEN,
	unix.SYS_PERSONALITY, unix.SYS_PIDFD_GETFD, unix.SYS_PIVOT_ROOT, unix.SYS_PROCESS_MADVISE, unix.SYS_PROCESS_MRELEASE,
	unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PTRACE, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_REBOOT,
	unix.SYS_REQUEST_KEY, unix.SYS_SET_MEMPOLICY, unix.SYS_SET_MEMPOLICY_HOME_NODE, unix.SYS_SETDOMAINNAME, unix.SYS_SETHOSTNAME,
	unix.SYS_SETNS, unix.SYS_SETTIMEOFDAY, unix.SYS_SWAPOFF, unix.SYS_SWAPON, unix.SYS_SYSLOG, unix.SYS_UMOUNT2, unix.SYS_UNSHARE,
	unix.SYS_USERFAULTFD, unix.SYS_VHANGUP, openTreeAttr,
}

// openTreeAttr is open_tree_attr(2) (Linux 6.15), which x/sys lacks on some architectures; listns and others after it are
// above newestCall.
const openTreeAttr = 467

// deniedFamilies are socket(2) families that reach the hypervisor or the kernel's cryptography.
var deniedFamilies = []uint32{unix.AF_VSOCK, unix.AF_ALG}

// program returns the filter: other architectures are killed, denied calls get EPERM, clone3 (whose flags a filter cannot
// read) and unknown calls ENOSYS, so that libraries fall back.
func program() []unix.SockFilter {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		above  = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
		set    = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret    = unix.BPF_RET | unix.BPF_K
		nr     = 0 // offsets in struct seccomp_data
		arch   = 4
		arg0lo = 16
		arg1lo = 24
	)
	var p []unix.SockFilter
	add := func(code uint16, k uint32, jt, jf uint8) {
		p = append(p, unix.SockFilter{Code: code, K: k, Jt: jt, Jf: jf})
	}
	refuse := func(errno uint32) { add(ret, seccompErrno|errno, 0, 0) }

	add(load, arch, 0, 0)
	add(equal, auditArch, 1, 0)
	add(ret, seccompKill, 0, 0)
	add(load, nr, 0, 0)
	if foreignCallBit != 0 { // x32 comes under the same architecture
		add(set, foreignCallBit, 0, 1)
		add(ret, seccompKill, 0, 0)
	}
	add(above, newestCall, 0, 1)
	refuse(uint32(unix.ENOSYS))
	add(equal, unix.SYS_CLONE3, 0, 1)
	refuse(uint32(unix.ENOSYS))
	for _, call := range append(archDeniedCalls, deniedCalls...) {
		add(equal, call, 0, 1)
		refuse(uint32(unix.EPERM))
	}
	add(equal, unix.SYS_CLONE, 0, 3)
	add(load, arg0lo, 0, 0)
	add(set, newNamespaces, 0, 1)
	refuse(uint32(unix.EPERM))
	add(load, nr, 0, 0)
	add(equal, unix.SYS_SOCKET, 0, uint8(1+2*len(deniedFamilies)))
	add(load, arg0lo, 0, 0)
	for _, family := range deniedFamilies {
		add(equal, family, 0, 1)
		refuse(uint32(unix.EPERM))
	}
	add(load, nr, 0, 0)
	add(equal, unix.SYS_IOCTL, 0, 5)
	add(load, arg1lo, 0, 0)
	add(equal, unix.TIOCSTI, 0, 1)
	refuse(uint32(unix.EPERM))
	add(equal, unix.TIOCLINUX, 0, 1)
	refuse(uint32(unix.EPERM))
	add(ret, seccompAllow, 0, 0)
	return p
}

// Apply puts the filter and no_new_privs on all threads of this process, and so on all that it starts. It needs no privilege and can't
// be undone. What an init needs after it, to fork, exec, signal, wait and write, is allowed. Errors: the kernel's, where it has no such filters.
func Apply() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	filter := program()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	return nil
}
