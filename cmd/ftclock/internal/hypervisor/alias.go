package hypervisor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"ftclock/cmd/ftclock/internal/ui"
)

// systemConf is libvirt's configuration of its clients, for root.
const systemConf = "/etc/libvirt/libvirt.conf"

// maxConf bounds such a file, in bytes.
const maxConf = 1 << 20

// aliasName is what libvirt allows for the name of an alias.
var aliasName = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// IsAlias tells whether what stands in the place of a URI is the name of an alias: it isn't a URI, then.
func IsAlias(uri string) bool { return aliasName.MatchString(uri) }

// Alias gives the URI for which an alias stands in libvirt.conf, as libvirt itself reads it: root's is the system's, another user's is
// in $XDG_CONFIG_HOME/libvirt. (virConfLoadConfig and virURIResolveAlias in libvirt's src/util.) The error is a hinted one.
func Alias(alias string) (string, error) {
	path := systemConf
	if os.Geteuid() != 0 {
		dir, err := os.UserConfigDir()
		if err != nil {
			return "", ui.Hinted(fmt.Errorf("looking for the alias %q: %w", alias, err), "give a URI, such as qemu+ssh://root@HOST/system")
		}
		path = filepath.Join(dir, "libvirt/libvirt.conf")
	}
	return aliasIn(path, alias)
}

func aliasIn(path, alias string) (string, error) {
	text, err := readConf(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", ui.Hinted(fmt.Errorf("looking for the alias %q: %w", alias, err), "give the URI in its place")
	}
	entries, err := confStrings(text, "uri_aliases")
	for _, entry := range entries {
		name, uri, ok := strings.Cut(entry, "=")
		if !ok || !aliasName.MatchString(name) {
			err = fmt.Errorf("uri_aliases has the entry %q", entry)
			break
		}
		if name == alias {
			return uri, nil
		}
	}
	if err != nil {
		return "", ui.Hinted(fmt.Errorf("reading %s: %w", path, err), `the form is uri_aliases = [ "`+alias+`=qemu+ssh://root@HOST/system" ]`)
	}
	return "", ui.Hinted(fmt.Errorf("%q is neither a URI nor an alias in %s", alias, path),
		`give qemu+ssh://root@HOST/system, or write uri_aliases = [ "`+alias+`=qemu+ssh://root@HOST/system" ] there`)
}

func readConf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	if err == nil && len(text) > maxConf {
		err = fmt.Errorf("%s is longer than %d KiB", path, maxConf>>10)
	}
	return string(text), err
}

// confToken is one token of libvirt's configuration language: a comment, a string in one of three ways, a name or a number, or a sign.
var confToken = regexp.MustCompile(`^(?:#[^\r\n]*|"""(?s:.*?)"""|"[^"\r\n]*"|'[^'\r\n]*'|[A-Za-z0-9_+-]+|[\[\],=;]|[ \t\r\n]+)`)

// confStrings gives the strings of a setting, one or a list of them. Where it is set more than once libvirt takes the first.
func confStrings(text, setting string) (all []string, err error) {
	var tokens []string
	for line := 1; text != ""; {
		token := confToken.FindString(text)
		if token == "" {
			return nil, fmt.Errorf("line %d isn't understood", line)
		}
		text = text[len(token):]
		line += strings.Count(token, "\n")
		if strings.Trim(token, " \t\r\n") != "" && token[0] != '#' {
			tokens = append(tokens, token)
		}
	}
	for i := 0; i+2 < len(tokens); i++ {
		if tokens[i] != setting || tokens[i+1] != "=" {
			continue
		}
		list := tokens[i+2] == "["
		for _, token := range tokens[i+2:] {
			switch token[0] {
			case '"', '\'':
				quote := token[:1]
				if len(token) >= 6 && strings.HasPrefix(token, `"""`) {
					quote = `"""`
				}
				all = append(all, strings.TrimSuffix(strings.TrimPrefix(token, quote), quote))
			case '[', ',':
			case ']':
				return all, nil
			default:
				return nil, fmt.Errorf("%s has %s in it", setting, token)
			}
			if !list {
				return all, nil
			}
		}
		return nil, fmt.Errorf("the list of %s isn't closed", setting)
	}
	return nil, nil
}
