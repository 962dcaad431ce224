// Package adversary attacks whole clusters of real daemons, each attack by a program or code that speaks the protocol at the real
// doors, and wants three things of each: that it fails, that it is counted where there is something of ours that could count it, and that
// honest work (a secret is made, nodes are listed, a node joins, a task starts) goes on without an error in about its normal time,
// measured beside it and in the same run. It has no code of its own but the intruder, a program that floods and that looks around as a
// local user or a task.
//
//	adversary                                        where                                                                        counted as (door, code)
//	worker's token for a manager, another's CSR      TestAdversaries/StolenTokenOfAnotherRole, e2e TestTokensRefused              join wrong-key, binding; peer, raft, control wrong-role
//	replays a join                                   TestAdversaries/ReplayedJoin, join TestReplayOnAnotherConnection             join unauthentic, unknown-token
//	man in the middle at join                        TestAdversaries/ManInTheMiddle, join TestRelayInTheMiddle                    join unknown-token where it reaches a manager
//	reports other nodes' tasks                       TestAdversaries/OtherNodesTasks, dispatcher TestReportsOfOthers              node denied
//	claims another zone, label, host name or ID      TestAdversaries/AnotherZoneLabelOrID                                         node unauthentic; what a node says of itself is not refused, but not believed
//	describes itself anew with each session          TestAdversaries/Descriptions, manager TestDescriptionsCostTheLogLittle      node limited
//	holds connections after its eviction             TestAdversaries/HeldAfterEviction, e2e TestI4EvictionOfAHostileNode          node evicted
//	demoted manager, old certificate, every door     TestAdversaries/DemotedManager, e2e TestDoors                                peer, raft, control wrong-role
//	10,000 half-open connections                     TestAdversaries/Floods/HalfOpen                                              none unavailable
//	slow-loris, garbage, giants without certificate  TestAdversaries/Floods/WithoutCertificate, e2e TestFloodWithoutACertificate  none unavailable, invalid; node too-large; join limited, invalid, too-large
//	the same with a worker's, 1,000 connections      TestAdversaries/Floods/Worker, e2e TestFloodOfSessions                       node limited, unavailable, too-large
//	the same with a manager's, 10,000 streams        TestAdversaries/Floods/Manager                                               peer too-large; raft invalid, too-large
//	local user who is not root                       TestAdversaries/OnTheNode/LocalUser                                          the kernel refuses: nothing of ours sees it
//	task after another task's secrets                TestAdversaries/OnTheNode/TaskAgainstTask, TestContainerAgainstContainer     the same
package adversary
