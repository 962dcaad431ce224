package docker

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"warden"
	"warden/executor"
	"warden/tmpfsmount"
)

// Labels of every container. They win over labels of the service.
const (
	labelTask    = "warden.task"
	labelService = "warden.service"
	labelState   = "warden.state" // whose container it is: the state directory's, hashed
)

// Bounds of a container.
const (
	PidsMax     = 512                             // processes and threads, init's own included
	oomAdjust   = 500                             // oom_score_adj of what a task runs
	tmpBytes    = 256 << 20                       // /tmp and /var/tmp, each; they count towards the memory limit
	shmBytes    = 64 << 20                        // /dev/shm
	runBytes    = 16 << 20                        // /run
	filesMax    = 64 << 10                        // inodes of each of these
	imageRefMax = 512                             // bytes of an image's name
	placeholder = "size=4k,mode=0755,nr_inodes=2" // of /run/secrets until the secrets come
)

// Where a container finds its gate and the socket.
const (
	gatePath   = "/.warden/init"
	gateSocket = "/.warden/gate"
)

var imageRef = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/@-]*$`)

// check refuses a spec that can never run, and plans its secrets. Errors: CodeInvalid, CodeTooLarge. Pure.
func check(spec executor.Spec) (plan, error) {
	const op = "checking the task"
	refuse := func(hint, format string, args ...any) (plan, error) {
		return plan{}, warden.Hint(warden.Errorf(warden.CodeInvalid, op, format, args...), hint)
	}
	switch {
	case !warden.ValidID(spec.TaskID):
		return refuse("", "its ID is malformed")
	case spec.Image == "host":
		return refuse("use an image of a registry or of the node's engine, or nodes with the process executor", `the docker executor has no image "host"`)
	case len(spec.Image) > imageRefMax || !imageRef.MatchString(spec.Image) || strings.Contains(spec.Image, ".."):
		return refuse("write it as for docker run: name, name:tag or name@sha256:…", "%.200q is not the name of an image", spec.Image)
	case spec.LimitMemoryBytes < 0 || spec.LimitNanoCPUs < 0:
		return refuse("", "a limit is negative")
	}
	for _, word := range append(slices.Clone(spec.Command), spec.Env...) {
		if strings.ContainsRune(word, 0) {
			return refuse("", "its command or environment has a NUL byte")
		}
	}
	for _, v := range spec.Env {
		if strings.IndexByte(v, '=') < 1 {
			return refuse("", "an environment variable is not KEY=value")
		}
	}
	for _, s := range spec.Secrets {
		if s.UID >= 1<<16 || s.GID >= 1<<16 {
			return refuse("use a uid and gid below 65536", "secret %q is for uid %d, gid %d", s.Target, s.UID, s.GID)
		}
	}
	p := plan{files: spec.Secrets}
	_, err := p.mount(owner{uids: allIDs, gids: allIDs})
	return p, err
}

// plan is the secrets of one task.
type plan struct{ files []executor.SecretFile }

// owner is whom a task's secrets belong to: its uid and gid as the host sees them, and how ids of its user namespace are seen there.
type owner struct {
	uid, gid   uint32
	uids, gids idMap
}

// mount returns what is mounted for the task. An owner 0, which no container runs as on the host, means the task itself. Errors:
// CodeInvalid for an id that the task's user namespace does not have.
func (p plan) mount(o owner) (tmpfsmount.Plan, error) {
	files := make([]tmpfsmount.File, 0, len(p.files))
	for _, s := range p.files {
		f := tmpfsmount.File{Name: s.Target, UID: o.uid, GID: o.gid, Mode: s.Mode, Data: s.Data}
		okUID, okGID := true, true
		if s.UID != 0 {
			f.UID, okUID = o.uids.host(s.UID)
		}
		if s.GID != 0 {
			f.GID, okGID = o.gids.host(s.GID)
		}
		if !okUID || !okGID {
			return tmpfsmount.Plan{}, warden.Errorf(warden.CodeInvalid, "planning a secrets mount", "containers of this engine have no uid %d or gid %d", s.UID, s.GID)
		}
		files = append(files, f)
	}
	return tmpfsmount.NewPlan(files)
}

// idMap is a user namespace's map of ids (user_namespaces(7)).
type idMap [][3]int64 // inside, outside, count

// allIDs is the map of the host's own user namespace.
var allIDs = idMap{{0, 0, 1<<32 - 1}}

// readIDMap reads /proc/PID/uid_map or gid_map.
func readIDMap(path string) (m idMap, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		var r [3]int64
		if _, err := fmt.Sscan(line, &r[0], &r[1], &r[2]); err != nil {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		m = append(m, r)
	}
	return m, nil
}

// host returns the id as the host sees it.
func (m idMap) host(id uint32) (uint32, bool) {
	for _, r := range m {
		if n := int64(id); n >= r[0] && n < r[0]+r[2] {
			return uint32(n - r[0] + r[1]), true
		}
	}
	return 0, false
}

// config is the container of a task. uid is that of the host that it runs as where its image names none, else 0. Errors:
// CodeInvalid where image and task together name no program, or the image has a volume in the way.
func (e *Executor) config(spec executor.Spec, img image, uid uint32) (client.ContainerCreateOptions, error) {
	const op = "checking the task"
	command := spec.Command
	if len(command) == 0 {
		command = img.command
	}
	if command = append(slices.Clone(img.entrypoint), command...); len(command) == 0 || command[0] == "" {
		return client.ContainerCreateOptions{}, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "it has no command, and image %s has neither entrypoint nor command", spec.Image),
			"name a command after the image")
	}
	for _, v := range img.volumes {
		if v = filepath.Clean(v); v == warden.SecretsDir || v == filepath.Dir(gatePath) {
			return client.ContainerCreateOptions{}, warden.Errorf(warden.CodeInvalid, op, "image %s has a volume at %s, which is warden's", spec.Image, v)
		}
	}
	cfg := &container.Config{
		Hostname: spec.TaskID[:12], Image: spec.Image, Env: slices.Clone(spec.Env), Entrypoint: []string{gatePath, gateVerb}, Cmd: command,
		Labels: maps.Clone(spec.Labels), Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
	}
	if cfg.Labels == nil {
		cfg.Labels = map[string]string{}
	}
	cfg.Labels[labelTask], cfg.Labels[labelService], cfg.Labels[labelState] = spec.TaskID, spec.ServiceName, e.mark
	if uid != 0 {
		cfg.User = fmt.Sprintf("%d:%d", uid, uid)
		if !slices.ContainsFunc(append(slices.Clone(spec.Env), img.env...), func(v string) bool { return strings.HasPrefix(v, "HOME=") }) {
			cfg.Env = append(cfg.Env, "HOME=/tmp") // no passwd file knows this uid
		}
	}
	if grace := int((spec.StopGrace + time.Second - 1) / time.Second); grace > 0 {
		cfg.StopTimeout = &grace // for an engine that stops
	}
	none, pids := false, int64(PidsMax)
	host := &container.HostConfig{
		OomScoreAdj: oomAdjust, NetworkMode: "default", IpcMode: container.IPCModeNone, CgroupnsMode: container.CgroupnsModePrivate,
		RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled},
		CapDrop:       []string{"ALL"}, SecurityOpt: []string{"no-new-privileges"}, ReadonlyRootfs: true, Init: &none,
		Tmpfs: e.tmpfs(spec, img),
		Mounts: []mount.Mount{
			{Type: mount.TypeBind, Source: filepath.Join(e.dir, gateFile), Target: gatePath, ReadOnly: true},
			{Type: mount.TypeBind, Source: filepath.Join(e.taskDir(spec.TaskID), socketFile), Target: gateSocket, ReadOnly: true},
		},
		// Two files of half the bound; compressed ones would be larger when they are read.
		LogConfig: container.LogConfig{Type: "local", Config: map[string]string{"max-size": strconv.Itoa(warden.TaskLogMax / 2), "max-file": "2", "compress": "false"}},
		Resources: container.Resources{
			NanoCPUs: spec.LimitNanoCPUs, Memory: spec.LimitMemoryBytes, MemorySwap: spec.LimitMemoryBytes, PidsLimit: &pids,
			Ulimits: []*container.Ulimit{{Name: "core"}},
		},
	}
	return client.ContainerCreateOptions{Name: "warden-" + spec.TaskID, Config: cfg, HostConfig: host}, nil
}

// tmpfs returns the writable places of a container: its root is read-only, so that what a program makes of a secret stays in
// memory and no task fills the disk. A volume of the image goes first.
func (e *Executor) tmpfs(spec executor.Spec, img image) map[string]string {
	options := func(flags string, bytes int) string {
		return fmt.Sprintf("%s,mode=1777,size=%d,nr_inodes=%d", flags, bytes, filesMax)
	}
	all := map[string]string{
		"/tmp": options("exec", tmpBytes), "/var/tmp": options("exec", tmpBytes), "/run": options("noexec", runBytes), "/dev/shm": options("noexec", shmBytes),
	}
	if len(spec.Secrets) > 0 {
		all[warden.SecretsDir] = placeholder
	}
	for _, v := range img.volumes {
		delete(all, filepath.Clean(v))
	}
	return all
}
