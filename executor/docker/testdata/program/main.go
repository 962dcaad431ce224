// Command program is what a test's image FROM scratch has: it prints the file that it is told of and ends with code 7.
package main

import (
	"fmt"
	"os"
)

func main() {
	b, err := os.ReadFile(os.Args[1])
	fmt.Println(string(b))
	if err != nil || os.Getpid() == 1 {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(7)
}
