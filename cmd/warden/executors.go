package main

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"warden"
	"warden/executor"
	"warden/executor/docker"
	"warden/executor/process"
)

// answerTime is how long auto waits for a Docker Engine to answer.
const answerTime = 2 * time.Second

// dockerDir is the docker executor's part of the folder of tasks.
const dockerDir = "docker"

// newExecutor opens the executor that was chosen, and the other one as well where tasks of it are left: they are adopted like all
// others. dir is the folder of tasks.
func (o options) newExecutor(ctx context.Context, dir string, logger *slog.Logger) (executor.Executor, error) {
	logger = logger.With("part", "executor")
	self, err := os.Executable()
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "finding this program", err)
	}
	host := cmp.Or(os.Getenv("DOCKER_HOST"), docker.DefaultHost)
	open := map[string]func() (executor.Executor, error){
		"docker": func() (executor.Executor, error) {
			return docker.New(filepath.Join(dir, dockerDir), self, host, logger)
		},
		"process": func() (executor.Executor, error) {
			helper, err := process.Self(logger)
			if err != nil {
				return nil, err
			}
			return process.New(dir, helper, logger)
		},
	}
	choice, other := o.executor, "process"
	if choice == "auto" {
		choice = "process"
		if docker.Answers(ctx, host, answerTime) || hasTasks(filepath.Join(dir, dockerDir)) {
			choice = "docker" // also where the engine starts later than this daemon, and has tasks of ours
		}
		logger.Info("chose executor", "executor", choice)
	}
	if choice == "process" {
		other = "docker"
	}
	if open[choice] == nil {
		return nil, warden.Errorf(warden.CodeUsage, "reading --executor", "%q is not auto, docker or process", o.executor)
	}
	chosen, err := open[choice]()
	if err != nil || !hasTasks(map[string]string{"docker": filepath.Join(dir, dockerDir), "process": dir}[other]) {
		return chosen, err
	}
	former, err := open[other]()
	if err != nil {
		return nil, err
	}
	logger.Warn("found tasks of another executor", "executor", other)
	return succession{chosen, former}, nil
}

// hasTasks reports whether an executor has left tasks in its folder.
func hasTasks(dir string) bool {
	entries, _ := os.ReadDir(dir) // one that is not there has none
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.IsDir() && warden.ValidID(e.Name()) })
}

// succession starts tasks on one executor and adopts also those that another one started before.
type succession struct {
	executor.Executor
	former executor.Executor
}

// Adopt returns the tasks of both.
func (s succession) Adopt(ctx context.Context) ([]executor.Task, error) {
	tasks, err := s.Executor.Adopt(ctx)
	if err != nil {
		return nil, err
	}
	more, err := s.former.Adopt(ctx)
	tasks = append(tasks, more...)
	slices.SortFunc(tasks, func(a, b executor.Task) int { return strings.Compare(a.ID(), b.ID()) })
	return tasks, err
}
