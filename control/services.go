package control

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/policy"
	"warden/scheduler"
	"warden/store"
)

const (
	imageMax = 256 // bytes of the name of an image

	// specMax bounds what tasks run, in bytes: one command of the log has an old task and the one that replaces it.
	specMax = warden.CommandBytes/2 - 16<<10
)

// CreateService checks a spec and stores it. The orchestrator makes tasks; a secret that the spec names without a version is
// that of the day for each task that it makes.
func (s *Server) CreateService(ctx context.Context, r *api.CreateServiceRequest) (*api.ChangeReply, error) {
	reply, err := s.createService(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) createService(ctx context.Context, r *api.CreateServiceRequest) (*api.ChangeReply, error) {
	if r.Spec == nil || r.Spec.Task == nil {
		return nil, warden.Errorf(warden.CodeInvalid, "creating a service", "the spec is missing")
	}
	if err := warden.CheckName("service", r.Spec.Name); err != nil {
		return nil, err
	}
	op := "creating service " + r.Spec.Name
	ctx, id, err := s.newID(ctx, api.Kind_KIND_SERVICE)
	if err != nil {
		return nil, err
	}
	return s.alter(ctx, func(v *store.View) (change, error) {
		spec := api.Clone(r.Spec)
		c, err := create(v, op, spec.Name, &api.Service{Id: id, Spec: spec})
		if err != nil || c.made != nil {
			return c, err
		}
		if v.ServiceByName(spec.Name) != nil {
			return c, warden.Hint(warden.Errorf(warden.CodeExists, op, "a service has this name"), "choose another name, or remove that service")
		}
		return c, checkService(v, op, spec)
	})
}

// UpdateService replaces the spec of a service, made from the version that the caller has read. The orchestrator replaces the
// tasks that the change concerns. The spec that the service has already makes no new version. Errors: CodeConflict where the
// service has another version now; those of CreateService. A refused update changes nothing.
func (s *Server) UpdateService(ctx context.Context, r *api.UpdateServiceRequest) (*api.ChangeReply, error) {
	reply, err := s.updateService(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) updateService(ctx context.Context, r *api.UpdateServiceRequest) (*api.ChangeReply, error) {
	op := "updating service " + r.Reference
	if r.Spec == nil || r.Spec.Task == nil {
		return nil, warden.Errorf(warden.CodeInvalid, op, "the spec is missing")
	}
	ctx, _, err := withRequestID(ctx)
	if err != nil {
		return nil, err
	}
	stale := false
	reply, err := s.alter(ctx, func(v *store.View) (change, error) {
		c := change{kind: api.Kind_KIND_SERVICE, action: "update service", name: r.Reference}
		id, err := v.Resolve(api.Kind_KIND_SERVICE, r.Reference)
		if err != nil {
			return c, err
		}
		now := v.Service(id)
		c.id, c.name = id, now.Spec.Name
		next := api.Clone(now)
		next.Spec = api.Clone(r.Spec)
		if next.Spec.Name != now.Spec.Name {
			return c, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "the name of a service never changes: it is %q", now.Spec.Name), "create another service, and remove this one")
		}
		if now.Meta.Version != r.Version {
			stale = true
			return c, warden.Hint(warden.Errorf(warden.CodeConflict, op, "it was changed meanwhile: it has version %d, the update was made from %d", now.Meta.Version, r.Version),
				"read it again, and make the update from that")
		}
		if err := checkService(v, op, next.Spec); err != nil {
			return c, err
		}
		if proto.Equal(now.Spec, next.Spec) {
			c.made = now.Meta
		}
		c.ops = []*api.Operation{store.Put(next, r.Version)}
		return c, nil
	})
	if stale { // perhaps by an earlier call with this request ID
		index, derr := s.done(ctx, api.Kind_KIND_SERVICE, warden.NewID())
		if derr != nil {
			return nil, derr
		}
		if index != 0 {
			id, err := s.cfg.Store.View().Resolve(api.Kind_KIND_SERVICE, r.Reference)
			return &api.ChangeReply{Id: id, Version: r.Version + 1, Index: index}, err
		}
	}
	return reply, err
}

// ScaleService sets the number of replicas. The number that it has already makes no new version.
func (s *Server) ScaleService(ctx context.Context, r *api.ScaleServiceRequest) (*api.ChangeReply, error) {
	if r.Replicas > warden.ReplicasMax {
		return nil, api.Error(warden.Errorf(warden.CodeTooLarge, "scaling service "+r.Reference, "at most %d replicas", warden.ReplicasMax))
	}
	reply, err := s.alter(ctx, func(v *store.View) (change, error) {
		c := change{kind: api.Kind_KIND_SERVICE, action: "scale service", name: r.Reference}
		id, err := v.Resolve(api.Kind_KIND_SERVICE, r.Reference)
		if err != nil {
			return c, err
		}
		now := v.Service(id)
		sv := api.Clone(now)
		sv.Spec.Replicas = r.Replicas
		if now.Spec.Replicas == r.Replicas {
			c.made = now.Meta
		}
		c.id, c.name, c.ops = id, sv.Spec.Name, []*api.Operation{store.Put(sv, now.Meta.Version)}
		return c, nil
	})
	return reply, api.Error(err)
}

// RemoveService removes a service. Its tasks are shut down and removed by the orchestrator.
func (s *Server) RemoveService(ctx context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	reply, err := s.remove(ctx, api.Kind_KIND_SERVICE, r.Reference)
	return reply, api.Error(err)
}

// target is what every executor can make a file of (tmpfsmount.CheckName).
var target = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)

var envKey = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// checkService fills in defaults and refuses what is out of bounds, with a reason for each.
func checkService(v *store.View, op string, spec *api.ServiceSpec) error {
	t := spec.Task
	invalid := func(format string, args ...any) error { return warden.Errorf(warden.CodeInvalid, op, format, args...) }
	if spec.Replicas > warden.ReplicasMax {
		return warden.Errorf(warden.CodeTooLarge, op, "%d replicas, at most %d", spec.Replicas, warden.ReplicasMax)
	}
	for _, labels := range []map[string]string{spec.Labels, t.Labels} {
		if err := checkLabels(op, labels); err != nil {
			return err
		}
	}
	if t.Image == "" || len(t.Image) > imageMax {
		return invalid("an image has 1 to %d bytes", imageMax)
	}
	if n := len(strings.Join(t.Command, "")); len(t.Command) > warden.CommandArgsMax || n > warden.CommandBytesMax {
		return invalid("a command has at most %d words and %d bytes", warden.CommandArgsMax, warden.CommandBytesMax)
	}
	if len(t.Env) > warden.EnvMax {
		return invalid("at most %d environment variables", warden.EnvMax)
	}
	for _, e := range t.Env {
		k, _, found := strings.Cut(e, "=")
		if !found || !envKey.MatchString(k) || len(e) > warden.EnvBytesMax || strings.ContainsRune(e, 0) {
			return invalid("an environment variable is KEY=VALUE with a key of letters, digits and '_', at most %d bytes", warden.EnvBytesMax)
		}
	}
	if len(t.Constraints) > warden.ConstraintsMax {
		return invalid("at most %d constraints", warden.ConstraintsMax)
	}
	if u := spec.Update; u != nil {
		if u.Parallelism > warden.ReplicasMax {
			return warden.Errorf(warden.CodeTooLarge, op, "%d tasks updated at once, at most %d", u.Parallelism, warden.ReplicasMax)
		}
		if d := time.Duration(u.DelayNs); d < 0 || d > warden.UpdateDelayMax {
			return invalid("a delay between updated tasks of %s is outside 0 to %s", d, warden.UpdateDelayMax)
		}
	}
	for i, c := range t.Constraints {
		parsed, err := scheduler.ParseConstraint(c)
		if err != nil {
			return warden.Wrap(op, err)
		}
		t.Constraints[i] = parsed.String()
	}
	if t.Zone == "" {
		t.Zone = warden.DefaultZone
	}
	if v.Zone(t.Zone) == nil {
		return noZone(op, t.Zone)
	}
	if err := checkRuntime(t, invalid); err != nil {
		return err
	}
	if err := resolveSecrets(v, op, t, invalid); err != nil {
		return err
	}
	if n := proto.Size(t); n > specMax {
		return warden.Hint(warden.Errorf(warden.CodeTooLarge, op, "what its tasks run is described with %d bytes, at most %d", n, specMax),
			"put large values into the image or into secrets, not into environment variables")
	}
	return nil
}

// checkRuntime checks resources, restarts and the grace of stopping.
func checkRuntime(t *api.TaskSpec, invalid func(string, ...any) error) error {
	if r := t.Resources; r != nil {
		for _, n := range []int64{r.ReserveNanoCpus, r.ReserveMemoryBytes, r.LimitNanoCpus, r.LimitMemoryBytes} {
			if n < 0 {
				return invalid("a reservation or limit is negative")
			}
		}
		if r.LimitNanoCpus > 0 && r.LimitNanoCpus < r.ReserveNanoCpus || r.LimitMemoryBytes > 0 && r.LimitMemoryBytes < r.ReserveMemoryBytes {
			return invalid("a limit is below its reservation")
		}
	}
	switch t.Restart {
	case api.RestartCondition_RESTART_UNSPECIFIED:
		t.Restart = api.RestartCondition_RESTART_ANY
	case api.RestartCondition_RESTART_ANY, api.RestartCondition_RESTART_ON_FAILURE, api.RestartCondition_RESTART_NONE:
	default:
		return invalid("unknown restart condition %d", t.Restart)
	}
	if d := time.Duration(t.RestartDelayNs); d < 0 || d > warden.RestartDelayMax {
		return invalid("a restart delay of %s is outside 0 to %s", d, warden.RestartDelayMax)
	}
	if t.StopGraceNs == 0 {
		t.StopGraceNs = int64(warden.StopGraceDefault)
	}
	if d := time.Duration(t.StopGraceNs); d < 0 || d > warden.StopGraceMax {
		return invalid("a stop grace of %s is outside 0 to %s", d, warden.StopGraceMax)
	}
	return nil
}

// resolveSecrets finds each secret, and that version of it which is pinned or current now, where it may enter the service's
// zone (I6, at admission).
func resolveSecrets(v *store.View, op string, t *api.TaskSpec, invalid func(string, ...any) error) error {
	if len(t.Secrets) > warden.SecretRefsMax {
		return invalid("at most %d secrets", warden.SecretRefsMax)
	}
	known := func(zone string) bool { return v.Zone(zone) != nil }
	targets := map[string]bool{}
	total := uint64(0)
	for _, ref := range t.Secrets {
		name := ref.SecretName
		if name == "" {
			name = ref.SecretId
		}
		id, err := v.Resolve(api.Kind_KIND_SECRET, name)
		if err != nil {
			return warden.Wrap(op, err)
		}
		secret := v.Secret(id)
		if d := policy.SecretMayEnter(secret.Zones, t.Zone, known); !d.Allow {
			verb := "create"
			if strings.HasPrefix(op, "updating") {
				verb = "update"
			}
			return warden.Hint(warden.Errorf(warden.CodeWrongZone, op, "secret %q may not enter zone %q: %s", secret.Name, t.Zone, d.Reason),
				fmt.Sprintf("the service is for zone %s, the secret for %s: %s the service with --zone of those, or use another secret", t.Zone, strings.Join(secret.Zones, ", "), verb))
		}
		ref.SecretId, ref.SecretName = id, secret.Name
		n := cmp.Or(ref.Version, secret.CurrentVersion)
		version := v.SecretVersion(id, n)
		if version == nil {
			return warden.Hint(warden.Errorf(warden.CodeNotFound, op, "secret %q has no version %d", secret.Name, n),
				fmt.Sprintf("see `wardenctl secret inspect %s`; without a version the service follows the current one", secret.Name))
		}
		total += version.SizeBytes
		if ref.Target == "" {
			ref.Target = secret.Name
		}
		if !target.MatchString(ref.Target) || ref.Target == "." || ref.Target == ".." {
			return invalid("%q is no file name for a secret below %s: use 1 to 128 of A-Z, a-z, 0-9, '.', '_', '-'", clip(ref.Target), warden.SecretsDir)
		}
		if targets[ref.Target] {
			return invalid("two secrets have the target %q", ref.Target)
		}
		targets[ref.Target] = true
		if ref.Mode == 0 {
			ref.Mode = 0o400
		}
		if ref.Mode&^0o777 != 0 {
			return invalid("mode %o of secret %q has bits beyond 0777", ref.Mode, secret.Name)
		}
	}
	if total > warden.TaskSecretsMax {
		return invalid("its secrets have %d bytes together, at most %d", total, warden.TaskSecretsMax)
	}
	return nil
}
