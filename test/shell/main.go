// Command shell is a shell in a libvirt of its own, with ftclock installed and a guest defined, for whoever wants to look: by
// `make shell`, on a KVM host that is emulated where the machine is none.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"ftclock/test/built"
	"ftclock/test/guest"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirtxml"
)

func main() {
	if why := privatelibvirt.MissingFor("shell"); why != "" {
		fmt.Fprintln(os.Stderr, "shell: error:", why)
		os.Exit(1)
	}
	os.Exit(privatelibvirt.Main(func() int {
		code, err := shell(os.Args[1:])
		if err != nil {
			fmt.Fprintln(os.Stderr, "shell: error:", err)
			return 1
		}
		return code
	}, privatelibvirt.Options{Prepare: func() error {
		root, err := built.Root()
		if err != nil {
			return err
		}
		return privatelibvirt.Install(root)
	}}))
}

// shell runs a command, by default a shell, beside the domains web1, which is managed, and stock, which isn't.
func shell(command []string) (int, error) {
	elf, err := guest.Copy(privatelibvirt.Dir)
	if err != nil {
		return 0, err
	}
	conn, err := privatelibvirt.Connect()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	for name, metadata := range map[string]string{"web1": `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`, "stock": ""} {
		x := privatelibvirt.GuestXML(name, elf)
		if metadata != "" {
			x.Metadata = &libvirtxml.DomainMetadata{XML: metadata}
		}
		if _, err := privatelibvirt.Define(conn, x); err != nil {
			return 0, err
		}
	}
	if len(command) == 0 {
		fmt.Println("A libvirt of its own, ftclock installed, the domains web1 (managed) and stock (not) defined. Try:")
		fmt.Println("  virsh start web1; ftclock exercise web1 --rate 10 --pause 10 --count 50; ftclock status; ftclock verify web1")
		command = []string{"bash", "--norc"}
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "PATH="+privatelibvirt.Prefix+"/bin:"+privatelibvirt.Prefix+"/sbin:"+os.Getenv("PATH"),
		"LIBVIRT_DEFAULT_URI="+privatelibvirt.URI, `PS1=ftclock \w\$ `)
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}
