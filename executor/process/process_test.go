package process_test

import (
	"log/slog"
	"os"
	"testing"

	"warden"
	"warden/executor"
	"warden/executor/process"
	"warden/internal/sensitive"
)

func TestMain(m *testing.M) {
	process.Main(os.Args)
	os.Exit(m.Run())
}

func TestSmoke(t *testing.T) {
	e, err := process.New(t.TempDir()+"/tasks", "/proc/self/exe", slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		t.Fatal(err)
	}
	task, err := e.Start(t.Context(), executor.Spec{TaskID: warden.NewID(), Image: "host", Command: []string{"/bin/sh", "-c",
		"id; cat /proc/self/status | egrep 'Uid|Groups|Cap|NoNew|Secc'; ps ax; ls -la / /run/secrets /etc/shadow /etc/ssh /dev; cat /run/secrets/a; cat /proc/mounts; pwd; env; cat /proc/self/cgroup; ls -la /proc/1; hostname; mount -t tmpfs x /tmp; unshare -r true; touch /x; cat /proc/self/oom_score_adj; exit 3"},
		Secrets: []executor.SecretFile{{Target: "a", Mode: 0o400, Data: sensitive.New([]byte("hello\n"))}}})
	if err != nil {
		t.Fatal(err, warden.HintOf(err))
	}
	t.Log(task.Wait(t.Context()))
	task.Logs(t.Context(), executor.LogOptions{Tail: -1}, func(l executor.Line) error { t.Log(l.Stderr, string(l.Data)); return nil })
	t.Log(task.Remove(t.Context()))
}

func BenchmarkStart(b *testing.B) {
	e, err := process.New(b.TempDir()+"/tasks", "/proc/self/exe", slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		task, err := e.Start(b.Context(), executor.Spec{TaskID: warden.NewID(), Image: "host", Command: []string{"/bin/true"},
			Secrets: []executor.SecretFile{{Target: "a", Mode: 0o400, Data: sensitive.New([]byte("hello\n"))}}})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		task.Remove(b.Context())
		b.StartTimer()
	}
}
