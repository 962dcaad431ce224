package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// onDisk refuses a folder in memory: there an fsync costs nothing.
func onDisk(dir string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return err
	}
	if s.Type == unix.TMPFS_MAGIC || s.Type == unix.RAMFS_MAGIC {
		return fmt.Errorf("%s is in memory: name a folder on a disk with -dir", dir)
	}
	return nil
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown processor"
}

// watchLoad returns a function that tells which share of all cores others took since, steal included, as a number from 0 to 1.
// What this program's processes took counts once they have been waited for.
func watchLoad() func() float64 {
	start, busy, own := time.Now(), busyCPU(), ownCPU()
	return func() float64 {
		cores := float64(len(cpus()))
		share := ((busyCPU() - busy) - (ownCPU() - own)).Seconds() / time.Since(start).Seconds() / cores
		return max(0, share)
	}
}

// cpus returns the lines of /proc/stat that are of one core each.
func cpus() (lines []string) {
	b, _ := os.ReadFile("/proc/stat")
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "cpu") && !strings.HasPrefix(line, "cpu ") {
			lines = append(lines, line)
		}
	}
	return lines
}

// busyCPU returns the time that all cores were not idle, but for what the kernel's own threads took: they mostly work for whoever is
// measured.
func busyCPU() (sum time.Duration) {
	for _, line := range cpus() {
		for i, word := range strings.Fields(line)[1:] {
			if n, err := strconv.Atoi(word); err == nil && i < 8 && i != 3 && i != 4 { // not idle, iowait; guest is in user
				sum += time.Duration(n) * userHZ
			}
		}
	}
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range all {
		b, _ := os.ReadFile(path) // one that has ended has none
		words := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(words) < 13 || words[1] != "2" { // not a child of kthreadd
			continue
		}
		for _, word := range words[11:13] { // utime, stime
			if n, err := strconv.Atoi(word); err == nil {
				sum -= time.Duration(n) * userHZ
			}
		}
	}
	return sum
}

const userHZ = time.Second / 100

func ownCPU() (sum time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var r syscall.Rusage
		if syscall.Getrusage(who, &r) == nil {
			sum += time.Duration(r.Utime.Nano() + r.Stime.Nano())
		}
	}
	return sum
}

// anonymous returns the resident memory of a process that is not of files, in bytes.
func anonymous(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if words := strings.Fields(line); len(words) > 1 && words[0] == "RssAnon:" {
			n, err := strconv.ParseFloat(words[1], 64)
			return n * 1024, err
		}
	}
	return 0, errors.New("this kernel does not say RssAnon")
}
