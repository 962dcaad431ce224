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
	counts map[api.Kind]int
	specs  specs
}

// versionsKept is up to how many operations of a command the versions are remembered with its result. Those that have more come from the
// orchestrator and the dispatcher, which don't ask again, and 10,000 results of 2,000 versions would be most of the state.
const versionsKept = 16

// NewState returns the empty state. Its database is a snapshot of an empty one: those keep no books for watches, which nobody uses here.
func NewState() *State {
	return &State{db: newDB().Snapshot(), counts: map[api.Kind]int{}}
}

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
	x := newTx(s, txn, index, s.time, cmd)
	result, keys := &api.Result{Index: index}, []Key(nil)
	if err := x.run(); err != nil {
		txn.Abort()
		txn = s.db.Txn(true)
		result = failed(index, err)
	} else {
		result.Versions, keys = x.versions, sortedKeys(x.written)
		for kind, n := range x.added {
			s.counts[kind] += n
		}
	}
	kept := result
	if len(kept.GetVersions()) > versionsKept {
		kept = &api.Result{Index: result.GetIndex()}
	}
	s.keep(txn, &api.StoredResult{RequestId: cmd.GetRequestId(), Result: kept})
	txn.Commit()
	return result, keys
}

// keep stores a result, and forgets the oldest beyond the bound.
func (s *State) keep(txn *memdb.Txn, r *api.StoredResult) {
	s.stored++
	if s.stored > warden.RequestsKept { // the oldest is read before the table is written to: see tx.base
		oldest, err := txn.First(requests, bySeq+"_prefix", "")
		must(err)
		must(txn.Delete(requests, oldest))
		s.stored--
	}
	must(txn.Insert(requests, r))
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
