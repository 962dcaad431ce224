package bed

import (
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// clockVar names what the test build reads the offset of its wall clock from (test/bed/clock): a file that it maps.
const clockVar = "WARDEN_TEST_CLOCK"

// clock is the wall clock of a host: an offset to the machine's, in a file that is shared with all that goes by it. It stays
// mapped while the test process lives: who skews a host that has ended does no harm.
type clock struct {
	path   string
	mapped []byte
}

func newClock(path string) (*clock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(8); err != nil {
		return nil, err
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return &clock{path, mapped}, nil
}

func (c *clock) set(d time.Duration) {
	(*atomic.Int64)(unsafe.Pointer(&c.mapped[0])).Store(int64(d))
}

// env is what makes a program go by the clock.
func (c *clock) env() string { return clockVar + "=" + c.path }

// Skew puts the host's wall clock so far ahead of the machine's, or behind where d is negative; 0 sets it right. The daemon goes
// by it at once, whether it runs already or starts later, and so does wardenctl by Ctl and Try. Monotonic time, so timers too,
// goes on as before. What the kernel stamps, files for one, keeps the machine's time, and so do tasks and what they run under.
func (h *Host) Skew(d time.Duration) {
	h.b.t.Helper()
	h.b.note("skew %s by %s", h.Name, d)
	if !h.b.canSkew() {
		h.b.t.Fatalf("%s has no clock that can be skewed: `make bin/test/warden` builds one that has", filepath.Join(h.b.bin, "warden"))
	}
	h.clock.set(d)
}

// canSkew says whether the daemon goes by clocks of ours: one that does not would make each test of clocks pass.
func (b *Bed) canSkew() bool {
	b.t.Helper()
	program, err := os.ReadFile(filepath.Join(b.bin, "warden"))
	if err != nil {
		b.t.Fatal(err)
	}
	return bytes.Contains(program, []byte(clockVar))
}
