// Package domaintest is what tests of domains share: it defines and starts domains that go with the test, reads their
// guests' clocks, pauses them, waits for their states, and checks what their shims say.
//
// It is for tests that run in a private libvirt or look into a container. Programs that measure use packages guest,
// privatelibvirt and measure instead, which give errors. It imports no test.
package domaintest
