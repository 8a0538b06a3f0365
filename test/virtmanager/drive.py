"""Drives virt-manager as a person does, by what it tells assistive technology (AT-SPI) of itself.

Usage: drive.py VERB ROLE NAME [TEXT]

wait   until a widget of that role and name is shown
click  it
text   prints what it says
type   replaces what it says by standard input
tree   prints all that is shown

A name is that of the widget or of the label that is for it. Every verb waits for the widget, for up to a minute.
"""
import sys
import time

import gi

gi.require_version("Atspi", "2.0")
from gi.repository import Atspi, GLib

PATIENCE = 60  # seconds


def shown(widget):
    states = widget.get_state_set()
    return states.contains(Atspi.StateType.SHOWING) and states.contains(Atspi.StateType.VISIBLE)


def names(widget):
    yield widget.get_name() or ""
    for relation in widget.get_relation_set() or []:
        if relation.get_relation_type() == Atspi.RelationType.LABELLED_BY:
            for i in range(relation.get_n_targets()):
                yield relation.get_target(i).get_name() or ""


def everything(widget, depth=0):
    yield widget, depth
    for i in range(widget.get_child_count()):
        child = widget.get_child_at_index(i)
        if child is not None:
            yield from everything(child, depth + 1)


def programs():
    desktop = Atspi.get_desktop(0)
    for i in range(desktop.get_child_count()):
        program = desktop.get_child_at_index(i)
        if program is not None and "virt-manager" in (program.get_name() or ""):
            yield program


def find(role, name):
    for program in programs():
        for widget, _ in everything(program):
            if widget.get_role_name() == role and shown(widget) and name in names(widget):
                return widget
    return None


def wait(role, name):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            widget = find(role, name)
            if widget is not None:
                return widget
        except GLib.Error:  # it changed while it was looked at
            pass
        time.sleep(0.1)
    tree()
    sys.exit(f"drive: no {role} {name!r} is shown")


def tree():
    for program in programs():
        for widget, depth in everything(program):
            if shown(widget) or depth == 0:
                print("  " * depth + widget.get_role_name(), list(names(widget)))


def main():
    verb, args = sys.argv[1], sys.argv[2:]
    if verb == "tree":
        return tree()
    widget = wait(*args[:2])
    if verb == "click":
        if widget.get_action_iface() is not None and widget.get_n_actions() > 0:
            widget.do_action(0)
        else:  # a tab, a row
            parent = widget.get_parent()
            parent.select_child(widget.get_index_in_parent())
    elif verb == "text":
        print(Atspi.Text.get_text(widget, 0, -1), end="")
    elif verb == "type":
        if not widget.set_text_contents(sys.stdin.read()):
            sys.exit(f"drive: {args} takes no text")


main()
