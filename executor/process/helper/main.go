// Command helper is the part of warden that a task needs, its supervisor and its init, and nothing else: it begins four times as fast
// as the daemon. The build puts it into the daemon, which runs it from memory (process.Self); nobody runs it by hand.
package main

import (
	"fmt"
	"os"

	"warden/executor/process"
)

func main() {
	if process.Main(os.Args) {
		return
	}
	fmt.Fprintln(os.Stderr, "this is a part of warden, for its own use")
	os.Exit(2)
}
