// The build command compiles the kvmclock guest: go run ftclock/test/guest/build DIR
package main

import (
	"fmt"
	"os"

	"ftclock/test/guest"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: build DIR")
		os.Exit(2)
	}
	elf, err := guest.Build(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(elf)
}
