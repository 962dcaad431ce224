package join

import (
	"net"
	"net/netip"
	"regexp"
	"strconv"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/tokens"
)

var (
	hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$`)
	versionPattern  = regexp.MustCompile(`^[A-Za-z0-9.+_~-]*$`)
)

// ParseRequest reads a JoinRequest from a frame's body, strictly: no unknown fields, every field within its bounds and
// charset. The CSR is bounded here and judged by package ca, after the proof. Errors: CodeInvalid, CodeTooLarge. Pure.
func ParseRequest(body []byte) (*api.JoinRequest, error) {
	const op = "parsing join request"
	bad := func(what string) (*api.JoinRequest, error) {
		return nil, warden.Errorf(warden.CodeInvalid, op, "%s", what)
	}
	if len(body) > warden.JoinFrameMax {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "%d bytes, at most %d are allowed", len(body), warden.JoinFrameMax)
	}
	r := new(api.JoinRequest)
	if err := proto.Unmarshal(body, r); err != nil {
		return bad("it is not a JoinRequest")
	}
	switch {
	case len(r.ProtoReflect().GetUnknown()) != 0:
		return bad("it has unknown fields")
	case !tokens.ValidID(r.TokenId):
		return bad("the token ID is malformed")
	case len(r.Csr) == 0:
		return bad("there is no CSR")
	case len(r.Csr) > warden.CSRBytesMax:
		return nil, warden.Errorf(warden.CodeTooLarge, op, "a CSR of %d bytes, at most %d are allowed", len(r.Csr), warden.CSRBytesMax)
	case len(r.Proof) != proofSize:
		return bad("the proof is malformed")
	case len(r.Hostname) > warden.HostnameMax || !hostnamePattern.MatchString(r.Hostname):
		return bad("the host name is malformed")
	case len(r.Version) > versionMax || !versionPattern.MatchString(r.Version):
		return bad("the version is malformed")
	}
	switch r.Availability {
	case api.Availability_AVAILABILITY_UNSPECIFIED, api.Availability_AVAILABILITY_ACTIVE, api.Availability_AVAILABILITY_PAUSE, api.Availability_AVAILABILITY_DRAIN:
	default:
		return bad("the availability is unknown")
	}
	if r.Advertise != "" {
		if _, err := Advertised(r.Advertise, netip.IPv6Loopback()); err != nil {
			return nil, warden.Wrap(op, err)
		}
	}
	return r, nil
}

// Advertised returns the address at which a manager says that it can be reached: "host:port", where ":port" stands for the
// address from which its connection came. Errors: CodeInvalid with a hint. Pure.
func Advertised(advertise string, from netip.Addr) (string, error) {
	bad := func(what string) (string, error) {
		return "", warden.Hint(warden.Errorf(warden.CodeInvalid, "checking the advertised address", "%s", what),
			"give --advertise-addr as host:port or :port, where other nodes can reach this manager")
	}
	if len(advertise) > advertiseMax {
		return bad("it is too long")
	}
	host, port, err := net.SplitHostPort(advertise)
	if err != nil {
		return bad("it is not host:port")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return bad("the port is not 1 to 65535")
	}
	if host == "" {
		if !from.IsValid() {
			return bad("the address that the connection comes from is not known")
		}
		return net.JoinHostPort(from.String(), port), nil
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "" || ip.Is4In6() {
			return bad("nobody can connect to " + ip.String())
		}
		return net.JoinHostPort(ip.String(), port), nil
	}
	if len(host) > warden.HostnameMax || !hostnamePattern.MatchString(host) {
		return bad("the host name is malformed")
	}
	return advertise, nil
}
