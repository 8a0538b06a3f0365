package kvmhost

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"ftclock/test/built"
	"ftclock/test/initramfs"

	"golang.org/x/sys/unix"
)

// wanted are the modules that the host loads, before what they depend on is added.
var wanted = []string{
	"virtio_pci", "virtio_console", "virtio_rng", "virtio_blk", "virtio_net", "9pnet_virtio", "9p", "overlay", "kvm_amd", "kvm_intel",
	"crc32c_generic", "ext4", // which asks for the first by an alias
	"tun", "bridge", "veth", "tap", "macvtap", "autofs4", "fuse",
}

// files are what a host boots from.
type files struct {
	kernel, initramfs string
}

// Kernel is the path of a Debian's stock kernel, which is fetched where it isn't there. It is kept below build/.
func Kernel(suite string) (string, error) {
	root, err := built.Root()
	if err != nil {
		return "", err
	}
	f, err := prepare(filepath.Join(root, "build/host"), suite)
	if err != nil {
		return "", err
	}
	return f.kernel, nil
}

// lock has hosts that begin at the same time fetch one after the other what they need.
func lock(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, os.NewSyscallError("flock", err)
	}
	return func() { f.Close() }, nil
}

// say tells of what takes a while.
func say(format string, values ...any) { fmt.Fprintf(os.Stderr, "host: "+format+"\n", values...) }

// prepare makes the files of a suite's kernel below dir, unless they are there: "" is the suite of this machine.
func prepare(dir, suite string) (*files, error) {
	name := suite
	if name == "" {
		name = "kernel"
	}
	home := filepath.Join(dir, name)
	f := &files{kernel: filepath.Join(home, "vmlinuz"), initramfs: filepath.Join(home, "initramfs")}
	unlock, err := lock(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(f.kernel); errors.Is(err, fs.ErrNotExist) {
		say("fetching a stock kernel from Debian's packages (some 70 MB), once")
		if err := fetch(home, suite); err != nil {
			return nil, fmt.Errorf("fetching the emulated host's kernel: %w", err)
		}
	}
	init, err := os.ReadFile(filepath.Join(dir, "init"))
	if err != nil {
		return nil, fmt.Errorf("reading process 1 of the emulated host: %w; fix: make host", err)
	}
	archive, err := pack(home, init)
	if err != nil {
		return nil, fmt.Errorf("packing the emulated host's modules: %w", err)
	}
	// Hosts that start at the same time write the same.
	next, err := os.CreateTemp(home, "initramfs.")
	if err != nil {
		return nil, err
	}
	defer next.Close()
	if _, err := next.Write(archive); err != nil {
		return nil, err
	}
	return f, errors.Join(next.Chmod(0o644), os.Rename(next.Name(), f.initramfs))
}

// fetch downloads and unpacks a suite's kernel into home. It installs nothing and needs no privilege.
func fetch(home, suite string) error {
	work := home + ".new"
	defer os.RemoveAll(work)
	tree, err := unpack(work, suite)
	if err != nil {
		return err
	}
	kernels, _ := filepath.Glob(filepath.Join(tree, "boot/vmlinuz-*"))
	modules, _ := filepath.Glob(filepath.Join(tree, "usr/lib/modules/*"))
	if len(modules) == 0 {
		modules, _ = filepath.Glob(filepath.Join(tree, "lib/modules/*"))
	}
	if len(kernels) == 0 && len(modules) == 1 { // Linux 7.2 and later
		kernels, _ = filepath.Glob(filepath.Join(modules[0], "vmlinuz"))
	}
	if len(kernels) != 1 || len(modules) != 1 {
		return fmt.Errorf("linux-image-amd64 has %d kernels and %d trees of modules", len(kernels), len(modules))
	}
	done := filepath.Join(work, "done")
	if err := os.MkdirAll(done, 0o755); err != nil {
		return err
	}
	if err := errors.Join(os.Rename(kernels[0], filepath.Join(done, "vmlinuz")), os.Rename(modules[0], filepath.Join(done, "modules"))); err != nil {
		return err
	}
	if err := os.RemoveAll(home); err != nil {
		return err
	}
	return os.Rename(done, home)
}

// unpack downloads the packages of a suite's kernel and unpacks them into one tree below work, which it makes anew.
func unpack(work, suite string) (tree string, err error) {
	if err := os.RemoveAll(work); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(work, "lists/partial"), 0o755); err != nil {
		return "", err
	}
	apt := &apt{dir: work}
	if suite != "" {
		if err := apt.only(suite); err != nil {
			return "", err
		}
	}
	packages, err := apt.kernel()
	if err != nil {
		if err := apt.update(); err != nil {
			return "", err
		}
		packages, err = apt.kernel()
	}
	if err != nil {
		return "", err
	}
	if err := apt.run("apt-get", append([]string{"download"}, packages...)...); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != len(packages) {
		return "", fmt.Errorf("apt-get download %s brought %d packages", strings.Join(packages, " "), len(debs))
	}
	tree = filepath.Join(work, "tree")
	for _, deb := range debs {
		if out, err := exec.Command("dpkg-deb", "-x", deb, tree).CombinedOutput(); err != nil {
			return "", fmt.Errorf("dpkg-deb -x: %w: %s", err, bytes.TrimSpace(out))
		}
	}
	return tree, nil
}

// apt is the machine's apt with lists of its own where the machine's don't do.
type apt struct {
	dir     string
	options []string
}

// only has apt know nothing but that suite.
func (a *apt) only(suite string) error {
	from := os.Getenv("FTCLOCK_DEBIAN_MIRROR")
	if from == "" {
		from = "http://deb.debian.org/debian"
	}
	list := filepath.Join(a.dir, "sources.list")
	if err := os.WriteFile(list, []byte("deb "+from+" "+suite+" main\n"), 0o644); err != nil {
		return err
	}
	a.options = append(a.options, "-o", "Dir::Etc::SourceList="+list, "-o", "Dir::Etc::SourceParts=/dev/null")
	a.own()
	return nil
}

func (a *apt) own() {
	a.options = append(a.options, "-o", "Dir::State::Lists="+filepath.Join(a.dir, "lists"), "-o", "Dir::Cache="+a.dir,
		"-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=")
}

// update brings the lists of packages, beside those of the machine.
func (a *apt) update() error {
	if !slices.Contains(a.options, "Acquire::Languages=none") {
		a.own()
	}
	return a.run("apt-get", "update", "-qq")
}

func (a *apt) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, append(append([]string(nil), a.options...), args...)...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	return cmd
}

func (a *apt) run(name string, args ...string) error {
	if out, err := a.command(name, args...).CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%s: %w: %s; fix: see that Debian's packages can be reached (apt-get update)", name, err, lines[len(lines)-1])
	}
	return nil
}

// kernel are the packages that linux-image-amd64 stands for: the kernel with its modules, or, with Linux 7.2 and later, one for
// each.
func (a *apt) kernel() ([]string, error) {
	image := a.depends("linux-image-amd64", "linux-image-")
	if len(image) != 1 {
		return nil, errors.New("apt knows no package linux-image-amd64; fix: use a Debian, or name one by --suite")
	}
	return append(image, a.depends(image[0], "linux-binary-", "linux-modules-")...), nil
}

// depends are the packages that a package depends on, of those that begin with one of the prefixes.
func (a *apt) depends(name string, prefixes ...string) (names []string) {
	out, err := a.command("apt-cache", "depends", name).Output()
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(out)) {
		on, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: ")
		if ok && slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(on, p) }) {
			names = append(names, on)
		}
	}
	return names
}

// pack makes the initramfs: process 1 and the modules, in the order in which they are loaded.
func pack(home string, init []byte) ([]byte, error) {
	paths, err := modulePaths(filepath.Join(home, "modules"))
	if err != nil {
		return nil, err
	}
	var archive initramfs.Archive
	archive.Add("init", init)
	var order []string
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = strings.ReplaceAll(name, "-", "_")
		if done[name] {
			return nil
		}
		done[name] = true
		path, ok := paths[name]
		if !ok {
			return nil // built into the kernel
		}
		text, err := readModule(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		needs, err := depends(text)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		file := strings.TrimSuffix(filepath.Base(path), ".xz")
		order = append(order, file)
		archive.Add("modules/"+file, text)
		return nil
	}
	for _, name := range wanted {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	if len(order) == 0 || paths["kvm_amd"] == "" {
		return nil, errors.New("the kernel's package has no module kvm_amd")
	}
	archive.Add("modules/order", []byte(strings.Join(order, "\n")+"\n"))
	return archive.Bytes(), nil
}

// modulePaths finds every module below dir, by its name.
func modulePaths(dir string) (map[string]string, error) {
	paths := map[string]string{}
	err := filepath.WalkDir(filepath.Join(dir, "kernel"), func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(strings.TrimSuffix(filepath.Base(path), ".xz"), ".ko"); ok && err == nil && !d.IsDir() {
			paths[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	return paths, err
}

func readModule(path string) ([]byte, error) {
	if strings.HasSuffix(path, ".xz") {
		return exec.Command("xz", "--decompress", "--stdout", path).Output()
	}
	return os.ReadFile(path)
}

// depends are the names in a module's "depends=" and "softdep=pre:", see modinfo(8).
func depends(module []byte) (names []string, err error) {
	file, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo: not a module of the kernel")
	}
	text, err := section.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Split(string(text), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok {
			names = append(names, strings.FieldsFunc(list, func(r rune) bool { return r == ',' })...)
		} else if list, ok := strings.CutPrefix(field, "softdep=pre: "); ok {
			names = append(names, strings.Fields(list)...)
		}
	}
	return names, nil
}
