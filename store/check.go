package store

import (
	"warden"
	"warden/api"
)

// checkCommand checks what every command needs, whatever it does.
func checkCommand(c *api.Command) error {
	const op = "checking a command"
	switch id := c.GetRequestId(); {
	case id == "" || len(id) > warden.RequestIDMax:
		return warden.Errorf(warden.CodeInvalid, op, "want a request ID of 1 to %d bytes", warden.RequestIDMax)
	case len(c.GetOperations()) > warden.CommandOpsMax:
		return warden.Errorf(warden.CodeTooLarge, op, "%d operations, at most %d", len(c.GetOperations()), warden.CommandOpsMax)
	}
	switch c.GetActor().GetKind() {
	case "uid", "node", "operator", "system":
	default:
		return warden.Errorf(warden.CodeInvalid, op, "want an actor of a known kind")
	}
	return nil
}

// clip shortens what a message quotes.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
