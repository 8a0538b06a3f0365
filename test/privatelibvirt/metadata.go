package privatelibvirt

import "libvirt.org/go/libvirtxml"

const (
	// ClockElement is the metadata of a managed domain in its shortest form: every checkpoint is caught up.
	ClockElement = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"/>`

	// PatientElement is for pauses that something holds up: on a starved machine they get longer than a checkpoint may be
	// by default, and would be held.
	PatientElement = `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1"><ftclock:on event="checkpoint" do="catch-up" limit="15m"/></ftclock:clock>`
)

// ClockWith is the metadata of a managed domain with those rules, which are elements ftclock:on.
func ClockWith(rules string) string {
	return `<ftclock:clock xmlns:ftclock="urn:ftclock:domain:1">` + rules + `</ftclock:clock>`
}

// Manage gives the domain that metadata; "" is none.
func Manage(x *libvirtxml.Domain, metadata string) *libvirtxml.Domain {
	if metadata == "" {
		x.Metadata = nil
		return x
	}
	x.Metadata = &libvirtxml.DomainMetadata{XML: metadata}
	return x
}

// SetEnvironment has the domain's QEMU run with those variables, each as its name and its value.
func SetEnvironment(x *libvirtxml.Domain, variables ...[2]string) {
	if x.QEMUCommandline == nil {
		x.QEMUCommandline = &libvirtxml.DomainQEMUCommandline{}
	}
	for _, v := range variables {
		x.QEMUCommandline.Envs = append(x.QEMUCommandline.Envs, libvirtxml.DomainQEMUCommandlineEnv{Name: v[0], Value: v[1]})
	}
}

// ACPI gives the domain ACPI, without which there are no hot-plug, no power button and no suspend to memory.
func ACPI(x *libvirtxml.Domain) {
	x.Features = &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}}
}

// QCOW2 is an IDE disk that can hold snapshots, in that file.
func QCOW2(path string) libvirtxml.DomainDisk {
	return libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "qcow2"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: path}},
		Target: &libvirtxml.DomainDiskTarget{Dev: "hda", Bus: "ide"},
	}
}
