package relay

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// all feeds b in pieces of the given sizes (the last one repeats) and gives every message.
func all(r *recogniser, b []byte, sizes ...int) (messages []Message) {
	for i := 0; len(b) > 0; i++ {
		size := min(sizes[min(i, len(sizes)-1)], len(b))
		part := b[:size]
		b = b[size:]
		for len(part) > 0 {
			n, m, ended := r.feed(part)
			part = part[n:]
			if ended {
				messages = append(messages, m)
			}
		}
	}
	return messages
}

var conversations = []struct {
	name, text string
	want       []Message
}{
	{"libvirt's cont", `{"execute":"cont","id":"libvirt-12"}` + "\r\n",
		[]Message{{Execute: "cont", ID: `"libvirt-12"`}}},
	{"other key order and spacing", "{ \"id\" :\t7 ,\r\n \"execute\" : \"stop\" }\n",
		[]Message{{Execute: "stop", ID: "7"}}},
	{"single quotes", `{'execute':'cont','id':'x'}` + "\n",
		[]Message{{Execute: "cont", ID: `'x'`}}},
	{"escaped name", `{"execute":"\u0063on\u0074"}`,
		[]Message{{Execute: "cont"}}},
	{"escaped key", `{"\u0065xecute":"cont"}`,
		[]Message{{Execute: "cont"}}},
	{"out of band", `{"exec-oob":"cont","id":1}`,
		[]Message{{Execute: "cont", ID: "1"}}},
	{"an id that is an object", `{"id":{"a":[1,"}"]} ,"execute":"cont"}`,
		[]Message{{Execute: "cont", ID: `{"a":[1,"}"]}`}}},
	{"ids that are words", `{"execute":"cont","id":null}{"id":true,"execute":"stop"}`,
		[]Message{{Execute: "cont", ID: "null"}, {Execute: "stop", ID: "true"}}},
	{"cont as an argument", `{"execute":"human-monitor-command","arguments":{"execute":"cont","command-line":"cont"},"id":"a"}`,
		[]Message{{Execute: "human-monitor-command", ID: `"a"`}}},
	{"cont in a string", `{"execute":"x","arguments":{"s":"{\"execute\":\"cont\"}"}}`,
		[]Message{{Execute: "x"}}},
	{"execute twice", `{"execute":"stop","execute":"cont"}` + "\n" + `{"execute":"stop"}`,
		[]Message{{Execute: "stop"}}},
	{"a command that isn't a string", `{"execute":["cont"]}{"execute":{"execute":"cont"}}`,
		[]Message{{}, {}}},
	{"a name that is too long", `{"execute":"` + strings.Repeat("c", maxWord+1) + `"}{"execute":"cont"}`,
		[]Message{{}, {Execute: "cont"}}},
	{"an id that is too long", `{"execute":"cont","id":"` + strings.Repeat("i", maxID) + `"}`,
		[]Message{{Execute: "cont"}}},
	{"events and answers", `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}` + "\r\n" +
		`{"return": {}, "id": "libvirt-3"}` + "\r\n" + `{"id": "libvirt-4", "error": {"class": "GenericError", "desc": "no"}}` + "\r\n",
		[]Message{{Event: "STOP"}, {Answer: true, ID: `"libvirt-3"`}, {Failure: true, ID: `"libvirt-4"`}}},
	{"greeting", `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}` + "\r\n",
		[]Message{{Greeting: true}}},
	{"event in an answer", `{"return": [{"event": "STOP"}], "id": 1}`,
		[]Message{{Answer: true, ID: "1"}}},
	{"empty object and array", `{}[]{"execute":"cont"}`,
		[]Message{{}, {}, {Execute: "cont"}}},
	{"garbage, then a newline", "hello {\n" + `{"execute":"cont"}`,
		[]Message{{Execute: "cont"}}},
	{"mismatched brackets", `{"a":[}` + "\n" + `{"execute":"cont"}`,
		[]Message{{Execute: "cont"}}},
	{"a control character in a string", "{\"a\":\"\x01\"}\n" + `{"execute":"cont"}`,
		[]Message{{Execute: "cont"}}},
	{"invalid UTF-8", "{\"a\":\"\xff\xfe\",\"execute\":\"cont\"}",
		[]Message{{Execute: "cont"}}},
	{"deep nesting", `{"a":` + strings.Repeat("[", 900) + strings.Repeat("]", 900) + `,"execute":"cont"}`,
		[]Message{{Execute: "cont"}}},
	{"nesting past the bound", strings.Repeat("[", 5000) + "\n" + `{"execute":"cont"}`,
		[]Message{{Execute: "cont"}}},
	{"missing comma", `{"a":1 "execute":"cont"}` + "\n", nil},
	{"missing colon", `{"execute" "cont"}` + "\n", nil},
	{"trailing comma", `{"execute":"cont",}` + "\n", nil},
}

func TestRecogniserAtEverySplit(t *testing.T) {
	for _, c := range conversations {
		t.Run(c.name, func(t *testing.T) {
			check := func(how string, sizes ...int) {
				t.Helper()
				got := all(new(recogniser), []byte(c.text), sizes...)
				if fmt.Sprint(got) != fmt.Sprint(c.want) {
					t.Fatalf("%s: got %+v, want %+v", how, got, c.want)
				}
			}
			check("whole", len(c.text))
			check("byte by byte", 1)
			for i := 1; i < len(c.text); i++ {
				check(fmt.Sprintf("cut at %d", i), i, len(c.text))
			}
		})
	}
}

func TestRecogniserSaysWhereAMessageEnds(t *testing.T) {
	text := []byte(`{"execute":"cont"}` + "\r\n" + `{"execute":"stop"}`)
	var r recogniser
	n, m, ended := r.feed(text)
	if n != len(`{"execute":"cont"}`) || m.Execute != "cont" || !ended || !r.idle() {
		t.Fatalf("got %d bytes, %+v, %v", n, m, ended)
	}
}

// FuzzRecogniser compares with encoding/json on what both accept, and a cut at any place with none.
func FuzzRecogniser(f *testing.F) {
	for _, c := range conversations {
		f.Add([]byte(c.text), 3)
	}
	f.Fuzz(func(t *testing.T, text []byte, cut int) {
		whole := all(new(recogniser), text, max(1, len(text)))
		if cut > 0 && cut < len(text) {
			if split := all(new(recogniser), text, cut, len(text)); fmt.Sprint(split) != fmt.Sprint(whole) {
				t.Fatalf("cut at %d: %+v, whole: %+v", cut, split, whole)
			}
		}
		var reference struct {
			Execute *string `json:"execute"`
		}
		decoder := json.NewDecoder(bytes.NewReader(text))
		var keys map[string]json.RawMessage
		if decoder.Decode(&keys) != nil || decoder.More() || keys["exec-oob"] != nil || len(keys["id"]) > 100 {
			return
		}
		if raw, ok := keys["execute"]; !ok || json.Unmarshal(raw, &reference.Execute) != nil || reference.Execute == nil {
			return
		}
		ascii := len(*reference.Execute) <= maxWord
		for _, c := range *reference.Execute {
			ascii = ascii && c >= 0x20 && c < 0x7f
		}
		if !ascii || bytes.Count(text, []byte("xecute")) > 1 || bytes.Contains(text, []byte(`\`)) {
			return
		}
		for key := range members { // encoding/json takes a member that comes twice, QEMU refuses the message
			if bytes.Count(text, []byte(`"`+key+`"`)) > 1 {
				return
			}
		}
		for _, m := range whole {
			if m.Execute == *reference.Execute {
				return
			}
		}
		if *reference.Execute != "" && jsonDepth(text) < maxDepth {
			t.Fatalf("encoding/json sees the command %q, the recogniser %+v", *reference.Execute, whole)
		}
	})
}

func jsonDepth(b []byte) int { return bytes.Count(b, []byte("[")) + bytes.Count(b, []byte("{")) }

// byStep is all without the quick way.
func byStep(r *recogniser, b []byte) (messages []Message) {
	for _, c := range b {
		if r.step(c) {
			m, spoiled := r.m, r.spoiled
			r.reset()
			if !spoiled {
				messages = append(messages, m)
			}
		}
	}
	return messages
}

// place is what of a recogniser decides over what comes.
func place(r *recogniser) string {
	return fmt.Sprint(r.state, r.quote, r.escape, r.depth, r.objects[:r.depth/64+1], r.m, r.seen, r.spoiled, r.current, r.takeID, string(r.id[:r.idN]))
}

// sameWithoutTheQuickWay reads text both ways, in pieces of the given sizes, and compares behind each.
func sameWithoutTheQuickWay(t *testing.T, text []byte, sizes ...int) {
	t.Helper()
	var quick, slow recogniser
	for i, at := 0, 0; at < len(text); i++ {
		piece := text[at:min(len(text), at+max(1, sizes[i%len(sizes)]))]
		at += len(piece)
		if got, want := all(&quick, piece, len(piece)), byStep(&slow, piece); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("%q, up to byte %d: %+v, without the quick way %+v", text, at, got, want)
		}
		if got, want := place(&quick), place(&slow); got != want {
			t.Fatalf("%q, behind byte %d: %s, without the quick way %s", text, at, got, want)
		}
	}
}

func TestTheQuickWayIsTheSame(t *testing.T) {
	for _, c := range conversations {
		for cut := 1; cut <= len(c.text) && cut < 600; cut++ {
			sameWithoutTheQuickWay(t, []byte(c.text), cut, len(c.text))
		}
		sameWithoutTheQuickWay(t, []byte(c.text), 1)
	}
	for _, name := range recordings {
		for i, p := range recorded(t, name) {
			sameWithoutTheQuickWay(t, p.text, len(p.text))
			sameWithoutTheQuickWay(t, p.text, 1+i, 7, 1000)
		}
	}
	// Streams that are nearly messages.
	const letters = `{}[]":,'\u0063 aecont` + "\n\r\x01\xff"
	random := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		text := []byte(`{"id":{"a":["\\u0041"]},"execute":"cont","x":-1.5e3}` + "\r\n" + `{"event":"STOP"}`)
		for range 1 + random.IntN(6) {
			text[random.IntN(len(text))] = letters[random.IntN(len(letters))]
		}
		sameWithoutTheQuickWay(t, append(text, "\n{}"...), 1+random.IntN(20), 1+random.IntN(60))
	}
}

// FuzzTheQuickWay does the same with any stream.
func FuzzTheQuickWay(f *testing.F) {
	for _, c := range conversations {
		f.Add([]byte(c.text), uint16(3), uint16(100))
	}
	f.Fuzz(func(t *testing.T, text []byte, first, second uint16) {
		sameWithoutTheQuickWay(t, text, int(first), int(second))
	})
}
