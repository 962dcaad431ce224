package store

import (
	"bufio"
	"errors"
	"io"
	"iter"

	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// snapshotFormat is the one format of snapshots.
const snapshotFormat = 1

// recordMax bounds one message in a snapshot: nothing larger than a command gets into the state, and the apply adds little.
const recordMax = warden.CommandBytes + 64<<10

// WriteSnapshot writes a state that holds the objects as they are, unchecked, as of index 1. It is how tests seed a store.
// Errors: CodeInvalid for an object that is empty or twice there, and those of w.
func WriteSnapshot(w io.Writer, objects ...*api.Object) error {
	s := NewState()
	s.index = 1
	to := newRestorer(s)
	for _, o := range objects {
		if err := to.object(api.Clone(o)); err != nil {
			return err
		}
		_, r := Unwrap(o)
		s.time = max(s.time, r.GetMeta().GetUpdatedNs())
	}
	to.txn.Commit()
	return s.View().Write(w)
}

// Write writes the whole state: a header, the records by kind and ID, the stored results by age; each length-delimited. Equal
// states give equal bytes.
func (v *View) Write(w io.Writer) error {
	txn := v.txn()
	var objects []Record
	for _, k := range kinds {
		objects = append(objects, list[Record](txn, k, byID+"_prefix", "")...)
	}
	it, err := txn.Get(requests, bySeq+"_prefix", "")
	if err != nil {
		return err
	}
	var results []*api.StoredResult
	for raw := it.Next(); raw != nil; raw = it.Next() {
		results = append(results, raw.(*api.StoredResult))
	}

	buf := bufio.NewWriterSize(w, 64<<10)
	put := func(m proto.Message) error {
		_, err := protodelim.MarshalOptions{MarshalOptions: proto.MarshalOptions{Deterministic: true}}.MarshalTo(buf, m)
		return err
	}
	if err := put(&api.SnapshotHeader{Format: snapshotFormat, Index: v.index, TimeNs: v.time,
		Objects: uint64(len(objects)), Results: uint64(len(results))}); err != nil {
		return err
	}
	for _, r := range objects {
		if err := put(Wrap(r)); err != nil {
			return err
		}
	}
	for _, r := range results {
		if err := put(r); err != nil {
			return err
		}
	}
	return buf.Flush()
}

// ReadState is the inverse of View.Write. It reads to the end. Errors: CodeCorrupt, CodeUnsupported for another format.
func ReadState(r io.Reader) (*State, error) {
	const op = "restoring the state from a snapshot"
	corrupt := func(format string, args ...any) (*State, error) {
		return nil, warden.Errorf(warden.CodeCorrupt, op, format, args...)
	}
	buf := bufio.NewReaderSize(r, 64<<10)
	next := func(m proto.Message) error {
		return protodelim.UnmarshalOptions{MaxSize: recordMax}.UnmarshalFrom(buf, m)
	}

	h := &api.SnapshotHeader{}
	if err := next(h); err != nil {
		return corrupt("reading its header: %w", err)
	}
	if h.GetFormat() != snapshotFormat {
		return nil, warden.Errorf(warden.CodeUnsupported, op, "it has format %d, this version knows %d", h.GetFormat(), snapshotFormat)
	}
	if h.GetResults() > warden.RequestsKept {
		return corrupt("it claims %d stored results, at most %d", h.GetResults(), warden.RequestsKept)
	}
	s := NewState()
	s.index, s.time, s.stored = h.GetIndex(), h.GetTimeNs(), int(h.GetResults())
	to := newRestorer(s)
	defer to.txn.Abort() // does nothing once committed
	requestIDs, indexes := map[string]bool{}, map[uint64]bool{}
	for batch := range decoded(next, h.GetObjects()) {
		for _, o := range batch.objects {
			if err := to.object(o); err != nil {
				return nil, warden.Wrap(op, err)
			}
		}
		if batch.err != nil {
			return corrupt("reading object %d of %d: %w", len(to.seen)+1, h.GetObjects(), batch.err)
		}
	}
	for i := range h.GetResults() {
		sr := &api.StoredResult{}
		if err := next(sr); err != nil {
			return corrupt("reading result %d of %d: %w", i+1, h.GetResults(), err)
		}
		if sr.GetRequestId() == "" || sr.GetResult().GetIndex() == 0 {
			return corrupt("result %d of %d lacks its request or index", i+1, h.GetResults())
		}
		if requestIDs[sr.GetRequestId()] {
			return corrupt("request %q is twice there", clip(sr.GetRequestId()))
		}
		if indexes[sr.GetResult().GetIndex()] {
			return corrupt("result of index %d is twice there", sr.GetResult().GetIndex())
		}
		requestIDs[sr.GetRequestId()], indexes[sr.GetResult().GetIndex()] = true, true
		must(to.txn.Insert(requests, sr))
	}
	if _, err := buf.ReadByte(); !errors.Is(err, io.EOF) {
		return corrupt("bytes follow its end")
	}
	to.txn.Commit()
	return s, nil
}

// objects is a part of a snapshot, and the error that ended it.
type objects struct {
	objects []*api.Object
	err     error
}

// decoded reads n objects by next, in parts: one is decoded while the one before is put into the tables. The goroutine that
// reads ends with the loop over the parts.
func decoded(next func(proto.Message) error, n uint64) iter.Seq[objects] {
	return func(yield func(objects) bool) {
		parts, stop, done := make(chan objects, 4), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			defer close(parts)
			for left := n; left > 0; {
				var p objects
				for range min(left, 256) {
					o := &api.Object{}
					if p.err = next(o); p.err != nil {
						break
					}
					p.objects = append(p.objects, o)
					left--
				}
				select {
				case parts <- p:
				case <-stop:
					return
				}
				if p.err != nil {
					return
				}
			}
		}()
		defer func() { close(stop); <-done }() // the reader is the caller's again
		for p := range parts {
			if !yield(p) {
				return
			}
		}
	}
}
