// Package kernel proves what ftclock relies on of the kernel; see package platform. It needs no hypervisor.
package kernel
