// Command intruder is what the attacks of package adversary run, as other processes: it floods a port, and as a local user or as a
// task it tries to reach what is not its own. It is static, so that it runs in a container without any file.
//
// It knows the protocol as an attacker does, by its bytes: of Warden it imports nothing.
package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	switch args := os.Args[2:]; os.Args[1] {
	case "flood":
		flood(args)
	case "user":
		user(args)
	case "task":
		task(args)
	case "victim":
		victim()
	default:
		usage()
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: intruder flood KIND ADDRESS CONNECTIONS [KEY-FILE] | user PATH|PID... | task PID... | victim")
	os.Exit(2)
}
