package tmpfsmount_test

import (
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"warden/internal/sensitive"
	"warden/tmpfsmount"
)

// BenchmarkReplace puts a secret of 32 bytes into the mount namespace of a process that runs: a mount is built, filled, moved there,
// and the old one taken away. It reports the median as median-ms.
func BenchmarkReplace(b *testing.B) {
	if os.Geteuid() != 0 || tmpfsmount.Probe() != tmpfsmount.Detached {
		b.Skip("needs root and a kernel that can build detached mounts")
	}
	p, err := tmpfsmount.NewPlan([]tmpfsmount.File{{Name: "name", Mode: 0o400, Data: sensitive.New(make([]byte, 32))}})
	if err != nil {
		b.Fatal(err)
	}
	target := b.TempDir()
	m, err := tmpfsmount.Build(p)
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	cmd := exec.Command("/proc/self/exe", holderVerb, target)
	cmd.ExtraFiles = []*os.File{m}
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, PidFD: &pidfd}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	defer unix.Close(pidfd)
	said := make([]byte, 64)
	if n, err := out.Read(said); err != nil || string(said[:n]) != "attached\n" {
		b.Fatalf("the holder says %q, %v", said[:n], err)
	}
	var took []time.Duration
	for b.Loop() {
		begin := time.Now()
		if err := tmpfsmount.Replace(pidfd, target, p); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2])/1e6, "median-ms")
}
