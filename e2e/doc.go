// Package e2e holds the tests that run whole clusters of real daemons, driven by the real wardenctl as a user would.
// It has no code of its own.
package e2e
