package store

import "warden/store/sealedlog"

// rewindable is the log of a manager that may fail to store entries. raft v1.8 deletes those that another leader's entries replace, and
// stores these then; where that failed, on a full disk, it took the deleted ones for there ever after, and followed nobody until it was
// started again (raft.go, appendEntries: "leaving r.getLastLog() in the wrong state"). So the end of the log is not deleted, but replaced by
// what is stored next, in one write: either both are done or neither.
type rewindable struct{ *sealedlog.Log }

// DeleteRange implements raft.LogStore: it deletes at the beginning of the log, or all of it. At the end StoreLogs does.
func (l rewindable) DeleteRange(low, high uint64) error {
	first, err := l.FirstIndex()
	if err != nil {
		return err
	}
	last, err := l.LastIndex()
	if err != nil {
		return err
	}
	if low > first && high >= last {
		return nil
	}
	return l.Log.DeleteRange(low, high)
}
