package tmpfsmount_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"warden"
	"warden/internal/leaktest"
	"warden/internal/sensitive"
	"warden/tmpfsmount"
)

// holderVerb makes the test binary a process in a mount namespace of its own: it attaches the mount that it inherits, then
// answers each line on its standard input.
const holderVerb = "test-holder"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == holderVerb {
		if err := hold(os.Args[2]); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	leaktest.Main(m)
}

func hold(target string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := tmpfsmount.Attach(os.NewFile(3, "mount"), target); err != nil {
		return err
	}
	held, err := os.Open(filepath.Join(target, "name"))
	if err != nil {
		return err
	}
	fmt.Println("attached")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch lines.Text() {
		case "read":
			b, err := os.ReadFile(filepath.Join(target, "name"))
			fmt.Printf("%s %v\n", b, err)
		case "held":
			b, err := io.ReadAll(io.NewSectionReader(held, 0, 100))
			fmt.Printf("%s %v\n", b, err)
		case "write":
			fmt.Println(os.WriteFile(filepath.Join(target, "name"), nil, 0o600))
		case "mounts":
			b, _ := os.ReadFile("/proc/self/mountinfo")
			fmt.Println(strings.Count(string(b), " "+target+" "))
		}
	}
	return nil
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

func file(name, value string) tmpfsmount.File {
	return tmpfsmount.File{Name: name, UID: 100_001, GID: 100_002, Mode: 0o440, Data: sensitive.New([]byte(value))}
}

func plan(t *testing.T, files ...tmpfsmount.File) tmpfsmount.Plan {
	t.Helper()
	p, err := tmpfsmount.NewPlan(files)
	if err != nil {
		t.Fatalf("NewPlan() = %v", err)
	}
	return p
}

func TestNewPlan(t *testing.T) {
	sized := func(name string, n int) tmpfsmount.File {
		return tmpfsmount.File{Name: name, Mode: 0o400, Data: sensitive.New(make([]byte, n))}
	}
	var many, heavy []tmpfsmount.File
	for i := range warden.SecretRefsMax + 1 {
		many = append(many, sized(fmt.Sprint("f", i), 1))
	}
	for i := range warden.TaskSecretsMax/warden.SecretBytesMax + 1 {
		heavy = append(heavy, sized(fmt.Sprint("f", i), warden.SecretBytesMax))
	}
	mode := sized("a", 1)
	mode.Mode = 0o1000
	for name, c := range map[string]struct {
		files []tmpfsmount.File
		want  warden.Code
	}{
		"none":         {nil, ""},
		"one":          {[]tmpfsmount.File{sized("a", 1)}, ""},
		"empty value":  {[]tmpfsmount.File{sized("a", 0)}, ""},
		"largest":      {[]tmpfsmount.File{sized("a", warden.SecretBytesMax)}, ""},
		"too large":    {[]tmpfsmount.File{sized("a", warden.SecretBytesMax+1)}, warden.CodeTooLarge},
		"most":         {many[:warden.SecretRefsMax], ""},
		"too many":     {many, warden.CodeTooLarge},
		"too heavy":    {heavy, warden.CodeTooLarge},
		"twice":        {[]tmpfsmount.File{sized("a", 1), sized("a", 1)}, warden.CodeInvalid},
		"special mode": {[]tmpfsmount.File{mode}, warden.CodeInvalid},
		"bad name":     {[]tmpfsmount.File{sized("a/b", 1)}, warden.CodeInvalid},
	} {
		if _, err := tmpfsmount.NewPlan(c.files); warden.CodeOf(err) != c.want {
			t.Errorf("NewPlan(%s) = %v, want code %q", name, err, c.want)
		}
	}
}

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "tls.key": true, ".hidden": true, "A_b-9": true, strings.Repeat("a", tmpfsmount.NameMax): true,
		"": false, ".": false, "..": false, "...": true, "a/b": false, "/a": false, "a\x00": false, "a b": false, "a\n": false, "ä": false,
		strings.Repeat("a", tmpfsmount.NameMax+1): false,
	} {
		if err := tmpfsmount.CheckName(name); (err == nil) != ok {
			t.Errorf("CheckName(%q) = %v", name, err)
		} else if err != nil && (warden.CodeOf(err) != warden.CodeInvalid || warden.HintOf(err) == "") {
			t.Errorf("CheckName(%q) = %v, without code or hint", name, err)
		}
	}
}

func TestBounds(t *testing.T) {
	for _, c := range []struct {
		values        []string
		bytes, inodes int64
	}{
		{nil, 4096, 1}, {[]string{""}, 4096, 2}, {[]string{"x"}, 4096, 2}, {[]string{strings.Repeat("x", 4097), "y"}, 12288, 3},
	} {
		var files []tmpfsmount.File
		for i, v := range c.values {
			files = append(files, file(fmt.Sprint("f", i), v))
		}
		if bytes, inodes := plan(t, files...).Bounds(4096); bytes != c.bytes || inodes != c.inodes {
			t.Errorf("Bounds() of %d files = %d, %d, want %d, %d", len(files), bytes, inodes, c.bytes, c.inodes)
		}
	}
}

// check looks at a filled mount: content, owner, mode, and that nothing can be changed.
func check(t *testing.T, dir, value string) {
	t.Helper()
	var s unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "name"), &s); err != nil || s.Uid != 100_001 || s.Gid != 100_002 || s.Mode != unix.S_IFREG|0o440 {
		t.Errorf("file = uid %d, gid %d, mode %#o, %v", s.Uid, s.Gid, s.Mode, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "name")); err != nil || string(b) != value {
		t.Errorf("file = %q, %v, want %q", b, err, value)
	}
	if err := os.WriteFile(filepath.Join(dir, "name"), nil, 0); err == nil {
		t.Error("the file can be written")
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); err == nil {
		t.Error("a file can be added")
	}
	var fs unix.Statfs_t
	const want = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
	if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC || fs.Flags&want != want {
		t.Errorf("mount = type %#x, flags %#x, %v", fs.Type, fs.Flags, err)
	}
}

func TestFill(t *testing.T) {
	needsRoot(t)
	dir := t.TempDir()
	if err := tmpfsmount.Fill(plan(t, file("name", "value")), dir); err != nil {
		t.Fatal(err)
	}
	check(t, dir, "value")
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := tmpfsmount.Fill(plan(t), filepath.Join(dir, "none")); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("Fill(no such directory) = %v", err)
	}
	wiped := file("name", "value")
	wiped.Data.Wipe() // which is refused, not an empty file
	if err := tmpfsmount.Fill(plan(t, wiped), dir); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("Fill(wiped value) = %v", err)
	}
	if err := unix.Unmount(dir, 0); err != unix.EINVAL {
		t.Errorf("Fill(wiped value) left a mount: Unmount() = %v", err)
	}
}

func TestBuildHasNoPath(t *testing.T) {
	needsRoot(t)
	if tmpfsmount.Probe() != tmpfsmount.Detached {
		t.Skip("this kernel cannot build detached mounts")
	}
	m, err := tmpfsmount.Build(plan(t, file("name", "value")))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var s unix.Stat_t
	if err := unix.Fstat(int(m.Fd()), &s); err != nil {
		t.Fatal(err)
	}
	device := fmt.Sprintf(" %d:%d ", unix.Major(s.Dev), unix.Minor(s.Dev)) // others on this machine mount, too
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), device) {
		t.Errorf("the mount of device%sshows on the host, %v:\n%s", device, err, mounts)
	}
	check(t, fmt.Sprintf("/proc/self/fd/%d", m.Fd()), "value")
}

// TestReplace: one process sees the mount, before and after its replacement; this one never does.
func TestReplace(t *testing.T) {
	needsRoot(t)
	if tmpfsmount.Probe() != tmpfsmount.Detached {
		t.Skip("this kernel cannot build detached mounts")
	}
	target := t.TempDir()
	m, err := tmpfsmount.Build(plan(t, file("name", "old")))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", holderVerb, target)
	cmd.ExtraFiles = []*os.File{m}
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, PidFD: &pidfd}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.Close()
	defer unix.Close(pidfd)
	answers := bufio.NewScanner(out)
	ask := func(question, want string) {
		t.Helper()
		if question != "" {
			fmt.Fprintln(in, question)
		}
		if answers.Scan(); answers.Text() != want {
			t.Fatalf("%q answered %q, want %q", question, answers.Text(), want)
		}
	}
	ask("", "attached")
	ask("read", "old <nil>")
	here, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	value := ""
	for _, value = range []string{"new", "newer"} {
		if err := tmpfsmount.Replace(pidfd, target, plan(t, file("name", value))); err != nil {
			t.Fatalf("Replace() = %v", err)
		}
		ask("read", value+" <nil>")
	}
	for range 300 { // on whichever thread
		if err := tmpfsmount.Replace(pidfd, target, plan(t, file("name", value))); err != nil {
			t.Fatalf("Replace() = %v", err)
		}
	}
	if ns, err := os.Readlink("/proc/self/ns/mnt"); err != nil || ns != here { // the main thread's, which never ends
		t.Errorf("after Replace() this process is in the mount namespace %s, %v, want %s", ns, err, here)
	}
	ask("held", "old <nil>")
	ask("write", "open "+filepath.Join(target, "name")+": read-only file system")
	ask("mounts", "1")
	if err := tmpfsmount.Replace(pidfd, filepath.Join(target, "none"), plan(t)); warden.CodeOf(err) != warden.CodeInternal {
		t.Errorf("Replace(no such directory) = %v", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if err := tmpfsmount.Replace(pidfd, link, plan(t, file("name", "stray"))); !errors.Is(err, unix.ELOOP) {
		t.Errorf("Replace(through a link) = %v, want %v", err, unix.ELOOP)
	}
	ask("read", "newer <nil>")
	if entries, err := os.ReadDir(target); err != nil || len(entries) != 0 {
		t.Errorf("the host sees %v, %v", entries, err)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
