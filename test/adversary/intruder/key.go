package main

import (
	"crypto/tls"
	"crypto/x509"
	"log"
)

func certificate(k Key) tls.Certificate {
	key, err := x509.ParsePKCS8PrivateKey(k.Key)
	if err != nil {
		log.Fatal(err)
	}
	return tls.Certificate{Certificate: k.Chain, PrivateKey: key}
}
