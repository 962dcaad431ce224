package dispatcher

import (
	"sync"

	"warden/internal/sensitive"
)

// vault opens secret versions for the sessions that are sending them right now: what several send at once is opened once, and
// wiped when the last of them has sent it. Safe for concurrent use.
type vault struct {
	unseal func(secretID string, version uint64) (sensitive.Bytes, error)

	mu   sync.Mutex // guards open; held while a version is opened, so that nobody opens it twice
	held map[version]*opened
}

type opened struct {
	value sensitive.Bytes
	bytes []byte // of value
	users int
}

func newVault(unseal func(string, uint64) (sensitive.Bytes, error)) *vault {
	return &vault{unseal: unseal, held: map[version]*opened{}}
}

// open returns the version's value, which stays whole until the caller releases it, and must not be changed.
func (v *vault) open(ver version) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	o := v.held[ver]
	if o == nil {
		value, err := v.unseal(ver.secretID, ver.number)
		if err != nil {
			return nil, err
		}
		o = &opened{value: value}
		if err := value.Use(func(b []byte) error { o.bytes = b; return nil }); err != nil {
			return nil, err
		}
		v.held[ver] = o
	}
	o.users++
	return o.bytes, nil
}

// release is the end of one use of each.
func (v *vault) release(versions []version) {
	if len(versions) == 0 {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, ver := range versions {
		o := v.held[ver]
		if o.users--; o.users == 0 {
			o.value.Wipe()
			delete(v.held, ver)
		}
	}
}
