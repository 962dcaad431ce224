# Two commands: `make demo` shows the main job, `make test` proves everything. Both set up what they need.

GO      ?= go
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
PKGS    := ./...

.PHONY: build demo test check bench fuzz soak generate setup clean

# The daemon carries the small binary that its tasks run under (executor/process/helper); no source tree holds it: an overlay shows it to go build.
HELPER = CGO_ENABLED=0 $(GO) build $(1) -trimpath -ldflags '-s -w' -o $(2)/helper ./executor/process/helper \
	&& printf '{"Replace":{"%s":"%s"}}' $(CURDIR)/executor/process/payload/helper $(abspath $(2))/helper >$(2)/overlay.json

build: ## static binaries into bin/
	@mkdir -p bin/.helper
	$(call HELPER,,bin/.helper)
	CGO_ENABLED=0 $(GO) build -overlay bin/.helper/overlay.json -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...
	@! grep -l $(TEST_CLOCK) bin/warden bin/wardenctl bin/.helper/helper || { echo 'build: the clock of tests is in a release'; exit 1; }

# The test build differs in two things: certificates may live for seconds (limits_wardentest.go), and tests can skew its clock (test/bed/clock).
TEST_BIN   ?= bin/test
TEST_CLOCK := WARDEN_TEST_CLOCK
bin/test/warden: FORCE
	@mkdir -p $(TEST_BIN)/.helper
	$(call HELPER,-tags wardentest,$(TEST_BIN)/.helper)
	$(GO) run ./test/bed/clock $(TEST_BIN)/.helper/overlay.json
	CGO_ENABLED=0 $(GO) build -overlay $(TEST_BIN)/.helper/overlay.json -tags wardentest -trimpath -ldflags '-X main.version=test' -o $(TEST_BIN)/ ./cmd/...
	@grep -q $(TEST_CLOCK) $(TEST_BIN)/warden && grep -q $(TEST_CLOCK) $(TEST_BIN)/wardenctl || { echo 'bin/test/warden: its clock cannot be skewed'; exit 1; }
.PHONY: FORCE
FORCE:

# $(1): a program, $(2): the packages that have it
INSTALL = command -v $(1) >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& (apt-get update -qq; RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) >/dev/null); } \
		|| echo "setup: no $(1), and no root or apt-get to install it: what needs it will say so"

setup: ## what the demo and the tests run as services
	@$(call INSTALL,redis-server,redis-server redis-tools)
	@$(call INSTALL,ip,iproute2)
	@$(call INSTALL,nft,nftables)

setup-engine: ## the Docker Engine that tests start engines of their own with
	@$(call INSTALL,dockerd,docker.io containerd)
.PHONY: setup-engine

demo: setup build ## the main job, in about a minute
	@./demo/demo.sh

# $(1): the arguments of go test. Its tests, with all that they leave behind, get a folder for temporary files of their own.
RUNTESTS = cd tools && $(GO) build -o ../bin/tools/ ./testreport && cd .. && WARDEN_TEST_BIN=$(CURDIR)/bin/test bin/tools/testreport $(GO) test -race -shuffle=on -json $(1)

# Its folder is the root of their image.
containers: build ## three managers and two workers as containers on this machine's Docker Engine, until Ctrl-C
	@mkdir -p bin/containers/bin && cp bin/warden bin/wardenctl bin/containers/bin/
	@CGO_ENABLED=0 $(GO) build -trimpath -o bin/containers/bin/host ./test/bed/containers
	@CGO_ENABLED=0 $(GO) build -trimpath -o bin/containers/bin/app ./test/bed/testdata/app
	@test/bed/containers/containers.sh bin/containers
.PHONY: containers

test: setup setup-engine check bin/test/warden ## everything
	@$(call RUNTESTS,-count=1 -timeout 15m $(PKGS))

# One test until it fails or has passed 20 times: `make flake RUN=TestUnlock PKGS=./daemon`. The machine should have other work meanwhile.
RUN   ?= .
TIMES ?= 20
flake: setup setup-engine bin/test/warden ## the same tests TIMES times
	@$(call RUNTESTS,-failfast -count=$(TIMES) -timeout 2h -run '$(RUN)' $(PKGS))

check: peers-check ## formatting, vet, lint, generated code fresh
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'check: run gofmt'; exit 1; }
	$(GO) vet $(PKGS)
	$(GO) vet -tags wardentest . ./daemon ./manager
	cd tools && $(GO) vet ./... && $(GO) test -race ./...
	cd tools && $(GO) build -o ../bin/tools/ honnef.co/go/tools/cmd/staticcheck && cd .. && bin/tools/staticcheck $(PKGS)
	@rm -rf bin/_fresh && mkdir -p bin/_fresh && cp api/*.proto bin/_fresh/ && (cd tools && $(GO) run ./genproto ../bin/_fresh) \
		&& for f in bin/_fresh/*.go; do cmp -s $$f api/$$(basename $$f) || { echo "check: api/$$(basename $$f) is not what its definition generates: run make generate"; exit 1; }; done

generate: ## the Go code of api/*.proto
	cd tools && $(GO) run ./genproto ../api

# One line a benchmark and run, for benchstat: `make bench BENCH=Join COUNT=10 >old.txt`. docs/benchmarks.md says what each one measures.
BENCH     ?= .
COUNT     ?= 1
BENCHTIME ?= 1s
bench: ## every benchmark
	@$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -count $(COUNT) -timeout 2h $(PKGS) | grep -v -e 'no test files' -e '^PASS' -e '^ok '

PEERS ?=
peers: ## Warden and SwarmKit at the same work, in turns: a table, also as bin/peers.md, and a chart, bin/peers.svg. `make peers PEERS=-quick`
	@mkdir -p bin && cd bench/peers && $(GO) build -o ../../bin/peers . && ../../bin/peers -svg ../../bin/peers.svg -md ../../bin/peers.md $(PEERS)
.PHONY: peers

peers-check: ## vet, and the tests that run no cluster, of bench/peers, which is a module of its own
	cd bench/peers && $(GO) vet ./... && $(GO) test -short ./...
.PHONY: peers-check

# Each target begins with its seeds, with what fuzz/testdata has for it, and with what earlier runs found (in Go's build cache).
FUZZTIME ?= 30s
FUZZ     ?= .
fuzz: ## every fuzz target for FUZZTIME
	@set -e; targets=$$($(GO) test ./fuzz -list '^Fuzz'); for t in $$(echo "$$targets" | grep '^Fuzz' | grep -e '$(FUZZ)'); do \
		echo "== $$t"; $(GO) test ./fuzz -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x; done

SOAK ?= 30m
soak: bin/test/warden ## random calls on clusters under faults, one run after the other, for SOAK
	@WARDEN_SOAK=$(SOAK) WARDEN_TEST_BIN=$(CURDIR)/bin/test $(GO) test ./test/history -race -count=1 -run TestSoak -v -timeout 0

powerloss: ## a kill after every call that changes a file, and all losses of power, where `make test` draws some
	@WARDEN_POWERLOSS_ALL=1 $(GO) test ./test/powerloss -race -count=1 -v -timeout 2h
.PHONY: powerloss

# Of what fuzzing has found on this machine so far, KEEP inputs a target, small ones to large ones, become seeds that every test run tries.
KEEP ?= 40
corpus: ## stores inputs that `make fuzz` found in fuzz/testdata
	@set -e; for dir in $$($(GO) env GOCACHE)/fuzz/warden/fuzz/*/; do to=fuzz/testdata/fuzz/$$(basename $$dir); rm -rf $$to; mkdir -p $$to; \
		find $$dir -type f -size -8k -printf '%s %p\n' | sort -n | cut -d' ' -f2 >$$to/.all; n=$$(wc -l <$$to/.all); \
		awk -v n=$$n -v keep=$(KEEP) 'NR == 1 || int(NR*keep/n) > int((NR-1)*keep/n)' $$to/.all | xargs -r cp -t $$to; rm $$to/.all; done; du -sh fuzz/testdata
.PHONY: corpus

clean:
	rm -rf bin
