package confine

import (
	"encoding/binary"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Foreign reports whether the program at path is a 32-bit one of this machine, all of whose calls the filter answers with SIGSYS. A file
// that cannot be read is not said to be foreign, and neither is a script.
func Foreign(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // it may be a FIFO
	if err != nil {
		return false
	}
	defer f.Close()
	const class, class32, machine = 4, 1, 18 // offsets in the header of elf(5), and ELFCLASS32
	var header [20]byte
	if _, err := io.ReadFull(f, header[:]); err != nil || string(header[:class]) != "\x7fELF" || header[class] != class32 {
		return false
	}
	return slices.Contains(foreignMachines, binary.LittleEndian.Uint16(header[machine:]))
}
