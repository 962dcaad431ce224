package process_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"warden/executor"
	"warden/executor/conformance"
	"warden/executor/process"
)

// TestConformanceHelper: the same with the helper that the build puts into the daemon, run from memory.
func TestConformanceHelper(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the process executor needs root")
	}
	helper := process.InMemory(t, process.BuildHelper(t))
	conformance.Run(t, func(t *testing.T) executor.Executor {
		dir := filepath.Join(t.TempDir(), "tasks")
		e, err := process.New(dir, helper, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatalf("New() = %v", err)
		}
		return opened{e, dir, nil}
	}, host(true))
}
