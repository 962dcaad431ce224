package powerloss_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"warden/executor/docker"
	"warden/executor/process"
	"warden/internal/leaktest"
	"warden/test/powerloss"
)

// allVar names the environment variable that has every state tried, and a kill after every call, where `make test` draws some.
const allVar = "WARDEN_POWERLOSS_ALL"

const seed = 1

const limit = 3 * time.Minute // of a child

const childVar = "WARDEN_POWERLOSS_CHILD"

// child is what a process of its own is told: what to do, and in which folder.
type child struct{ Sequence, Base string }

func TestMain(m *testing.M) {
	process.Main(os.Args) // of tasks
	docker.Main(os.Args)  // and of containers
	if told := os.Getenv(childVar); told != "" {
		var c child
		if err := json.Unmarshal([]byte(told), &c); err != nil {
			panic(err)
		}
		notes := os.NewFile(powerloss.NoteFD, "notes")
		err := sequences[c.Sequence](c.Base, func(format string, args ...any) { fmt.Fprintf(notes, format, args...) })
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	leaktest.Main(m)
}

// sequences is what a child can do: it works in base/state, and notes what is acknowledged. What it finds in base besides is the test's.
var sequences = map[string]func(base string, note func(string, ...any)) error{}

func state(base string) string { return filepath.Join(base, "state") }

// attack is a sequence that is crashed everywhere, and what must hold after a crash.
type attack struct {
	sequence string
	// prepare fills the folder before: base/state is there, empty.
	prepare func(t *testing.T, base string)
	// check opens base/state with the product's code. notes is what was acknowledged before the crash.
	check func(base string, notes []string) error
	// live is a check that takes long. It comes after every kill, and after as many losses of power as lives says; -1: none.
	live  func(base string, notes []string) error
	lives int
	// kills and losses are how many kills and losses of power are tried; 0: all.
	kills, losses int
	isOwnNetwork  bool // of the processes
	isShared      bool // other processes write there too: nothing is known of losses of power
	isFollowed    bool // other processes, which it starts, write there too and lose power with it
	// beside is a folder of base that is another machine's, or "": a loss of power in base/state finds it as it was then.
	beside string
	// again is a sequence that runs after as many of the kills, on what they left, before power is lost. "": none.
	again  string
	agains int // 0: after all
}

// run crashes the sequence.
func (a attack) run(t *testing.T) {
	t.Parallel()
	s := &scene{t: t, attack: a, dir: scratch(t)}
	s.base = s.folder()
	if a.prepare != nil {
		a.prepare(t, s.base)
	}
	base := s.copy(s.base)
	full, ok := s.trace(a.sequence, base, 0, nil)
	if !ok {
		return
	}
	if got := full.Record.Notes(len(full.Record.Ops)); len(got) == 0 {
		t.Fatal("the sequence notes nothing: no loss could be seen")
	}
	whole := base
	if !a.isShared {
		whole = s.copy(base)
	}
	if err := s.checkAll(whole, full.Record.Notes(len(full.Record.Ops))); err != nil {
		t.Fatalf("unharmed: %v", err)
	}
	start := time.Now()
	kills := s.kills(full.Record.Own())
	killTime := time.Since(start)
	if a.isShared {
		t.Logf("%d operations, killed after %d of them in %s", len(full.Record.Ops), kills, killTime.Round(time.Millisecond))
		return
	}
	start = time.Now()
	states, of := s.losses(full, base, 0, a.losses)
	t.Logf("%d operations, killed after %d of them in %s; power lost in %d of %d distinct ways in %s", len(full.Record.Ops), kills, killTime.Round(time.Millisecond), states, of, time.Since(start).Round(time.Millisecond))
}

// scene is the folders of one attack.
type scene struct {
	t *testing.T
	attack
	dir, base string

	mu sync.Mutex // guards n
	n  int
}

// scratch returns a folder that is in memory where that can be had: what is durable is what the model says.
func scratch(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "warden-powerloss-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// folder returns a new folder with an empty one for the state.
func (s *scene) folder() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	base := filepath.Join(s.dir, fmt.Sprint(s.n))
	if err := os.MkdirAll(state(base), 0o700); err != nil {
		s.t.Fatal(err)
	}
	return base
}

// copy returns a copy of the folder.
func (s *scene) copy(base string) string {
	s.t.Helper()
	to := s.folder()
	tree, err := powerloss.ReadTree(base)
	if err == nil {
		err = errors.Join(os.RemoveAll(to), tree.WriteTree(to))
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return to
}

// trace runs a sequence in base and wants the record to tell what is on the disk.
func (s *scene) trace(sequence, base string, killAt int, after *powerloss.Tracer) (*powerloss.Tracer, bool) {
	told, err := json.Marshal(child{sequence, base})
	if err != nil {
		s.t.Fatal(err)
	}
	how := powerloss.Trace{Argv: []string{os.Args[0]}, Env: append(os.Environ(), childVar+"="+string(told), "GORACE=atexit_sleep_ms=0"), Root: state(base), KillAt: killAt,
		IsShared: s.isShared, IsOwnNetwork: s.isOwnNetwork, IsFollowed: s.isFollowed, Limit: limit, After: after}
	if s.beside != "" && killAt == 0 {
		how.Root, how.Beside = base, filepath.Join(base, s.beside)
	}
	tr, err := how.Run()
	if err != nil {
		s.t.Errorf("%s, killed after %d: %v", sequence, killAt, err)
		return tr, false
	}
	if s.isShared {
		return tr, true
	}
	is, err := powerloss.ReadTree(how.Root)
	if err != nil {
		s.t.Errorf("%s, killed after %d: %v", sequence, killAt, err)
		return tr, false
	}
	if diff := tr.Record.Kept(len(tr.Record.Ops)).Diff(is); diff != "" {
		s.t.Errorf("%s, killed after %d: the disk is not what the record says: %s", sequence, killAt, diff)
		return tr, false
	}
	return tr, true
}

// checkAll is check and live, each on what is in the folder.
func (s *scene) checkAll(base string, notes []string) error {
	if s.live == nil {
		return s.check(base, notes)
	}
	other := s.copy(base)
	defer os.RemoveAll(other)
	return errors.Join(s.check(base, notes), s.live(other, notes))
}

// some returns want of the numbers 1 to n, all where it is 0, ascending.
func some(n, want int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i + 1
	}
	if os.Getenv(allVar) != "" || want == 0 || want >= n {
		return all
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	rng.Shuffle(n, func(a, b int) { all[a], all[b] = all[b], all[a] })
	all = all[:want]
	slices.Sort(all)
	return all
}

// kills runs the sequence anew for each of its operations, kills it after that, and checks what is left.
func (s *scene) kills(ops []powerloss.Op) (n int) {
	at := some(len(ops), s.attack.kills)
	for i, o := range ops { // names are where a restart finds what is not durable
		if s.again == "" {
			break
		}
		if o.Kind == powerloss.Create || o.Kind == powerloss.Rename || o.Kind == powerloss.Unlink {
			at = append(at, i+1)
		}
	}
	slices.Sort(at)
	at = slices.Compact(at)
	again := map[int]bool{}
	for _, i := range some(len(at), s.agains) {
		again[i-1] = s.again != ""
	}
	s.each(len(at), func(i int) bool {
		base := s.copy(s.base)
		defer os.RemoveAll(base)
		tr, ok := s.trace(s.sequence, base, at[i], nil)
		if !ok {
			return false
		}
		last := "nothing"
		if n := len(tr.Record.Ops); n > 0 {
			last = tr.Record.Ops[n-1].String()
		}
		notes := tr.Record.Notes(len(tr.Record.Ops))
		checked := base
		if again[i] {
			checked = s.copy(base)
		}
		if err := s.checkAll(checked, notes); err != nil {
			s.t.Errorf("killed after operation %d, %s, with %q acknowledged: %v", at[i], last, notes, err)
			return false
		}
		if again[i] {
			next, ok := s.trace(s.again, base, 0, tr)
			if !ok {
				return false
			}
			s.lossesFrom(fmt.Sprintf("killed after operation %d, %s, and started again", at[i], last), next, base, next.First, 8)
		}
		return true
	})
	return len(at)
}

// losses checks what power loss can leave of a record.
func (s *scene) losses(tr *powerloss.Tracer, base string, from, want int) (tried, of int) {
	return s.lossesFrom("", tr, base, from, want)
}

func (s *scene) lossesFrom(before string, tr *powerloss.Tracer, base string, from, want int) (tried, of int) {
	points := tr.Record.Points(from)
	if before != "" { // what counts is what was built on what the killed process left
		points = slices.DeleteFunc(points, func(n int) bool { return n == from || tr.Record.Ops[n-1].Kind != powerloss.Note })
		if last := len(points) - 1; last > 0 {
			points = []int{points[0], points[last]} // the rest is between
		}
	}
	states := slices.Collect(tr.Record.States(points, seed))
	pick := some(len(states), want)
	var alive []int
	if s.lives >= 0 {
		alive = some(len(pick), s.lives)
	}
	work := func(i int) bool {
		st := states[pick[i]-1]
		dir := s.copyWith(base, st.Tree)
		defer func() { os.RemoveAll(dir) }()
		notes := tr.Record.Notes(st.Ops)
		err := s.check(dir, notes)
		if err == nil && s.live != nil && slices.Contains(alive, i+1) {
			err = os.RemoveAll(dir)
			if dir = s.copyWith(base, st.Tree); err == nil {
				err = s.live(dir, notes)
			}
		}
		if err != nil {
			after := "nothing"
			if st.Ops > 0 {
				after = tr.Record.Ops[st.Ops-1].String()
			}
			s.t.Errorf("%s power lost after operation %d, %s, with %q acknowledged; of them lost: %s\n%v", before, st.Ops, after, notes, st.Lost, err)
		}
		return err == nil
	}
	if before != "" { // a worker does it
		for i := range pick {
			work(i)
		}
	} else {
		s.each(len(pick), work)
	}
	return len(pick), len(states)
}

// copyWith returns a copy of the folder with another tree in the place of what was recorded.
func (s *scene) copyWith(base string, tree powerloss.Tree) string {
	s.t.Helper()
	to := s.copy(base)
	root := state(to)
	if s.beside != "" {
		root = to
	}
	if err := errors.Join(os.RemoveAll(root), tree.WriteTree(root)); err != nil {
		s.t.Fatal(err)
	}
	return to
}

const errorsMax = 8 // of one attack are shown

// each calls f for 0 to n-1, some at once, until it has failed errorsMax times.
func (s *scene) each(n int, f func(i int) (ok bool)) {
	workers := 2
	if s.live != nil {
		workers = 6 // they wait more than they work
	}
	next := make(chan int)
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed := 0
	for range workers {
		wg.Go(func() {
			for i := range next {
				mu.Lock()
				enough := failed >= errorsMax
				mu.Unlock()
				if enough {
					continue
				}
				if !f(i) {
					mu.Lock()
					failed++
					mu.Unlock()
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// private wants nothing below the state to be open to others but what is public.
func private(base string) error {
	return filepath.WalkDir(state(base), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if name := filepath.Base(path); info.Mode().Perm()&0o077 != 0 && !strings.Contains(name, "node.crt") && name != "gate" {
			return fmt.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	})
}
