package main

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

func TestParseMemory(t *testing.T) {
	for text, want := range map[string]int64{
		"1": 1, "512b": 512, "1k": 1 << 10, "512m": 512 << 20, "512M": 512 << 20, "512mb": 512 << 20, "512MiB": 512 << 20, "1.5g": 3 << 29, "2t": 2 << 40,
		"0.5k": 512,
		"":     0, "0": 0, "-1": 0, "m": 0, "1x": 0, "1mm": 0, "1e9": 0, "0x10": 0, "1/2": 0, "1 g": 0, "1..2": 0, "99999999t": 0, "nan": 0, strings.Repeat("9", 40): 0,
	} {
		got, err := parseMemory(text)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("parseMemory(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
}

func TestParseCPUs(t *testing.T) {
	for text, want := range map[string]int64{
		"1": 1e9, "1.5": 15e8, "0.000000001": 1, ".5": 5e8,
		"": 0, "0": 0, "-1": 0, "0.0000000001": 0, "1.0000000001": 0, "1e3": 0, "half": 0, "9999999999999": 0,
	} {
		got, err := parseCPUs(text)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("parseCPUs(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
}

func TestParseDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90d": 90 * 24 * time.Hour, "1h30m": 90 * time.Minute, "500ms": 500 * time.Millisecond,
		"": 0, "5": 0, "0": 0, "0d": 0, "-1h": 0, "-1d": 0, "1.5d": 0, "99999999d": 0, "d": 0, "forever": 0,
	} {
		got, err := parseDuration(text)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("parseDuration(%q) = %s, %v, want %s", text, got, err, want)
		}
	}
}

func TestParseSecretReference(t *testing.T) {
	for text, want := range map[string]*api.SecretReference{
		"db":                      {SecretName: "db", Mode: 0o400},
		"source=db":               {SecretName: "db", Mode: 0o400},
		"src=db,target=password":  {SecretName: "db", Target: "password", Mode: 0o400},
		"source=db,uid=5,gid=6":   {SecretName: "db", Uid: 5, Gid: 6, Mode: 0o400},
		"mode=0440,source=db":     {SecretName: "db", Mode: 0o440},
		"db@3":                    {SecretName: "db", Version: 3, Mode: 0o400},
		"source=db@12,target=x":   {SecretName: "db", Version: 12, Target: "x", Mode: 0o400},
		"db@":                     nil,
		"db@0":                    nil,
		"db@03":                   nil,
		"db@-1":                   nil,
		"@3":                      nil,
		"db@3@4":                  nil,
		"source=db@x":             nil,
		"db@18446744073709551616": nil,
		"":                        nil,
		"target=x":                nil,
		"source=":                 nil,
		"db,target=x":             nil,
		"source=a,source=b":       nil,
		"source=a,src=b":          nil,
		"source=a,uid=-1":         nil,
		"source=a,uid=4294967296": nil,
		"source=a,mode=888":       nil,
		"source=a,mode=0":         nil,
		"source=a,mode=4755":      nil,
		"source=a,colour=red":     nil,
	} {
		got, err := parseSecretReference(text)
		if (err == nil) != (want != nil) || want != nil && !proto.Equal(got, want) {
			t.Errorf("parseSecretReference(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
}

func TestFollowingIsTheInverse(t *testing.T) {
	for text, want := range map[string]string{
		"db@3":                  "db",
		"source=db@3,target=db": "db",
		"source=db@3,target=x":  "source=db,target=x,uid=0,gid=0,mode=0400",
		"source=db,target=db,uid=5,gid=6,mode=0440": "source=db,target=db,uid=5,gid=6,mode=0440",
	} {
		ref, err := parseSecretReference(text)
		if err != nil {
			t.Fatal(err)
		}
		ref.Target = cmp.Or(ref.Target, ref.SecretName) // as the daemon does
		got := following(ref)
		again, err := parseSecretReference(got)
		if got != want || err != nil {
			t.Errorf("following(%s) = %s, %v, want %s", text, got, err, want)
		}
		ref.Version, again.Target = 0, cmp.Or(again.Target, again.SecretName)
		if !proto.Equal(ref, again) {
			t.Errorf("following(%s) means %v", text, again)
		}
	}
}

func TestSplitWords(t *testing.T) {
	for text, want := range map[string][]string{
		"":              {},
		"  ":            {},
		"a":             {"a"},
		" a  b\tc\n":    {"a", "b", "c"},
		`'a b' "c d"`:   {"a b", "c d"},
		`a'b c'd`:       {"ab cd"},
		`'' ""`:         {"", ""},
		`a\ b \" \\ \'`: {"a b", `"`, `\`, "'"},
		`"a\"b\\c\d$x"`: {`a"b\c\d$x`},
		`'a\"b'`:        {`a\"b`},
		`a "b`:          nil,
		`a 'b`:          nil,
		`a \`:           nil,
		"é 'ü ö'":       {"é", "ü ö"},
	} {
		got, err := splitWords(text)
		if (err == nil) != (want != nil) || err == nil && (got == nil || !slices.Equal(got, want)) {
			t.Errorf("splitWords(%q) = %q, %v, want %q", text, got, err, want)
		}
	}
}

func TestWithPort(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.1": "192.0.2.1:2377", "192.0.2.1:99": "192.0.2.1:99", "m1": "m1:2377", "m1.example:2378": "m1.example:2378",
		"2001:db8::1": "[2001:db8::1]:2377", "[2001:db8::1]:5": "[2001:db8::1]:5", "[2001:db8::1]": "[2001:db8::1]:2377",
		"": "", ":2377": "", "m1:": "", "m1:0": "", "m1:70000": "", "m1:x": "", "a:b:c": "", strings.Repeat("a", 300): "",
	} {
		got, err := withPort(text)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("withPort(%q) = %q, %v, want %q", text, got, err, want)
		}
	}
}

func TestParseTail(t *testing.T) {
	for text, want := range map[string]int64{"all": -1, "0": 0, "100": 100, "-1": math.MinInt64, "ten": math.MinInt64, "": math.MinInt64} {
		got, err := parseTail(text)
		if (err == nil) != (want != math.MinInt64) || err == nil && got != want {
			t.Errorf("parseTail(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
}

func TestFilters(t *testing.T) {
	f, err := parseFilters([]string{"name=web", "name=db", "label=a=b", "ID=x"}, "name", "label", "id")
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{"a": "b", "empty": ""}
	for _, c := range []struct {
		what string
		got  bool
		want bool
	}{
		{"first of two values", f.fits("name", prefix("web-1")), true},
		{"second of two values", f.fits("name", prefix("db")), true},
		{"no value", f.fits("name", prefix("other")), false},
		{"not in the middle", f.fits("name", prefix("my-web")), false},
		{"key without filter", f.fits("zone", word("x")), true},
		{"label with its value", f.fits("label", label(labels)), true},
		{"keys are not case-sensitive", f.fits("id", prefix("xyz")), true},
		{"label by key", label(labels)("a"), true},
		{"label without value", label(labels)("empty="), true},
		{"label with another value", label(labels)("a=c"), false},
		{"missing label", label(labels)("z"), false},
		{"words fold case", word("running")("Running"), true},
	} {
		if c.got != c.want {
			t.Errorf("%s = %v, want %v", c.what, c.got, c.want)
		}
	}
	for _, flag := range []string{"name", "name=", "=x", "colour=red"} {
		if _, err := parseFilters([]string{flag}, "name"); warden.CodeOf(err) != warden.CodeUsage {
			t.Errorf("parseFilters(%q) = %v, want usage", flag, err)
		}
	}
}

func TestClean(t *testing.T) {
	for text, want := range map[string]string{
		"plain": "plain", "héllo → 世界": "héllo → 世界", "a\x1b[31mb": `a\x1b[31mb`, "a\nb\tc\r": `a\nb\tc\x0d`, "\u202egnp": `\u202egnp`, "\x9b1m": `\x9b1m`,
		"\u009b": `\x9b`, "bad\xff": `bad\xff`, "": "",
	} {
		if got := clean(text); got != want {
			t.Errorf("clean(%q) = %q, want %q", text, got, want)
		}
		if again := clean(clean(text)); again != clean(text) {
			t.Errorf("clean(clean(%q)) = %q, want no change", text, again)
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "less than a second", time.Second: "1 second", 59 * time.Second: "59 seconds", time.Minute: "about a minute", 2 * time.Minute: "2 minutes",
		time.Hour: "about an hour", 26 * time.Hour: "26 hours", 3 * 24 * time.Hour: "3 days", 21 * 24 * time.Hour: "3 weeks", 90 * 24 * time.Hour: "3 months",
		3 * 366 * 24 * time.Hour: "3 years",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%s) = %q, want %q", d, got, want)
		}
	}
	if got := ago(testNow.Add(time.Hour).UnixNano(), testNow); got != "less than a second ago" {
		t.Errorf("ago(in the future) = %q, want now", got)
	}
}

func TestHeaderOf(t *testing.T) {
	for field, want := range map[string]string{"ID": "ID", "Hostname": "HOSTNAME", "ManagerStatus": "MANAGER STATUS", "CreatedAt": "CREATED", "NodeID": "NODE ID", "BoundTo": "BOUND TO"} {
		if got := headerOf(field); got != want {
			t.Errorf("headerOf(%q) = %q, want %q", field, got, want)
		}
	}
}

func TestReadLimited(t *testing.T) {
	for size, want := range map[int]warden.Code{0: "", 9: "", 10: "", 11: warden.CodeTooLarge} {
		data, err := readLimited("reading", strings.NewReader(strings.Repeat("x", size)), 10)
		if warden.CodeOf(err) != want || err == nil && len(data) != size {
			t.Errorf("readLimited(%d bytes, 10) = %d bytes, %v, want %q", size, len(data), err, want)
		}
	}
}

func TestEventFilters(t *testing.T) {
	f, err := parseFilters([]string{"event=create", "name=web"}, "event", "name")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		event *api.Event
		want  bool
	}{
		{&api.Event{Action: "create", Name: "web-1"}, true},
		{&api.Event{Action: "create", Name: "db"}, false},
		{&api.Event{Action: "remove", Name: "web-1"}, false},
		{&api.Event{Action: "resync"}, true}, // what was missed is not known
	} {
		if got := eventFits(c.event, f); got != c.want {
			t.Errorf("eventFits(%v) = %v, want %v", c.event, got, c.want)
		}
	}
}
