// Package bench measures whole clusters: real managers (raft, sealed log on disk, doors with TLS) in the benchmark's own
// process, and any number of real agents, with an executor that runs nothing, in a child process, so that what the managers
// cost can be told apart. It has no code but its benchmarks:
//
//	go test ./bench -run '^$' -bench . -benchtime 3x
//
// Everything runs on this machine, over loopback: the figures are for both ends on its cores. They are ready for benchstat
// (golang.org/x/perf) with -count.
package bench
