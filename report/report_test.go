package report

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"image"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ftclock/clockpage"
	"ftclock/control"
	"ftclock/record"
	"ftclock/test/check"
	"ftclock/test/history"
)

const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"

var begin0 = time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)

// read makes the report of a history.
func read(t testing.TB, dir string, o Options) *Report {
	t.Helper()
	r := check.Value(record.Read(dir, uuid, o.From, o.To))(t)
	o.Made, o.Version, o.Host = o.To, "test", "host1"
	return New(r, o)
}

// day is a history with everything that can go wrong.
func day(dir string) time.Time {
	h := history.New(dir, uuid, "web1", begin0, "utc")
	h.Minutes(60, 240)
	h.Unseen(600, 250*time.Millisecond) // more than the ring holds
	h.Look()
	h.Minutes(20, 240)
	h.End(record.EndSignal) // and QEMU runs on
	h.Unseen(2400, 250*time.Millisecond)
	h.Shim("utc")
	h.Look()
	h.Minutes(20, 240)
	h.Change = func(r *clockpage.Record) { r.Decision, r.Reason = clockpage.Passed, clockpage.ReadFailed }
	h.Minutes(2, 240)
	h.Change = nil
	h.Minutes(30, 240)
	h.End(record.EndQEMU)
	h.At = h.At.Add(30 * time.Minute)
	h.Boot("history-2", "utc")
	h.Minutes(40, 240)
	h.State(control.Watching, "")
	h.At = h.At.Add(10 * time.Minute)
	h.State(control.Correcting, "utc")
	h.Minutes(15, 240)
	h.End(record.EndQEMU)
	return h.At
}

func clean(dir, reference string) time.Time {
	h := history.New(dir, uuid, "web1", begin0, reference)
	h.Minutes(90, 240)
	return h.At.Add(time.Second) // the last one is before it
}

func TestCleanPeriod(t *testing.T) {
	dir := t.TempDir()
	end := clean(dir, "utc")
	p := read(t, dir, Options{To: end, Alive: true})
	s := p.Statement
	if len(s.Findings) != 0 || len(p.Gaps) != 0 || s.Coverage != 1 || s.Pauses != 90*240 || s.Missed != 0 || s.Reference != "utc" {
		t.Errorf("statement: %+v, gaps %+v", s, p.Gaps)
	}
	total := record.Minute{}
	var worst int64
	for _, m := range p.Minutes {
		total.Lost += m.Lost
		worst = max(worst, m.Residual.Worst())
	}
	if s.Lost != total.Lost || s.Lost == 0 || s.CaughtUp != s.Lost || s.Divergence != worst || worst == 0 || s.ToUTC != worst+41_000 {
		t.Errorf("lost %d, want %d; divergence %d, want %d; to UTC %d", s.Lost, total.Lost, s.Divergence, worst, s.ToUTC)
	}
	for _, l := range Limits {
		if v := s.Verdict(l.Limit); v != "kept, from UTC" {
			t.Errorf("%v: %s", l.Limit, v)
		}
	}
	if v := s.Verdict(40 * time.Microsecond); v != "exceeded" {
		t.Errorf("40 µs: %s", v)
	}
	html := page1(t, p)
	if !strings.Contains(html, "All 21\u202f600 pauses were recorded and corrected") || strings.Contains(html, "isn&#39;t known what") {
		t.Error("the page doesn't say that all is well")
	}
}

// Nothing is shown for a guest that reads another clock, though kvmclock was right.
func TestUnkept(t *testing.T) {
	dir := t.TempDir()
	h := history.New(dir, uuid, "web1", begin0, "raw")
	h.Minutes(10, 240)
	h.State(control.Unkept, "raw")
	h.Minutes(10, 240)
	h.End(record.EndQEMU)
	p := read(t, dir, Options{To: h.At, Alive: true})
	if s := p.Statement; s.Uncorrected != 10*time.Minute || s.Verdict(time.Second) == "kept, from the reference" || len(p.Gaps) != 1 || len(s.Findings) != 1 {
		t.Errorf("uncorrected for %v, gaps %+v, findings %q: %s", s.Uncorrected, p.Gaps, s.Findings, s.Verdict(time.Second))
	}
}

// Against the raw clock nothing is claimed about UTC; nor where the host wasn't synchronised.
func TestNoClaimOfUTC(t *testing.T) {
	dir := t.TempDir()
	end := clean(dir, "raw")
	s := read(t, dir, Options{To: end, Alive: true}).Statement
	if s.ToUTC != -1 || !strings.Contains(s.ToUTCWhy, "in the guest") || s.Verdict(time.Millisecond) != "kept, from the reference" {
		t.Errorf("%+v", s)
	}
	dir = t.TempDir()
	h := history.New(dir, uuid, "web1", begin0, "raw")
	h.Host.Synchronised = false
	h.Minutes(5, 60)
	if s := read(t, dir, Options{To: h.At, Alive: true}).Statement; len(s.Findings) != 0 || s.HostClock.Unsynchronised == 0 {
		t.Errorf("a clock that has nothing to do with the host's: %+v", s)
	}
	dir = t.TempDir()
	h = history.New(dir, uuid, "web1", begin0, "utc")
	h.Minutes(5, 60)
	h.Host.Synchronised = false
	h.Minutes(5, 60)
	s = read(t, dir, Options{To: h.At, Alive: true}).Statement
	if s.ToUTC != -1 || !strings.Contains(s.ToUTCWhy, "wasn't synchronised") || s.HostClock.Unsynchronised == 0 || len(s.Findings) != 1 {
		t.Errorf("%+v", s)
	}
}

func page1(t testing.TB, p *Report) string {
	t.Helper()
	var b bytes.Buffer
	check.NoError(t, p.WriteHTML(&b))
	return b.String()
}

// Whatever is missing is said, and no line goes over it.
func TestGaps(t *testing.T) {
	dir := t.TempDir()
	end := day(dir)
	p := read(t, dir, Options{To: end})
	s := p.Statement
	if s.Missed != 600-256+2400-256 {
		t.Errorf("%d missed", s.Missed)
	}
	// 10 minutes without a shim and the ring that was full: 344 pauses, a quarter of a second each. 10 minutes watched, and the
	// pauses of 2 minutes passed, in which a minute counts whole.
	if s.Unknown < 10*time.Minute+86*time.Second || s.Unknown > 12*time.Minute {
		t.Errorf("%v not known", s.Unknown)
	}
	if s.Uncorrected < 12*time.Minute-time.Second || s.Uncorrected > 14*time.Minute || s.Doubtful != 480 || s.Passed == 0 || s.Behind != s.Passed {
		t.Errorf("%v uncorrected, %d doubtful, %d ns passed", s.Uncorrected, s.Doubtful, s.Passed)
	}
	if s.Off != 30*time.Minute {
		t.Errorf("%v off", s.Off)
	}
	if sum := s.Corrected + s.Uncorrected + s.Unknown + s.Off; sum != p.To.Sub(p.From) {
		t.Errorf("the stretches make %v of %v", sum, p.To.Sub(p.From))
	}
	at := p.From
	for _, x := range p.Stretches {
		if !x.From.Equal(at) || !x.To.After(x.From) {
			t.Errorf("a hole before %+v", x)
		}
		at = x.To
	}
	if s.ToUTC != -1 || s.Verdict(100*time.Microsecond) != "exceeded" {
		t.Errorf("verdict: %s", s.Verdict(100*time.Microsecond))
	}
	kinds := map[string]bool{}
	for _, g := range p.Gaps {
		kinds[g.Kind] = true
	}
	if !kinds["no shim"] || !kinds["not recorded"] || !kinds["uncorrected"] {
		t.Errorf("gaps: %+v", p.Gaps)
	}
	html := page1(t, p)
	for _, want := range []string{"Not everything in this time is shown to be right", "2\u202f488 pauses are known by number alone", "no shim", "overwritten",
		"the kernel&#39;s clock", "the shim was told to end (signal); QEMU ran on", `class="unknown"`, `class="uncorrected"`, `class="off"`, `class="missed"`} {
		if !strings.Contains(html, want) {
			t.Errorf("the page has no %q", want)
		}
	}
	// The line without ftclock is broken at each gap: no part of it crosses a stretch that isn't corrected.
	line := regexp.MustCompile(`<path class="without"[^>]* d="([^"]*)"`).FindStringSubmatch(string(p.drift().SVG))
	if line == nil || strings.Count(line[1], "M") < 5 {
		t.Errorf("the line isn't broken: %v", line)
	}
}

// A record whose shim has died isn't known to its end; one that has ended is off.
func TestDeadShim(t *testing.T) {
	dir := t.TempDir()
	end := clean(dir, "raw").Add(time.Hour)
	p := read(t, dir, Options{To: end})
	if s := p.Statement; s.Unknown < 59*time.Minute || len(p.Gaps) != 1 || !strings.Contains(p.Gaps[0].Why, "killed") {
		t.Errorf("%+v, %+v", s, p.Gaps)
	}
	p = read(t, dir, Options{To: end, Alive: true})
	if s := p.Statement; s.Unknown != 0 || s.Coverage != 1 {
		t.Errorf("alive: %+v", s)
	}
	p = read(t, dir, Options{From: begin0.Add(-24 * time.Hour), To: end, Alive: true})
	if s := p.Statement; s.Unknown != 24*time.Hour || len(p.Gaps) != 1 || p.Gaps[0].Kind != "before the record" {
		t.Errorf("before the record: %+v, %+v", s, p.Gaps)
	}
	p = read(t, dir, Options{From: begin0.Add(100 * time.Minute), To: end, Alive: true})
	if s := p.Statement; s.Pauses != 0 || s.Verdict(time.Second) != "nothing to show" || !strings.Contains(page1(t, p), "no pause was recorded") {
		t.Errorf("without a pause: %+v", s)
	}
}

// What is damaged is a gap, and named.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	end := clean(dir, "raw")
	files, _ := filepath.Glob(filepath.Join(dir, uuid, "timeline-*.log"))
	text := check.Value(os.ReadFile(files[0]))(t)
	text[len(text)/2] ^= 0x20
	check.NoError(t, os.WriteFile(files[0], text, 0o600))
	p := read(t, dir, Options{To: end, Alive: true})
	if len(p.Problems) != 1 || p.Statement.Unknown == 0 || len(p.Statement.Findings) == 0 || p.Statement.Coverage == 1 {
		t.Errorf("%+v, %v", p.Statement, p.Problems)
	}
	if html := page1(t, p); !strings.Contains(html, files[0]) {
		t.Error("the page doesn't name the file")
	}
}

// A name is anything, and the page has nothing from elsewhere.
func TestPageIsSelfContained(t *testing.T) {
	dir := t.TempDir()
	h := history.New(dir, uuid, `<script>alert(1)</script>&"`, begin0, "raw")
	h.Minutes(3, 60)
	html := page1(t, read(t, dir, Options{To: h.At, Alive: true}))
	if strings.Contains(html, "<script") || !strings.Contains(html, "&lt;script&gt;") {
		t.Error("a name came through as it was")
	}
	if found := regexp.MustCompile(`(?i)(src|href)=|url\([^#]|@import|<link|<iframe`).FindString(html); found != "" {
		t.Errorf("the page reaches out: %s", found)
	}
	for _, want := range []string{"prefers-color-scheme: dark", "@media print", "default-src 'none'"} {
		if !strings.Contains(html, want) {
			t.Errorf("no %q", want)
		}
	}
}

// JSON and CSV have what the page has.
func TestFormatsAgree(t *testing.T) {
	dir := t.TempDir()
	end := day(dir)
	p := read(t, dir, Options{To: end})
	text := check.Value(json.Marshal(p))(t)
	var back Report
	if err := json.Unmarshal(text, &back); err != nil || back.Statement.Divergence != p.Statement.Divergence || len(back.Minutes) != len(p.Minutes) {
		t.Errorf("JSON: %v", err)
	}
	var b bytes.Buffer
	check.NoError(t, p.WriteCSV(&b))
	rows := check.Value(csv.NewReader(&b).ReadAll())(t)
	minutes, gaps, stretches := 0, 0, 0
	for _, row := range rows[1:] {
		switch {
		case row[0] == "minute":
			minutes++
		case strings.HasPrefix(row[0], "gap: "):
			gaps++
		default:
			stretches++
		}
	}
	if minutes != len(p.Minutes) || gaps != len(p.Gaps) || stretches != len(p.Stretches) || len(rows[0]) != 20 {
		t.Errorf("%d minutes, %d gaps, %d stretches", minutes, gaps, stretches)
	}
}

// A real browser shows the page light and dark, and prints it. With FTCLOCK_PICTURES the pictures go there.
func TestBrowser(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal("no chromium: apt-get install chromium")
	}
	dir := t.TempDir()
	for name, past := range map[string]func(string) time.Time{
		"report": func(dir string) time.Time { return clean(dir, "utc") }, "report-gaps": day,
	} {
		end := past(filepath.Join(dir, name))
		p := read(t, filepath.Join(dir, name), Options{To: end, Alive: name == "report"})
		check.NoError(t, os.WriteFile(filepath.Join(dir, name+".html"), []byte(page1(t, p)), 0o600))
	}
	pictures := dir
	if to := os.Getenv("FTCLOCK_PICTURES"); to != "" {
		pictures = to
	}
	browse := func(args ...string) {
		t.Helper()
		args = append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--user-data-dir=" + dir + "/profile"}, args...)
		cmd := exec.Command(chromium, args...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "LC_ALL=C.UTF-8"}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("chromium: %v: %s", err, out)
		}
	}
	convert := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("convert", args...).CombinedOutput(); err != nil {
			t.Fatalf("convert (apt-get install imagemagick): %v: %s", err, out)
		}
	}
	brightness := map[string]uint32{}
	for _, shot := range []struct{ name, page, scheme, size string }{
		{"report-light", "report", "1", "1000,4000"}, {"report-dark", "report", "0", "1000,4000"},
		{"report-gaps", "report-gaps", "1", "1000,5000"}, {"report-narrow", "report-gaps", "1", "500,1900"},
	} {
		if pictures == dir && shot.page != "report" {
			continue // for people
		}
		file := filepath.Join(pictures, shot.name+".png")
		browse("--blink-settings=preferredColorScheme="+shot.scheme, "--window-size="+shot.size, "--screenshot="+file, "file://"+dir+"/"+shot.page+".html")
		r, g, b, _ := decode(t, file).At(2, 2).RGBA()
		brightness[shot.name] = r >> 8
		if pictures != dir { // the window is higher than the page
			paper := fmt.Sprintf("#%02x%02x%02x", r>>8, g>>8, b>>8)
			convert(file, "-bordercolor", paper, "-border", "1", "-trim", "+repage", "-border", "24", file)
		}
	}
	if brightness["report-light"] != 255 || brightness["report-dark"] > 60 {
		t.Errorf("the paper's brightness: %v", brightness)
	}
	pdf := filepath.Join(pictures, "report-print.pdf")
	browse("--blink-settings=preferredColorScheme=0", "--no-pdf-header-footer", "--print-to-pdf="+pdf, "file://"+dir+"/report.html")
	text := check.Value(os.ReadFile(pdf))(t)
	pages := regexp.MustCompile(`/Type\s*/Page\b`).FindAll(text, -1)
	if len(pages) < 1 || len(pages) > 4 {
		t.Errorf("%d printed pages", len(pages))
	}
	// Printed on white, whatever the screen was.
	if out, err := exec.Command("pdftoppm", "-r", "72", "-png", pdf, filepath.Join(dir, "print")).CombinedOutput(); err != nil {
		t.Fatalf("pdftoppm (apt-get install poppler-utils): %v: %s", err, out)
	}
	sheets, _ := filepath.Glob(filepath.Join(dir, "print-*.png"))
	if len(sheets) != len(pages) {
		t.Fatalf("%d sheets of %d pages", len(sheets), len(pages))
	}
	r, _, _, _ := decode(t, sheets[0]).At(5, 5).RGBA()
	if r>>8 != 255 {
		t.Errorf("the printed paper's brightness is %d", r>>8)
	}
	if pictures == dir {
		return
	}
	// Side by side, in few colours: small.
	montage(t, filepath.Join(pictures, "report-print.png"), sheets)
	check.NoError(t, os.Remove(pdf))
	shots, _ := filepath.Glob(filepath.Join(pictures, "report-*.png"))
	for _, shot := range shots {
		convert(shot, "-resize", "1400x>", "+dither", "-colors", "64", "-strip", "PNG8:"+shot)
	}
}

func decode(t *testing.T, file string) image.Image {
	t.Helper()
	f := check.Value(os.Open(file))(t)
	defer f.Close()
	picture := check.Value(png.Decode(f))(t)
	return picture
}

// montage puts sheets side by side.
func montage(t *testing.T, to string, sheets []string) {
	t.Helper()
	args := append(append([]string{"-background", "#888", "-bordercolor", "#888", "-border", "6"}, sheets...), "+append", to)
	if out, err := exec.Command("convert", args...).CombinedOutput(); err != nil {
		t.Fatalf("convert (apt-get install imagemagick): %v: %s", err, out)
	}
}
