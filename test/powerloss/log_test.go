package powerloss_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/hashicorp/raft"

	"warden"
	"warden/autolock"
	"warden/store/sealedlog"
)

// content is what a log holds: entry index to term, and stable values.
type content struct {
	first, last uint64
	terms       map[uint64]uint64
	stable      map[string]uint64
}

func (c content) equal(o content) bool {
	return c.first == o.first && c.last == o.last && maps.Equal(c.terms, o.terms) && maps.Equal(c.stable, o.stable)
}

func (c content) String() string {
	return fmt.Sprintf("entries %d to %d, terms %v, stable %v", c.first, c.last, c.terms, c.stable)
}

// logStep is one thing that raft asks of a log, and what is there then.
type logStep struct {
	name   string
	do     func(*sealedlog.Log) error
	expect func(*content)
}

func appended(from, to, term uint64, size int) logStep {
	return logStep{fmt.Sprintf("append %d to %d of term %d", from, to, term), func(l *sealedlog.Log) error {
		var entries []*raft.Log
		for i := from; i <= to; i++ {
			entries = append(entries, &raft.Log{Index: i, Term: term, Type: raft.LogCommand, Data: entryData(i, term, size)})
		}
		return l.StoreLogs(entries)
	}, func(c *content) {
		maps.DeleteFunc(c.terms, func(i, _ uint64) bool { return i >= from || from > c.last+1 })
		for i := from; i <= to; i++ {
			c.terms[i] = term
		}
	}}
}

func entryData(index, term uint64, size int) []byte {
	return append(fmt.Appendf(nil, "entry %d of term %d ", index, term), bytes.Repeat([]byte{byte(index)}, size)...)
}

func deleted(from, to uint64) logStep {
	return logStep{fmt.Sprintf("delete %d to %d", from, to), func(l *sealedlog.Log) error { return l.DeleteRange(from, to) }, func(c *content) {
		maps.DeleteFunc(c.terms, func(i, _ uint64) bool { return i >= from && i <= to })
	}}
}

func set(key string, value uint64) logStep {
	return logStep{fmt.Sprintf("set %s to %d", key, value), func(l *sealedlog.Log) error { return l.SetUint64([]byte(key), value) }, func(c *content) { c.stable[key] = value }}
}

// logSteps: votes, appends, a conflict, a compaction, a rotation of the DEK, and a log that a snapshot replaced.
var logSteps = []logStep{
	{"open", func(*sealedlog.Log) error { return nil }, func(*content) {}},
	set("CurrentTerm", 1), appended(1, 3, 1, 10), appended(4, 20, 1, 1000), set("LastVoteTerm", 2), deleted(15, 20), appended(15, 17, 2, 10),
	appended(16, 18, 3, 3000), deleted(1, 10), appended(19, 40, 3, 1500),
	{"rotate", func(l *sealedlog.Log) error { return l.Reseal(context.Background()) }, func(*content) {}},
	appended(41, 41, 3, 10), deleted(11, 41), appended(100, 102, 4, 10), set("CurrentTerm", 5),
}

var rotateStep = slices.IndexFunc(logSteps, func(s logStep) bool { return s.name == "rotate" })

// contentAfter returns what is there after n steps.
func contentAfter(n int) content {
	c := content{terms: map[uint64]uint64{}, stable: map[string]uint64{}}
	for _, s := range logSteps[:n] {
		s.expect(&c)
		c.first, c.last = 0, 0
		if len(c.terms) > 0 {
			all := slices.Sorted(maps.Keys(c.terms))
			c.first, c.last = all[0], all[len(all)-1]
		}
	}
	return c
}

// contentOf reads a log.
func contentOf(l *sealedlog.Log) (c content, err error) {
	c = content{terms: map[uint64]uint64{}, stable: map[string]uint64{}}
	var err1, err2 error
	c.first, err1 = l.FirstIndex()
	c.last, err2 = l.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return c, err
	}
	for i := c.first; i != 0 && i <= c.last; i++ {
		var e raft.Log
		if err := l.GetLog(i, &e); err != nil {
			return c, err
		}
		if e.Index != i || !bytes.HasPrefix(e.Data, entryData(i, e.Term, 0)) {
			return c, fmt.Errorf("entry %d is %d of term %d: %.40q", i, e.Index, e.Term, e.Data)
		}
		c.terms[i] = e.Term
	}
	for _, key := range []string{"CurrentTerm", "LastVoteTerm"} {
		v, err := l.GetUint64([]byte(key))
		if err == nil {
			c.stable[key] = v
		} else if err.Error() != "not found" {
			return c, err
		}
	}
	return c, nil
}

// rings returns the sealer before the rotation, and after: both keys, and the fresh one alone.
func rings(base string) (before, both, fresh *autolock.Keyring, err error) {
	first, err := wanted(base, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	rotated, err := wanted(base, len(keySteps)-1)
	if err != nil {
		return nil, nil, nil, err
	}
	fresh, err = rotated.Keyring.OnlyPrimary()
	return first.Keyring, rotated.Keyring, fresh, err
}

const cluster, node = "cluster", "node"

func raftDir(base string) string { return filepath.Join(state(base), "raft") }

func openLog(base string, s sealedlog.Sealer) (*sealedlog.Log, error) {
	return sealedlog.Open(raftDir(base), cluster, node, s, slog.New(slog.DiscardHandler))
}

// matches returns after how many steps a log may be that holds c.
func matches(c content) (at []int) {
	for n := 1; n <= len(logSteps); n++ {
		if contentAfter(n).equal(c) {
			at = append(at, n)
		}
	}
	return at
}

func init() {
	sequences["log"] = func(base string, note func(string, ...any)) error {
		before, both, _, err := rings(base)
		if err != nil {
			return err
		}
		sealer := autolock.NewSealer(before)
		l, err := openLog(base, sealer)
		if warden.CodeOf(err) == warden.CodeCorrupt { // rotated by a process before, which had said so in its key file
			sealer.Swap(both)
			l, err = openLog(base, sealer)
		}
		if err != nil {
			return err
		}
		c, err := contentOf(l)
		if err != nil {
			return err
		}
		at := matches(c)
		if len(at) == 0 {
			return fmt.Errorf("the log holds what was never written: %v", c)
		}
		note("%d", at[0])
		for n := at[0]; n < len(logSteps); n++ {
			if n == rotateStep {
				sealer.Swap(both)
			}
			if err := logSteps[n].do(l); err != nil {
				return fmt.Errorf("%s: %w", logSteps[n].name, err)
			}
			note("%d", n+1)
		}
		return l.Close()
	}
}

// lastStep returns the number in the last note.
func lastStep(notes []string) (n int, err error) {
	if len(notes) > 0 {
		n, err = strconv.Atoi(notes[len(notes)-1])
	}
	return n, err
}

// checkLog wants all that was acknowledged and at most the next step, whole; and a log that can be written, re-sealed and opened again.
func checkLog(base string, notes []string) error {
	acked, err := lastStep(notes)
	if err != nil {
		return err
	}
	_, both, fresh, err := rings(base)
	if err != nil {
		return err
	}
	var sealer sealedlog.Rotating = both
	if acked > rotateStep {
		sealer = fresh
	}
	if err := private(base); err != nil {
		return err
	}
	l, err := openLog(base, sealer)
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := contentOf(l)
	if err != nil {
		return err
	}
	at := matches(c)
	if acked == 0 && slices.Contains(at, 1) { // it was just made
	} else if !slices.Contains(at, acked) && !slices.Contains(at, acked+1) {
		return fmt.Errorf("step %d was acknowledged, found is what is there after %v: %v", acked, at, c)
	}
	next := appended(c.last+1, c.last+2, 9, 10)
	if err := errors.Join(next.do(l), l.Reseal(context.Background())); err != nil {
		return err
	}
	if n, err := l.Stale(); n != 0 || err != nil {
		return fmt.Errorf("%d records are under the old key, %w", n, err)
	}
	if err := l.Close(); err != nil {
		return err
	}
	entries, err := os.ReadDir(raftDir(base))
	if err != nil || len(entries) != 1 {
		return fmt.Errorf("left is %v, %w", entries, err)
	}
	again, err := openLog(base, fresh)
	if err != nil {
		return err
	}
	if last, err := again.LastIndex(); err != nil || last != c.last+2 {
		return fmt.Errorf("after another append the log ends at %d, want %d, %w", last, c.last+2, err)
	}
	return again.Close()
}

// TestLog: wherever a log is cut, what was acknowledged is there, and what was not is there whole or not at all.
func TestLog(t *testing.T) {
	attack{sequence: "log", prepare: prepareKeyFile, check: checkLog, kills: 25, losses: 200, again: "log"}.run(t)
}
