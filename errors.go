package warden

import (
	"context"
	"errors"
	"fmt"
)

// Code is one of a closed list of error kinds. It is what crosses the wire; docs/errors.md has a row for each.
type Code string

// The codes. A test wants each of them documented.
const (
	CodeInternal      Code = "internal"      // a bug or a broken machine
	CodeInvalid       Code = "invalid"       // input that is malformed or out of bounds
	CodeUsage         Code = "usage"         // the command line itself is wrong
	CodeNotFound      Code = "not-found"     // no object has this ID or name
	CodeAmbiguous     Code = "ambiguous"     // a prefix fits several objects
	CodeExists        Code = "exists"        // the name is taken
	CodeConflict      Code = "conflict"      // the object has changed meanwhile
	CodeInUse         Code = "in-use"        // something else still needs it
	CodeDenied        Code = "denied"        // the subject may not do this
	CodeUnauthentic   Code = "unauthentic"   // a proof, MAC, chain or signature does not hold
	CodeUnknownToken  Code = "unknown-token" // no such token here, or its secret is wrong
	CodeExpired       Code = "expired"       // token or certificate is past its end
	CodeClock         Code = "clock"         // a clock is out
	CodeUsedUp        Code = "used-up"       // the token has no uses left
	CodeRevoked       Code = "revoked"       // the token was revoked
	CodeBinding       Code = "binding"       // the token is bound to another host name or address
	CodeWrongRoot     Code = "wrong-root"    // the other side does not present the pinned root
	CodeWrongCluster  Code = "wrong-cluster" // it belongs to another cluster
	CodeEvicted       Code = "evicted"       // the node was removed and stays out
	CodeWrongRole     Code = "wrong-role"    // the record does not have the role that this needs
	CodeWrongKey      Code = "wrong-key"     // the leaf's key is not the recorded one
	CodeWrongZone     Code = "wrong-zone"    // the zone forbids it
	CodeNoFit         Code = "no-fit"        // a placement does not hold any more
	CodeLimited       Code = "limited"       // too many attempts; later
	CodeTooLarge      Code = "too-large"     // a size or count is over its bound
	CodeLocked        Code = "locked"        // the manager needs the unlock key
	CodeWrongUnlock   Code = "wrong-unlock"  // this unlock key does not open this manager
	CodeUninitialized Code = "uninitialized" // the daemon belongs to no cluster
	CodeInitialized   Code = "initialized"   // the daemon belongs to a cluster already
	CodeNotManager    Code = "not-manager"   // only a manager can answer this
	CodeNotLeader     Code = "not-leader"    // only the leader can answer this
	CodeNoLeader      Code = "no-leader"     // the managers have no leader now
	CodeNoQuorum      Code = "no-quorum"     // the step would lose the majority
	CodeUnavailable   Code = "unavailable"   // not reachable, or not yet ready; trying again may help
	CodeTimeout       Code = "timeout"       // no answer in time; the outcome may be unknown
	CodeCorrupt       Code = "corrupt"       // a record or file fails authentication or does not parse
	CodeForeign       Code = "foreign"       // a record or file belongs to another node, place or cluster
	CodePermissions   Code = "permissions"   // a file with keys is readable to others
	CodeUnsupported   Code = "unsupported"   // this machine or version cannot do it
)

// Error is an error with a code. Op is the gerund of what was tried and the identifier; Err the cause; HintText what to do.
// None of them ever holds a secret.
type Error struct {
	Code     Code
	Op       string
	Err      error
	HintText string
}

// Error returns "op: cause".
func (e *Error) Error() string {
	switch {
	case e.Err == nil:
		return e.Op
	case e.Op == "":
		return e.Err.Error()
	}
	return e.Op + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf returns an Error of the code; format and args make the cause and may wrap with %w.
func Errorf(code Code, op, format string, args ...any) error {
	return &Error{Code: code, Op: op, Err: fmt.Errorf(format, args...)}
}

// Wrap adds op to err and keeps its code and hint. nil stays nil.
func Wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Code: CodeOf(err), Op: op, Err: err, HintText: HintOf(err)}
}

// Recode gives err another code and op, and keeps it as the cause. nil stays nil.
func Recode(code Code, op string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Code: code, Op: op, Err: err, HintText: HintOf(err)}
}

// Hint adds what the user can do. nil stays nil.
func Hint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &Error{Code: CodeOf(err), Err: err, HintText: hint}
}

// CodeOf returns the code of the outermost Error in err: CodeTimeout for a context's deadline, CodeUnavailable for its
// cancellation, CodeInternal for other errors, "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return CodeTimeout
	case errors.Is(err, context.Canceled):
		return CodeUnavailable
	}
	return CodeInternal
}

// HintOf returns the first hint found in err's chain, or "".
func HintOf(err error) string {
	for err != nil {
		e, ok := errors.AsType[*Error](err)
		if !ok {
			return ""
		}
		if e.HintText != "" {
			return e.HintText
		}
		err = e.Err
	}
	return ""
}

// Refusal reports whether the code says that a rule forbids the request, which the CLI ends with exit code 3.
func (c Code) Refusal() bool {
	switch c {
	case CodeDenied, CodeUnauthentic, CodeUnknownToken, CodeExpired, CodeClock, CodeUsedUp, CodeRevoked, CodeBinding, CodeWrongRoot,
		CodeWrongCluster, CodeEvicted, CodeWrongRole, CodeWrongKey, CodeWrongZone, CodeLimited, CodeLocked, CodeWrongUnlock,
		CodeNoQuorum, CodeInUse, CodePermissions:
		return true
	}
	return false
}
