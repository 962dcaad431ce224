package adversary

import (
	"fmt"
	"syscall"
	"testing"

	"warden"
	"warden/internal/thief"
)

// floods: a peer that stalls, sends too much, opens too much, or speaks no protocol, at each door: before a hello, within a handshake, behind the
// door without a certificate, with a worker's, and with a manager's.
func (a *arena) floods(t *testing.T) {
	t.Run("HalfOpen", func(t *testing.T) {
		n := 10_000
		var files syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
			t.Fatal(err)
		}
		if most := int(files.Max) - 100; n > most {
			t.Logf("this machine allows %d connections, not %d", most, n)
			n = most
		}
		a.attack(t, 160, flood{kind: "half-open", n: n, door: "none", code: warden.CodeUnavailable, want: max(0, n-1100) / 2})
	})
	t.Run("WithoutCertificate", func(t *testing.T) {
		a.attack(t, 160,
			flood{kind: "big-certificate", n: 300, door: "node", code: warden.CodeTooLarge, want: 30},
			flood{kind: "slow-hello", n: 1100, door: "none", code: warden.CodeUnavailable, want: 50},
			flood{kind: "garbage", n: 50, door: "none", code: warden.CodeInvalid, want: 40},
			flood{kind: "join-silent", n: 200, door: "join", code: warden.CodeLimited, want: 70},
			flood{kind: "join-slow", n: 30, door: "join", code: warden.CodeInvalid, want: 10, late: true},
			flood{kind: "join-garbage", n: 30, door: "join", code: warden.CodeTooLarge, want: 5},
		)
	})
	t.Run("Worker", func(t *testing.T) {
		var as [3]*thief.Member
		for i := range as {
			m, err := a.join("127.98.1.1", a.token, fmt.Sprint("thief", i))
			if err != nil {
				t.Fatal(err)
			}
			as[i] = &m
		}
		a.attack(t, 160,
			flood{kind: "node-silent", n: 1000, as: as[0], door: "node", code: warden.CodeLimited, want: 300},
			flood{kind: "node-frames", n: 40, as: as[1], door: "node", code: warden.CodeUnavailable, want: 20},
			flood{kind: "node-giant", n: 10, as: as[2], door: "node", code: warden.CodeTooLarge, want: 5},
		)
	})
	t.Run("Manager", func(t *testing.T) {
		a.m[2].Kill()
		as := thief.Steal(t, a.m[2].State)
		a.attack(t, 220, // 8,192 calls of some 15 KiB: a manager is one of few, and trusted with more
			flood{kind: "peer-silent", n: 20, as: &as, door: "peer"},
			flood{kind: "peer-streams", n: 2, as: &as, door: "peer"},
			flood{kind: "raft-silent", n: 10, as: &as, door: "raft"},
		)
		a.attack(t, 450, // a call of raft may have 160 MiB
			flood{kind: "peer-giant", n: 4, as: &as, door: "peer", code: warden.CodeTooLarge, want: 2},
			flood{kind: "raft-garbage", n: 10, as: &as, door: "raft", code: warden.CodeInvalid, want: 5},
			flood{kind: "raft-giant", n: 1, as: &as, door: "raft", code: warden.CodeTooLarge, want: 1},
		)
	})
}
