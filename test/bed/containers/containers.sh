#!/usr/bin/env bash
# Three managers and two workers as containers on this machine's Docker Engine, for people who want to look: an image of our own
# static programs and nothing else, a network of their own, no more rights than a daemon that runs tasks needs. They stay up until
# Ctrl-C, and then all of it is removed; where standard input is no terminal it ends by itself.
set -euo pipefail
ROOT=${1:?usage: containers.sh FOLDER with bin/warden, bin/wardenctl, bin/host and bin/app}
LABEL=warden-bed-containers
IMAGE=$LABEL:latest
MANAGERS="m1 m2 m3"
WORKERS="w1 w2"

# What the daemon and the process executor need. SYS_ADMIN: namespaces and mounts of tasks. SETUID, SETGID, CHOWN, FOWNER: users of
# their own, and their secrets. KILL: to end them. Docker's seccomp profile has no pivot_root; its masks over /proc keep a user
# namespace from mounting one. A cgroup namespace of its own: limits of tasks within the container's part.
RIGHTS="--cap-drop ALL --cap-add SYS_ADMIN --cap-add SETUID --cap-add SETGID --cap-add CHOWN --cap-add FOWNER --cap-add KILL
  --security-opt seccomp=unconfined --security-opt systempaths=unconfined --cgroupns private"

docker version >/dev/null 2>&1 || { echo "containers: no Docker Engine answers: $(docker version 2>&1 | tail -1)" >&2; exit 1; }

remove() {
  local all
  all=$(docker ps -aq --filter "label=$LABEL"); [ -z "$all" ] || docker rm -fv $all >/dev/null
  all=$(docker network ls -q --filter "label=$LABEL"); [ -z "$all" ] || docker network rm $all >/dev/null
  all=$(docker images -q "$IMAGE"); [ -z "$all" ] || docker rmi -f $all >/dev/null
}
trap 'trap "" INT TERM; echo; echo "removing containers, network and image"; remove' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
remove # what a run that was killed left

ctl() { local h=$1; shift; docker exec -i "warden-$h" wardenctl "$@"; }

ready() {
  for _ in $(seq 100); do
    ctl "$1" version >/dev/null 2>&1 && return
    [ "$(docker inspect -f '{{.State.Running}}' "warden-$1")" = true ] || break
    read -rt 0.1 <> <(:) || :
  done
  echo "containers: the daemon of $1 does not answer:" >&2; docker logs --tail 5 "warden-$1" >&2; exit 1
}

mkdir -p "$ROOT/var/lib/warden" && chmod 700 "$ROOT/var/lib/warden" # the volume takes after it
tar -C "$ROOT" --owner=0 --group=0 -c bin var | docker import -c 'ENV PATH=/bin' \
  -c 'ENTRYPOINT ["/bin/host", "warden", "run", "--executor", "process"]' - "$IMAGE" >/dev/null
docker network create --label $LABEL warden-bed >/dev/null
for h in $MANAGERS $WORKERS; do
  docker run -d --name "warden-$h" --hostname "$h" --label $LABEL --network warden-bed --tmpfs /tmp -v /var/lib/warden $RIGHTS "$IMAGE" >/dev/null
done
for h in $MANAGERS $WORKERS; do ready "$h"; done

ctl m1 swarm init
join() { ctl m1 swarm join-token -q "$1" | ctl "$2" swarm join --token-file - m1:2377; }
for h in $MANAGERS; do [ "$h" = m1 ] || join manager "$h"; done
for h in $WORKERS; do join worker "$h"; done
printf s3cret | ctl m1 secret create password - >/dev/null
ctl m1 service create --detach=false --name app --replicas 2 --secret password --limit-memory 64m host /bin/app >/dev/null
echo; ctl m1 node ls
echo; ctl m1 service ps app
echo; ctl m1 service logs app
cat <<'END'

Talk to them:      docker exec warden-m1 wardenctl status
                   printf 'another' | docker exec -i warden-m1 wardenctl secret rotate password -
Hurt them:         docker network disconnect warden-bed warden-w1     docker network connect warden-bed warden-w1
                   docker pause warden-m2                             docker unpause warden-m2
                   docker kill warden-m1                              docker start warden-m1
Read what they say: docker logs -f warden-m1
END
[ -t 0 ] || exit 0
echo "Ctrl-C removes all of it."
while :; do read -rt 3600 <> <(:) || :; done
