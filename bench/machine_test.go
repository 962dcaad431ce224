package bench

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/mlkem"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkMachine measures what the other benchmarks cannot beat here: one ECDSA signature and one verification with P-256
// (leaves, handshakes), a key exchange by X25519MLKEM768, both ends of it, one write of 4 KiB with its fsync (commits), and one
// byte there and back over TCP on loopback.
func BenchmarkMachine(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	sum := sha256.Sum256([]byte("warden"))
	b.Run("sign", func(b *testing.B) {
		for b.Loop() {
			if _, err := ecdsa.SignASN1(rand.Reader, key, sum[:]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("verify", func(b *testing.B) {
		sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if !ecdsa.VerifyASN1(&key.PublicKey, sum[:], sig) {
				b.Fatal("not verified")
			}
		}
	})
	b.Run("exchange", func(b *testing.B) {
		for b.Loop() {
			client, server := must[*ecdh.PrivateKey](b)(ecdh.X25519().GenerateKey(rand.Reader)), must[*ecdh.PrivateKey](b)(ecdh.X25519().GenerateKey(rand.Reader))
			kem := must[*mlkem.DecapsulationKey768](b)(mlkem.GenerateKey768())
			public := must[*mlkem.EncapsulationKey768](b)(mlkem.NewEncapsulationKey768(kem.EncapsulationKey().Bytes()))
			_, sealed := public.Encapsulate()
			must[[]byte](b)(kem.Decapsulate(sealed))
			must[[]byte](b)(client.ECDH(server.PublicKey()))
			must[[]byte](b)(server.ECDH(client.PublicKey()))
		}
	})
	b.Run("fsync", func(b *testing.B) { // the file has its size before, as a log's has
		const block, blocks = 4096, 1024
		f, err := os.Create(filepath.Join(b.TempDir(), "f"))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(make([]byte, block*blocks)); err != nil {
			b.Fatal(err)
		}
		data, i := make([]byte, block), int64(0)
		for b.Loop() {
			if _, err := f.WriteAt(data, i%blocks*block); err != nil {
				b.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
			i++
		}
	})
	b.Run("loopback", func(b *testing.B) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		go func() {
			if c, err := l.Accept(); err == nil {
				defer c.Close()
				io.Copy(c, c)
			}
		}()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		one := make([]byte, 1)
		for b.Loop() {
			if _, err := c.Write(one); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, one); err != nil {
				b.Fatal(err)
			}
		}
	})
}
