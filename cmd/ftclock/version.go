package main

import (
	"runtime"
	"runtime/debug"

	"ftclock/cmd/ftclock/internal/hypervisor"

	"libvirt.org/go/libvirt"
)

// version is set by the linker: -X main.version=….
var version string

// programVersion is the version that the linker set, or else the module's.
func programVersion() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

func goVersion() string { return runtime.Version() }

type versionCmd struct{}

func (versionCmd) Run(p *program) error {
	p.Printf("ftclock %s\n", programVersion())
	p.Printf("built with %s\n", goVersion())
	if v, err := libvirt.GetVersion(); err == nil {
		p.Printf("libvirt library %s\n", hypervisor.Dotted(v))
	}
	return nil
}
