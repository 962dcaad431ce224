// Package autolock keeps a node's keys on its disk: the key file (identity/node.key), the manager's DEK, and the unlock key
// under which both are sealed when the cluster is autolocked.
//
// The unlock key is asymmetric (X25519): a manager seals its own keys to the public half (anonymous nacl/box), so that it can
// join, renew or be sealed again without anyone holding the private half, which is kept nowhere. An anonymous box proves
// neither who made it nor what for; the boxed plaintext therefore carries purpose, cluster, node, role, key ID, recipient and the
// hashes of the certificates, and Unlock checks all of them against the clear part.
//
// The package does not verify certificate chains (package ca does), does not choose the recipient (it comes from sealed
// state only, never from a file in clear), does not open logs, and cannot see a disk that was rolled back as a whole. Who can
// write to a manager's state directory while it is down can replace the whole file by one of their own making: its leaf is
// then not the recorded one, and its DEK opens none of the log.
//
// Invariants: a key file is one file of mode 0600, replaced in one step; in a sealed one nothing secret is readable (I8, I9);
// blocks of two nodes never mix; what WriteKeyFile would not write is refused with the file's name and a remedy; no key
// prints (I10).
//
// It trusts the file system for the mode and for fsync, crypto/rand, Tink and golang.org/x/crypto/nacl/box. References: RFC
// 7748 (X25519), libsodium's sealed boxes (https://doc.libsodium.org/public-key_cryptography/sealed_boxes), RFC 7468 (PEM),
// RFC 5958 (PKCS #8).
package autolock
