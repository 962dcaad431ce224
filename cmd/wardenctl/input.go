package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"warden"
)

// readSecret reads a secret text or value of at most limit bytes from the file at path, or from standard input where path is
// "-": without echo after the prompt if that is a terminal. Errors: CodeTooLarge, CodeNotFound, CodeInvalid. The bytes are never part of an error.
func (c *cli) readSecret(ctx context.Context, what, path string, limit int) ([]byte, error) {
	op := "reading the " + what
	if path == "-" {
		if file := c.terminal(); file != nil {
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

// terminal returns standard input where that is a terminal, else nil.
func (c *cli) terminal() *os.File {
	if file, ok := c.stdin.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return file
	}
	return nil
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

// prompt asks on a terminal without echo, and gives the echo back before it returns. Interrupted, its reading goroutine ends with
// the process or when the file is closed.
func (c *cli) prompt(ctx context.Context, what string, file *os.File, limit int) ([]byte, error) {
	op := "reading the " + what
	before, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	if err != nil {
		return nil, warden.Errorf(warden.CodeInternal, op, "preparing the terminal: %w", err)
	}
	quiet := *before
	quiet.Lflag &^= unix.ECHO
	quiet.Lflag |= unix.ICANON | unix.ISIG
	quiet.Iflag |= unix.ICRNL
	if err := unix.IoctlSetTermios(int(file.Fd()), unix.TCSETS, &quiet); err != nil {
		return nil, warden.Errorf(warden.CodeInternal, op, "preparing the terminal: %w", err)
	}
	defer func() {
		unix.IoctlSetTermios(int(file.Fd()), unix.TCSETS, before)
		fmt.Fprintln(c.stderr)
	}()
	fmt.Fprintf(c.stderr, "%s: ", title(what))
	type answer struct {
		line []byte
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		line, err := readLine(file, limit)
		answers <- answer{line, err}
	}()
	select {
	case <-ctx.Done():
		return nil, warden.Errorf(warden.CodeUnavailable, op, "interrupted")
	case a := <-answers:
		if a.err != nil {
			return nil, warden.Errorf(warden.CodeInvalid, op, "%w", a.err)
		}
		return readLimited(op, bytes.NewReader(a.line), limit)
	}
}

// readLine returns one line without its end; of one that is longer than limit only the first limit+1 bytes.
func readLine(r io.Reader, limit int) ([]byte, error) {
	var line []byte
	for b := make([]byte, 1); len(line) <= limit; {
		n, err := r.Read(b)
		if n == 1 && b[0] != '\n' {
			line = append(line, b[0])
			continue
		}
		if n == 1 || errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return line, nil
}
