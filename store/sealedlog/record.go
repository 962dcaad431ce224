package sealedlog

import (
	"encoding/binary"
	"time"

	"github.com/hashicorp/raft"

	"warden"
)

// recordFixed is the length of a record without its two byte strings: version, index, term, type, seconds, nanoseconds and the
// two lengths.
const recordFixed = 1 + 8 + 8 + 1 + 8 + 4 + 4 + 4

// FormatRecord returns the plaintext form of a log entry, big-endian: version 1, index, term, type, the seconds (since 1970)
// and nanoseconds of AppendedAt, then data and extensions, each after its length in 4 bytes. ParseRecord is its inverse.
func FormatRecord(l *raft.Log) []byte {
	b := make([]byte, 0, recordFixed+len(l.Data)+len(l.Extensions))
	b = append(b, 1)
	b = binary.BigEndian.AppendUint64(b, l.Index)
	b = binary.BigEndian.AppendUint64(b, l.Term)
	b = append(b, byte(l.Type))
	b = binary.BigEndian.AppendUint64(b, uint64(l.AppendedAt.Unix()))
	b = binary.BigEndian.AppendUint32(b, uint32(l.AppendedAt.Nanosecond()))
	for _, s := range [][]byte{l.Data, l.Extensions} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	return b
}

// ParseRecord fills l from b, which it does not keep. Every entry has one spelling only; times come back in UTC without a
// monotonic part, empty byte strings as nil. Errors: CodeCorrupt; l is unchanged then.
func ParseRecord(b []byte, l *raft.Log) error {
	const op = "parsing log record"
	if len(b) < recordFixed {
		return warden.Errorf(warden.CodeCorrupt, op, "%d bytes are too few", len(b))
	}
	if b[0] != 1 {
		return warden.Errorf(warden.CodeCorrupt, op, "version %d is not known", b[0])
	}
	out := raft.Log{Index: binary.BigEndian.Uint64(b[1:]), Term: binary.BigEndian.Uint64(b[9:]), Type: raft.LogType(b[17])}
	nanos := binary.BigEndian.Uint32(b[26:])
	if nanos >= 1e9 {
		return warden.Errorf(warden.CodeCorrupt, op, "nanoseconds out of range")
	}
	out.AppendedAt = time.Unix(int64(binary.BigEndian.Uint64(b[18:])), int64(nanos)).UTC()
	rest := b[30:]
	for _, s := range []*[]byte{&out.Data, &out.Extensions} {
		if len(rest) < 4 || uint64(len(rest)-4) < uint64(binary.BigEndian.Uint32(rest)) {
			return warden.Errorf(warden.CodeCorrupt, op, "cut short")
		}
		n := binary.BigEndian.Uint32(rest)
		if n > 0 {
			*s = append([]byte(nil), rest[4:4+n]...)
		}
		rest = rest[4+n:]
	}
	if len(rest) != 0 {
		return warden.Errorf(warden.CodeCorrupt, op, "%d bytes too many", len(rest))
	}
	*l = out
	return nil
}
