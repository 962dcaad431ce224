package docker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/tmpfsmount"
)

// Files of the state directory.
const (
	gateFile   = "gate"      // a copy of this binary
	socketFile = "gate.sock" // in a task's directory, until its task is on record
)

// installGate copies the binary self to dir, unless it is there already. Containers that run keep the copy that they have.
func installGate(self, dir string) error {
	op := "copying the gate to " + dir
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err == nil && fs.Flags&unix.ST_NOEXEC != 0 {
		return warden.Hint(warden.Errorf(warden.CodeUnsupported, op, "the file system is mounted noexec, and containers take that over"),
			"put the state directory on one that is not (--state-dir)")
	}
	want, err := digest(self)
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	path := filepath.Join(dir, gateFile)
	if have, err := digest(path); err == nil && bytes.Equal(have, want) {
		return warden.Recode(warden.CodeInternal, op, os.Chmod(path, 0o755))
	}
	return warden.Recode(warden.CodeInternal, op, copyFile(self, path))
}

func digest(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return h.Sum(nil), err
}

// copyFile puts a copy in the place of path in one step.
func copyFile(from, path string) (err error) {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	next := path + ".next"
	_ = os.Remove(next)
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, source)
	if err = errors.Join(err, f.Chmod(0o755), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return os.Rename(next, path)
}

// gateListener waits for the gate of one container.
type gateListener struct {
	*net.UnixListener
	path string
}

// listen makes the socket in the task's directory, which root alone can enter; a container is shown the socket itself.
func listen(dir string) (*gateListener, error) {
	const op = "making the task's gate"
	d, err := os.Open(dir)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	defer d.Close()
	name := fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketFile) // a socket's path has at most 107 bytes
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: name})
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	l.SetUnlinkOnClose(false)
	g := &gateListener{UnixListener: l, path: filepath.Join(dir, socketFile)}
	if err := os.Chmod(g.path, 0o666); err != nil { // the task's uid connects
		g.Close()
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	return g, nil
}

// Close takes the socket away: a container that is started again finds none.
func (l *gateListener) Close() error {
	return errors.Join(os.Remove(l.path), l.UnixListener.Close())
}

// acceptPause is how often alive is asked while the gate does not come.
const acceptPause = 500 * time.Millisecond

// accept waits for the gate, at most gateTime, and as long as alive returns nil.
func (l *gateListener) accept(ctx context.Context, alive func() error) (*gateConn, error) {
	const op = "waiting for the task's gate"
	stop := context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Now()) })
	defer stop()
	for deadline := time.Now().Add(gateTime); ; {
		if err := l.SetDeadline(time.Now().Add(acceptPause)); err != nil {
			return nil, warden.Recode(warden.CodeInternal, op, err)
		}
		if err := ctx.Err(); err != nil {
			return nil, warden.Wrap(op, err)
		}
		conn, err := l.AcceptUnix()
		switch {
		case err == nil:
			g, err := newGateConn(conn)
			if err != nil {
				conn.Close()
			}
			return g, warden.Recode(warden.CodeInternal, op, err)
		case ctx.Err() != nil:
			return nil, warden.Wrap(op, ctx.Err())
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return nil, warden.Recode(warden.CodeInternal, op, err)
		case time.Now().After(deadline):
			return nil, warden.Errorf(warden.CodeTimeout, op, "it did not come within %s", gateTime)
		}
		if err := alive(); err != nil {
			return nil, warden.Wrap(op, err)
		}
	}
}

// gateConn is the connection to a gate: pid, uid and gid are what the kernel says of it, as this process sees them.
type gateConn struct {
	*net.UnixConn
	pid      int
	uid, gid uint32
	pidfd    *os.File // certainly the gate's; nil once somebody else closes it
}

func newGateConn(conn *net.UnixConn) (*gateConn, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	credErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(credErr, err); err != nil {
		return nil, err
	}
	if cred.Pid <= 0 {
		return nil, errors.New("the container's processes are not seen from here: daemon and engine are in different pid namespaces")
	}
	fd, err := unix.PidfdOpen(int(cred.Pid), unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	g := &gateConn{UnixConn: conn, pid: int(cred.Pid), uid: cred.Uid, gid: cred.Gid, pidfd: os.NewFile(uintptr(fd), "pidfd")}
	if err := errors.Join(g.SetDeadline(time.Now().Add(callTime)), g.say(wordHello), await(g, wordHere), g.SetDeadline(time.Now().Add(gateTime))); err != nil {
		g.pidfd.Close()
		return nil, err
	}
	return g, nil
}

func (g *gateConn) say(word string) error {
	_, err := g.Write([]byte(word))
	return err
}

// Close ends the gate, and with it the container, unless keep came before.
func (g *gateConn) Close() error {
	if g.pidfd != nil {
		_ = g.pidfd.Close()
	}
	return g.UnixConn.Close()
}

// alive wants the gate not to have ended.
func (g *gateConn) alive() error {
	if hasEnded(g.pidfd) {
		return errors.New("the gate has ended")
	}
	return nil
}

// inject moves the secrets into the gate's mount namespace. It takes less than a millisecond.
func (p plan) inject(g *gateConn) error {
	if len(p.files) == 0 {
		return nil
	}
	const op = "giving the task its secrets"
	uids, err := readIDMap(fmt.Sprintf("/proc/%d/uid_map", g.pid))
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	gids, err := readIDMap(fmt.Sprintf("/proc/%d/gid_map", g.pid))
	if err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	files, err := p.mount(owner{g.uid, g.gid, uids, gids})
	if err != nil {
		return err
	}
	replaced := errors.New("the gate's pidfd is closed")
	if conn, err := g.pidfd.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { replaced = tmpfsmount.Replace(int(fd), warden.SecretsDir, files) })
	}
	if errors.Is(replaced, unix.ELOOP) {
		return warden.Errorf(warden.CodeInvalid, op, "the image's %s leads through a link", warden.SecretsDir)
	}
	return warden.Wrap(op, replaced)
}

// run lets the gate start the program and returns when it runs.
func (g *gateConn) run(ctx context.Context) error {
	const op = "starting the command"
	stop := context.AfterFunc(ctx, func() { _ = g.SetDeadline(time.Now()) })
	defer stop()
	if err := g.say(wordRun); err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	b := make([]byte, packetMax)
	n, err := g.Read(b)
	var r refusal
	switch {
	case ctx.Err() != nil:
		return warden.Wrap(op, ctx.Err())
	case err != nil:
		return warden.Recode(warden.CodeInternal, op, err)
	case string(b[:n]) == wordRunning:
		return nil
	case json.Unmarshal(b[:n], &r) != nil || r.Code != warden.CodeInvalid && r.Code != warden.CodeInternal:
		return warden.Errorf(warden.CodeInternal, op, "the gate's answer makes no sense")
	}
	return r.err()
}

// keep lets the task go on by itself. A program that has ended already takes its gate with it: no error.
func (g *gateConn) keep() { _ = g.say(wordKeep) }
