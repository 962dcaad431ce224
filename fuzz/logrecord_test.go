package fuzz_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"warden"
	"warden/store/sealedlog"
)

// FuzzLogRecord: a log record has one spelling, and what does not parse is CodeCorrupt.
func FuzzLogRecord(f *testing.F) {
	for _, l := range []raft.Log{
		{},
		{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(raft.Configuration{})},
		{Index: 1 << 63, Term: 1<<64 - 1, Type: 255, Data: []byte("data"), Extensions: []byte("more"), AppendedAt: time.Unix(1_800_000_000, 999_999_999)},
	} {
		b := sealedlog.FormatRecord(&l)
		if err := sealedlog.ParseRecord(b, &raft.Log{}); err != nil {
			f.Fatal("seed does not parse:", err)
		}
		f.Add(b)
		f.Add(b[:len(b)-1])
		f.Add(append(b, 0))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var l raft.Log
		if err := sealedlog.ParseRecord(b, &l); err != nil {
			if warden.CodeOf(err) != warden.CodeCorrupt {
				t.Fatalf("ParseRecord = %v [%s]", err, warden.CodeOf(err))
			}
			return
		}
		if again := sealedlog.FormatRecord(&l); !bytes.Equal(again, b) {
			t.Fatalf("FormatRecord(ParseRecord(%x)) = %x", b, again)
		}
	})
}
