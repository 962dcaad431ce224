package warden

import "time"

// Bounds that several packages share. What concerns one package alone stands beside its use, never above these.
const (
	NameMax            = 63        // characters of a name of a zone, service or secret
	HostnameMax        = 253       // characters
	IDPrefixMin        = 4         // characters of an ID that stand for it: `secret rm db`, said again, must not remove a secret whose ID begins with db
	LabelsMax          = 64        // labels of one object
	LabelKeyMax        = 128       // bytes
	LabelValueMax      = 512       // bytes
	ConstraintsMax     = 32        // of a service
	ConstraintMax      = 256       // bytes
	EnvMax             = 256       // variables of a service
	EnvBytesMax        = 32 << 10  // of one variable
	CommandArgsMax     = 256       // words
	CommandBytesMax    = 64 << 10  // of all words
	SecretRefsMax      = 64        // secrets of a service
	SecretBytesMax     = 500 << 10 // value of one secret version
	SecretVersionsMax  = 100       // of one secret
	TaskSecretsMax     = 4 << 20   // bytes of all secrets of one task
	ReplicasMax        = 100_000   // of a service
	ZonesMax           = 256       // of a cluster, and zones named by one secret
	ServicesMax        = 10_000    // of a cluster
	SecretsMax         = 10_000    // of a cluster
	NodesMax           = 10_000    // of a cluster
	TokensMax          = 1_000     // outstanding
	TokenTextMax       = 256       // bytes of a join token's text
	UnlockKeyTextMax   = 128       // bytes
	CSRBytesMax        = 8 << 10   // DER
	CertBytesMax       = 8 << 10   // DER, one certificate
	ChainMax           = 4         // certificates in a chain
	JoinFrameMax       = 16 << 10  // request at the join door
	JoinReplyMax       = 256 << 10 // reply at the join door
	CommandBytes       = 1 << 20   // a command in the log
	CommandOpsMax      = 2_000     // operations in a command
	RequestIDMax       = 64        // bytes
	RequestsKept       = 10_000    // results of request IDs that are replicated
	MessageMax         = 4 << 20   // a gRPC message
	KeyFileMax         = 256 << 10 // a node's key file
	TailLogMax         = 100_000   // lines of a log that one call can ask for
	LogLineMax         = 16 << 10  // bytes; longer lines are split
	TaskLogMax         = 10 << 20  // bytes kept per task on its node, in two files
	AssignTasksMax     = 4_096     // tasks assigned to one node
	ManagersMax        = 15        // of a cluster
	WatchKeysMax       = 10_000    // changes that a watcher holds before it is told to resync
	TaskHistoryPerSlot = 3         // ended tasks kept for a slot
)

// Times.
const (
	TokenTTLDefault  = time.Hour
	TokenTTLMin      = time.Second
	TokenTTLMax      = 30 * 24 * time.Hour
	TokenKept        = 24 * time.Hour // how long an ended token is remembered, so that its use is explained
	LeafTTLDefault   = 90 * 24 * time.Hour
	LeafTTLMax       = 397 * 24 * time.Hour
	LeafBackdate     = 5 * time.Minute
	CATTL            = 20 * 365 * 24 * time.Hour // root
	IssuingTTL       = 10 * 365 * 24 * time.Hour
	ExpiredKept      = 90 * 24 * time.Hour // how long past its end a leaf with the recorded key may still ask for its renewal
	SkewWarn         = 5 * time.Second     // shown by status
	SkewMax          = 10 * time.Second    // a command time further behind than this is not proposed
	RenewSpread      = 45 * time.Second    // renewals after a change of expiry policy are spread over this
	HandshakeTimeout = 10 * time.Second
	JoinTimeout      = 30 * time.Second // whole exchange at the join door
	HeartbeatPeriod  = 3 * time.Second  // on a session
	ReportPeriod     = time.Second      // between managers
	DescribePeriod   = 30 * time.Second // a node's description is stored so often at most, but for the first few
	HeartbeatMissed  = 10 * time.Second // a session without an answer for this long is dead
	NodeDownAfter    = 12 * time.Second // without a session for this long a node is down and its tasks move
	LeasePush        = 3 * time.Second  // a manager that is further behind than this pushes nothing
	LeaseHold        = 15 * time.Second // … and than this closes its sessions
	RestartDelayMin  = time.Second      // back-off of failing tasks: first delay
	RestartDelayMax  = 2 * time.Minute  // … and longest
	StopGraceDefault = 10 * time.Second
	StopGraceMax     = 10 * time.Minute
	UpdateDelayMax   = 24 * time.Hour // from one updated task running to the next being replaced
)

// Ports and names.
const (
	DefaultPort     = 2377
	DefaultZone     = "default"
	SecretsDir      = "/run/secrets"
	DefaultSocket   = "/run/warden/warden.sock"
	DefaultStateDir = "/var/lib/warden"
)

// ALPN protocol names of the doors.
const (
	DoorJoin    = "warden-join/1"
	DoorNode    = "warden-node/1"
	DoorPeer    = "warden-peer/1"
	DoorRaft    = "warden-raft/1"
	DoorControl = "h2"
)
