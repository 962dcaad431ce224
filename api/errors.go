// Package api holds the protobuf messages and services, and how errors cross them. Messages are the records themselves:
// there is no second struct of a noun. Treat a message that came from the store as immutable: clone it to change it.
package api

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"warden"
)

// Error returns err as a gRPC status that carries its code and hint. The chain of causes becomes text. nil stays nil.
func Error(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*warden.Error](err); !ok {
		if _, ok := status.FromError(err); ok {
			return err
		}
	}
	code := warden.CodeOf(err)
	st, derr := status.New(grpcCode(code), err.Error()).WithDetails(&ErrorDetail{Code: string(code), Text: err.Error(), Hint: warden.HintOf(err)})
	if derr != nil {
		return status.Error(codes.Internal, err.Error())
	}
	return st.Err()
}

// FromError is the inverse of Error: the *warden.Error that the other side gave. A status that no Warden made becomes
// CodeUnavailable, CodeTimeout or CodeInternal. nil stays nil.
func FromError(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*warden.Error](err); ok {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range st.Details() {
		if e, ok := d.(*ErrorDetail); ok {
			return e.Err()
		}
	}
	code := warden.CodeInternal
	switch st.Code() {
	case codes.Unavailable, codes.Canceled:
		code = warden.CodeUnavailable
	case codes.DeadlineExceeded:
		code = warden.CodeTimeout
	case codes.ResourceExhausted:
		code = warden.CodeTooLarge
	case codes.Unimplemented:
		code = warden.CodeUnsupported
	}
	return &warden.Error{Code: code, Err: errors.New(st.Message())}
}

// Err returns the detail as an error. An empty code is CodeInternal.
func (e *ErrorDetail) Err() error {
	code := warden.Code(e.GetCode())
	if code == "" {
		code = warden.CodeInternal
	}
	return &warden.Error{Code: code, Err: errors.New(e.GetText()), HintText: e.GetHint()}
}

// Detail returns err as a message for protocols without gRPC. nil stays nil.
func Detail(err error) *ErrorDetail {
	if err == nil {
		return nil
	}
	return &ErrorDetail{Code: string(warden.CodeOf(err)), Text: err.Error(), Hint: warden.HintOf(err)}
}

// Transient reports whether trying the same call again may succeed.
func Transient(err error) bool {
	switch warden.CodeOf(FromError(err)) {
	case warden.CodeUnavailable, warden.CodeTimeout, warden.CodeNoLeader, warden.CodeNotLeader, warden.CodeConflict:
		return true
	}
	return errors.Is(err, context.DeadlineExceeded)
}

func grpcCode(c warden.Code) codes.Code {
	switch c {
	case warden.CodeInvalid, warden.CodeUsage, warden.CodeTooLarge:
		return codes.InvalidArgument
	case warden.CodeNotFound:
		return codes.NotFound
	case warden.CodeExists:
		return codes.AlreadyExists
	case warden.CodeConflict, warden.CodeNoFit:
		return codes.Aborted
	case warden.CodeUnavailable, warden.CodeNoLeader, warden.CodeNotLeader:
		return codes.Unavailable
	case warden.CodeTimeout:
		return codes.DeadlineExceeded
	case warden.CodeLimited:
		return codes.ResourceExhausted
	case warden.CodeUnsupported:
		return codes.Unimplemented
	case warden.CodeInternal, warden.CodeCorrupt:
		return codes.Internal
	}
	return codes.PermissionDenied
}
