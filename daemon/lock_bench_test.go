package daemon

import (
	"fmt"
	"testing"
	"time"

	"warden/api"
	"warden/manager"
)

// BenchmarkRotateDEK is the time from the order to a manager of 10,000 log entries that has nothing under an older DEK, as its leader sees it:
// key file, log and snapshots re-sealed, scan, key file.
func BenchmarkRotateDEK(b *testing.B) {
	p := newPlace(b)
	p.start()
	must[*api.InitReply](b)(p.local.Init(b.Context(), &api.InitRequest{Advertise: p.cfg.Listen}))
	for i := range 10_000 { // a snapshot is taken at the same number of entries, and keeps as many behind it
		must[*api.ChangeReply](b)(p.ctl.UpdateNode(b.Context(), &api.UpdateNodeRequest{Reference: "h", LabelsAdd: map[string]string{"k": fmt.Sprint(i)}}))
	}
	dek := uint64(1)
	for b.Loop() {
		must[*api.ChangeReply](b)(p.ctl.RotateDEK(b.Context(), &api.RotateDEKRequest{}))
		dek++
		tick := time.NewTicker(5 * time.Millisecond)
		for {
			if s := p.state(); s.GetLockState() == manager.LockUnlocked && s.GetDekGeneration() == dek {
				break
			}
			<-tick.C
		}
		tick.Stop()
	}
}
