package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/term"

	"warden"
)

// readSecret reads a secret text or value of at most limit bytes from the file at path, or from standard input where path is
// "-": without echo after the prompt if that is a terminal. Errors: CodeTooLarge, CodeNotFound, CodeInvalid. The bytes are never part of an error.
func (c *cli) readSecret(ctx context.Context, what, path string, limit int) ([]byte, error) {
	op := "reading the " + what
	if path == "-" {
		if file, ok := c.stdin.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
			return c.prompt(ctx, what, file, limit)
		}
		return readLimited(op+" from standard input", c.stdin, limit)
	}
	file, err := os.Open(path)
	if err != nil {
		code := warden.CodeInvalid
		if errors.Is(err, fs.ErrNotExist) {
			code = warden.CodeNotFound
		}
		return nil, warden.Errorf(code, op, "%w", err)
	}
	defer file.Close()
	return readLimited(op+" from "+path, file, limit)
}

func readLimited(op string, r io.Reader, limit int) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, warden.Errorf(warden.CodeInvalid, op, "%w", err)
	}
	if len(data) > limit {
		clear(data)
		return nil, warden.Errorf(warden.CodeTooLarge, op, "it has more than %d bytes", limit)
	}
	return data, nil
}

// prompt asks on a terminal without echo. Interrupted, it gives the terminal its echo back; the reading goroutine then ends with
// the process.
func (c *cli) prompt(ctx context.Context, what string, file *os.File, limit int) ([]byte, error) {
	fd := int(file.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInternal, "preparing the terminal", "%w", err)
	}
	fmt.Fprintf(c.stderr, "%s: ", title(what))
	type answer struct {
		text []byte
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		text, err := term.ReadPassword(fd)
		answers <- answer{text, err}
	}()
	defer fmt.Fprintln(c.stderr)
	select {
	case <-ctx.Done():
		term.Restore(fd, before)
		return nil, warden.Errorf(warden.CodeUnavailable, "reading the "+what, "interrupted")
	case a := <-answers:
		if a.err != nil {
			return nil, warden.Errorf(warden.CodeInvalid, "reading the "+what, "%w", a.err)
		}
		return readLimited("reading the "+what, bytes.NewReader(a.text), limit)
	}
}
