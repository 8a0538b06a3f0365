package ui

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Duration writes a time in the unit that suits it, with three significant digits or more.
func Duration(ns uint64) string {
	decimals := func(v float64, unit string) string {
		switch {
		case v < 9.995:
			return strconv.FormatFloat(v, 'f', 2, 64) + " " + unit
		case v < 99.95:
			return strconv.FormatFloat(v, 'f', 1, 64) + " " + unit
		}
		return strconv.FormatFloat(v, 'f', 0, 64) + " " + unit
	}
	const second = 1_000_000_000
	switch seconds := ns / second; {
	case ns < 1_000:
		return strconv.FormatUint(ns, 10) + " ns"
	case ns < 999_500:
		return decimals(float64(ns)/1e3, "µs")
	case ns < 999_500_000:
		return decimals(float64(ns)/1e6, "ms")
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

// Signed is sayNS with a sign.
func Signed(ns int64) string {
	switch {
	case ns < 0:
		return "-" + Duration(uint64(-(ns+1))+1)
	case ns == 0:
		return "0 ns"
	}
	return "+" + Duration(uint64(ns))
}

// Count words a number of things: "1 pause", "2 pauses".
func Count(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.FormatUint(n, 10) + " " + noun + "s"
}

// ShellWord quotes a word for a shell where it needs it.
func ShellWord(s string) string {
	plain := strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.,:+@/", r))
	}) < 0
	if plain && s != "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// OneLine makes one line of text, without characters that a terminal would act on.
func OneLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	return strings.Join(strings.Fields(text), " ")
}

// TableWidth is what every table fits, in columns.
const TableWidth = 100

// Column is a column of a table.
type Column struct {
	Title string
	Right bool // numbers
}

// Table lays rows out below their titles. Where that is wider than tableWidth, the first column gives way.
func Table(columns []Column, rows [][]string) []string {
	widths := make([]int, len(columns))
	total := 2 * (len(columns) - 1)
	for i, c := range columns {
		widths[i] = utf8.RuneCountInString(c.Title)
		for _, row := range rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
		total += widths[i]
	}
	if total > TableWidth {
		widths[0] = max(widths[0]-(total-TableWidth), utf8.RuneCountInString(columns[0].Title))
	}
	lay := func(cell func(int) string) string {
		var line strings.Builder
		for i, c := range columns {
			text := Shorten(cell(i), widths[i])
			gap := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
			if c.Right {
				line.WriteString(gap + text)
			} else {
				line.WriteString(text + gap)
			}
			line.WriteString("  ")
		}
		return strings.TrimRight(line.String(), " ")
	}
	lines := []string{lay(func(i int) string { return columns[i].Title })}
	for _, row := range rows {
		lines = append(lines, lay(func(i int) string { return row[i] }))
	}
	return lines
}

// Shorten cuts s to a width in runes, the last of which is then an ellipsis.
func Shorten(s string, width int) string {
	r := []rune(s)
	if len(r) <= width {
		return s
	}
	return string(r[:max(width-1, 0)]) + "…"
}
