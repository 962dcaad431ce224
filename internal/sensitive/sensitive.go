// Package sensitive holds bytes that must not be printed: keys, tokens, values of secrets.
//
// It keeps them behind a closure, because fmt walks unexported fields by reflection and would print a slice or what a
// pointer leads to. It does not encrypt memory, lock pages or find copies: Wipe overwrites the one buffer that New was
// given, and the heap may hold others (of the caller, of a decoder, of the garbage collector's past).
//
// Invariants: no verb of fmt, no slog handler and no text or JSON encoder shows a byte or the length of a Bytes; nobody
// reads the bytes but through Use, so that a search for ".Use(" lists every reader; a wiped Bytes is refused, not empty.
//
// It trusts its callers not to keep the slice that Use lends them. Standard library only.
package sensitive

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
)

// Redacted is what a Bytes prints as, whatever the verb or the encoder.
const Redacted = "REDACTED"

// Bytes are bytes that do not print. Copies of a Bytes share the buffer: wiping one wipes all. The zero value holds
// nothing and is refused by Use as a wiped one is. Safe for concurrent use.
type Bytes struct {
	held func() *buffer // a closure: reflection stops here
}

type buffer struct {
	mu    sync.Mutex // guards the fields below; not held while a caller's function runs
	b     []byte
	users int  // calls of Use that are running
	wiped bool // the last user, or Wipe itself where there is none, zeroes b
}

var errWiped = errors.New("using sensitive bytes: they were wiped, or never set")

// New returns b as Bytes. It takes ownership: the caller must not use b again.
func New(b []byte) Bytes {
	held := &buffer{b: b}
	return Bytes{held: func() *buffer { return held }}
}

// Use lends the bytes to f and returns f's error. f must neither keep nor change the slice. A Wipe meanwhile takes effect
// when f returns. After Wipe, and on the zero value, f is not called and the error is without a code (CodeInternal).
func (b Bytes) Use(f func([]byte) error) error {
	if b.held == nil {
		return errWiped
	}
	held := b.held()
	held.mu.Lock()
	if held.wiped {
		held.mu.Unlock()
		return errWiped
	}
	held.users++
	held.mu.Unlock()
	defer held.release()
	return f(held.b)
}

func (h *buffer) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.users--
	h.zeroIfUnused()
}

// zeroIfUnused is called with mu held.
func (h *buffer) zeroIfUnused() {
	if h.wiped && h.users == 0 {
		clear(h.b)
		h.b = nil
	}
}

// Len returns the number of bytes: 0 for the zero value and after Wipe.
func (b Bytes) Len() int {
	if b.held == nil {
		return 0
	}
	held := b.held()
	held.mu.Lock()
	defer held.mu.Unlock()
	if held.wiped {
		return 0
	}
	return len(held.b)
}

// Wipe zeroes the buffer, at once or when the last running Use returns, and makes later uses fail. It may be called again.
func (b Bytes) Wipe() {
	if b.held == nil {
		return
	}
	held := b.held()
	held.mu.Lock()
	defer held.mu.Unlock()
	held.wiped = true
	held.zeroIfUnused()
}

// Format writes Redacted for every verb (fmt.Formatter).
func (Bytes) Format(s fmt.State, _ rune) { io.WriteString(s, Redacted) }

// String returns Redacted.
func (Bytes) String() string { return Redacted }

// LogValue returns Redacted (slog.LogValuer).
func (Bytes) LogValue() slog.Value { return slog.StringValue(Redacted) }

// MarshalText returns Redacted.
func (Bytes) MarshalText() ([]byte, error) { return []byte(Redacted), nil }

// MarshalJSON returns Redacted as a JSON string.
func (Bytes) MarshalJSON() ([]byte, error) { return []byte(`"` + Redacted + `"`), nil }
