package durable

// fault is what SetFault was given; guarded by writing.
var fault func(point string) error

// SetFault is for tests: until undo, f is called before and after each step of every WriteFile ("before create", "after
// create", … chmod, write, sync, rename, sync directory). An error of f acts as a crash at that point: WriteFile returns
// it at once and cleans nothing up. f must not call WriteFile.
func SetFault(f func(point string) error) (undo func()) {
	writing.Lock()
	defer writing.Unlock()
	fault = f
	return func() {
		writing.Lock()
		defer writing.Unlock()
		fault = nil
	}
}

// crash is called with writing held.
func crash(point string) error {
	if fault == nil {
		return nil
	}
	return fault(point)
}
