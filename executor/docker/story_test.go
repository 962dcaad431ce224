package docker_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"warden/internal/testcluster"
)

// limit is how long a test waits for what takes moments on a quiet machine.
const limit = time.Minute

func running(h *testcluster.Host, service string, want int) error {
	out := h.Ctl("service", "ps", service, "--filter", "desired-state=running", "--format", "{{.CurrentState}}")
	if got := strings.Count(out, "Running"); got != want {
		return fmt.Errorf("%d of %d tasks run: %s", got, want, h.Ctl("service", "ps", service))
	}
	return nil
}

// TestStory is a service with a secret on the machine's engine, from its creation to its removal, through a kill -9 of the daemon. The
// cluster's end searches all that was printed, logged and stored for the canary; the engine's own folders are searched here.
func TestStory(t *testing.T) {
	testcluster.Root(t)
	l := engineLab(t)
	c := testcluster.New(t)
	h := c.Host("n1", "--executor", "docker")
	h.Ctl("swarm", "init", "--availability", "active")
	h.CtlIn(testcluster.Canary, "secret", "create", "db", "-")
	image := l.image(t, `CMD ["/bin/sh","-c","cat /run/secrets/db | wc -c; trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done"]`)
	h.Ctl("service", "create", "--name", "web", "--replicas", "2", "--secret", "db", image)
	testcluster.Await(t, limit, func() error { return running(h, "web", 2) })
	ids := l.ofService(t, "web")
	if len(ids) != 2 {
		t.Fatalf("containers = %q", ids)
	}
	if out := h.Ctl("node", "inspect", "n1"); !strings.Contains(out, `"Executor": "docker"`) || !strings.Contains(out, `"SecretMounts": "detached"`) {
		t.Errorf("node inspect = %s", out)
	}
	told := func() error {
		out, stderr, _ := h.Try("service", "logs", "web")
		if strings.Count(out, fmt.Sprintf("| %d\n", len(testcluster.Canary))) != 2 {
			return fmt.Errorf("logs = %q, %q", out, stderr)
		}
		return nil
	}
	testcluster.Await(t, limit, told)
	searchEngine(t, l)

	h.Kill()
	h.Start()
	testcluster.Await(t, limit, func() error { return running(h, "web", 2) })
	if again := l.ofService(t, "web"); fmt.Sprint(again) != fmt.Sprint(ids) {
		t.Errorf("after a kill of the daemon the containers are %q, were %q", again, ids)
	}
	testcluster.Await(t, limit, told)
	h.Ctl("service", "create", "--name", "wrong", "host", "sleep", "60")
	testcluster.Await(t, limit, func() error {
		if out := h.Ctl("service", "ps", "--no-trunc", "wrong"); !strings.Contains(out, `no image "host"`) {
			return errors.New(out)
		}
		return nil
	})
	h.Ctl("service", "rm", "web", "wrong")
	testcluster.Await(t, limit, func() error { // a task's folder goes after its container
		containers := l.ofService(t, "web")
		folders, err := filepath.Glob(filepath.Join(h.State, "tasks", "docker", "*", "*"))
		if err != nil || len(containers)+len(folders) > 0 {
			return fmt.Errorf("containers %q and folders %q are left, %v", containers, folders, err)
		}
		return nil
	})
	searchEngine(t, l)
}

// ofService returns the containers of a service, sorted.
func (l *lab) ofService(t *testing.T, name string) (ids []string) {
	t.Helper()
	r, err := l.cli.ContainerList(t.Context(), client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", "warden.service="+name)})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Items {
		ids = append(ids, c.ID)
	}
	slices.Sort(ids)
	return ids
}

// searchEngine searches what the engine keeps of containers for the canary.
func searchEngine(t *testing.T, l *lab) {
	t.Helper()
	info, err := l.cli.Info(t.Context(), client.InfoOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{filepath.Join(info.Info.DockerRootDir, "containers"), filepath.Join(info.Info.DockerRootDir, "volumes"), "/run/docker", "/run/containerd"} {
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil // gone meanwhile
			}
			if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(testcluster.Canary)) {
				t.Errorf("the canary is in %s", path)
			}
			return nil
		})
	}
}

// TestStoryWithoutEngine: a daemon that finds no engine starts all the same; its tasks fail with the reason, and run once the engine is
// there. auto takes the engine only where it answers.
func TestStoryWithoutEngine(t *testing.T) {
	testcluster.Root(t)
	own := newEngine(t, false)
	t.Setenv("DOCKER_HOST", own.host)
	c := testcluster.New(t)
	h := c.Host("n1", "--executor", "docker")
	h.Ctl("swarm", "init", "--availability", "active")
	h.Ctl("service", "create", "--name", "web", "no-such-image", "sleep", "60")
	testcluster.Await(t, limit, func() error {
		if out := h.Ctl("service", "ps", "--no-trunc", "web"); !strings.Contains(out, "not reachable") {
			return errors.New(out)
		}
		return nil
	})
	h.Ctl("service", "rm", "web")
	chosen(t, c.Host("n2", "--executor", "auto"), "process")
	own.run(t)
	h.Ctl("service", "create", "--name", "web", own.base, "sleep", "60")
	testcluster.Await(t, limit, func() error { return running(h, "web", 1) })
	chosen(t, c.Host("n3", "--executor", "auto"), "docker")
	h.Ctl("service", "rm", "web")
	testcluster.Await(t, limit, func() error {
		if left := own.ofService(t, "web"); len(left) > 0 {
			return fmt.Errorf("containers %q are left", left)
		}
		return nil
	})
}

// chosen wants the daemon to have chosen this executor.
func chosen(t *testing.T, h *testcluster.Host, want string) {
	t.Helper()
	b, err := os.ReadFile(h.LogPath)
	if err != nil || !bytes.Contains(b, []byte(`msg="chose executor" part=executor executor=`+want)) {
		t.Errorf("%s did not choose %s: %s, %v", h.Name, want, b, err)
	}
}
