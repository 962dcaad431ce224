package docker

import "warden/executor"

// Inject gives a running task these secrets in the place of those that it has, the way that a start does.
func Inject(t executor.Task, files []executor.SecretFile) error {
	r := t.(*task)
	return plan{files}.inject(&gateConn{pid: r.record.PID, uid: r.record.UID, gid: r.record.UID, pidfd: r.pidfd})
}
