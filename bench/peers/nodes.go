package main

import (
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// member is one simulated node that has joined: a real agent over real TLS whose tasks are nothing.
type member interface {
	// open starts the agent. It runs until the process ends.
	open() error
}

// Nodes is the service of the process that runs all nodes of a cluster.
type Nodes struct {
	mu  sync.Mutex // guards all
	all []member
}

// JoinArgs says who joins.
type JoinArgs struct {
	Product, Address, Token string
	Dir                     string // for what the nodes keep on their disks
	Nodes, Clients          int
}

// serveNodes is the child's main. It ends with its standard input.
func serveNodes() {
	s := rpc.NewServer()
	s.RegisterName("Nodes", &Nodes{})
	s.ServeConn(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
}

// Join has so many nodes join, by so many clients at once, each from no more than the token and an address, and returns how
// long it took.
func (n *Nodes) Join(args JoinArgs, took *time.Duration) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := products[args.Product]
	todo := make(chan int, args.Nodes)
	for i := range args.Nodes {
		todo <- len(n.all) + i
	}
	close(todo)
	var mu sync.Mutex // guards made and failed
	var made []member
	var failed error
	var wg sync.WaitGroup
	start := time.Now()
	for client := range args.Clients {
		wg.Go(func() {
			for i := range todo {
				m, err := p.join(args.Address, args.Token, filepath.Join(args.Dir, fmt.Sprint(i)), i, client)
				mu.Lock()
				if err != nil {
					failed = err
				} else {
					made = append(made, m)
				}
				stop := failed != nil
				mu.Unlock()
				if stop {
					return
				}
			}
		})
	}
	wg.Wait()
	*took = time.Since(start)
	n.all = append(n.all, made...)
	return failed
}

// Open starts the agents of all nodes.
func (n *Nodes) Open(int, *int) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, m := range n.all {
		if err := m.open(); err != nil {
			return err
		}
	}
	return nil
}

// live counts the tasks that run on all nodes of this process.
var live atomic.Int64

// secretSize is that of each secret.
const secretSize = 100

// wantSecret refuses what is not the value of a secret that the harness wrote.
func wantSecret(value []byte) error {
	if len(value) != secretSize {
		return fmt.Errorf("a task has a secret of %d bytes, want %d", len(value), secretSize)
	}
	return nil
}

// Memory returns the resident memory of this process that is not of files, after a collection.
func (n *Nodes) Memory(_ int, bytes *float64) (err error) {
	debug.FreeOSMemory()
	*bytes, err = anonymous(os.Getpid())
	return err
}

// Tasks returns how many tasks run on all nodes.
func (n *Nodes) Tasks(_ int, count *int) error {
	*count = int(live.Load())
	return nil
}

// nodesProcess is the nodes' process, as the harness sees it.
type nodesProcess struct {
	cmd    *exec.Cmd
	client *rpc.Client
	dir    string // in memory
}

// startNodes starts the process. name is that of a new folder in memory for what they keep.
func startNodes(name string) (*nodesProcess, error) {
	dir := filepath.Join("/dev/shm", name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	cmd, in, out, err := startChild("nodes", nil)
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return &nodesProcess{cmd: cmd, dir: dir, client: rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})}, nil
}

func (n *nodesProcess) stop() {
	n.cmd.Process.Kill()
	n.client.Close()
	n.cmd.Wait()
	os.RemoveAll(n.dir)
}
