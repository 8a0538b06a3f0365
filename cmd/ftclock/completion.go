package main

import (
	"github.com/alecthomas/kong"
	kongcompletion "github.com/jotaen/kong-completion"
	"github.com/posener/complete"
)

// completeLine answers a shell that asks what could come next: it has put the line so far into COMP_LINE (bash(1),
// complete -C). Without that variable it does nothing. The shells' own halves are in packaging/completions.
func completeLine(parser *kong.Kong) {
	kongcompletion.Register(parser, kongcompletion.WithPredictor("domain", complete.PredictFunc(domainNames)))
}

// domainNames are all domains of the hypervisor that a command without --connect would reach. Where it can't be
// reached there are none: a shell has no place for an error here.
func domainNames(complete.Args) []string {
	h, err := connect("")
	if err != nil {
		return nil
	}
	defer h.close()
	domains, err := h.ListAllDomains(0)
	if err != nil {
		return nil
	}
	var names []string
	for i := range domains {
		if name, err := domains[i].GetName(); err == nil {
			names = append(names, name)
		}
		_ = domains[i].Free()
	}
	return names
}
