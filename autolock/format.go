package autolock

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"maps"
	"slices"
	"strconv"

	"warden"
)

// A key file is a sequence of PEM blocks in this order, and nothing else:
//
//	WARDEN KEY FILE          header: Version, Cluster, Node, Role; if sealed: Recipient, Key-Id; where not 0: Lock-Generation, Dek-Generation
//	CERTIFICATE …            leaf, issuing, root
//	PRIVATE KEY              not sealed: PKCS #8
//	WARDEN DEK               not sealed, managers: Tink keyset; headers Cluster, Node
//	WARDEN SEALED IDENTITY   sealed: anonymous box of both
//	WARDEN DIGEST            SHA-256 of all that is before it: finds damage, stops no attacker
const (
	blockHeader = "WARDEN KEY FILE"
	blockCert   = "CERTIFICATE"
	blockKey    = "PRIVATE KEY"
	blockDEK    = "WARDEN DEK"
	blockSealed = "WARDEN SEALED IDENTITY"
	blockDigest = "WARDEN DIGEST"

	version = "1"

	headerLock = "Lock-Generation"
	headerDEK  = "Dek-Generation"
)

const opParse = "parsing"

// formatKeyFile returns the file's bytes. The caller wipes them. Errors: CodeInvalid, CodeForeign.
func formatKeyFile(id Identity, to *Recipient) ([]byte, error) {
	if to != nil && id.Role != roleManager {
		return nil, warden.Errorf(warden.CodeInvalid, "formatting", "the file of a %s is never sealed", id.Role)
	}
	blocks := []*pem.Block{{Type: blockHeader, Headers: headers(id, to)}}
	for _, cert := range id.Chain {
		blocks = append(blocks, &pem.Block{Type: blockCert, Bytes: cert})
	}
	var file []byte
	err := keysOf(id, func(nodeKey, dek []byte) error {
		checked, err := withKeys(id, nodeKey, dek) // never write what would stop the next start
		checked.Key.Wipe()
		if err != nil {
			return err
		}
		switch {
		case to != nil:
			sealed, err := seal(id, nodeKey, dek, *to)
			if err != nil {
				return err
			}
			blocks = append(blocks, &pem.Block{Type: blockSealed, Bytes: sealed})
		case id.Role == roleManager:
			blocks = append(blocks, &pem.Block{Type: blockKey, Bytes: nodeKey}, &pem.Block{Type: blockDEK, Headers: dekHeaders(id), Bytes: dek})
		default:
			blocks = append(blocks, &pem.Block{Type: blockKey, Bytes: nodeKey})
		}
		file = encode(blocks)
		return nil
	})
	if warden.CodeOf(err) == warden.CodeCorrupt {
		err = warden.Recode(warden.CodeInvalid, "", err) // it is the caller's, not a file's
	}
	if err != nil {
		return nil, err
	}
	file = append(file, digest(file)...)
	if len(file) > warden.KeyFileMax {
		return nil, warden.Errorf(warden.CodeInvalid, "formatting", "%d bytes, at most %d", len(file), warden.KeyFileMax)
	}
	return file, nil
}

// ParseKeyFile reads the bytes of a key file; ReadKeyFile does so from disk. It does not keep data. Only what WriteKeyFile
// would write is accepted: no other spelling of a block, no block twice, none unknown, nothing between or behind them.
// Errors: CodeCorrupt, CodeForeign, CodeUnsupported.
func ParseKeyFile(data []byte) (*KeyFile, error) {
	blocks, err := decode(data)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, b := range blocks {
			if b.Type == blockKey || b.Type == blockDEK {
				clear(b.Bytes)
			}
		}
	}()
	head, blocks := blocks[0], blocks[1:]
	id := Identity{ClusterID: head.Headers["Cluster"], NodeID: head.Headers["Node"], Role: head.Headers["Role"]}
	id.LockGeneration, _ = strconv.ParseUint(head.Headers[headerLock], 10, 64) // another spelling, or none, is found below
	id.DEKGeneration, _ = strconv.ParseUint(head.Headers[headerDEK], 10, 64)
	var to *Recipient
	if text, sealed := head.Headers["Recipient"]; sealed {
		public, err := warden.ParseBase36(text, keySize, keyWidth)
		if err != nil {
			return nil, warden.Errorf(warden.CodeCorrupt, opParse, "the recipient does not parse")
		}
		to = (*Recipient)(public)
	}
	if !maps.Equal(head.Headers, headers(id, to)) || len(head.Bytes) != 0 {
		return nil, warden.Errorf(warden.CodeCorrupt, opParse, "the header does not parse")
	}
	for len(blocks) > 0 && blocks[0].Type == blockCert && len(blocks[0].Headers) == 0 {
		id.Chain = append(id.Chain, blocks[0].Bytes)
		blocks = blocks[1:]
	}
	if _, err := checkClear(id); err != nil {
		return nil, err
	}
	file := &KeyFile{ClusterID: id.ClusterID, NodeID: id.NodeID, Role: id.Role, Chain: id.Chain, identity: id}
	switch {
	case to != nil && id.Role == roleManager && are(blocks, blockSealed):
		file.Locked, file.KeyID, file.recipient, file.box = true, to.KeyID(), *to, blocks[0].Bytes
		return file, nil
	case to == nil && id.Role == roleManager && are(blocks, blockKey, blockDEK):
		if !maps.Equal(blocks[1].Headers, dekHeaders(id)) {
			return nil, warden.Errorf(warden.CodeForeign, opParse, "the DEK belongs to another node")
		}
		file.identity, err = withKeys(id, blocks[0].Bytes, blocks[1].Bytes)
	case to == nil && id.Role == roleWorker && are(blocks, blockKey):
		file.identity, err = withKeys(id, blocks[0].Bytes, nil)
	default:
		return nil, warden.Errorf(warden.CodeCorrupt, opParse, "it has not the blocks that the file of a %s has", id.Role)
	}
	if err != nil {
		return nil, err
	}
	return file, nil
}

// headers returns the headers of the first block.
func headers(id Identity, to *Recipient) map[string]string {
	h := map[string]string{"Version": version, "Cluster": id.ClusterID, "Node": id.NodeID, "Role": id.Role}
	if to != nil {
		h["Recipient"], h["Key-Id"] = warden.Base36(to[:], keyWidth), to.KeyID()
	}
	for name, generation := range map[string]uint64{headerLock: id.LockGeneration, headerDEK: id.DEKGeneration} {
		if generation != 0 {
			h[name] = strconv.FormatUint(generation, 10)
		}
	}
	return h
}

func dekHeaders(id Identity) map[string]string {
	return map[string]string{"Cluster": id.ClusterID, "Node": id.NodeID}
}

// are reports whether blocks have exactly these types, and no headers but the DEK's.
func are(blocks []*pem.Block, types ...string) bool {
	return slices.EqualFunc(blocks, types, func(b *pem.Block, t string) bool {
		return b.Type == t && (len(b.Headers) == 0 || t == blockDEK)
	})
}

// decode returns the blocks of a file without the last, the digest, which it checks: at least one. Errors: CodeCorrupt,
// CodeUnsupported.
func decode(data []byte) ([]*pem.Block, error) {
	if len(data) > warden.KeyFileMax {
		return nil, warden.Errorf(warden.CodeCorrupt, opParse, "%d bytes, at most %d", len(data), warden.KeyFileMax)
	}
	var blocks []*pem.Block
	for rest := data; len(rest) > 0; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return nil, warden.Errorf(warden.CodeCorrupt, opParse, "after PEM block %d comes something else than a key file has", len(blocks))
		}
		blocks = append(blocks, b)
	}
	if len(blocks) < 2 || blocks[0].Type != blockHeader {
		return nil, warden.Errorf(warden.CodeCorrupt, opParse, "it does not begin as a key file does")
	}
	if v := blocks[0].Headers["Version"]; v != version {
		return nil, warden.Hint(warden.Errorf(warden.CodeUnsupported, opParse, "its version is %.20q, this Warden reads %q", v, version),
			"run the version of Warden that wrote it, or a newer one")
	}
	encoded := encode(blocks)
	canonical := bytes.Equal(encoded, data) // pem.Decode is lenient
	clear(encoded)
	if !canonical {
		return nil, warden.Errorf(warden.CodeCorrupt, opParse, "it is damaged, or was edited: not in the form in which it is written")
	}
	body, last := blocks[:len(blocks)-1], blocks[len(blocks)-1]
	if last.Type != blockDigest {
		return nil, warden.Errorf(warden.CodeCorrupt, opParse, "its end is missing")
	}
	before := data[:len(data)-len(encode([]*pem.Block{last}))]
	if !bytes.Equal(digest(before), data[len(before):]) {
		return nil, warden.Errorf(warden.CodeCorrupt, opParse, "its digest does not fit: it is damaged, or was edited")
	}
	return body, nil
}

// encode is the inverse of pem.Decode, in the one spelling that a key file has.
func encode(blocks []*pem.Block) []byte {
	var out bytes.Buffer
	for _, b := range blocks {
		_ = pem.Encode(&out, b) // fails for a header with a colon only, and then decode does not find its input again
	}
	return out.Bytes()
}

// digest returns the last block of a file that has before in front of it.
func digest(before []byte) []byte {
	sum := sha256.Sum256(before)
	return pem.EncodeToMemory(&pem.Block{Type: blockDigest, Bytes: sum[:]})
}
