package manager

import (
	"testing"

	"warden/api"
)

// TestNobodyStaysConnectedToAnEvictedManager: what others had dialled to a manager ends with its eviction, also what raft keeps idle.
func TestNobodyStaysConnectedToAnEvictedManager(t *testing.T) {
	c := newCluster(t)
	evil := c.join(api.Role_ROLE_MANAGER, "evil")
	c.join(api.Role_ROLE_MANAGER, "third")
	await(t, "others are connected to it", func() bool { return evil.m.doors.Live() > 0 })
	c.evict(evil)
	await(t, "nobody is connected to it", func() bool { return evil.m.doors.Live() == 0 })
}
