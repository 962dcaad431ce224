package sealedlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"syscall"

	"warden"
)

// The page format of bbolt v1.5 (internal/common), on the little-endian machines that we run on.
const (
	boltMagic       = 0xED0CDAED
	boltVersion     = 2
	boltPageHeader  = 16
	boltElement     = 16
	boltMetaBytes   = 64
	boltBucketBytes = 16
	boltBranch      = 0x01
	boltLeaf        = 0x02
	boltFreelist    = 0x10
	boltBucketFlag  = 0x01
	boltDepthMax    = 64
)

// openBoltFile opens the file for bbolt, locks it and checks its pages before bbolt maps them: bbolt believes what it reads,
// and a wrong length or page number would end the process. Errors: CodeInUse if another process has the file, CodeCorrupt.
// Cost: reads every page in use once.
func openBoltFile(path string, flag int, mode os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, flag&^os.O_CREATE|syscall.O_NOFOLLOW, mode)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "opening "+path, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, warden.Hint(warden.Errorf(warden.CodeInUse, "opening "+path, "another process has it open: %w", err),
			"stop the other daemon that uses this state directory")
	}
	if err := sameFile(f, path); err != nil {
		f.Close()
		return nil, err
	}
	if err := checkBoltFile(f); err != nil {
		f.Close()
		return nil, corrupt(path, "%w", err)
	}
	return f, nil
}

// sameFile refuses an open file that path does not name any more: another process may have put a re-sealed one there between our
// open and our lock. Errors: CodeInUse.
func sameFile(f *os.File, path string) error {
	is, err1 := f.Stat()
	named, err2 := os.Lstat(path)
	if err := errors.Join(err1, err2); err != nil {
		return warden.Recode(warden.CodeInternal, "opening "+path, err)
	}
	if !os.SameFile(is, named) {
		return warden.Errorf(warden.CodeInUse, "opening "+path, "another process replaced it meanwhile")
	}
	return nil
}

// boltFile is a bbolt file under check.
type boltFile struct {
	r        io.ReaderAt
	pageSize uint64
	pages    uint64 // high-water mark: no page number in use reaches it
	used     map[uint64]bool
}

// boltMeta is what the check needs of a meta page.
type boltMeta struct{ pageSize, root, freelist, pages, txid uint64 }

// checkBoltFile walks the pages that the newest valid meta page of f leads to and returns what is wrong with them, nil if
// bbolt can use the file. A torn meta page is no error, as bbolt goes back to the other one.
func checkBoltFile(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	meta, err := newestMeta(f, info.Size())
	if err != nil {
		return err
	}
	if meta.pageSize < 1024 || meta.pageSize > 64<<10 || meta.pageSize&(meta.pageSize-1) != 0 {
		return fmt.Errorf("a page size of %d is not possible", meta.pageSize)
	}
	if size := uint64(info.Size()); meta.pages > size/meta.pageSize {
		return fmt.Errorf("the file was cut short: %d bytes of %d", size, meta.pages*meta.pageSize)
	}
	b := &boltFile{r: f, pageSize: meta.pageSize, pages: meta.pages, used: map[uint64]bool{0: true, 1: true}}
	if err := b.tree(meta.root, nil, nil, 0); err != nil {
		return err
	}
	return b.freelist(meta.freelist)
}

// newestMeta returns the meta page that bbolt will choose: of those that are valid the one with the higher transaction.
func newestMeta(r io.ReaderAt, size int64) (boltMeta, error) {
	var best boltMeta
	at := func(off int64) (m boltMeta, ok bool) {
		b := make([]byte, boltPageHeader+boltMetaBytes)
		if _, err := r.ReadAt(b, off); err != nil {
			return m, false
		}
		b = b[boltPageHeader:]
		sum := fnv.New64a()
		sum.Write(b[:56])
		if le32(b) != boltMagic || le32(b[4:]) != boltVersion || le64(b[56:]) != sum.Sum64() {
			return m, false
		}
		m = boltMeta{pageSize: uint64(le32(b[8:])), root: le64(b[16:]), freelist: le64(b[32:]), pages: le64(b[40:]), txid: le64(b[48:])}
		return m, true
	}
	first, ok := at(0)
	if ok {
		if second, ok := at(int64(first.pageSize)); ok && second.txid > first.txid {
			if second.pageSize != first.pageSize {
				return first, errors.New("the meta pages disagree on the page size")
			}
			return second, nil
		}
		return first, nil
	}
	// The second page's place follows from the page size, which only the meta pages tell. bbolt takes the first it finds.
	for ps := int64(1024); ps < size && best.pageSize == 0; ps *= 2 {
		if m, ok := at(ps); ok {
			if m.pageSize != uint64(ps) {
				return m, errors.New("the meta page is not where its page size says")
			}
			best = m
		}
	}
	if best.pageSize == 0 {
		return best, errors.New("no valid meta page")
	}
	return best, nil
}

// page reads page id with its overflow pages and marks them used.
func (b *boltFile) page(id uint64) (data []byte, flags, count uint16, err error) {
	if id < 2 || id >= b.pages {
		return nil, 0, 0, fmt.Errorf("page %d is out of range", id)
	}
	head := make([]byte, boltPageHeader)
	if _, err := b.r.ReadAt(head, int64(id*b.pageSize)); err != nil {
		return nil, 0, 0, fmt.Errorf("reading page %d: %w", id, err)
	}
	over := uint64(le32(head[12:]))
	if le64(head) != id || over >= b.pages-id {
		return nil, 0, 0, fmt.Errorf("page %d has a wrong header", id)
	}
	for i := id; i <= id+over; i++ {
		if b.used[i] {
			return nil, 0, 0, fmt.Errorf("page %d is in use twice", i)
		}
		b.used[i] = true
	}
	data = make([]byte, (over+1)*b.pageSize)
	if _, err := b.r.ReadAt(data, int64(id*b.pageSize)); err != nil {
		return nil, 0, 0, fmt.Errorf("reading page %d: %w", id, err)
	}
	return data, le16(head[8:]), le16(head[10:]), nil
}

// tree checks the subtree at page id, whose keys must lie in [low, high); nil bounds are open.
func (b *boltFile) tree(id uint64, low, high []byte, depth int) error {
	if depth > boltDepthMax {
		return fmt.Errorf("page %d is nested too deep", id)
	}
	data, flags, count, err := b.page(id)
	if err != nil {
		return err
	}
	switch flags {
	case boltLeaf:
		return b.leaf(id, data, count, low, high, depth)
	case boltBranch:
	default:
		return fmt.Errorf("page %d is of kind %#x, not of a tree", id, flags)
	}
	if count == 0 {
		return fmt.Errorf("branch page %d is empty", id)
	}
	keys, children := make([][]byte, count), make([]uint64, count)
	for i := range keys {
		off := boltPageHeader + i*boltElement
		if off+boltElement > len(data) {
			return fmt.Errorf("page %d: element %d lies outside", id, i)
		}
		e := data[off:]
		if keys[i], err = slice(data, off, uint64(le32(e)), uint64(le32(e[4:]))); err != nil {
			return fmt.Errorf("page %d: element %d: %w", id, i, err)
		}
		children[i] = le64(e[8:])
	}
	if err := ascending(id, keys, low, high); err != nil {
		return err
	}
	for i, child := range children {
		next := high
		if i+1 < len(keys) {
			next = keys[i+1]
		}
		if err := b.tree(child, keys[i], next, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks the elements of a leaf page, inline or its own, and the buckets among them.
func (b *boltFile) leaf(id uint64, data []byte, count uint16, low, high []byte, depth int) error {
	keys := make([][]byte, count)
	for i := range keys {
		off := boltPageHeader + i*boltElement
		if off+boltElement > len(data) {
			return fmt.Errorf("page %d: element %d lies outside", id, i)
		}
		e := data[off:]
		kv, err := slice(data, off, uint64(le32(e[4:])), uint64(le32(e[8:])))
		if err != nil {
			return fmt.Errorf("page %d: key %d: %w", id, i, err)
		}
		keys[i] = kv
		value, err := slice(data, off, uint64(le32(e[4:]))+uint64(le32(e[8:])), uint64(le32(e[12:])))
		if err != nil {
			return fmt.Errorf("page %d: value %d: %w", id, i, err)
		}
		switch le32(e) {
		case 0:
		case boltBucketFlag:
			if err := b.bucket(id, value, depth); err != nil {
				return err
			}
		default:
			return fmt.Errorf("page %d: element %d is of kind %#x", id, i, le32(e))
		}
	}
	return ascending(id, keys, low, high)
}

// bucket checks a bucket, whose root is a page of its own or follows inline.
func (b *boltFile) bucket(id uint64, value []byte, depth int) error {
	if len(value) < boltBucketBytes {
		return fmt.Errorf("page %d: a bucket is cut short", id)
	}
	if root := le64(value); root != 0 {
		return b.tree(root, nil, nil, depth+1)
	}
	inline := value[boltBucketBytes:]
	if len(inline) < boltPageHeader || le16(inline[8:]) != boltLeaf || depth > boltDepthMax {
		return fmt.Errorf("page %d: an inline bucket is malformed", id)
	}
	return b.leaf(id, inline, le16(inline[10:]), nil, nil, depth+1)
}

// freelist checks that the list of free pages names each page once and none in use: bbolt will overwrite them.
func (b *boltFile) freelist(id uint64) error {
	data, flags, count, err := b.page(id)
	if err != nil {
		return err
	}
	if flags != boltFreelist {
		return fmt.Errorf("page %d is of kind %#x, not the freelist", id, flags)
	}
	ids, n := data[boltPageHeader:], uint64(count)
	if count == 0xFFFF {
		n, ids = le64(ids), ids[8:]
	}
	if n > uint64(len(ids)/8) {
		return fmt.Errorf("the freelist at page %d is too long", id)
	}
	for i := range n {
		free := le64(ids[i*8:])
		if free < 2 || free >= b.pages || b.used[free] {
			return fmt.Errorf("the freelist names page %d, which is in use or out of range", free)
		}
		b.used[free] = true
	}
	return nil
}

// ascending checks that keys are strictly ascending and in [low, high).
func ascending(id uint64, keys [][]byte, low, high []byte) error {
	for i, k := range keys {
		if i > 0 && bytes.Compare(keys[i-1], k) >= 0 || low != nil && bytes.Compare(k, low) < 0 || high != nil && bytes.Compare(k, high) >= 0 {
			return fmt.Errorf("page %d: key %d is out of order", id, i)
		}
	}
	return nil
}

// slice returns the n bytes that start pos bytes after off. The sum cannot overflow: pos and n come from 32-bit fields.
func slice(data []byte, off int, pos, n uint64) ([]byte, error) {
	from := uint64(off) + pos
	if from+n > uint64(len(data)) {
		return nil, errors.New("lies outside its page")
	}
	return data[from : from+n], nil
}

func le16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
