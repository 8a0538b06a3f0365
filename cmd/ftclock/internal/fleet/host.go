package fleet

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"ftclock/cmd/ftclock/internal/hypervisor"
	"ftclock/cmd/ftclock/internal/ui"
)

// Host is one host of the command line.
type Host struct {
	URI  string   // as given; "" is libvirt's default, or else this host
	Name string   // how it is shown: the URI's host, with its port, or this host's own name
	ssh  []string // what ssh is given to get there; nil: it is this host
	hand string   // the same as a person types it
}

// Remote tells whether it is another host, which is asked by ssh.
func (h Host) Remote() bool { return h.ssh != nil }

// Hosts are those that the URIs of --connect name, each once, in their order. Without any it is the default alone. An alias is looked
// up in libvirt.conf. URIs that only libvirt understands are taken for this host's: hypervisor.Connect judges them.
func Hosts(uris []string) ([]Host, error) { return hosts(uris, hypervisor.Alias) }

// hosts is Hosts with another way to look up an alias, for tests.
func hosts(uris []string, alias func(string) (string, error)) ([]Host, error) {
	if len(uris) == 0 {
		uris = []string{""}
	}
	var all []Host
	for _, uri := range uris {
		h, err := parse(uri, alias)
		if err != nil {
			return nil, err
		}
		same := func(other Host) bool { return other.URI == h.URI || slices.Equal(other.ssh, h.ssh) } // this host has no ssh
		switch i := slices.IndexFunc(all, same); {
		case i < 0:
			all = append(all, h)
		case all[i].URI != h.URI && !h.Remote():
			return nil, ui.Hinted(fmt.Errorf("%s and %s are both this host", all[i].URI, h.URI), "give one of them")
		}
	}
	return all, nil
}

// What may stand in a URI for a host and a user: ssh's configuration can have both interpreted by a shell (ProxyCommand).
var (
	plainHost = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.:%-]{0,254}$`)
	plainUser = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}$`)
)

func parse(uri string, alias func(string) (string, error)) (Host, error) {
	shown := cmp.Or(uri, os.Getenv("LIBVIRT_DEFAULT_URI"))
	if hypervisor.IsAlias(shown) {
		named, err := alias(shown)
		if err != nil {
			return Host{}, err
		}
		shown = named
	}
	u, err := url.Parse(shown)
	if err != nil && strings.Contains(shown, "://") {
		return Host{}, ui.Hinted(fmt.Errorf("%q isn't a URI: %w", shown, err), "another host is qemu+ssh://USER@HOST/system, and this one qemu:///system")
	}
	here := err != nil
	if !here {
		driver, transport, _ := strings.Cut(u.Scheme, "+")
		here = driver != "qemu" || u.Host == "" && transport != "ssh"
	}
	if here {
		name, err := os.Hostname()
		if err != nil {
			name = "localhost"
		}
		return Host{URI: uri, Name: name}, nil
	}
	if err := hypervisor.CheckURI(shown); err != nil {
		return Host{}, err
	}
	if u.Scheme != "qemu+ssh" {
		return Host{}, ui.Hinted(fmt.Errorf("%s carries libvirt alone, which doesn't know how a clock is kept", shown),
			"-c qemu+ssh://root@"+u.Host+"/system asks ftclock there")
	}
	args, err := sshTo(u)
	if err != nil {
		return Host{}, ui.Hinted(fmt.Errorf("%s: %w", shown, err), "the form is qemu+ssh://USER@HOST:PORT/system; what else ssh needs goes into ~/.ssh/config")
	}
	hand := u.Hostname()
	if user := u.User.Username(); user != "" {
		hand = user + "@" + hand
	}
	if port := u.Port(); port != "" {
		hand = "-p " + port + " " + hand
	}
	return Host{URI: uri, Name: u.Host, ssh: args, hand: hand}, nil
}

// sshTo gives ssh's arguments for the host of a URI.
func sshTo(u *url.URL) ([]string, error) {
	// It asks for nothing, and carries nothing but the answer.
	args := []string{"-T", "-a", "-x", "-e", "none", "-oBatchMode=yes", "-oConnectTimeout=10", "-oClearAllForwardings=yes",
		"-oRemoteCommand=none", "-oLogLevel=ERROR"}
	host, user := u.Hostname(), u.User.Username()
	if !plainHost.MatchString(host) {
		return nil, fmt.Errorf("%q is no name of a host", host)
	}
	if _, secret := u.User.Password(); secret {
		return nil, errors.New("a password can't be given; use a key")
	}
	if user != "" {
		if !plainUser.MatchString(user) {
			return nil, fmt.Errorf("%q is no name of a user", user)
		}
		args = append(args, "-l", user)
	}
	if port := u.Port(); port != "" {
		args = append(args, "-p", port)
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		switch value := query.Get(name); name {
		case "keyfile":
			args = append(args, "-i", value)
		case "no_verify":
			if value == "1" {
				args = append(args, "-oStrictHostKeyChecking=no")
			}
		case "no_tty", "socket", "netcat", "mode", "proxy": // of libvirt's own way through ssh
		default:
			return nil, fmt.Errorf("the parameter %q isn't supported", name)
		}
	}
	return append(args, "--", host), nil
}
