package rafttransport

// BoundCalls sets how many bytes a call may have, before the first Serve.
func (t *Transport) BoundCalls(bytes int64) { t.callMax = bytes }
