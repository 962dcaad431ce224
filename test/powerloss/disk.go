package powerloss

import (
	"crypto/sha256"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
)

const (
	pageSize   = 4096
	sectorSize = 512

	subsetsMax = 5  // so many pieces that are not durable are tried in every combination
	sampleMax  = 12 // else, of each sort of combination, so many
)

// State is what a loss of power may leave behind.
type State struct {
	Ops  int    // of the record, that came before it
	Lost string // what was lost of them, for people
	Tree Tree
}

// piece is a part of an operation that is there or not. Operations but writes are one piece.
type piece struct {
	op       int
	from, to int // of the data of a write
}

// fate is what becomes of a piece.
type fate int

const (
	kept fate = iota
	lost
	sized // the file has grown, its data is lost
	torn  // the first sectors of a page are there
	rest  // the last sectors of a page are there
)

// Kept returns the tree after the first n operations with nothing lost: what a process that is killed leaves.
func (r *Record) Kept(n int) Tree {
	d := r.disk()
	d.do(r.Ops[:n], 0, nil)
	return d.tree()
}

// Points returns after how many operations, from or more, power can be lost in a way of its own.
func (r *Record) Points(from int) (points []int) {
	for n := from; n <= len(r.Ops); n++ {
		if n < len(r.Ops) && (r.Ops[n].Kind == Note || r.isBeside(r.Ops[n])) {
			continue // the same trees come again after it, and promise more
		}
		if n > from && (r.Ops[n-1].Kind == Sync || r.Ops[n-1].Kind == DataSync) {
			continue // all that it can leave could be there before it
		}
		points = append(points, n)
	}
	return points
}

// States returns each distinct tree that a loss of power may leave at the points, what is beside aside, with the highest of them where that
// can be: the more a process had been told was done, the more must be there. seed draws the combinations where there are too many to try all.
func (r *Record) States(points []int, seed uint64) iter.Seq[State] {
	type made struct {
		ops     int
		pending []piece
		fates   map[piece]fate
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	states, order := map[[32]byte]made{}, [][32]byte(nil)
	base, done := r.disk(), 0 // what is durable before the first piece that is not
	for _, n := range points {
		pending := r.pending(n)
		first := n
		if len(pending) > 0 {
			first = pending[0].op
		}
		if first < done {
			base, done = r.disk(), 0
		}
		base.do(r.Ops[done:first], done, nil)
		done = first
		for _, fates := range combinations(r, pending, rng) {
			d := base.clone()
			d.do(r.Ops[first:n], first, fates)
			sum := d.sum(r.beside)
			if _, ok := states[sum]; !ok {
				order = append(order, sum)
			}
			states[sum] = made{n, pending, fates}
		}
	}
	return func(yield func(State) bool) {
		for _, sum := range order {
			m := states[sum]
			d := r.disk()
			d.do(r.Ops[:m.ops], 0, m.fates)
			if !yield(State{Ops: m.ops, Lost: r.describe(m.pending, m.fates), Tree: d.tree()}) {
				return
			}
		}
	}
}

// pending returns the pieces of the first n operations that are not durable, in order.
func (r *Record) pending(n int) (pieces []piece) {
	for i, o := range r.Ops[:n] {
		if r.isBeside(o) {
			continue
		}
		switch o.Kind {
		case Note:
		case SyncAll:
			pieces = nil
		case Sync, DataSync:
			pieces = slices.DeleteFunc(pieces, func(p piece) bool {
				switch done := r.Ops[p.op]; done.Kind {
				case Create, Unlink, Rename:
					return done.Dir == o.File
				case Chmod:
					return done.File == o.File && o.Kind == Sync
				default:
					return done.File == o.File
				}
			})
		case Write:
			for at := 0; at < len(o.Data); {
				end := min(len(o.Data), at+pageSize-int((o.Off+int64(at))%pageSize))
				pieces = append(pieces, piece{i, at, end})
				at = end
			}
		default:
			pieces = append(pieces, piece{op: i})
		}
	}
	return pieces
}

// combinations returns what may become of the pieces: a fate for each that is not kept.
func combinations(r *Record, pieces []piece, rng *rand.Rand) (all []map[piece]fate) {
	with := func(f func(i int) fate) {
		m := map[piece]fate{}
		for i, p := range pieces {
			if x := f(i); x != kept {
				m[p] = x
			}
		}
		all = append(all, m)
	}
	isWrite := func(i int) bool { return r.Ops[pieces[i].op].Kind == Write }
	choose := func(ok bool) fate {
		if ok {
			return kept
		}
		return lost
	}
	n := len(pieces)
	with(func(int) fate { return kept })
	if n == 0 {
		return all
	}
	if n <= subsetsMax {
		for set := range 1<<n - 1 {
			with(func(i int) fate { return choose(set>>i&1 == 1) })
		}
	} else {
		with(func(int) fate { return lost })
		for _, one := range sample(n, rng) {
			with(func(i int) fate { return choose(i != one) })
			with(func(i int) fate { return choose(i == one) })
			with(func(i int) fate { return choose(i < one) })
			with(func(i int) fate { return choose(i > one) })
		}
		for range sampleMax {
			with(func(int) fate { return choose(rng.IntN(2) == 0) })
		}
	}
	with(func(i int) fate { return choose(!isWrite(i)) }) // names without data
	with(func(i int) fate { return choose(isWrite(i)) })  // data without names
	with(func(i int) fate {
		if isWrite(i) {
			return sized
		}
		return kept
	})
	if last := n - 1; isWrite(last) {
		for _, how := range []fate{sized, torn, rest} {
			with(func(i int) fate {
				if i == last {
					return how
				}
				return kept
			})
			with(func(i int) fate {
				if i == last {
					return how
				}
				return lost
			})
		}
	}
	return all
}

// sample returns up to sampleMax numbers below n, the last among them.
func sample(n int, rng *rand.Rand) []int {
	if n <= sampleMax {
		return rng.Perm(n)
	}
	return append(rng.Perm(n - 1)[:sampleMax-1], n-1)
}

// disk is files and directories by number. A clone shares them until it changes one.
type disk map[int]*node

func (r *Record) disk() disk {
	d := disk{}
	for id, n := range r.start {
		d[id] = n
	}
	return d.clone()
}

func (d disk) clone() disk {
	c := make(disk, len(d))
	for id, n := range d {
		n.isShared = true
		c[id] = n
	}
	return c
}

// change returns a file or directory to change.
func (d disk) change(id int) *node {
	n := d[id]
	if n.isShared {
		n = &node{mode: n.mode, data: slices.Clone(n.data), names: maps.Clone(n.names)}
		d[id] = n
	}
	n.sum = nil
	return n
}

// do does operations, of which the first is the one of that number, but what fates takes from them.
func (d disk) do(ops []Op, number int, fates map[piece]fate) {
	done := func(i int) bool { return fates[piece{op: i}] == kept }
	for i, o := range ops {
		i += number
		switch o.Kind {
		case Create:
			if d[o.File] == nil { // it is there, though its name may be lost
				d[o.File] = &node{mode: o.Mode, names: map[string]int{}}
			}
			if done(i) {
				d.change(o.Dir).names[o.Name] = o.File
			}
		case Unlink:
			if done(i) && d[o.Dir].names[o.Name] == o.File {
				delete(d.change(o.Dir).names, o.Name)
			}
		case Rename:
			if done(i) {
				dir := d.change(o.Dir)
				if dir.names[o.Name] == o.File {
					delete(dir.names, o.Name)
				}
				dir.names[o.To] = o.File
			}
		case Write:
			n := d.change(o.File)
			if len(fates) == 0 {
				n.write(o.Off, o.Data)
				continue
			}
			for at := 0; at < len(o.Data); {
				end := min(len(o.Data), at+pageSize-int((o.Off+int64(at))%pageSize))
				n.writePiece(o.Off+int64(at), o.Data[at:end], fates[piece{i, at, end}])
				at = end
			}
		case Truncate:
			if done(i) {
				d.change(o.File).resize(o.Size)
			}
		case Chmod:
			if done(i) {
				n := d.change(o.File)
				n.mode = n.mode.Type() | o.Mode
			}
		}
	}
}

func (n *node) resize(size int64) {
	if size <= int64(len(n.data)) {
		n.data = n.data[:size:size]
		return
	}
	n.data = append(n.data, make([]byte, size-int64(len(n.data)))...)
}

func (n *node) write(off int64, data []byte) {
	if end := off + int64(len(data)); end > int64(len(n.data)) {
		n.resize(end)
	}
	copy(n.data[off:], data)
}

// writePiece writes at most one page.
func (n *node) writePiece(off int64, data []byte, f fate) {
	half := len(data) / sectorSize / 2 * sectorSize // 0: less than two sectors, of which the first is there or not
	switch f {
	case kept:
		n.write(off, data)
	case sized:
		if end := off + int64(len(data)); end > int64(len(n.data)) {
			n.resize(end)
		}
	case torn:
		if half == 0 {
			half = min(sectorSize, len(data))
		}
		n.write(off, data[:half])
	case rest:
		n.write(off+int64(half), data[half:])
	}
}

// walk calls f for what has a name, a directory before what it holds, in the order of names.
func (d disk) walk(f func(path string, id int)) {
	var walk func(path string, id int)
	walk = func(path string, id int) {
		f(path, id)
		names := d[id].names
		for _, name := range slices.Sorted(maps.Keys(names)) {
			walk(filepath.Join(path, name), names[name])
		}
	}
	walk(".", 0)
}

func (d disk) tree() Tree {
	t := Tree{}
	d.walk(func(path string, id int) { t[path] = File{Mode: d[id].mode, Data: d[id].data} })
	return t
}

// sum returns a hash of all that has a name and is not beside.
func (d disk) sum(beside map[int]bool) (sum [32]byte) {
	h := sha256.New()
	d.walk(func(path string, id int) {
		if beside[id] {
			return
		}
		n := d[id]
		if n.sum == nil {
			of := sha256.Sum256(n.data)
			n.sum = of[:]
		}
		fmt.Fprintf(h, "%q %v %x ", path, n.mode, n.sum)
	})
	h.Sum(sum[:0])
	return sum
}

// describe says what is lost of the pieces.
func (r *Record) describe(pieces []piece, fates map[piece]fate) string {
	s := ""
	for _, p := range pieces {
		if f := fates[p]; f != kept {
			s += fmt.Sprintf("; %s %v", [...]string{"", "lost", "grown without data", "torn", "torn at its end"}[f], r.Ops[p.op])
			if p.to > 0 {
				s += fmt.Sprintf(" [%d:%d]", p.from, p.to)
			}
		}
	}
	if s == "" {
		return "nothing"
	}
	return s[2:]
}
