package main

import (
	"bytes"
	"image/color"
	"image/png"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"ftclock/test/check"
	"ftclock/test/guest"
	"ftclock/test/measure"
	"ftclock/test/privatelibvirt"

	"libvirt.org/go/libvirt"
)

func TestMain(m *testing.M) {
	os.Exit(privatelibvirt.Main(m.Run, privatelibvirt.Installed("../..")))
}

// What make demo does, with fewer checkpoints: stock loses all of them, ftclock none.
func TestKVMDemo(t *testing.T) {
	if missing := privatelibvirt.Missing(); len(missing) > 0 {
		privatelibvirt.LeaveOut(t, strings.Join(missing, "; "))
	}
	defer func(n int) { checkpoints = n }(checkpoints)
	checkpoints = 40
	t.Chdir(t.TempDir()) // the pictures go there
	stdout := check.Value(os.Create("stdout"))(t)
	defer stdout.Close()
	stderr := check.Value(os.Create("stderr"))(t)
	defer stderr.Close()
	failed := demonstrate(stdout, stderr)
	said, err := os.ReadFile("stdout")
	if err != nil || failed != nil {
		t.Fatal(failed, err)
	}
	t.Logf("%s", said)
	lost := regexp.MustCompile(`guest's clock lost +([0-9.]+) ms +0\.0 ms\n`).FindSubmatch(said)
	if lost == nil {
		t.Fatal("the table doesn't say that ftclock lost nothing")
	}
	if ms, err := strconv.ParseFloat(string(lost[1]), 64); err != nil || ms < 40*5 {
		t.Errorf("stock lost %v ms of 40 pauses of 5 ms or more: %v", ms, err)
	}
	for _, picture := range []string{svgPath, pngPath} {
		if info, err := os.Stat(picture); err != nil || info.Size() < 1000 {
			t.Errorf("%s: %v", picture, err)
		}
	}
}

// example is a run that loses so many ns at each checkpoint.
func example(lost int64) *course {
	c := &course{paused: int64(checkpoints) * 6_000_000, points: []point{{}}}
	for n := 1; n <= checkpoints; n++ {
		c.overheads = append(c.overheads, 500_000+int64(n))
		if n%every == 0 {
			c.points = append(c.points, point{n, int64(n) * lost})
		}
	}
	c.commands = []int64{200_000, 300_000, 250_000}
	return c
}

func TestRatio(t *testing.T) {
	for _, c := range []struct {
		stock, kept []int64
		want        string
	}{
		{[]int64{100}, []int64{150}, "× 1.50"}, {[]int64{200}, []int64{100}, "× 0.50"}, {nil, []int64{1}, "-"}, {[]int64{1}, nil, "-"},
	} {
		if got := ratio(c.stock, c.kept); got != c.want {
			t.Errorf("ratio of %v and %v: %s, want %s", c.stock, c.kept, got, c.want)
		}
	}
}

func TestFixed(t *testing.T) {
	for _, c := range []struct {
		v        float64
		decimals int
		want     string
	}{
		{-0.0003, 1, "0.0"}, {-0.4, 0, "0"}, {0, 2, "0.00"}, {-0.3, 2, "-0.30"}, {1153.04, 1, "1153.0"}, {-1200, 0, "-1200"},
	} {
		if got := fixed(c.v, c.decimals); got != c.want {
			t.Errorf("fixed(%v, %d): %s, want %s", c.v, c.decimals, got, c.want)
		}
	}
}

func TestVerdict(t *testing.T) {
	off := func(drift int64) *course {
		c := example(0)
		c.points[len(c.points)-1].drift = drift
		return c
	}
	back := example(0)
	back.backsteps = 3
	good := example(6_000_000)
	for _, c := range []struct {
		name        string
		stock, kept *course
		want        []string // all of it, nothing where it is empty
	}{
		{"good", good, example(0), nil},
		{"at the bound", good, off(guest.MaxDrift), nil},
		{"behind", good, off(guest.MaxDrift + 1), []string{"off by 10.0 µs"}},
		{"ahead", good, off(-25_000), []string{"off by -25.0 µs, more than 10 µs"}},
		{"stock loses nothing", example(0), example(0), []string{"measuring is broken"}},
		{"stock loses half", example(3_000_000), example(0), nil},
		{"stock loses less than half", example(2_999_999), example(0), []string{"measuring is broken", "1200.0 ms", "600.0 ms"}},
		{"back", good, back, []string{"go back 3 times"}},
		{"everything", example(0), example(6_000_000), []string{"measuring is broken", "off by"}},
	} {
		err := verdict(c.stock, c.kept)
		if (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v lacks %q, or isn't one line", c.name, err, w)
			}
		}
	}
}

func TestTable(t *testing.T) {
	stock, kept := example(6_000_000), example(-2)
	kept.module = []int64{1000, 1200, 9000}
	const want = `                                                   stock       ftclock    ratio
checkpoints                                          200           200
guest was paused, STOP to RESUME, in all       1200.0 ms     1200.0 ms
guest's clock lost                             1200.0 ms        0.0 ms
drift left                                 1200000.00 µs      -0.40 µs
guest saw its clock go back, times                     0             0
suspend and resume, less the pause, median        500 µs        500 µs   × 1.00
QMP stop and cont, median                         250 µs        250 µs   × 1.00
module's part of a cont, median                        -        1.2 µs
module's part of a cont, longest                       -        9.0 µs`
	if got := table(stock, kept); got != want {
		t.Errorf("table:\n%s\nwant:\n%s", got, want)
	}
	kept.module = nil
	if got := table(stock, kept); strings.Contains(got, "module") {
		t.Errorf("without records:\n%s", got)
	}
}

func TestTicks(t *testing.T) {
	for _, c := range []struct{ low, high float64 }{{0, 200}, {-60, 1260}, {-20, 20}, {-70, 1467}, {-0.05, 1}, {0, 3999}, {-1e6, 1e6}} {
		all := ticks(c.low, c.high)
		if len(all) < 4 || len(all) > 11 {
			t.Errorf("%v to %v: %d ticks", c.low, c.high, len(all))
		}
		for _, tick := range all {
			if tick.Value < c.low || tick.Value > c.high || tick.Label == "" || tick.Label == "-0" {
				t.Errorf("%v to %v: tick %+v", c.low, c.high, tick)
			}
		}
	}
}

func TestPicture(t *testing.T) {
	for name, kept := range map[string]*course{"good": example(-2), "bad": example(300_000)} {
		kept.module = []int64{1000}
		svg, image := filepath.Join(t.TempDir(), "a.svg"), filepath.Join(t.TempDir(), "a.png")
		if err := writePicture(svg, image, example(6_000_000), kept, "libvirt <1>"); err != nil {
			t.Fatal(name, err)
		}
		text := check.Value(os.ReadFile(svg))(t)
		for _, want := range []string{"stroke:#D55E00", "stroke:#0072B2", "stock libvirt and QEMU", "with ftclock", "time lost (ms)",
			"residual (µs)", "±10 µs", "checkpoints", "libvirt &lt;1&gt;", "sans-serif"} {
			if !bytes.Contains(text, []byte(want)) {
				t.Errorf("%s: %q isn't in the SVG", name, want)
			}
		}
		f := check.Value(os.Open(image))(t)
		defer f.Close()
		img, err := png.Decode(f)
		if err != nil {
			t.Fatal(name, err)
		}
		pixels := map[color.Color]int{}
		for y := range img.Bounds().Dy() {
			for x := range img.Bounds().Dx() {
				pixels[color.RGBAModel.Convert(img.At(x, y))]++
			}
		}
		for _, c := range []color.Color{measure.Vermilion, measure.Blue, paleBlue} {
			if pixels[c] < 1000 {
				t.Errorf("%s: %d pixels of %v in the PNG", name, pixels[c], c)
			}
		}
	}
	if err := writePicture(filepath.Join(t.TempDir(), "none/a.svg"), filepath.Join(t.TempDir(), "a.png"), example(1), example(0), ""); err == nil {
		t.Error("writing where there is no directory succeeds")
	}
}

func TestProgressElsewhereThanOnATerminal(t *testing.T) {
	f := check.Value(os.Create(filepath.Join(t.TempDir(), "out")))(t)
	defer f.Close()
	p := newProgress(f)
	p.begin("stock")
	for n := 1; n <= checkpoints; n++ {
		p.step(n, int64(n)*6_000_000)
	}
	p.finish()
	text := check.Value(os.ReadFile(f.Name()))(t)
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if len(lines) != 5 || lines[4] != "stock    guest's clock lost   1200.0 ms  (200 of 200)" || strings.ContainsAny(string(text), "\r\x1b") {
		t.Errorf("%q", text)
	}
}

func TestPausesAreSummedFromEvents(t *testing.T) {
	w := &pauseWatch{}
	for _, e := range []libvirt.DomainQemuMonitorEvent{
		{Event: "STOP", Seconds: 10, Micros: 999_000}, {Event: "RESUME", Seconds: 11, Micros: 5_500},
		{Event: "STOP", Seconds: 11, Micros: 100_000}, {Event: "RESUME", Seconds: 11, Micros: 106_000},
	} {
		w.see(nil, nil, &e)
	}
	if sum, err := w.sum(2); err != nil || sum != 12_500_000 {
		t.Errorf("%d, %v", sum, err)
	}
	if _, err := w.sum(1); err == nil {
		t.Error("a pause too many wasn't noticed")
	}
}
