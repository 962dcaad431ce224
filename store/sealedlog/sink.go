package sealedlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/streamingaead"

	"warden"
)

// sink writes one snapshot. Like every raft.SnapshotSink it is not for concurrent use.
type sink struct {
	sn   *Snapshots
	meta meta
	key  *keyset.Handle // of the body; wrapped only when the metadata is sealed, under the key that is primary then
	file *os.File
	enc  io.WriteCloser
	err  error // the first failure; what follows it fails alike
	done bool  // closed or cancelled
}

func (s *sink) dir() string { return filepath.Join(s.sn.dir, s.meta.ID+tmpSuffix) }

// start makes the directory, the key and the body's file.
func (s *sink) start() (err error) {
	if s.meta.ID, err = s.sn.makeTmp(s.meta.Term, s.meta.Index); err != nil {
		return err
	}
	if s.key, err = keyset.NewHandle(streamingaead.AES256GCMHKDF1MBKeyTemplate()); err != nil {
		return err
	}
	key, err := streamingaead.New(s.key)
	if err != nil {
		return err
	}
	if s.file, err = os.OpenFile(filepath.Join(s.dir(), stateFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	if s.enc, err = key.NewEncryptingWriter(s.file, s.sn.owner.aad("snapshot body", []byte(s.meta.ID))); err != nil {
		return err
	}
	_, err = s.enc.Write([]byte{bodyFormat})
	return err
}

// ID returns the snapshot's ID.
func (s *sink) ID() string { return s.meta.ID }

// Write adds to the body.
func (s *sink) Write(p []byte) (int, error) {
	if s.done {
		return 0, warden.Errorf(warden.CodeInternal, "writing snapshot "+s.meta.ID, "it is closed")
	}
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.enc.Write(p)
	s.meta.Size += int64(n)
	s.err = warden.Recode(warden.CodeInternal, "writing snapshot "+s.meta.ID, err)
	return n, s.err
}

// Close makes the snapshot durable and puts it in the list. If a Write failed nothing of it stays; if making it durable fails it may
// be in the list or not, but never in part. Another Close returns the same.
func (s *sink) Close() error {
	if s.done {
		return s.err
	}
	s.done = true
	if s.err == nil {
		s.err = warden.Recode(warden.CodeInternal, "closing snapshot "+s.meta.ID, s.finish())
	}
	if s.err != nil {
		s.abandon()
	}
	return s.err
}

// finish ends the body, writes the metadata and publishes both, each durable before the next.
func (s *sink) finish() error {
	if err := errors.Join(s.enc.Close(), s.file.Sync(), s.file.Close()); err != nil {
		return err
	}
	s.sn.mu.Lock() // from the sealing on, so that Reseal sees the snapshot, or it is under the new key
	defer s.sn.mu.Unlock()
	delete(s.sn.open, s.meta.ID)
	clear, err := json.Marshal(s.sn.owner)
	if err != nil {
		return err
	}
	var wrapped bytes.Buffer
	if err := s.key.WriteWithAssociatedData(keyset.NewBinaryWriter(&wrapped), wrapper{s.sn.sealer}, s.sn.owner.aad("snapshot key", []byte(s.meta.ID))); err != nil {
		return err
	}
	s.meta.Key = wrapped.Bytes()
	plain, err := json.Marshal(s.meta)
	if err != nil {
		return err
	}
	sealed, err := s.sn.sealer.Seal(plain, s.sn.owner.aad("snapshot", []byte(s.meta.ID)))
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.dir(), metaFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(append(clear, '\n'), sealed...))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := syncDir(s.dir()); err != nil {
		return err
	}
	return s.sn.publish(s.meta.ID)
}

// Cancel removes what was written. After Close it does nothing.
func (s *sink) Cancel() error {
	if s.done {
		return nil
	}
	s.done = true
	s.err = warden.Errorf(warden.CodeInternal, "closing snapshot "+s.meta.ID, "it was cancelled")
	return s.abandon()
}

func (s *sink) abandon() error {
	if s.meta.ID == "" {
		return nil
	}
	if s.file != nil {
		s.file.Close()
	}
	s.sn.mu.Lock()
	defer s.sn.mu.Unlock()
	delete(s.sn.open, s.meta.ID)
	return warden.Recode(warden.CodeInternal, "removing snapshot "+s.meta.ID, removeTmp(s.dir()))
}
