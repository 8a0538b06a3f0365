package measure

import (
	"testing"

	"ftclock/test/check"
)

// What other files take isn't the module's; the page's sections are one part, wherever the compiler put them.
func TestPartsOf(t *testing.T) {
	const annotated = `
 9,000 (50.00%)  PROGRAM TOTALS
 2,000 (11.11%)  /work/rule_clocks.c:read_clock [/work/cont]
 1,500 ( 8.33%)  testdata/cont.c:clock_now [/work/cont]
 4,000 (22.22%)  /work/rule.c:rule_set_clock [/work/cont]
   900 ( 5.00%)  /work/rule_page.h:rule_set_clock
   300 ( 1.67%)  /work/rule_page.h:steer
   100 ( 0.56%)  /work/rule_parts.h:rule_set_clock
     1 ( 0.01%)  /work/rule_tsc.c:learn_tsc [/work/cont]
`
	c := Counted{Parts: check.Value(partsOf(annotated, 100))(t)}
	if got, want := c.Split(), "rule_set_clock 41, read_clock 20, the page's sections, word by word 12"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if _, err := partsOf("PROGRAM TOTALS", 100); err == nil {
		t.Error("nothing of the rule is no error")
	}
}
