package main

import (
	"cmp"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"warden"
	"warden/api"
	"warden/autolock"
)

// Times of waiting for managers to follow a rotation.
const (
	resealPatience = 30 * time.Second
	resealLook     = 250 * time.Millisecond
	lookUpPatience = 5 * time.Second // for what became of a call whose answer was lost
)

const keepNewKey = "Keep this key in a password manager: it is shown this once, and without it no restarted manager can be unlocked."

// rotationReach is what a new unlock key, or DEK, protects and what not.
const rotationReach = `Every manager makes a new data key (DEK) and a new node key, and seals all of its state anew, while it runs. What is copied from a
manager's disk from then on is closed to the old key. What it does not change: disks copied before and backups, which the old
key still opens; the values of secrets, the cluster keyset and the CA keys, which whoever has read such a copy knows
("wardenctl secret rotate", "wardenctl swarm ca --rotate-issuing").`

// withNewKey makes an unlock key and has send hand its public half on: the private half leaves this process by show alone. Where
// send fails for sure, show is not called. Where nobody knows, the key is shown with a warning: the cluster may be sealed under it.
// taken, where not nil, finds out what became of a call whose answer was lost.
func (c *cli) withNewKey(ctx context.Context, d *daemon, send func(recipient []byte) error, taken func(context.Context, string) bool, show func(id string, text []byte) error) error {
	key, err := autolock.NewUnlockKey()
	if err != nil {
		return err
	}
	defer key.Wipe()
	text := key.Text()
	defer text.Wipe()
	to := key.Recipient()
	err = send(to[:])
	if err != nil && certain(warden.CodeOf(api.FromError(err))) {
		return err
	}
	if err != nil && taken != nil {
		lctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookUpPatience)
		if taken(lctx, to.KeyID()) {
			c.warn("the answer was lost, but the cluster has the new key")
			err = nil
		}
		cancel()
	}
	signal.Ignore(syscall.SIGPIPE) // where nobody reads the key, that is to be said
	serr := text.Use(func(b []byte) error { return show(to.KeyID(), b) })
	if serr != nil {
		return warden.Hint(errors.Join(serr, err), "unlock key "+to.KeyID()+" is lost, and the cluster may be sealed under it: run `wardenctl swarm unlock-key --rotate` before a manager restarts")
	}
	if err != nil {
		c.warn("nobody knows whether the cluster took unlock key %s: keep it, and the key of before, until `wardenctl swarm unlock-key` says which one counts", to.KeyID())
		return err
	}
	return nil
}

// certain reports whether a refusal with this code is the last word: others may come after the change was made.
func certain(code warden.Code) bool {
	switch code {
	case warden.CodeInvalid, warden.CodeDenied, warden.CodeExists, warden.CodeInitialized, warden.CodeUninitialized, warden.CodeLocked, warden.CodeNotManager,
		warden.CodeUnsupported, warden.CodeTooLarge, warden.CodeNotFound, warden.CodeUsage:
		return true
	}
	return false
}

// cluster returns the cluster's record, as the leader has it.
func (d *daemon) cluster(ctx context.Context) (*api.Cluster, error) {
	found, err := listed(ctx, d, api.Kind_KIND_CLUSTER, false, (*api.Object).GetCluster)
	if err == nil && len(found) != 1 {
		err = warden.Errorf(warden.CodeUnavailable, "reading the cluster's record", "this manager has none yet")
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// hasKey reports whether the cluster's unlock key is the one with this ID.
func (d *daemon) hasKey(ctx context.Context, id string) bool {
	now, err := d.cluster(ctx)
	return err == nil && now.GetUnlockKeyId() == id
}

// writeNewKey shows a new unlock key. Pure but for w.
func writeNewKey(w io.Writer, id string, key []byte) error {
	_, err := fmt.Fprintf(w, `
To unlock a manager after it restarts, run "wardenctl swarm unlock" and provide the following key (%s):

    %s

%s
`, id, key, keepNewKey)
	return writeFailed(err)
}

func (c *cli) unlockKeyCommand() *cobra.Command {
	var rotate, quiet bool
	cmd := &cobra.Command{
		Use:   "unlock-key",
		Short: "Show which unlock key the managers are sealed under, or rotate it",
		Long: `Show the ID of the unlock key, and which managers are sealed under it. The key itself can't be shown again: the cluster has no copy.

With --rotate, make another unlock key and print it, this once; then wait until every manager that can be reached is sealed under
it. ` + rotationReach + `

A manager that is down meanwhile needs the old key at its next start; it then asks the others, and seals itself anew before it does anything else.
Keep the old key until all are sealed under the new one.`,
		Example: "  wardenctl swarm unlock-key\n  wardenctl swarm unlock-key --rotate\n  wardenctl swarm unlock-key --rotate -q > /media/usb/unlock-key",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			now, err := d.cluster(ctx)
			if err != nil {
				return err
			}
			if !now.GetAutolock() {
				return warden.Hint(warden.Errorf(warden.CodeInvalid, "", "autolock is off: there is no unlock key"), "turn it on with `wardenctl swarm update --autolock=true`")
			}
			if !rotate {
				return c.showUnlockKey(ctx, d, now, quiet)
			}
			err = c.withNewKey(ctx, d, func(recipient []byte) error {
				_, err := d.control.RotateUnlockKey(ctx, &api.RotateUnlockKeyRequest{UnlockRecipient: recipient})
				return err
			}, d.hasKey, func(id string, key []byte) error {
				if quiet {
					_, err := fmt.Fprintf(c.stdout, "%s\n", key)
					return writeFailed(err)
				}
				fmt.Fprintf(c.stdout, "Successfully rotated the unlock key: it is %s in place of %s.\n", id, now.GetUnlockKeyId())
				return writeNewKey(c.stdout, id, key)
			})
			if err != nil {
				return err
			}
			return c.awaitResealed(ctx, d, now.GetUnlockKeyId(), quiet)
		}),
	}
	cmd.Flags().BoolVar(&rotate, "rotate", false, "make another unlock key")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only the new key, or without --rotate the ID of the present one")
	return cmd
}

func (c *cli) showUnlockKey(ctx context.Context, d *daemon, now *api.Cluster, quiet bool) error {
	if quiet {
		_, err := fmt.Fprintln(c.stdout, now.GetUnlockKeyId())
		return writeFailed(err)
	}
	reply, err := d.list(ctx, api.Kind_KIND_NODE, false)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, `The unlock key is %s. The key itself can't be shown again: the cluster has no copy. If it is lost, "wardenctl swarm unlock-key --rotate"
makes another while the managers run.

`, now.GetUnlockKeyId())
	return sealListing(managersOf(reply), now).write(c.stdout, "")
}

// managerSeal is a manager and what the leader knows of it.
type managerSeal struct {
	*api.Node
	state *api.NodeState
}

// managersOf returns the managers in a list of nodes, by host name.
func managersOf(reply *api.ListReply) []managerSeal {
	states := statesByID(reply.GetNodes())
	var out []managerSeal
	for _, n := range pick(reply, (*api.Object).GetNode) {
		if n.EffectiveRole() == api.Role_ROLE_MANAGER {
			out = append(out, managerSeal{n, states[n.GetId()]})
		}
	}
	slices.SortFunc(out, func(a, b managerSeal) int {
		return cmp.Or(cmp.Compare(a.GetHostname(), b.GetHostname()), cmp.Compare(a.GetId(), b.GetId()))
	})
	return out
}

// follows reports whether a manager is sealed as the cluster says, with nothing on its disk under older keys, and has a node key of the
// same generation.
func (m managerSeal) follows(now *api.Cluster) bool {
	return m.GetLeafDekGeneration() == now.GetDekGeneration() && len(m.GetNextKeyHash()) == 0 && m.state.GetLockState() == "unlocked" && m.state.GetUnlockKeyId() == now.GetUnlockKeyId() && m.state.GetDekGeneration() == now.GetDekGeneration()
}

// sealListing is the table of the managers. Pure.
func sealListing(managers []managerSeal, now *api.Cluster) listing {
	shown := []string{"ID", "Hostname", "SealedUnder", "State", "DEK"}
	l := listing{fields: shown, shown: shown}
	for _, m := range managers {
		state := cmp.Or(m.state.GetLockState(), "unknown")
		if !m.state.GetReachable() {
			state += " (unreachable)"
		}
		under := m.state.GetUnlockKeyId()
		switch {
		case m.state.GetLockState() == "":
			under = "unknown"
		case under == "":
			under = "none"
		}
		dek := "-"
		if g := m.state.GetDekGeneration(); g > 0 {
			dek = fmt.Sprintf("%d of %d", g, now.GetDekGeneration())
		}
		l.rows = append(l.rows, row{"ID": shortID(m.GetId()), "Hostname": m.GetHostname(), "SealedUnder": under, "State": state, "DEK": dek})
	}
	return l
}

// awaitResealed waits until every manager that can be reached follows the cluster's lock and DEK generation, and says what is left to
// do. oldKey is the ID of the unlock key that a manager may still need; "" where there was none.
func (c *cli) awaitResealed(ctx context.Context, d *daemon, oldKey string, quiet bool) error {
	deadline := time.Now().Add(resealPatience)
	tick := time.NewTicker(resealLook)
	defer tick.Stop()
	var behind, away []managerSeal
	managers, known := 0, false
	for {
		now, err := d.cluster(ctx)
		var reply *api.ListReply
		if err == nil {
			reply, err = d.list(ctx, api.Kind_KIND_NODE, false)
		}
		if err == nil {
			behind, away, managers, known = nil, nil, 0, true
			for _, m := range managersOf(reply) {
				managers++
				switch {
				case m.follows(now) && m.state.GetReachable():
				case m.state.GetReachable():
					behind = append(behind, m)
				default:
					away = append(away, m)
				}
			}
			if len(behind) == 0 && managers > 0 {
				break
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			deadline = time.Time{}
		}
		if time.Now().After(deadline) {
			break
		}
	}
	if !known {
		c.warn("could not see whether the managers have followed: see `wardenctl status`")
		return nil
	}
	for _, m := range append(behind, away...) {
		c.warn("%s", m.needs(oldKey))
	}
	if left := len(behind) + len(away); left > 0 || quiet {
		return nil
	}
	_, err := fmt.Fprintf(c.stdout, "\nDone: on %s nothing is sealed under older keys any more.\n", plural(managers, "manager", "managers"))
	return writeFailed(err)
}

// needs says what a manager that has not followed yet needs.
func (m managerSeal) needs(oldKey string) string {
	why := "has not made and sealed all of its keys anew yet"
	if !m.state.GetReachable() {
		why = "does not answer"
	}
	what := "it does so by itself when it is back"
	if m.state.GetReachable() {
		what = "it goes on by itself"
	}
	if oldKey != "" {
		what += "; if it starts before it has, it needs the old unlock key " + cmp.Or(m.state.GetUnlockKeyId(), oldKey) + ": keep that key until `wardenctl swarm unlock-key` shows this manager as unlocked"
	}
	return fmt.Sprintf("manager %s (%s) %s; %s", m.GetHostname(), shortID(m.GetId()), why, what)
}

func (c *cli) rotateDEKCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate-dek",
		Short: "Have every manager seal its state under a new data key",
		Long: `Have every manager seal its state under a new data key (DEK), and wait until those that can be reached have. The unlock key stays.
Managers do so by themselves every 90 days.

` + rotationReach + ` Here the old key is a manager's old DEK: who has the unlock key and a manager's disk opens the new one too.`,
		Example: "  wardenctl swarm rotate-dek",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			if _, err := d.control.RotateDEK(ctx, &api.RotateDEKRequest{}); err != nil {
				return err
			}
			fmt.Fprintln(c.stdout, "Every manager makes a new DEK and a new node key, and seals its state anew. The unlock key stays.")
			return c.awaitResealed(ctx, d, "", false)
		}),
	}
}

func (c *cli) caCommand() *cobra.Command {
	var rotate bool
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Print the root certificate, or rotate the issuing CA",
		Long: `Print the root certificate of the cluster, PEM.

With --rotate-issuing, make a new issuing CA under the same root. Every node gets a new leaf, for a new key, by itself; sessions and
tasks go on, and join tokens stay valid. Leaves of the old issuing CA then pass only with a key that the cluster has on record, so
that the old CA's key, if somebody has it, makes no node. The root's key stays: who has that one makes another issuing CA.`,
		Example: "  wardenctl swarm ca > root.pem\n  wardenctl swarm ca --rotate-issuing",
		Args:    takes(0, 0),
		RunE: c.with(func(ctx context.Context, d *daemon, _ []string) error {
			if rotate {
				if _, err := d.control.RotateIssuing(ctx, &api.RotateIssuingRequest{}); err != nil {
					return err
				}
			}
			now, err := d.cluster(ctx)
			if err != nil {
				return err
			}
			if rotate {
				_, err = fmt.Fprintf(c.stdout, "The issuing CA is of generation %d now. Every node gets a new leaf by itself: \"wardenctl status\" counts those that have not.\n", now.GetIssuingGeneration())
				return writeFailed(err)
			}
			return writeFailed(pem.Encode(c.stdout, &pem.Block{Type: "CERTIFICATE", Bytes: now.GetRootCert()}))
		}),
	}
	cmd.Flags().BoolVar(&rotate, "rotate-issuing", false, "make a new issuing CA; every node gets a new leaf by itself")
	return cmd
}

// updateAutolock is "swarm update" where --autolock was given; request has what else is to change.
func (c *cli) updateAutolock(ctx context.Context, d *daemon, request *api.UpdateClusterRequest, on bool) error {
	now, err := d.cluster(ctx)
	if err != nil {
		return err
	}
	request.Autolock = &on
	if !on {
		reply, err := d.control.UpdateCluster(ctx, request)
		if err != nil {
			return err
		}
		c.changed(reply)
		lines := []string{"Swarm updated."}
		if now.GetAutolock() {
			lines = append(lines, "Managers write their keys in clear: from now on their disks open by themselves, to whoever has them.",
				"A manager that is down now needs unlock key "+now.GetUnlockKeyId()+" once more, and so do disks copied before.")
		}
		_, err = fmt.Fprintln(c.stdout, strings.Join(lines, "\n"))
		return writeFailed(err)
	}
	err = c.withNewKey(ctx, d, func(recipient []byte) error {
		request.UnlockRecipient = recipient
		_, err := d.control.UpdateCluster(ctx, request)
		return err
	}, d.hasKey, func(id string, key []byte) error {
		fmt.Fprintln(c.stdout, "Swarm updated.")
		return writeNewKey(c.stdout, id, key)
	})
	if err != nil {
		return err
	}
	return c.awaitResealed(ctx, d, "", false)
}
