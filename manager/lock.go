package manager

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/door"
	"warden/secrets"
	"warden/store"
)

// States of a manager's own keys, as NodeState names them.
const (
	LockUnlocked  = "unlocked"  // its key file is sealed as the cluster says, and nothing on its disk is under an older DEK
	LockResealing = "resealing" // its key file is, but not yet all of its disk
	LockOldKey    = "old-key"   // a restart needs what the cluster has replaced
)

// LockStatus is how a manager's own keys are sealed.
type LockStatus struct {
	State         string
	KeyID         string // of the unlock key that its key file needs; empty: none
	DEKGeneration uint64
}

func lockOf(r *api.ReportRequest) LockStatus {
	return LockStatus{State: r.LockState, KeyID: r.UnlockKeyId, DEKGeneration: r.DekGeneration}
}

// LockStateOf returns the lock state as a joining or promoted manager needs it before it writes a key file, and as one that
// starts is told by its peers.
func LockStateOf(c *api.Cluster) *api.LockState {
	return &api.LockState{Autolock: c.GetAutolock(), Recipient: c.GetUnlockRecipient(), KeyId: c.GetUnlockKeyId(),
		Generation: c.GetLockGeneration(), DekGeneration: c.GetDekGeneration()}
}

// LockChanged has the leader told at once how this node's keys are sealed.
func (m *Manager) LockChanged() { m.askReport() }

// Times of AskPeers.
const (
	askMax   = 3 * time.Second        // for the first answer
	askGrace = 250 * time.Millisecond // for the others, once there is one
)

// AskPeers asks the managers that the node knows of how its key file must be sealed by now, before its own manager starts (I9). It
// returns the newest answer, nil where nobody answered within 3 s. What a peer says counts until this node's replica has
// caught up, and no longer: one that was evicted meanwhile could answer anything. stale: the list is so old that its keys may have changed.
func AskPeers(ctx context.Context, cfg Config, stale bool) *api.LockState {
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	known := cfg.Known()
	answers := make(chan *api.LockState)
	var asking sync.WaitGroup
	for _, i := range known.GetManagers() {
		if i.NodeId == cfg.NodeID {
			continue
		}
		asking.Go(func() { // ends with ctx
			state, err := askPeer(ctx, cfg, i, known.DistrustedIssuers, stale)
			if err != nil {
				cfg.Logger.Debug("got no recipient from a peer", "node_id", i.NodeId, "error", err)
				return
			}
			select {
			case answers <- state:
			case <-ctx.Done():
			}
		})
	}
	go func() { asking.Wait(); close(answers) }()
	var newest *api.LockState
	for {
		select {
		case state, more := <-answers:
			if !more {
				return newest
			}
			if newest == nil {
				time.AfterFunc(askGrace, cancel)
			}
			if newest == nil || state.Generation > newest.Generation || state.Generation == newest.Generation && state.DekGeneration > newest.DekGeneration {
				newest = state
			}
		case <-ctx.Done():
			return newest
		}
	}
}

func askPeer(ctx context.Context, cfg Config, i *api.ManagerInfo, distrusted []byte, stale bool) (*api.LockState, error) {
	cc, err := grpc.NewClient("passthrough:///"+i.NodeId, grpc.WithTransportCredentials(door.Credentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return door.Dial(ctx, i.Address, warden.DoorPeer, cfg.Certificate(), Expect(cfg.Root, i, distrusted, stale))
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(4<<10)))
	if err != nil {
		return nil, err
	}
	defer cc.Close()
	state, err := api.NewPeerClient(cc).Recipient(ctx, &api.RecipientRequest{}) // fails at once where nothing listens
	return state, api.FromError(err)
}

// dekAge is the age at which DEKs are replaced without being asked for: about as often as node keys are.
const dekAge = 90 * 24 * time.Hour

// ageDEKs asks every manager for a new DEK when the present ones are dekAge old. On the leader only.
func (m *Manager) ageDEKs(ctx context.Context, now time.Time) error {
	c := m.store.View().Cluster()
	if c == nil || now.Sub(time.Unix(0, max(c.DekChangedNs, c.Meta.GetCreatedNs()))) < dekAge {
		return nil
	}
	next := api.Clone(c)
	next.DekGeneration++
	_, err := m.store.Propose(ctx, m.systemCommand("housekeeping", store.Put(next, c.Meta.Version)))
	if err == nil {
		m.logger.Info("asked every manager for a new DEK: the present ones are old", "dek_generation", next.DekGeneration)
	}
	return err
}

// issuersMax is how many issuing CAs may be distrusted before a plain rotation is refused: the store takes more, for evictions of managers.
const issuersMax = 768

// NextIssuing puts a new issuing CA into the record. Errors: CodeUnsupported where the root key is not in the cluster; CodeTooLarge
// where so many issuing CAs are distrusted that only the eviction of a manager may add another.
func (m *Manager) NextIssuing(c *api.Cluster) error {
	const op = "rotating the issuing CA"
	if len(c.SealedRootKey) == 0 {
		return warden.Hint(warden.Errorf(warden.CodeUnsupported, op, "the root key is not in the cluster"), "an issuing CA is signed by the root's key")
	}
	if n := len(Sums(c.DistrustedIssuers)); n >= issuersMax {
		return warden.Hint(warden.Errorf(warden.CodeTooLarge, op, "%d issuing CAs are distrusted already, and what room is left is for evictions of managers", n),
			"every node carries that list: to be rid of it, build a new cluster")
	}
	return warden.Wrap(op, nextIssuing(c, time.Now()))
}

// nextIssuing makes a new generation of the issuing CA and distrusts the present one: its leaves pass only where a record
// vouches for their key.
func nextIssuing(c *api.Cluster, now time.Time) error {
	ks, err := secrets.ParseKeyset(c.Keyset)
	if err != nil {
		return err
	}
	der, err := ks.Open(c.SealedRootKey, c.Id, purposeRoot)
	if err != nil {
		return err
	}
	rootKey, err := ca.ParseKey(der)
	clear(der)
	if err != nil {
		return err
	}
	issuing, key, err := ca.NewIssuing(c.RootCert, rootKey, c.Id, c.IssuingGeneration+1, now)
	if err != nil {
		return err
	}
	if c.SealedIssuingKey, err = sealKey(ks, c.Id, key, purposeIssuing); err != nil {
		return err
	}
	c.DistrustedIssuers = append(c.DistrustedIssuers, issuerSum(c.IssuingCert)...)
	c.IssuingCert = issuing
	c.IssuingGeneration++
	return nil
}
