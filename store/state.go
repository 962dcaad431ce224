package store

import (
	"errors"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// State is the replicated state without raft: bytes in, result out, nothing else. Not safe for concurrent use.
type State struct {
	db     *memdb.MemDB
	index  uint64 // of the last command applied
	time   int64  // last command time, Unix nanoseconds; never falls
	stored int    // rows of the table of request results
}

// NewState returns the empty state.
func NewState() *State { return &State{db: newDB()} }

// View returns the state as it is now.
func (s *State) View() *View { return &View{db: s.db.Snapshot(), index: s.index, time: s.time} }

// Apply applies one committed command: all of it or nothing. It depends on its arguments and the state alone, never panics
// whatever the bytes are, and returns a result in every case, with the keys of the records that changed. A command that cannot be
// attributed to a request ID leaves nothing but the index.
func (s *State) Apply(index uint64, data []byte) (*api.Result, []Key) {
	s.index = index
	const op = "applying a command"
	if len(data) > warden.CommandBytes {
		return failed(index, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d", len(data), warden.CommandBytes)), nil
	}
	cmd := &api.Command{}
	if proto.Unmarshal(data, cmd) != nil { // its text differs from build to build, so it stays out of the state
		return failed(index, warden.Errorf(warden.CodeCorrupt, op, "the bytes do not parse")), nil
	}
	if err := checkCommand(cmd); err != nil {
		return failed(index, err), nil
	}
	s.time = max(s.time, cmd.GetTimeNs())

	txn := s.db.Txn(true)
	if raw, _ := txn.First(requests, byID, cmd.GetRequestId()); raw != nil {
		txn.Abort()
		return raw.(*api.StoredResult).GetResult(), nil
	}
	x := newTx(txn, index, s.time, cmd)
	result, keys := &api.Result{Index: index}, []Key(nil)
	if err := x.run(); err != nil {
		txn.Abort()
		txn = s.db.Txn(true)
		result = failed(index, err)
	} else {
		result.Versions, keys = x.versions, sortedKeys(x.changed)
	}
	s.keep(txn, &api.StoredResult{RequestId: cmd.GetRequestId(), Result: result})
	txn.Commit()
	return result, keys
}

// keep stores a result, and forgets the oldest beyond the bound.
func (s *State) keep(txn *memdb.Txn, r *api.StoredResult) {
	must(txn.Insert(requests, r))
	s.stored++
	for s.stored > warden.RequestsKept {
		oldest, err := txn.First(requests, bySeq+"_prefix", "")
		must(err)
		must(txn.Delete(requests, oldest))
		s.stored--
	}
}

// must stops the process where memdb refuses what the schema allows: a bug of ours that must not become a divergence.
func must(err error) {
	if err != nil {
		panic("the state's tables are broken: " + err.Error())
	}
}

func failed(index uint64, err error) *api.Result {
	return &api.Result{Index: index, Code: string(warden.CodeOf(err)), Text: err.Error(), Hint: warden.HintOf(err)}
}

// resultError returns what the result says, as an error; nil where the command was applied.
func resultError(r *api.Result) error {
	if r.GetCode() == "" {
		return nil
	}
	return &warden.Error{Code: warden.Code(r.GetCode()), Err: errors.New(r.GetText()), HintText: r.GetHint()}
}
