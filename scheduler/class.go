package scheduler

import (
	"regexp"
	"strings"
)

// Classes of reasons why a task finds no node.
const (
	ClassZone       = "zone"
	ClassSecretZone = "secret-zone"
	ClassDown       = "down"
	ClassInactive   = "inactive"
	ClassConstraint = "constraint"
	ClassFull       = "full"
	ClassCPU        = "cpu"
	ClassMemory     = "memory"
	ClassNoNodes    = "no-nodes"
	ClassRefused    = "refused"
	ClassOther      = "other"
)

// Classes are all of them, sorted by the order of the filters.
var Classes = []string{ClassNoNodes, ClassZone, ClassSecretZone, ClassDown, ClassInactive, ClassConstraint, ClassFull, ClassCPU, ClassMemory, ClassRefused, ClassOther}

var (
	waits    = regexp.MustCompile(`^no suitable node \((.*)\)$`)
	lastPart = regexp.MustCompile(`(?:.*; |^)\d+ nodes?(: | [a-z]+)(.*)$`)
)

// Class returns the class of a task's message, by the last filter that kept nodes out: those nodes came nearest. "" where the
// message does not say that the task finds no node. Pure.
func Class(message string) string {
	if strings.HasPrefix(message, "placement refused: ") {
		return ClassRefused
	}
	m := waits.FindStringSubmatch(message)
	if m == nil {
		return ""
	}
	if m[1] == "the cluster has no nodes" {
		return ClassNoNodes
	}
	m = lastPart.FindStringSubmatch(m[1])
	if m == nil {
		return ClassOther // a constraint that can't be read, or a text that was cut
	}
	switch strings.TrimSpace(m[1]) {
	case "in":
		if strings.HasSuffix(m[2], "may not enter") {
			return ClassSecretZone
		}
		return ClassZone
	case "down":
		return ClassDown
	case "paused":
		return ClassInactive
	case "without":
		return ClassConstraint
	case "with":
		return ClassFull
	case ":", "of":
		if strings.Contains(m[2], "CPU") {
			return ClassCPU
		}
		return ClassMemory
	}
	return ClassOther
}
