// Command prepare makes the images of whole Debians that package container boots, unless they are there: prepare SUITE…
package main

import (
	"fmt"
	"os"

	"ftclock/test/container"
)

func main() {
	for _, suite := range os.Args[1:] {
		image, err := container.Image(suite)
		if err != nil {
			fmt.Fprintln(os.Stderr, "images:", err)
			os.Exit(1)
		}
		fmt.Println("images:", image)
	}
}
