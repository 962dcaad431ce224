package door

// Handshakes returns the number of handshakes under way.
func (s *Server) Handshakes() int {
	s.shaking.mu.Lock()
	defer s.shaking.mu.Unlock()
	return s.shaking.order.Len()
}
