#!/usr/bin/env bash
# The main job in about a minute: three managers and three workers as real processes on loopback, autolock, tokens, a secret
# on tmpfs in zone pci, refusal in the wrong zone, a new value of the secret, a new unlock key, restart and unlock, eviction
# with what the node had seen. Each step prints the command that a user would type, and what it answers. The cluster stays up
# until Ctrl-C; where standard input is no terminal the demo ends by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=$PWD/bin
[ "$(id -u)" = 0 ] || { echo "demo: needs root: tasks run in namespaces of their own" >&2; exit 1; }

D=$(mktemp -d /tmp/warden-demo-XXXXXX)
HOSTS="m1 m2 m3 w1 w2 w3"
NET=127.$((RANDOM % 200 + 30)).$((RANDOM % 250))
PORT=$((20000 + RANDOM % 20000))
declare -A ADDR PID
n=0; for h in $HOSTS; do n=$((n + 1)); ADDR[$h]=$NET.$n:2377; mkdir "$D/$h"; done

bold=''; plain=''; if [ -t 1 ]; then bold=$'\e[1m'; plain=$'\e[0m'; fi
say() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }

# start HOST: the daemon of one host, in a session of its own.
start() {
  setsid "$BIN/warden" run --executor process --state-dir "$D/$1/state" --socket "$D/$1/sock" --listen "${ADDR[$1]}" --hostname "$1" >>"$D/$1/log" 2>&1 </dev/null &
  PID[$1]=$!
  for _ in $(seq 200); do
    [ -S "$D/$1/sock" ] && ctl "$1" version >/dev/null 2>&1 && return
    kill -0 "${PID[$1]}" 2>/dev/null || break
    read -rt 0.05 <> <(:) || :
  done
  echo "demo: the daemon of $1 did not start:" >&2; tail -5 "$D/$1/log" >&2; exit 1
}
ctl() { local h=$1; shift; "$BIN/wardenctl" --host "unix://$D/$h/sock" "$@"; }

# on HOST COMMAND...: print the command as a user on that host types it, then run it.
on() {
  local h=$1 shown=() w; shift
  for w in "$@"; do
    case $w in
      WDNTKN-1-*) w=${w:0:20}…${w: -8} ;;
      *[\ \$\"\;\&\|\<\>]*) w="'$w'" ;;
    esac
    shown+=("$w")
  done
  printf '%s%s$%s wardenctl %s\n' "$bold" "$h" "$plain" "${shown[*]}"
  ctl "$h" "$@"
}
# refused HOST COMMAND...: the same, for what must be refused.
refused() { if on "$@" 2>&1; then echo "demo: that should have been refused" >&2; exit 1; fi; }
# until_ok COMMAND...: ask until it holds.
until_ok() {
  local i; for i in $(seq 400); do "$@" >/dev/null 2>&1 && return; read -rt 0.1 <> <(:) || :; done
  echo "demo: waited in vain for: $*" >&2; exit 1
}
ready() { [ "$(ctl "$1" node ls --format '{{.Status}}' | grep -c Ready)" = "$2" ]; }
voters() { [ "$(ctl "$1" node ls --filter role=manager --format '{{.ManagerStatus}}' | grep -c 'Leader\|Reachable')" = "$2" ]; }
running() { [ "$(ctl "$1" service ps "$2" --filter desired-state=running --format '{{.CurrentState}}' | grep -c '^Running')" = "$3" ]; }
# rolled HOST SERVICE: the one task that runs has the newest version of the secret, and the server answers again.
rolled() {
  [ "$(ctl "$1" service ps "$2" --filter desired-state=shutdown -q | wc -l)" -ge 1 ] && running "$1" "$2" 1 || return 1
  ! command -v redis-cli >/dev/null || [ "$(REDISCLI_AUTH=$PASSWORD redis-cli -p "$PORT" ping 2>&1)" = PONG ]
}
says() { local h=$1 want=$2 out; shift 2; out=$(ctl "$h" "$@" 2>&1 || :); [[ $out == *"$want"* ]]; }

clean() {
  local h code=$?
  trap - EXIT INT TERM
  say "cleaning up"
  for h in w3 w2 w1 m3 m2 m1; do
    [ -n "${PID[$h]:-}" ] || continue
    timeout 20 "$BIN/wardenctl" --host "unix://$D/$h/sock" swarm leave --force >/dev/null 2>&1 || :
    kill "${PID[$h]}" 2>/dev/null || :
  done
  wait 2>/dev/null || :
  rm -rf "$D"
  exit $code
}
trap clean EXIT
trap 'exit 0' INT TERM

say "Six hosts, each with a daemon of its own that belongs to nothing yet"
for h in $HOSTS; do start "$h"; printf '%s$ warden run --executor process --state-dir … --listen %s   # pid %s\n' "$h" "${ADDR[$h]}" "${PID[$h]}"; done

say "The first manager makes the cluster: root CA, issuing CA, and an unlock key that is shown this once"
INIT=$(on m1 swarm init --autolock); echo "$INIT"
KEY=$(grep -o 'WDNKEY-1-[0-9a-z-]*' <<<"$INIT")

say "Tokens: for one role, with a life, a number of uses, and here a zone. They pin the root CA; their secret never crosses the wire"
on m1 zone create pci
on m1 swarm join-token --uses 2 manager
MANAGER=$(ctl m1 swarm join-token -q --uses 2 manager)
WORKER=$(ctl m1 swarm join-token -q --uses 2 worker)
PCI=$(ctl m1 swarm join-token -q --uses 1 --zone pci --node-name w3 worker)
on m2 swarm join --token "$MANAGER" "${ADDR[m1]}"
on m3 swarm join --token "$MANAGER" "${ADDR[m2]}"
on w1 swarm join --token "$WORKER" "${ADDR[m1]}"
on w2 swarm join --token "$WORKER" "${ADDR[m3]}"
on w3 swarm join --token "$PCI" "${ADDR[m2]}"
until_ok voters m1 3
until_ok ready m1 6
on m1 node ls

say "A token that is used up is refused, and leaves nothing behind"
mkdir "$D/late"; ADDR[late]=$NET.99:2377; start late
refused late swarm join --token "$WORKER" "${ADDR[m1]}"
kill "${PID[late]}"; unset 'PID[late]'

say "A secret that may enter zone pci only, from standard input"
PASSWORD=$(head -c 18 /dev/urandom | base64 | tr -dc a-zA-Z0-9)
printf %s "$PASSWORD" | on m2 secret create --zone pci redis-password -

say "The wrong zone is refused, with the reason"
refused m1 service create --name thief --secret redis-password host cat /run/secrets/redis-password

say "In the right zone a real server takes its password from its own tmpfs"
if command -v redis-server >/dev/null; then
  on m1 service create --name redis --zone pci --secret source=redis-password,target=password host \
    sh -c "exec redis-server --port $PORT --bind 127.0.0.1 --save '' --dir /tmp --requirepass \"\$(cat /run/secrets/password)\""
else
  echo "(no redis-server here: a shell stands in its place)"
  on m1 service create --name redis --zone pci --secret source=redis-password,target=password host sh -c 'cat /run/secrets/password >/dev/null && exec sleep 1000'
fi
until_ok running m1 redis 1
on m1 service ps redis
if command -v redis-cli >/dev/null; then
  until_ok redis-cli -p "$PORT" ping
  echo "\$ redis-cli -p $PORT ping                       # without the password"; redis-cli -p "$PORT" ping
  echo "\$ REDISCLI_AUTH=… redis-cli -p $PORT ping"; REDISCLI_AUTH=$PASSWORD redis-cli -p "$PORT" ping
fi
echo "\$ grep -rl PASSWORD <every state directory> /proc/mounts"
if grep -rls -- "$PASSWORD" "$D" /proc/mounts; then echo "demo: the secret is on a disk" >&2; exit 1; else echo "(nothing: the value is on no disk)"; fi

say "A new value for the secret: the task is replaced, and the server takes the new password"
OLD=$PASSWORD
PASSWORD=$(head -c 18 /dev/urandom | base64 | tr -dc a-zA-Z0-9)
printf %s "$PASSWORD" | on m2 secret rotate redis-password -
until_ok rolled m1 redis
on m1 service ps redis
if command -v redis-cli >/dev/null; then
  echo "\$ REDISCLI_AUTH=… redis-cli -p $PORT ping        # with the old password"; REDISCLI_AUTH=$OLD redis-cli -p "$PORT" ping 2>&1
  echo "\$ REDISCLI_AUTH=… redis-cli -p $PORT ping        # with the new one"; REDISCLI_AUTH=$PASSWORD redis-cli -p "$PORT" ping
fi

say "A new unlock key, while everything runs: every manager's data key and log are sealed anew, and the old key opens nothing"
OLDKEY=$KEY
ROTATED=$(on m1 swarm unlock-key --rotate); echo "$ROTATED"
KEY=$(grep -o 'WDNKEY-1-[0-9a-z-]*' <<<"$ROTATED")

say "The leader is killed: another takes over"
kill -9 "${PID[m1]}"; wait "${PID[m1]}" 2>/dev/null || :
echo "\$ kill -9 ${PID[m1]}   # m1"
on m2 zone create made-without-m1

say "All managers are killed and come back locked; the task never stopped"
kill -9 "${PID[m2]}" "${PID[m3]}"; wait "${PID[m2]}" "${PID[m3]}" 2>/dev/null || :
for h in m1 m2 m3; do start "$h"; done
refused m1 node ls
printf '%s\n' "$OLDKEY" | refused m1 swarm unlock
for h in m1 m2 m3; do printf '%s\n' "$KEY" | on "$h" swarm unlock; done
until_ok voters m1 3
until_ok ready m1 6
on m1 service ps redis

say "Host w3 is compromised: out with it, and what did it hold?"
on m1 node rm --force --compromised w3
until_ok says w3 evicted status
on w3 status || :
until_ok says m1 'no suitable node' service ps redis --no-trunc
on m1 service ps redis --no-trunc --format 'table {{.Name}}\t{{.DesiredState}}\t{{.CurrentState}}\t{{.Error}}'

say "One screen for all of it"
on m1 status || :

if [ -t 0 ]; then
  say "The cluster stays up until Ctrl-C. Talk to it with"
  echo "  export WARDEN_HOST=unix://$D/m1/sock"
  echo "  $BIN/wardenctl status"
  while :; do read -r || break; done
fi
