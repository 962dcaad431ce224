package tmpfsmount

import (
	"fmt"
	"regexp"
	"slices"

	"warden"
	"warden/internal/sensitive"
)

// NameMax is the longest name of a file on a mount, in bytes.
const NameMax = 128

var namePattern = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// File is one file of a mount. UID and GID are as the host sees them: the caller has translated a task's own.
type File struct {
	Name     string // one path element
	UID, GID uint32
	Mode     uint32 // permission bits
	Data     sensitive.Bytes
}

// Plan is a set of files that fits on a mount. Only NewPlan makes one; the zero value is a mount without files.
type Plan struct {
	files []File
}

// CheckName refuses a name that is not 1 to NameMax characters of A-Z, a-z, 0-9, '.', '_' and '-', or is "." or "..".
// Errors: CodeInvalid. Pure.
func CheckName(name string) error {
	if len(name) > NameMax || !namePattern.MatchString(name) || name == "." || name == ".." {
		return warden.Hint(warden.Errorf(warden.CodeInvalid, "checking the target of a secret", "%.140q is not a file name", name),
			fmt.Sprintf("use 1 to %d characters of A-Z, a-z, 0-9, '.', '_', '-'; the file appears under %s", NameMax, warden.SecretsDir))
	}
	return nil
}

// NewPlan checks names, modes, counts and sizes of files, and returns them as a plan, which shares their Data. Errors:
// CodeInvalid for a bad name or mode and for a name used twice; CodeTooLarge over warden.SecretRefsMax files,
// warden.SecretBytesMax in one or warden.TaskSecretsMax in all. Pure.
func NewPlan(files []File) (Plan, error) {
	const op = "planning a secrets mount"
	if len(files) > warden.SecretRefsMax {
		return Plan{}, warden.Errorf(warden.CodeTooLarge, op, "%d files, at most %d are allowed", len(files), warden.SecretRefsMax)
	}
	seen, total := make(map[string]bool, len(files)), 0
	for _, f := range files {
		if err := CheckName(f.Name); err != nil {
			return Plan{}, warden.Wrap(op, err)
		}
		switch size := f.Data.Len(); {
		case seen[f.Name]:
			return Plan{}, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "two secrets have the target %q", f.Name), "give each secret its own target=")
		case f.Mode&^0o777 != 0:
			return Plan{}, warden.Errorf(warden.CodeInvalid, op, "mode %#o of %q has more than permission bits", f.Mode, f.Name)
		case size > warden.SecretBytesMax:
			return Plan{}, warden.Errorf(warden.CodeTooLarge, op, "%q is over %d bytes", f.Name, warden.SecretBytesMax)
		default:
			seen[f.Name], total = true, total+size
		}
	}
	if total > warden.TaskSecretsMax {
		return Plan{}, warden.Errorf(warden.CodeTooLarge, op, "the files are over %d bytes together", warden.TaskSecretsMax)
	}
	return Plan{files: slices.Clone(files)}, nil
}

// Empty reports whether the plan has no files.
func (p Plan) Empty() bool { return len(p.files) == 0 }

// Bounds returns what the mount may hold at most: each file in whole pages of pageSize bytes (tmpfs counts pages of
// content and nothing else), never 0, which would mean no bound; and one inode per file and one for the root. Pure.
func (p Plan) Bounds(pageSize int64) (bytes, inodes int64) {
	for _, f := range p.files {
		bytes += (int64(f.Data.Len()) + pageSize - 1) / pageSize * pageSize
	}
	return max(bytes, pageSize), int64(len(p.files)) + 1
}
