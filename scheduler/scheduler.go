// Package scheduler decides which node runs which task: nodes and groups of equal tasks in, placements and reasons out.
//
// It is pure: no clock, no randomness, no I/O, and the same input gives the same output whatever the order of the nodes. It
// does not know of services, slots, restarts or commits. A placement is a proposal: whoever commits it has zone, availability
// and resources checked again there, because the view that it was made from may be old.
//
// Invariants: a task is only ever placed in its own zone, and only where each of its secrets may enter; the zone is looked
// at before anything else. A node is never given more CPU or memory than it has free, counting what this call placed.
// What cannot be read (a constraint that does not parse, a node that did not report its size) never fits.
//
// Labels with the prefix engine.labels, and os and arch, are what nodes say of themselves: good for convenience, not for
// security. Reference: the filters and the spread of SwarmKit (manager/scheduler), whose ties are broken by chance.
package scheduler

// Node is what placement needs to know of a node.
type Node struct {
	ID, Hostname, Role, Zone string
	IP                       string // as a manager saw it
	OS, Arch                 string
	Labels                   map[string]string // set by operators
	EngineLabels             map[string]string // reported by the node
	Active                   bool              // may get new tasks: neither paused nor drained
	Ready                    bool              // has a session
	NanoCPUs, MemoryBytes    int64             // total; 0: unknown, so that only tasks without a reservation fit
	UsedNanoCPUs             int64             // reserved by the tasks it holds
	UsedMemoryBytes          int64
	Tasks                    int            // that it holds
	ServiceTasks             map[string]int // the same by service ID
	RecentFailures           map[string]int // tasks that failed there lately, by service ID
}

// Group is a number of equal tasks of one service.
type Group struct {
	ServiceID             string
	Zone                  string
	Constraints           []Constraint // all must match
	NanoCPUs, MemoryBytes int64        // reserved by each task
	SecretZones           [][]string   // for each secret the zones that it may enter; empty: any
	TaskIDs               []string     // placed in this order
}

// Placement gives a task its node.
type Placement struct{ TaskID, NodeID string }

// Unplaced says why a task fits nowhere now.
type Unplaced struct{ TaskID, Reason string }

// FailuresMax is how many recent failures of a service move a node behind all others for tasks of that service.
const FailuresMax = 5

// ReasonMax bounds the reason of an Unplaced, in bytes: the longest status message that the state keeps.
const ReasonMax = 1 << 10
