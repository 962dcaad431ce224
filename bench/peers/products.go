package main

import (
	"context"
	"crypto/tls"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// product is what both are asked for. All times are taken by the harness, which is the same for both.
type product struct {
	// manage runs a manager in this process until ctx ends, and calls ready when it serves; it makes a cluster, joins the one that
	// cfg names, or goes on with what is there.
	manage func(ctx context.Context, cfg managerConfig, ready func()) error
	// unlock gives the key to a started manager by its local socket; nil: the key goes with managerConfig.
	unlock  func(ctx context.Context, cc *grpc.ClientConn, key []byte) error
	keyFile string // of a manager, below managerConfig.Dir
	// creds are those that a manager's local socket wants.
	creds credentials.TransportCredentials
	// operator speaks to a manager by its local socket.
	operator func(cc *grpc.ClientConn) operator
	// join has one node join.
	join func(address, token, dir string, number, client int) (member, error)
}

// products are by their names.
var products = map[string]product{
	"warden":    {manage: wardenManage, unlock: wardenUnlock, keyFile: "state/identity/node.key", creds: insecure.NewCredentials(), operator: wardenOperator, join: wardenJoin},
	"swarmkit":  swarmProduct(0),
	"swarmkit2": swarmProduct(2),
}

// swarmProduct has an election timeout of so many ticks, which are seconds, to twice that; 0: the default, 10. 2 is the least that its raft
// takes.
func swarmProduct(electionTicks uint32) product {
	return product{manage: swarmManage(electionTicks), keyFile: "state/certificates/swarm-node.key", creds: credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}),
		operator: swarmOperator, join: swarmJoin}
}

// operator is what the harness does by a manager's local socket.
type operator interface {
	// token returns a join token for many uses.
	token(ctx context.Context, manager bool) (string, error)
	// state returns how many workers have a live session and how many managers are reachable, and the leader's hostname.
	state(ctx context.Context) (clusterState, error)
	// create makes a service of tasks that run until they are stopped, each one where the fewest are. secret is the ID of one
	// of the service's name that each task has; empty: none.
	create(ctx context.Context, name string, replicas int, secret string) (id string, err error)
	// running returns how many tasks of the service are running.
	running(ctx context.Context, id string) (int, error)
	remove(ctx context.Context, id string) error
	// tasks returns how many records of tasks there are.
	tasks(ctx context.Context) (int, error)
	// write commits a secret of a hundred bytes.
	write(ctx context.Context, name string) (id string, err error)
	// secrets returns how many secrets there are.
	secrets(ctx context.Context) (int, error)
	// autolock turns it on and returns the unlock key.
	autolock(ctx context.Context) (key []byte, err error)
}

type clusterState struct {
	workers, managers int
	leader            string
}
