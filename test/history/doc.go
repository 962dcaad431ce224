// Package history proves Warden under faults: clients make random calls on a real cluster (test/bed) whose daemons are killed,
// paused, cut off from each other and run out of disk meanwhile, write down what each call was answered and when, and porcupine
// looks for an order of these calls, each between its begin and its end, that a sequential model allows. The invariants I1 to I12
// are checked as far as an outside observer can, while it runs and at the end on every byte that is left.
//
// It has no code but its tests. TestHistories is the short run; `make soak` makes longer ones for SOAK, one after the other:
//
//	make soak SOAK=30m
//
// A run prints its seed, and the variable bed.SeedVar repeats it: the same calls and faults, though not the same moments. What
// failed leaves a page for each object (history-*.html), all calls (history), the faults (events), and logs and disks of all hosts.
package history
