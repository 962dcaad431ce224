package docker

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"warden"
	"warden/executor"
)

// engine is the Docker Engine as this package uses it: every call is bounded in time, and every error has a code. Safe for
// concurrent use.
type engine struct {
	host string

	mu   sync.Mutex // guards the fields below; held across nothing that blocks
	cli  *client.Client
	info *facts // what the engine behind cli can do; nil: not asked yet
}

func newEngine(host string) (*engine, error) {
	if !strings.HasPrefix(host, "unix://") {
		return nil, warden.Hint(warden.Errorf(warden.CodeInvalid, "reading the address of the engine", "%.200q is not a Unix socket", host),
			"the engine must be on this machine: unix:///path/of/docker.sock")
	}
	e := &engine{host: host}
	_, err := e.client()
	return e, err
}

// client returns the present client, which knows the engine's API version once it has talked to it.
func (e *engine) client() (*client.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cli == nil {
		cli, err := client.New(client.WithHost(e.host), client.WithUserAgent("warden"))
		if err != nil {
			return nil, warden.Recode(warden.CodeInvalid, "reading the address of the engine", err)
		}
		e.cli = cli
	}
	return e.cli, nil
}

// drop forgets what was learnt of an engine that has gone: another version may come in its place.
func (e *engine) drop(cli *client.Client) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cli == cli {
		e.cli, e.info = nil, nil
		_ = cli.Close() // idle connections only; never fails
	}
}

// call calls f with a context that ends after limit. Errors: the context's where the caller's ended; CodeTimeout where limit did;
// CodeUnavailable without an engine; CodeInvalid, CodeNotFound and CodeConflict as the engine says; else CodeInternal.
func (e *engine) call(ctx context.Context, limit time.Duration, op string, f func(context.Context, *client.Client) error) error {
	cli, err := e.client()
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = f(bounded, cli)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return warden.Wrap(op, ctx.Err())
	case bounded.Err() != nil || errors.Is(err, context.DeadlineExceeded):
		e.drop(cli)
		return warden.Hint(warden.Errorf(warden.CodeTimeout, op, "the Docker Engine did not answer within %s", limit), "look at the engine's state and log")
	case unreachable(err):
		e.drop(cli)
		return warden.Hint(warden.Errorf(warden.CodeUnavailable, op, "the Docker Engine at %s is not reachable", e.host),
			"start the engine (systemctl start docker), or run the daemon with --executor process")
	}
	return warden.Recode(codeOf(err), op, err)
}

// unreachable reports whether there is no engine at the other end, or none any more.
func unreachable(err error) bool {
	text := err.Error()
	return client.IsErrConnectionFailed(err) || strings.HasSuffix(text, "EOF") || strings.Contains(text, "connection reset") || strings.Contains(text, "broken pipe")
}

func codeOf(err error) warden.Code {
	switch {
	case errdefs.IsInvalidArgument(err):
		return warden.CodeInvalid
	case errdefs.IsNotFound(err):
		return warden.CodeNotFound
	case errdefs.IsConflict(err):
		return warden.CodeConflict
	}
	return warden.CodeInternal
}

// Answers reports whether an engine answers at host within limit.
func Answers(ctx context.Context, host string, limit time.Duration) bool {
	e, err := newEngine(host)
	if err != nil {
		return false
	}
	return e.call(ctx, limit, "looking for the engine", func(ctx context.Context, cli *client.Client) error {
		defer cli.Close()
		_, err := cli.Ping(ctx, client.PingOptions{})
		return err
	}) == nil
}

// facts are what an engine can do.
type facts struct {
	memory, cpu, pids bool
	remapped          bool // uid 0 of its containers is another uid of the host
}

func (e *engine) facts(ctx context.Context) (facts, error) {
	e.mu.Lock()
	known := e.info
	e.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	var f facts
	err := e.call(ctx, callTime, "asking what the engine can do", func(ctx context.Context, cli *client.Client) error {
		i, err := cli.Info(ctx, client.InfoOptions{})
		if err != nil {
			return err
		}
		f = facts{memory: i.Info.MemoryLimit, cpu: i.Info.CPUCfsQuota && i.Info.CPUCfsPeriod, pids: i.Info.PidsLimit}
		f.remapped = slices.ContainsFunc(i.Info.SecurityOptions, func(s string) bool {
			return strings.HasPrefix(s, "name=userns") || strings.HasPrefix(s, "name=rootless")
		})
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.cli == cli {
			e.info = &f
		}
		return nil
	})
	return f, err
}

// check refuses limits that the engine would drop with a warning.
func (f facts) check(spec executor.Spec) error {
	for _, c := range []struct {
		asked, can bool
		what       string
	}{{spec.LimitMemoryBytes > 0, f.memory, "memory"}, {spec.LimitNanoCPUs > 0, f.cpu, "CPU"}, {true, f.pids, "process"}} {
		if c.asked && !c.can {
			return warden.Hint(warden.Errorf(warden.CodeUnsupported, "checking the task", "the engine cannot enforce its %s limit", c.what),
				"the kernel lacks the cgroup controller: see the warnings of docker info")
		}
	}
	return nil
}

// image is one that the engine has.
type image struct {
	ID, user                          string
	entrypoint, command, env, volumes []string
}

// root reports whether the image names no user, or uid 0 by number or by its usual name.
func (i image) root() bool {
	name, _, _ := strings.Cut(i.user, ":")
	return strings.Trim(name, "0") == "" || name == "root"
}

// image returns the image of a name, which is pulled where the engine has none. Errors: CodeInvalid where it is not to be had.
func (e *engine) image(ctx context.Context, ref string) (image, error) {
	img, err := e.lookUp(ctx, ref)
	if warden.CodeOf(err) != warden.CodeNotFound {
		return img, err
	}
	op := "pulling image " + ref
	err = e.call(ctx, pullTime, op, func(ctx context.Context, cli *client.Client) error {
		r, err := cli.ImagePull(ctx, ref, client.ImagePullOptions{})
		if err != nil {
			return err
		}
		return r.Wait(ctx)
	})
	switch code := warden.CodeOf(err); {
	case err == nil:
		return e.lookUp(ctx, ref)
	case ctx.Err() != nil || code == warden.CodeTimeout || code == warden.CodeUnavailable:
		return image{}, err
	}
	return image{}, warden.Hint(warden.Errorf(warden.CodeInvalid, "looking for the image", "the engine does not have it and cannot get it: %w", err),
		"check the name; or load it on the node (docker load, docker pull): registries that want a login are not supported")
}

func (e *engine) lookUp(ctx context.Context, ref string) (img image, err error) {
	err = e.call(ctx, callTime, "looking for image "+ref, func(ctx context.Context, cli *client.Client) error {
		r, err := cli.ImageInspect(ctx, ref)
		if err != nil {
			return err
		}
		img.ID = r.ID
		if c := r.Config; c != nil {
			img.user, img.entrypoint, img.command, img.env = c.User, c.Entrypoint, c.Cmd, c.Env
			for v := range c.Volumes {
				img.volumes = append(img.volumes, v)
			}
		}
		return nil
	})
	return img, err
}

func (e *engine) create(ctx context.Context, o client.ContainerCreateOptions) (id string, err error) {
	err = e.call(ctx, workTime, "creating the container", func(ctx context.Context, cli *client.Client) error {
		r, err := cli.ContainerCreate(ctx, o)
		id = r.ID
		return err
	})
	return id, err
}

func (e *engine) start(ctx context.Context, id string) error {
	const op = "starting the container"
	err := e.call(ctx, workTime, op, func(ctx context.Context, cli *client.Client) error {
		_, err := cli.ContainerStart(ctx, id, client.ContainerStartOptions{})
		return err
	})
	if err != nil && (strings.Contains(err.Error(), "unable to find user") || strings.Contains(err.Error(), "unable to find group") || strings.Contains(err.Error(), "no matching entries")) {
		return warden.Hint(warden.Recode(warden.CodeInvalid, op, err), "the image names a user or group that its /etc/passwd or /etc/group does not have")
	}
	return err
}

func (e *engine) inspect(ctx context.Context, id string) (c container.InspectResponse, err error) {
	err = e.call(ctx, callTime, "asking for the container's state", func(ctx context.Context, cli *client.Client) error {
		r, err := cli.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
		if err != nil {
			return err
		}
		if c = r.Container; c.State == nil || c.Config == nil || c.HostConfig == nil {
			return errors.New("the engine's answer is not complete")
		}
		return nil
	})
	return c, err
}

// kill sends SIGKILL by way of the engine, which thaws a container that was paused.
func (e *engine) kill(ctx context.Context, id string) error {
	return e.call(ctx, callTime, "killing the container", func(ctx context.Context, cli *client.Client) error {
		_, err := cli.ContainerKill(ctx, id, client.ContainerKillOptions{Signal: "SIGKILL"})
		return err
	})
}

// remove ends and removes a container with its anonymous volumes. One that is not there is no error.
func (e *engine) remove(ctx context.Context, id string) error {
	for deadline := time.Now().Add(workTime); ; {
		err := e.call(ctx, workTime, "removing the container", func(ctx context.Context, cli *client.Client) error {
			_, err := cli.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
			return err
		})
		switch warden.CodeOf(err) {
		case warden.CodeNotFound:
			return nil
		case warden.CodeConflict: // somebody else removes it just now
			if time.Now().Before(deadline) && pause(ctx, 100*time.Millisecond) {
				continue
			}
		}
		return err
	}
}

// lastWords returns the last line on a container's log, or "".
func (e *engine) lastWords(ctx context.Context, id string) (text string) {
	_ = e.call(ctx, callTime, "reading the container's log", func(ctx context.Context, cli *client.Client) error {
		stream, err := cli.ContainerLogs(ctx, id, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true, Tail: "1"})
		if err != nil {
			return err
		}
		defer stream.Close()
		b, err := io.ReadAll(io.LimitReader(stream, packetMax))
		text = strings.TrimSpace(string(b[min(len(b), frameHead):]))
		return err
	})
	return text
}

// mine lists the containers with the mark of one state directory, running or not, as container ID to task ID; with a task ID, of that task alone.
func (e *engine) mine(ctx context.Context, mark, taskID string) (found map[string]string, err error) {
	filters := client.Filters{}.Add("label", labelState+"="+mark)
	if taskID != "" {
		filters = filters.Add("label", labelTask+"="+taskID)
	}
	err = e.call(ctx, callTime, "listing containers", func(ctx context.Context, cli *client.Client) error {
		r, err := cli.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: filters})
		found = map[string]string{}
		for _, c := range r.Items {
			found[c.ID] = c.Labels[labelTask]
		}
		return err
	})
	return found, err
}

// pause waits for d, and reports false where ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
