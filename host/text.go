package host

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode"
)

// Printable puts a space in the place of every character that a terminal or a log would act upon, and U+FFFD in that of a byte
// that isn't UTF-8. It keeps what comes from elsewhere from writing into the log, or the terminal, of whoever reads it.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
}

// OneLine is Printable text with one space between its words, and none around it.
func OneLine(text string) string {
	return strings.Join(strings.Fields(Printable(text)), " ")
}

// ErrorLine words an error, joined ones too, as one line.
func ErrorLine(err error) string {
	return OneLine(strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; "))
}

// UUID gives the UUID that a person wrote, with or without dashes, in the form of libvirt's: 36 characters, in lower case.
func UUID(text string) (id string, ok bool) {
	hex := strings.ToLower(strings.ReplaceAll(text, "-", ""))
	if len(hex) != 32 || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", false
	}
	return strings.Join([]string{hex[:8], hex[8:12], hex[12:16], hex[16:20], hex[20:]}, "-"), true
}

// IsUUID says whether id is a UUID as libvirt writes it, which is always safe in a file's name.
func IsUUID(id string) bool {
	canonical, ok := UUID(id)
	return ok && canonical == id
}

// processPrefix begins what stands for the UUID of a QEMU that libvirt didn't start.
const processPrefix = "pid-"

// ProcessUUID stands for the UUID of a QEMU that libvirt didn't start: its pid, and when that process began, in clock ticks since boot,
// so that the state of one that had the pid before isn't taken for its.
func ProcessUUID(pid int, started uint64) string {
	return fmt.Sprintf("%s%d-%d", processPrefix, pid, started)
}

// ProcessOf reads ProcessUUID's words back; ok is false for a domain of libvirt's.
func ProcessOf(uuid string) (pid int, started uint64, ok bool) {
	words, _ := strings.CutPrefix(uuid, processPrefix)
	first, second, _ := strings.Cut(words, "-")
	pid, _ = strconv.Atoi(first)
	started, _ = strconv.ParseUint(second, 10, 64)
	return pid, started, pid > 1 && uuid == ProcessUUID(pid, started)
}

// Nanoseconds writes a time in the unit that suits it, with three significant digits or more: 5.00 ms, 0.58 s, 1m17s.
func Nanoseconds(ns uint64) string {
	const second = 1_000_000_000
	switch seconds := ns / second; {
	case ns < 1_000:
		return strconv.FormatUint(ns, 10) + " ns"
	case ns < 999_500:
		return significant(float64(ns)/1e3) + " µs"
	case ns < 999_500_000:
		return significant(float64(ns)/1e6) + " ms"
	case seconds < 60:
		return strconv.FormatFloat(math.Floor(float64(ns)/1e7)/100, 'f', 2, 64) + " s"
	case seconds < 3600:
		return fmt.Sprintf("%dm%02ds", seconds/60, seconds%60)
	case seconds < 100*3600:
		return fmt.Sprintf("%dh%02dm", seconds/3600, seconds/60%60)
	default:
		return fmt.Sprintf("%dd%02dh", seconds/86400, seconds/3600%24)
	}
}

// significant writes a number below 1000 with three digits.
func significant(v float64) string {
	decimals := 0
	switch {
	case v < 9.995:
		decimals = 2
	case v < 99.95:
		decimals = 1
	}
	return strconv.FormatFloat(v, 'f', decimals, 64)
}

// SignedNanoseconds is Nanoseconds with a sign; 0 has none.
func SignedNanoseconds(ns int64) string {
	switch {
	case ns < 0:
		return "-" + Nanoseconds(uint64(-(ns+1))+1)
	case ns == 0:
		return "0 ns"
	}
	return "+" + Nanoseconds(uint64(ns))
}
