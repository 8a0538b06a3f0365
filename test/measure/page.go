package measure

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// Table is one of Markdown. What else is written to it comes behind its rows.
type Table struct{ strings.Builder }

// NewTable is a table with that head and no rows.
func NewTable(head ...string) *Table {
	t := &Table{}
	t.Row(head...)
	t.Row(slices.Repeat([]string{"---"}, len(head))...)
	return t
}

// Row adds a row.
func (t *Table) Row(cells ...string) { t.WriteString("| " + strings.Join(cells, " | ") + " |\n") }

// Marks are the lines of a page between which a section is measured, not written by a person.
func Marks(section string) (begin, end string) {
	return "<!-- measured: " + section + " -->\n", "<!-- end: " + section + " -->\n"
}

// WriteSection puts text between the marks of a page's section.
func WriteSection(path, section, text string) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	begin, end := Marks(section)
	before, rest, ok := strings.Cut(string(page), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("writing %s: it lacks the marks %q and %q", path, begin, end)
	}
	return os.WriteFile(path, []byte(before+begin+text+end+after), 0o644)
}

// Load is the machine's load average over the last minute; "?" if it isn't known.
func Load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	return strings.SplitN(string(text), " ", 2)[0]
}
