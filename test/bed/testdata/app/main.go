// Command app is what containers of the tests run: it says whether it has its secret, and waits.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	b, err := os.ReadFile("/run/secrets/password")
	fmt.Printf("a secret of %d bytes, %v\n", len(b), err)
	<-end
}
