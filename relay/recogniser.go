package relay

import "bytes"

// Bounds of what a recogniser remembers of a message. Past them the message is passed over, never the relay held up.
const (
	maxDepth = 1024 // QEMU's own limit (qobject/json-streamer.c, MAX_NESTING)
	maxWord  = 64   // bytes of a key, a command's or an event's name
	maxID    = 512  // bytes of an id
)

// A Message is what the recogniser saw of one QMP message (docs/interop/qmp-spec.rst in QEMU).
type Message struct {
	Execute  string // the command's name; "" if it isn't a command
	Event    string // the event's name; "" if it isn't an event
	ID       string // the id member as it was written; "" without one, or one longer than 512 bytes
	Answer   bool   // has a return member
	Failure  bool   // has an error member
	Greeting bool   // has a QMP member
}

// A recogniser finds the messages in one direction of a monitor's byte stream: a push tokeniser for JSON that keeps
// its place between any two bytes and needs a bounded memory whatever comes. It accepts what QEMU's parser accepts
// (strings in single quotes too); after anything else it goes on behind the next newline, with which both libvirt
// and QEMU end each message.
type recogniser struct {
	state  state
	quote  byte // of the string that is open
	escape int  // in a string: 0 none, 1 after a backslash, 2 to 5 the hex digits of \u
	rune   rune // what they say so far

	depth   int
	objects [maxDepth/64 + 1]uint64 // bit d: the container at depth d is an object

	m       Message
	seen    member // top-level members seen: one that comes twice spoils the message, as for QEMU
	spoiled bool
	current member // of the top-level value being read
	take    bool   // the string being read goes to word
	takeID  bool
	// Arrays, so that a recogniser can be copied to look ahead.
	word  [maxWord]byte // the string being read, while it is a top-level key or name
	wordN int
	id    [maxID]byte
	idN   int
}

type state uint8

const (
	wantValue state = iota
	wantValueOrEnd
	wantKey
	wantKeyOrEnd
	wantColon
	wantCommaOrEnd
	inString
	inKey
	inAtom
	lost // until a newline
)

type member uint8

const (
	otherMember   member = 0
	executeMember member = 1 << iota
	eventMember
	idMember
	returnMember
	errorMember
	qmpMember
)

var members = map[string]member{
	"execute":  executeMember,
	"exec-oob": executeMember,
	"event":    eventMember,
	"id":       idMember,
	"return":   returnMember,
	"error":    errorMember,
	"QMP":      qmpMember,
}

// feed reads the next bytes of the stream up to the end of a message, and says how many it read and, if a message
// ended with them, which. The caller calls again with the rest.
func (r *recogniser) feed(b []byte) (n int, m Message, ended bool) {
	for n < len(b) {
		if n += r.pass(b[n:]); n == len(b) {
			break
		}
		n++
		if r.step(b[n-1]) {
			m, ended = r.m, !r.spoiled
			r.reset()
			if ended {
				return n, m, true
			}
		}
	}
	return n, Message{}, false
}

// each reads all of b, and tells of each message that ended.
func (r *recogniser) each(b []byte, tell func(Message)) {
	for len(b) > 0 {
		n, m, ended := r.feed(b)
		b = b[n:]
		if ended {
			tell(m)
		}
	}
}

// pass is the quick way: how many bytes at the beginning of b step would take without anything coming of it. Most of a stream are:
// strings and words that nobody asks for.
func (r *recogniser) pass(b []byte) (n int) {
	switch {
	case r.takeID:
	case (r.state == inString || r.state == inKey) && !r.take && r.escape == 0:
		for n < len(b) && b[n] >= 0x20 && b[n] != r.quote && b[n] != '\\' {
			n++
		}
	case r.state == inAtom:
		for n < len(b) && isAtom(b[n]) {
			n++
		}
	case r.state == lost:
		if n = bytes.IndexByte(b, '\n'); n < 0 {
			n = len(b)
		}
	}
	return n
}

// idle says that the stream is between two messages.
func (r *recogniser) idle() bool { return r.depth == 0 && r.state == wantValue }

// isLost says that the recogniser waits for the next newline to find its place again.
func (r *recogniser) isLost() bool { return r.state == lost }

// reset begins a message. What the arrays hold is looked at only as far as it was written since.
func (r *recogniser) reset() {
	r.state, r.escape, r.depth = wantValue, 0, 0
	r.m, r.seen, r.spoiled, r.current = Message{}, 0, false, otherMember
	r.take, r.takeID, r.wordN, r.idN = false, false, 0, 0
}

func (r *recogniser) giveUp(c byte) bool {
	r.reset()
	if c != '\n' {
		r.state = lost
	}
	return false
}

// step takes one byte and says whether a top-level value ended with it.
func (r *recogniser) step(c byte) bool {
	if r.takeID && r.state != lost {
		r.keepID(c)
	}
	switch r.state {
	case inString, inKey:
		return r.inString(c)
	case inAtom:
		if isAtom(c) {
			return false
		}
		if r.valueEnded() { // a number or a word at the top level: no message of QMP
			return r.giveUp(c)
		}
		// c comes after the value and is looked at below.
	case lost:
		if c == '\n' {
			r.state = wantValue
		}
		return false
	}
	if c == ' ' || c == '\t' || c == '\n' || c == '\r' {
		return false
	}
	switch r.state {
	case wantValue, wantValueOrEnd:
		if c == ']' && r.state == wantValueOrEnd {
			return r.leave()
		}
		return r.beginValue(c)
	case wantKey, wantKeyOrEnd:
		switch {
		case c == '"' || c == '\'':
			r.openString(c, inKey)
			return false
		case c == '}' && r.state == wantKeyOrEnd:
			return r.leave()
		}
	case wantColon:
		if c == ':' {
			r.state = wantValue
			return false
		}
	case wantCommaOrEnd:
		object := r.inObject()
		switch {
		case c == ',' && object:
			r.state = wantKey
			return false
		case c == ',':
			r.state = wantValue
			return false
		case c == '}' && object, c == ']' && !object:
			return r.leave()
		}
	}
	return r.giveUp(c)
}

func (r *recogniser) beginValue(c byte) bool {
	if r.depth == 1 && r.current == idMember && !r.takeID && r.inObject() {
		r.takeID, r.id[0], r.idN = true, c, 1
	}
	switch {
	case c == '{' || c == '[':
		if r.depth == maxDepth {
			return r.giveUp(c)
		}
		r.depth++
		bit := uint64(1) << (r.depth % 64)
		if c == '{' {
			r.objects[r.depth/64] |= bit
			r.state = wantKeyOrEnd
		} else {
			r.objects[r.depth/64] &^= bit
			r.state = wantValueOrEnd
		}
	case c == '"' || c == '\'':
		r.openString(c, inString)
	case isAtom(c):
		r.state = inAtom
	default:
		return r.giveUp(c)
	}
	return false
}

// openString begins a string; it is kept if it is a top-level key or the name of a command or an event.
func (r *recogniser) openString(quote byte, as state) {
	r.state, r.quote, r.escape = as, quote, 0
	r.wordN = 0
	r.take = r.depth == 1 && r.inObject() && (as == inKey || r.current&(executeMember|eventMember) != 0)
}

func (r *recogniser) inString(c byte) bool {
	switch {
	case r.escape >= 2:
		digit := unhex(c)
		if digit < 0 {
			return r.giveUp(c)
		}
		r.rune = r.rune<<4 | rune(digit)
		if r.escape++; r.escape == 6 {
			r.escape = 0
			r.keep(r.rune)
		}
	case r.escape == 1:
		r.escape = 0
		switch c {
		case 'u':
			r.escape, r.rune = 2, 0
		case 'b', 'f', 'n', 'r', 't':
			r.keep(' ') // in no name that we look for
		case '"', '\'', '\\', '/':
			r.keep(rune(c))
		default:
			return r.giveUp(c)
		}
	case c == '\\':
		r.escape = 1
	case c == r.quote:
		return r.stringEnded()
	case c < 0x20:
		return r.giveUp(c)
	default:
		r.keep(rune(c))
	}
	return false
}

// keep adds a character to the string that is being kept. What we look for is ASCII; anything else only has to be
// different from it.
func (r *recogniser) keep(c rune) {
	if !r.take {
		return
	}
	if r.wordN == maxWord {
		r.take, r.wordN = false, 0
		return
	}
	if c >= 0x80 {
		c = '?'
	}
	r.word[r.wordN] = byte(c)
	r.wordN++
}

func (r *recogniser) keepID(c byte) {
	if r.idN == maxID {
		r.takeID, r.current = false, otherMember
		return
	}
	r.id[r.idN] = c
	r.idN++
}

func (r *recogniser) stringEnded() bool {
	if r.state == inKey {
		r.state = wantColon
		if r.depth == 1 {
			r.current = members[string(r.word[:r.wordN])]
			if r.current != otherMember && r.seen&r.current != 0 {
				r.spoiled = true
			}
			r.seen |= r.current
			switch r.current {
			case returnMember:
				r.m.Answer = true
			case errorMember:
				r.m.Failure = true
			case qmpMember:
				r.m.Greeting = true
			}
		}
		return false
	}
	if r.take {
		switch r.current {
		case executeMember:
			r.m.Execute = string(r.word[:r.wordN])
		case eventMember:
			r.m.Event = string(r.word[:r.wordN])
		}
	}
	if r.valueEnded() {
		return r.giveUp(r.quote)
	}
	if r.takeID && r.depth == 1 {
		r.idEnded(0)
	}
	return false
}

// leave ends the innermost object or array.
func (r *recogniser) leave() bool {
	r.depth--
	if r.valueEnded() {
		return true
	}
	if r.takeID && r.depth == 1 {
		r.idEnded(0)
	}
	return false
}

// valueEnded says whether the value that ended was a top-level one.
func (r *recogniser) valueEnded() bool {
	if r.takeID && r.depth == 1 && r.state == inAtom {
		r.idEnded(1) // the byte behind the atom was taken, too
	}
	r.state = wantCommaOrEnd
	return r.depth == 0
}

func (r *recogniser) idEnded(over int) {
	r.takeID = false
	r.m.ID = string(r.id[:r.idN-over])
}

func (r *recogniser) inObject() bool {
	return r.objects[r.depth/64]&(1<<(r.depth%64)) != 0
}

// isAtom says that c can be in a number or a word. Which of them are valid is QEMU's affair.
func isAtom(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '+' || c == '.'
}

func unhex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}
