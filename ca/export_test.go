package ca

// ForgetIssuers makes Verify judge as in a new process.
func ForgetIssuers() {
	knownIssuers.mu.Lock()
	defer knownIssuers.mu.Unlock()
	knownIssuers.known = nil
}

// KnownIssuers returns how many are remembered.
func KnownIssuers() int {
	knownIssuers.mu.RLock()
	defer knownIssuers.mu.RUnlock()
	return len(knownIssuers.known)
}
