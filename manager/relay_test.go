package manager

import (
	"slices"
	"testing"

	"warden/api"
)

// TestLogGoesOn: what comes again after a session has ended is left out, and nothing else, also where lines have the same time, or
// the first ones are gone meanwhile.
func TestLogGoesOn(t *testing.T) {
	for name, c := range map[string]struct{ before, again, want []int64 }{
		"all again":          {[]int64{1, 2, 3}, []int64{1, 2, 3, 4}, []int64{1, 2, 3, 4}},
		"the same time":      {[]int64{1, 2, 2}, []int64{1, 2, 2, 2, 2, 3}, []int64{1, 2, 2, 2, 2, 3}},
		"only a tail before": {[]int64{5, 6}, []int64{1, 2, 5, 6, 7}, []int64{5, 6, 7}},
		"the first are gone": {[]int64{1, 2, 3}, []int64{5, 6}, []int64{1, 2, 3, 5, 6}},
		"out of order":       {[]int64{1, 3}, []int64{1, 3, 2, 4}, []int64{1, 3, 2, 4}},
		"nothing new":        {[]int64{1, 2}, []int64{1, 2}, []int64{1, 2}},
	} {
		var p logPlace
		var got []int64
		for _, part := range [][]int64{c.before, c.again} {
			p.resume()
			for _, at := range part {
				if !p.passed(&api.LogChunk{TimeNs: at}) {
					got = append(got, at)
				}
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: sent %v, want %v", name, got, c.want)
		}
	}
}
