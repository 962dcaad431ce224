package confine

import (
	"crypto/rand"
	"math/big"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Uids and gids of tasks lie where systemd keeps those of containers (systemd.io/UIDS-GIDS), a slot of IDsPerTask each.
const (
	IDsPerTask = 1 << 16
	IDFirst    = 8 * IDsPerTask // 524288
	IDSlots    = 28663          // up to 1879048191
)

// Range is a range of uids or gids that belongs to a user of the host.
type Range struct{ First, Count int64 }

func (r Range) overlaps(first, count int64) bool {
	return first < r.First+r.Count && r.First < first+count
}

// DrawIDs draws the first id of a slot that used does not say is used and that has no id of foreign.
func DrawIDs(foreign []Range, used func(base uint32) bool) (base uint32) {
	for {
		n, err := rand.Int(rand.Reader, big.NewInt(IDSlots))
		if err != nil {
			panic(err) // crypto/rand never fails (since Go 1.24)
		}
		first := IDFirst + n.Int64()*IDsPerTask
		if !used(uint32(first)) && !slices.ContainsFunc(foreign, func(r Range) bool { return r.overlaps(first, IDsPerTask) }) {
			return uint32(first)
		}
	}
}

// SubordinateIDs returns the ranges of /etc/subuid and /etc/subgid, less any that would leave no ids for tasks. A line is
// "<user>:<first>:<count>" (subuid(5)).
func SubordinateIDs() (ranges []Range) {
	for _, path := range []string{"/etc/subuid", "/etc/subgid"} {
		b, _ := os.ReadFile(path)
		for line := range strings.Lines(string(b)) {
			f := strings.Split(strings.TrimSpace(line), ":")
			if len(f) != 3 {
				continue
			}
			first, errFirst := strconv.ParseInt(f[1], 10, 64)
			count, errCount := strconv.ParseInt(f[2], 10, 64)
			if errFirst == nil && errCount == nil && count < IDSlots/4*IDsPerTask {
				ranges = append(ranges, Range{first, count})
			}
		}
	}
	return ranges
}
