package ui

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

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

// TableWidth is what every table fits, in columns.
const TableWidth = 100

// Column is a column of a table.
type Column struct {
	Title string
	Right bool // numbers
	Gives bool // it may be made narrower
}

// Table lays rows out below their titles. Where that is wider than TableWidth, the columns that may give way, the widest first; where
// none may, the first.
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
	for ; total > TableWidth; total-- {
		widest := 0
		for i, c := range columns {
			if c.Gives && (!columns[widest].Gives || widths[i] > widths[widest]) {
				widest = i
			}
		}
		if widths[widest] <= utf8.RuneCountInString(columns[widest].Title) {
			break
		}
		widths[widest]--
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
