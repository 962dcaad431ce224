package main

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"google.golang.org/grpc/credentials/insecure"

	"warden"
	"warden/api"
)

// runner is one way to have containers run on an engine.
type runner interface {
	// create has so many containers of the lab's image run. It may return before they do.
	create(ctx context.Context, name string, containers int) error
	// running returns how many run.
	running(ctx context.Context, name string) (int, error)
	// remove ends and removes them. It may return before they are gone.
	remove(ctx context.Context, name string) error
}

// runners are by their names, and start what they need on a lab's engine.
var runners = map[string]func(context.Context, *lab) (runner, error){
	"warden": newWardenRunner,
	"swarm":  newSwarmRunner,
	"run1":   func(_ context.Context, l *lab) (runner, error) { return &plainRunner{lab: l, clients: 1}, nil },
	"run20":  func(_ context.Context, l *lab) (runner, error) { return &plainRunner{lab: l, clients: 20}, nil },
}

func (l *lab) env() []string { return []string{"PROBE=" + bridge + ":" + probePort} }

// plainRunner does what `docker run -d` does, by the engine's API, so many at a time.
type plainRunner struct {
	lab     *lab
	clients int

	mu  sync.Mutex // guards ids
	ids []string   // of what runs
}

func (r *plainRunner) create(ctx context.Context, name string, containers int) error {
	todo := make(chan struct{}, containers)
	for range containers {
		todo <- struct{}{}
	}
	close(todo)
	errs := make([]error, r.clients)
	var wg sync.WaitGroup
	for i := range r.clients {
		wg.Go(func() {
			for range todo {
				if errs[i] = r.one(ctx, name); errs[i] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (r *plainRunner) one(ctx context.Context, name string) error {
	made, err := r.lab.cli.ContainerCreate(ctx, client.ContainerCreateOptions{
		Config: &container.Config{Image: r.lab.image, Env: r.lab.env(), Labels: map[string]string{"peers": name}}, HostConfig: &container.HostConfig{},
	})
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.ids = append(r.ids, made.ID)
	r.mu.Unlock()
	_, err = r.lab.cli.ContainerStart(ctx, made.ID, client.ContainerStartOptions{})
	return err
}

func (r *plainRunner) running(ctx context.Context, name string) (int, error) {
	all, err := r.lab.cli.ContainerList(ctx, client.ContainerListOptions{Filters: client.Filters{}.Add("label", "peers="+name).Add("status", "running")})
	return len(all.Items), err
}

func (r *plainRunner) remove(ctx context.Context, _ string) error {
	for _, id := range r.ids {
		if _, err := r.lab.cli.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true}); err != nil {
			return err
		}
	}
	r.ids = nil
	return nil
}

// swarmRunner is the engine's own swarm mode, with this engine as its one manager and worker.
type swarmRunner struct{ lab *lab }

func newSwarmRunner(ctx context.Context, l *lab) (runner, error) {
	_, err := l.cli.SwarmInit(ctx, client.SwarmInitOptions{ListenAddr: "127.0.0.1:2377", AdvertiseAddr: "127.0.0.1"})
	return swarmRunner{l}, err
}

func (r swarmRunner) create(ctx context.Context, name string, containers int) error {
	n := uint64(containers)
	_, err := r.lab.cli.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: swarm.ServiceSpec{
		Annotations:  swarm.Annotations{Name: name},
		TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: r.lab.image, Env: r.lab.env()}},
		Mode:         swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &n}},
	}})
	return err
}

func (r swarmRunner) running(ctx context.Context, name string) (n int, err error) {
	all, err := r.lab.cli.TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", name)})
	for _, t := range all.Items {
		if t.Status.State == swarm.TaskStateRunning {
			n++
		}
	}
	return n, err
}

func (r swarmRunner) remove(ctx context.Context, name string) error {
	_, err := r.lab.cli.ServiceRemove(ctx, name, client.ServiceRemoveOptions{})
	return err
}

// wardenRunner is a Warden daemon with the docker executor, its one manager and worker.
type wardenRunner struct {
	lab *lab
	op  wardenOp
}

func newWardenRunner(ctx context.Context, l *lab) (runner, error) {
	socket := filepath.Join(l.Dir, "warden.sock")
	if err := l.start("warden", []string{"DOCKER_HOST=" + l.engine()}, l.Warden, "run", "--state-dir", filepath.Join(l.Dir, "warden"), "--socket", socket,
		"--listen", "127.0.0.1:2377", "--executor", "docker"); err != nil {
		return nil, err
	}
	cc, err := dialSocket(socket, insecure.NewCredentials())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	op := wardenOperator(cc).(wardenOp)
	if _, err := op.local.Init(ctx, &api.InitRequest{Availability: api.Availability_AVAILABILITY_ACTIVE}); err != nil {
		return nil, l.lastWords("warden", err)
	}
	return wardenRunner{l, op}, nil
}

func (r wardenRunner) create(ctx context.Context, name string, containers int) error {
	_, err := r.op.ctl.CreateService(ctx, &api.CreateServiceRequest{Spec: &api.ServiceSpec{Name: name, Replicas: uint64(containers), Update: &api.UpdatePolicy{},
		Task: &api.TaskSpec{Image: r.lab.image, Env: r.lab.env(), Zone: warden.DefaultZone}}})
	return err
}

func (r wardenRunner) running(ctx context.Context, name string) (int, error) {
	return r.op.running(ctx, name)
}

func (r wardenRunner) remove(ctx context.Context, name string) error {
	return r.op.remove(ctx, name)
}
