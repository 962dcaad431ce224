package daemon

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/manager"
)

// How a manager's keys follow the cluster's lock:
//
//	key file with a fresh DEK beside the old one, sealed to the cluster's recipient → the state's sealer uses the fresh one → all
//	that is on disk is sealed anew, and scanned → key file with the fresh DEK alone → the sealer forgets the old one.
//
// The key file is replaced in one step each time, and always opens all that is on disk: killed anywhere, the next start finds the
// old recipient or the new, and goes on. A keyring of more than one key means: not finished.

// lock is how a key file should be sealed.
type lock struct {
	to              *autolock.Recipient // nil: in clear
	generation, dek uint64
}

// lockOf reads a lock state. Errors: CodeInvalid as recipientOf.
func lockOf(l *api.LockState) (lock, error) {
	to, err := recipientOf(l)
	return lock{to, l.GetGeneration(), l.GetDekGeneration()}, err
}

// ahead reports whether the lock is newer than what a key file has followed. One without autolock never is where the file is
// sealed: nothing but the replica's own record has a sealed file written in clear.
func (l lock) ahead(id autolock.Identity, to *autolock.Recipient) bool {
	return (l.generation > id.LockGeneration || l.dek > id.DEKGeneration) && (l.to != nil || to == nil)
}

// misses reports what a key file lacks of the lock: whether it is to be written anew, and whether with a fresh DEK. A DEK
// that was sealed to another recipient, or was in clear, is not good enough for this one. Pure.
func (l lock) misses(id autolock.Identity, to *autolock.Recipient) (file, dek bool) {
	same := (l.to == nil) == (to == nil) && (to == nil || *l.to == *to)
	dek = id.DEKGeneration != l.dek || !same && l.to != nil
	return dek || !same || id.LockGeneration != l.generation, dek
}

// keysMax is how many DEKs a manager keeps while it can't finish a rotation, on a full disk say.
const keysMax = 16

// relocked returns the identity as its key file under the lock will hold it. Errors: CodeTooLarge where it has keysMax DEKs.
func relocked(id autolock.Identity, to *autolock.Recipient, want lock) (autolock.Identity, error) {
	if _, dek := want.misses(id, to); dek {
		if n := id.Keyring.Keys(); n >= keysMax {
			return id, warden.Errorf(warden.CodeTooLarge, "rotating the DEK", "%d rotations before it are not finished", n-1)
		}
		var err error
		if id.Keyring, err = id.Keyring.Rotate(); err != nil {
			return id, err
		}
	}
	id.LockGeneration, id.DEKGeneration = want.generation, want.dek
	return id, nil
}

// errReplaced says that the node was demoted meanwhile: the keys are another manager's than the caller's.
var errReplaced = errors.New("the node's keys were replaced")

// sealed returns the identity and what its state is sealed by.
func (i *identity) sealed() (autolock.Identity, *autolock.Sealer) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.id, i.sealer
}

// changed returns when the keys, or what they are sealed to, last changed.
func (i *identity) changed() time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.held
}

// relock seals the key file as want says: durable when it returns, and the sealer uses what it holds. It reports whether there was
// anything to do. Where want is older than what the file has followed, it is done only if the file last changed at asOf, or before:
// up to then want is known to be the newer word.
func (i *identity) relock(s *autolock.Sealer, want lock, asOf time.Time) (bool, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.sealer != s {
		return false, errReplaced
	}
	if (want.generation < i.id.LockGeneration || want.dek < i.id.DEKGeneration) && i.held.After(asOf) {
		return false, nil
	}
	if file, _ := want.misses(i.id, i.recipient); !file {
		return false, nil
	}
	next, err := relocked(i.id, i.recipient, want)
	if err != nil {
		return false, err
	}
	return true, i.rewrite("sealed", next, want.to)
}

// dropKeys leaves the primary of the keyring alone, which the caller found to be enough. again: it was rotated meanwhile.
func (i *identity) dropKeys(s *autolock.Sealer, of *autolock.Keyring) (again bool, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.sealer != s {
		return false, errReplaced
	}
	if i.id.Keyring != of {
		return true, nil
	}
	next := i.id
	if next.Keyring, err = of.OnlyPrimary(); err != nil {
		return false, err
	}
	return false, i.rewrite("cleaned", next, i.recipient)
}

// rewrite writes the key file, then lets the sealer use what it holds. i.mu is held.
func (i *identity) rewrite(what string, next autolock.Identity, to *autolock.Recipient) error {
	if err := autolock.WriteKeyFile(filepath.Join(i.dir, keyFile), next, to); err != nil {
		return err
	}
	at("after the key file is " + what)
	i.hold(next, to)
	at("after the sealer knows that it is " + what)
	return nil
}

// step is for tests: it is called between the steps of a rotation.
var step func(name string)

func at(name string) {
	if step != nil {
		step(name)
	}
}

// askLock asks the other managers, before this one starts, how its key file must be sealed by now (I9). Where nobody answers it
// stays as it is until the replica says.
func (d *Daemon) askLock(i *identity) {
	_, stale := i.known()
	state := manager.AskPeers(d.ctx, d.managerConfig(i), stale)
	if state == nil {
		return
	}
	want, err := lockOf(state)
	id, sealer := i.sealed()
	if err == nil && want.ahead(id, i.recipient) {
		_, err = i.relock(sealer, want, time.Now())
	}
	if err != nil {
		d.logger.Warn("failed to seal the key file as another manager says", "error", err)
		return
	}
	if id.LockGeneration < want.generation || id.DEKGeneration < want.dek {
		d.logger.Info("sealed the key file as another manager says", "unlock_key_id", state.KeyId, "dek_generation", state.DekGeneration)
	}
}

// lockStatus says how this manager's keys are sealed, against what its replica says of the cluster.
func (d *Daemon) lockStatus(i *identity) manager.LockStatus {
	d.mu.Lock()
	m := d.manager
	d.mu.Unlock()
	i.mu.Lock()
	id, to := i.id, i.recipient
	i.mu.Unlock()
	s := manager.LockStatus{State: manager.LockUnlocked, DEKGeneration: id.DEKGeneration}
	if to != nil {
		s.KeyID = to.KeyID()
	}
	if id.Keyring != nil && id.Keyring.Keys() > 1 {
		s.State = manager.LockResealing
	}
	if m == nil || m.Store().View().Cluster() == nil {
		return s
	}
	c := m.Store().View().Cluster()
	want, err := lockOf(manager.LockStateOf(c))
	if err == nil && !m.Ready() && !want.ahead(id, to) {
		return s
	}
	switch file, dek := want.misses(id, to); {
	case err != nil || file && s.KeyID != c.UnlockKeyId:
		s.State = manager.LockOldKey
	case dek:
		s.State = manager.LockResealing
	}
	return s
}

// Times of a lockKeeper.
const (
	keeperLook       = 200 * time.Millisecond // until the replica has caught up with what the key file has followed
	keeperBackoffMin = time.Second
	keeperBackoffMax = time.Minute
)

// lockKeeper keeps the keys of one running manager as the cluster's record says.
type lockKeeper struct {
	d      *Daemon
	m      *manager.Manager
	i      *identity
	sealer *autolock.Sealer
	cancel context.CancelFunc
	ctx    context.Context
	wake   chan struct{} // capacity 1

	caughtUp func(since time.Time) bool // Manager.CaughtUpSince

	done chan struct{} // closed when run has returned

	mu  sync.Mutex // guards err
	err error      // of the last attempt
}

func newLockKeeper(d *Daemon, m *manager.Manager, i *identity, s *autolock.Sealer) *lockKeeper {
	k := &lockKeeper{d: d, m: m, i: i, sealer: s, wake: make(chan struct{}, 1), done: make(chan struct{}), caughtUp: m.CaughtUpSince}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

// kick has run look again.
func (k *lockKeeper) kick() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// end ends run and waits for it.
func (k *lockKeeper) end() {
	k.cancel()
	<-k.done
}

// trouble says what keeps the keys from following, "" where nothing does.
func (k *lockKeeper) trouble() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err == nil {
		return ""
	}
	return "this manager's keys do not follow the cluster's lock, it tries again: " + k.err.Error()
}

// run follows every change of the cluster's record until end, or until the manager ends. What fails is tried again with back-off, and
// leaves the keys as they are.
func (k *lockKeeper) run() {
	defer close(k.done)
	w := k.m.Store().Watch(api.Kind_KIND_CLUSTER)
	defer w.Close()
	var watching sync.WaitGroup
	defer watching.Wait()
	defer k.cancel()
	watching.Go(func() {
		for {
			if _, err := w.Next(k.ctx); err != nil {
				return
			}
			k.kick()
		}
	})
	backoff := keeperBackoffMin
	for {
		before := k.d.lockStatus(k.i)
		ready := k.m.Ready()
		err := k.follow(ready)
		if errors.Is(err, errReplaced) || k.ctx.Err() != nil {
			return
		}
		k.mu.Lock()
		k.err = err
		k.mu.Unlock()
		if k.d.lockStatus(k.i) != before {
			k.m.LockChanged()
		}
		var again <-chan time.Time
		switch {
		case err != nil:
			k.d.logger.Warn("failed to follow the cluster's lock", "error", err, "retry_within", backoff)
			again, backoff = time.After(backoff), min(2*backoff, keeperBackoffMax)
		case !ready || !k.caughtUp(k.i.changed()):
			again = time.After(keeperLook)
		default:
			backoff = keeperBackoffMin
		}
		select {
		case <-k.ctx.Done():
			return
		case <-k.m.Done():
			return
		case <-k.wake:
		case <-again:
		}
	}
}

// follow takes the keys to where the cluster's record wants them, in as many rounds as rotations come meanwhile. ready: the replica
// has all that the leader had committed at its start, so that its record counts; even where it looks older than what the key file has followed,
// if the replica has caught up since: a renewal may bring a newer lock state before the replica has it.
func (k *lockKeeper) follow(ready bool) error {
	for again := true; again && k.ctx.Err() == nil; {
		again = false
		id, _ := k.i.sealed()
		var asOf time.Time
		if since := k.i.changed(); k.caughtUp(since) { // before the record is read
			asOf = since
		}
		if c := k.m.Store().View().Cluster(); ready && c != nil && (id.Keyring == nil || id.Keyring.Keys() < keysMax) {
			want, err := lockOf(manager.LockStateOf(c))
			if err != nil {
				return err
			}
			changed, err := k.i.relock(k.sealer, want, asOf)
			if err != nil {
				return err
			}
			if changed {
				k.d.logger.Info("sealed the key file as the cluster says", "autolock", c.Autolock, "unlock_key_id", c.UnlockKeyId,
					"lock_generation", c.LockGeneration, "dek_generation", c.DekGeneration)
				k.m.LockChanged()
			}
		}
		id, sealer := k.i.sealed()
		if sealer != k.sealer {
			return errReplaced
		}
		if id.Keyring.Keys() == 1 {
			return nil
		}
		start := time.Now()
		at("before the state is re-sealed")
		if err := k.m.Store().Reseal(k.ctx); err != nil {
			if now, _ := k.i.sealed(); now.Keyring != id.Keyring && warden.CodeOf(err) == warden.CodeConflict {
				again = true // a renewal that came with a newer lock state rotated the DEK meanwhile
				continue
			}
			return err
		}
		at("after the state is re-sealed")
		if n, err := k.m.Store().Stale(); err != nil || n > 0 { // Reseal has scanned: this is for stores that can't
			return warden.Recode(warden.CodeConflict, "re-sealing the state", errors.Join(err, warden.Errorf(warden.CodeConflict, "", "%d records are under an older DEK", n)))
		}
		var err error
		if again, err = k.i.dropKeys(k.sealer, id.Keyring); err != nil {
			return err
		}
		if !again {
			k.d.logger.Info("re-sealed the state: no older DEK opens anything on the disk", "dek_generation", id.DEKGeneration, "took", time.Since(start))
			again = ready // the record may have changed meanwhile
		}
	}
	return nil
}
