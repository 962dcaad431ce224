package bed_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"warden/internal/testcluster"
	"warden/test/bed"
)

// appImage is what the containers are of: the program of testdata/app, and nothing else.
const appImage = "warden-bed-app:1"

// app returns a tar of the files of the image.
func app(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "app")
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "./testdata/app")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the program of the containers: %v\n%s", err, out)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err = w.WriteHeader(&tar.Header{Name: "app", Mode: 0o755, Size: int64(len(program))})
	_, werr := w.Write(program)
	if err := errors.Join(err, werr, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// dial returns a client of a host's engine.
func dial(t *testing.T, h *bed.Host) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost(h.EngineHost()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// containers returns those that an engine has, and how many do not run.
func containers(c *client.Client) (ids []string, ended int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	r, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
	for _, x := range r.Items {
		ids = append(ids, x.ID)
		if x.State != "running" {
			ended++
		}
	}
	slices.Sort(ids)
	return ids, ended, err
}

// TestEngines: two workers with a Docker Engine each run a service with a secret in containers; an engine is killed, a worker cut
// off, and of the service nothing is left when it is removed, of the bed when it ends.
func TestEngines(t *testing.T) {
	t.Parallel()
	bed.NeedEngine(t)
	var dir string
	var processes, groups []string
	if !t.Run("bed", func(t *testing.T) {
		b := bed.New(t)
		m := b.Hosts([]string{"m1", "m2", "m3"})
		w := b.Hosts([]string{"w1", "w2"}, bed.WithEngine())
		image := app(t)
		var engines []*client.Client
		for _, h := range w {
			c := dial(t, h)
			engines = append(engines, c)
			r, err := c.ImageImport(t.Context(), client.ImageImportSource{Source: bytes.NewReader(image), SourceName: "-"}, appImage, client.ImageImportOptions{})
			if err != nil {
				t.Fatalf("importing an image at %s: %v", h.Name, err)
			}
			var said bytes.Buffer
			if _, err := said.ReadFrom(r); err != nil || strings.Contains(said.String(), `"error"`) {
				t.Fatalf("importing an image at %s: %v %s", h.Name, err, &said)
			}
			r.Close()
		}
		b.Form(m, w)

		secret := filepath.Join(t.TempDir(), "password")
		if err := os.WriteFile(secret, []byte("of 12 bytes."), 0o600); err != nil {
			t.Fatal(err)
		}
		m[0].Ctl("secret", "create", "password", secret)
		m[0].Ctl("service", "create", "--name", "app", "--replicas", "4", "--secret", "password", appImage, "/app")
		// settled waits until so many containers run at each engine, and no other ones are there, and returns them.
		settled := func(when string, want ...int) (at [2][]string) {
			t.Helper()
			testcluster.Await(t, limit, func() error {
				for i, c := range engines {
					ids, ended, err := containers(c)
					if err != nil || len(ids) != want[i] || ended > 0 {
						return fmt.Errorf("%s: %d containers at %s, %d of them ended, want %d: %w", when, len(ids), w[i].Name, ended, want[i], err)
					}
					at[i] = ids
				}
				return nil
			})
			return at
		}
		testcluster.AwaitRunning(t, m[0], "app", 4)
		first := settled("at first", 2, 2)
		testcluster.Await(t, limit, func() error {
			out, stderr, _ := m[0].Try("service", "logs", "app")
			if n := strings.Count(out, "a secret of 12 bytes, <nil>"); n != 4 {
				return fmt.Errorf("%d of 4 containers have their secret:\n%s%s", n, out, stderr)
			}
			return nil
		})

		w[0].KillEngine()
		w[0].StartEngine()
		b.AwaitReady(m[0], 5)
		testcluster.AwaitRunning(t, m[0], "app", 4)
		if now := settled("after an engine was killed", 2, 2); !slices.Equal(now[0], first[0]) || !slices.Equal(now[1], first[1]) {
			t.Errorf("after an engine was killed: containers %q, before %q", now, first)
		}

		b.Isolate(w[1])
		testcluster.Await(t, limit, func() error {
			if nodes := testcluster.AwaitRunning(t, m[0], "app", 4); slices.Contains(nodes, "w2") {
				return fmt.Errorf("tasks are on %v, of which w2 is cut off", nodes)
			}
			return nil
		})
		b.Heal()
		b.AwaitReady(m[0], 5)
		settled("after a worker was cut off", 4, 0)

		m[0].Ctl("service", "scale", "app=6")
		testcluster.AwaitRunning(t, m[0], "app", 6)
		settled("scaled", 4, 2)
		dir, processes = b.Dir, processesOf(b)
		m[0].Ctl("service", "rm", "app")
		settled("removed", 0, 0)
		for _, h := range w {
			if mounts, err := h.Run("cat", "/proc/self/mountinfo"); err != nil || strings.Contains(mounts, "secret") {
				t.Errorf("mounts of %s when the service is gone: %v\n%s", h.Name, err, mounts)
			}
		}
		m[0].Ctl("service", "create", "--name", "left", "--replicas", "2", "--secret", "password", appImage, "/app")
		testcluster.AwaitRunning(t, m[0], "left", 2) // what runs when the bed ends
		processes, groups = append(processes, processesOf(b)...), bed.Cgroups(dir)
		if len(groups) < len(w) {
			t.Errorf("cgroups of %d engines = %q", len(w), groups)
		}
		if err := leftover(dir, processes); err == nil {
			t.Error("leftover does not see a bed that is there")
		}
	}) || dir == "" {
		return // skipped
	}
	if err := leftover(dir, processes); err != nil {
		t.Error(err)
	}
	for _, group := range groups {
		if _, err := os.Stat(group); err == nil {
			t.Errorf("%s is left", group)
		}
	}
}
