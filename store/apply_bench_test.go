package store_test

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// world10k is a state with a service of 10,000 tasks on 1,000 nodes, and 1,000 secrets of a KiB.
type world10k struct {
	cluster, manager string
	nodes            []*api.Node
	service          *api.Service
	tasks            []*api.Task
	secrets          []*api.Secret
}

func newWorld10k() *world10k {
	b := &world10k{cluster: warden.NewID(), manager: warden.NewID()}
	token := storetest.Token(api.Role_ROLE_WORKER)
	for i := range 1000 {
		n := storetest.Node(fmt.Sprintf("w-%04d", i), token)
		n.Leaf, n.Description.EngineLabels = bytes.Repeat([]byte("l"), 600), map[string]string{"rack": fmt.Sprint(i % 40)}
		b.nodes = append(b.nodes, n)
	}
	for i := range 1000 {
		b.secrets = append(b.secrets, storetest.Secret(fmt.Sprintf("s-%04d", i)))
	}
	var refs []*api.SecretReference
	for _, s := range b.secrets[:3] {
		refs = append(refs, storetest.Reference(s))
	}
	b.service = storetest.Service("big", warden.DefaultZone, refs...)
	b.service.Spec.Replicas = 10_000
	b.service.Spec.Task.Env = []string{"LANG=C.UTF-8", "MODE=production", "LISTEN=:8080", "PATH=/usr/local/bin:/usr/bin:/bin"}
	b.service.Spec.Task.Labels = map[string]string{"team": "core", "tier": "front"}
	for i := range 10_000 {
		t := storetest.Placed(storetest.Task(b.service, uint64(i+1)), b.nodes[i%1000].Id)
		t.Status.State = api.TaskState_TASK_RUNNING
		b.tasks = append(b.tasks, t)
	}
	return b
}

// objects returns all but the tasks.
func (b *world10k) objects() (out []*api.Object) {
	put := func(r store.Record) { out = append(out, store.Wrap(r)) }
	put(storetest.Cluster(b.cluster))
	put(storetest.Zone(warden.DefaultZone))
	put(storetest.Manager(b.manager))
	for _, n := range b.nodes {
		put(n)
	}
	put(b.service)
	for _, s := range b.secrets {
		v := storetest.SecretVersion(s, 1)
		v.Ciphertext = bytes.Repeat([]byte("c"), 1024)
		put(s)
		put(v)
	}
	return out
}

// state returns the state with or without the tasks.
func (b *world10k) state(t testing.TB, tasks bool) *store.State {
	t.Helper()
	objects := b.objects()
	if tasks {
		for _, task := range b.tasks {
			objects = append(objects, store.Wrap(task))
		}
	}
	var out bytes.Buffer
	if err := store.WriteSnapshot(&out, objects...); err != nil {
		t.Fatal(err)
	}
	s, err := store.ReadState(&out)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func marshal(t testing.TB, ops ...*api.Operation) []byte {
	t.Helper()
	c := storetest.Command(ops...)
	c.TimeNs = 1_800_000_000_000_000_000
	data, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// BenchmarkApply applies one command of each kind to a state of 1,000 nodes and 1,000 secrets.
func BenchmarkApply(b *testing.B) {
	big := newWorld10k()
	run := func(name string, tasks bool, commands func(i int) []byte) {
		b.Run(name, func(b *testing.B) {
			s := big.state(b, tasks)
			index := s.View().Index()
			size, spent := 0, time.Duration(0)
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				data := commands(i)
				size = len(data)
				index++
				b.StartTimer()
				from := cpu()
				if r, _ := s.Apply(index, data); r.GetCode() != "" {
					b.Fatal(r)
				}
				s.View()
				spent += cpu() - from
			}
			b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N), "cpu-ns/op")
			b.ReportMetric(float64(size), "command-bytes")
		})
	}
	run("describe", false, func(i int) []byte { return marshal(b, describe(big.nodes[i%1000].Id, fmt.Sprint(i))) })
	run("put500tasks", false, func(int) []byte {
		var ops []*api.Operation
		for i := range 500 {
			ops = append(ops, store.Put(storetest.Task(big.service, uint64(i)), 0))
		}
		return marshal(b, ops...)
	})
	run("place500tasks", false, func(int) []byte {
		var ops []*api.Operation
		for i := range 500 {
			ops = append(ops, store.Put(storetest.Task(big.service, uint64(i)), 0))
		}
		for i, o := range ops[:500] {
			ops = append(ops, store.Put(storetest.Placed(o.GetPut().GetObject().GetTask(), big.nodes[i].Id), 1))
		}
		return marshal(b, ops...)
	})
	run("report500tasks", true, func(i int) []byte {
		var ops []*api.Operation
		for j := range 500 {
			o := storetest.Report(big.tasks[(i*500+j)%10_000], api.TaskState_TASK_RUNNING)
			o.GetReportTask().Status.Message = fmt.Sprint(i)
			ops = append(ops, o)
		}
		return marshal(b, ops...)
	})
}

// BenchmarkView reads a state of 10,000 tasks on 1,000 nodes.
func BenchmarkView(b *testing.B) {
	big := newWorld10k()
	v := big.state(b, true).View()
	for name, read := range map[string]func() int{
		"Task":           func() int { return len(v.Task(big.tasks[7].Id).Id) },
		"Tasks":          func() int { return len(v.Tasks()) },
		"TasksByNode":    func() int { return len(v.TasksByNode(big.nodes[3].Id)) },
		"TasksByService": func() int { return len(v.TasksByService(big.service.Id)) },
		"Nodes":          func() int { return len(v.Nodes()) },
		"NodesByKey":     func() int { return len(v.NodesByKey(big.nodes[3].KeyHash)) },
		"SecretVersion":  func() int { return len(v.SecretVersion(big.secrets[3].Id, 1).Id) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if read() == 0 {
					b.Fatal("nothing")
				}
			}
		})
	}
}

// BenchmarkSnapshot writes and reads a state of 10,000 tasks, 1,000 nodes and 1,000 secrets; heap-MiB is what it takes in memory.
func BenchmarkSnapshot(b *testing.B) {
	big := newWorld10k()
	var data bytes.Buffer
	if err := big.state(b, true).View().Write(&data); err != nil {
		b.Fatal(err)
	}
	b.Run("write", func(b *testing.B) {
		s := big.state(b, true)
		for b.Loop() {
			if err := s.View().Write(io.Discard); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		var s *store.State
		var err error
		before, from := heap(), cpu()
		for b.Loop() {
			if s, err = store.ReadState(bytes.NewReader(data.Bytes())); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64((cpu()-from).Nanoseconds())/float64(b.N), "cpu-ns/op")
		b.ReportMetric(float64(heap()-before)/(1<<20), "heap-MiB")
		b.ReportMetric(float64(data.Len())/(1<<20), "snapshot-MiB")
		runtime.KeepAlive(s)
	})
}

// cpu is what this process has used of processors, in all threads: elapsed time says little on a machine that is shared.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
