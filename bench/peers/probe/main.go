// Command probe is what the containers of a measurement run: it says that it runs, by a connection, and ends with it or with SIGTERM.
package main

import (
	"io"
	"net"
	"os"
)

func main() {
	c, err := net.Dial("tcp", os.Getenv("PROBE"))
	if err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	io.Copy(io.Discard, c)
}
