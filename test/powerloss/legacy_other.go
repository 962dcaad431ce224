//go:build !amd64

package powerloss

// legacy decodes nothing: other machines never had the older form of a call.
func (tr *Tracer) legacy(int, info) func(int64) { return nil }
