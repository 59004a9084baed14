#!/usr/bin/env bash
# One run on all hosts of a TPU VM, a single one or a pod, by gcloud.
#
#   launch/tpu_pod.sh TPU --zone=us-east5-a --setup                          installs this repository's HEAD on every host
#   launch/tpu_pod.sh TPU --zone=us-east5-a -- gptjax train --config=configs/gpt2_124m.py --workdir=/mnt/runs/a
#
#   --zone=ZONE --project=PROJECT   where the TPU is (default: gcloud's own settings)
#   --setup                         copy HEAD (nothing uncommitted) to ~/gptjax on every host and install it there with jax[tpu]
#   --python=COMMAND                with --setup: the hosts' Python, 3.11 or newer (default python3.11)
#   --env=NAME=VALUE                set in the run's environment, such as GPTJAX_STUCK_SECONDS=600; may be repeated
#   --restarts=K                    start all hosts again, up to K times, after a status other than 0, 2 and 130 (default 10)
#   --grace=SECONDS                 how long a process may take to save before it is killed (default 300)
#   --dry-run                       print the gcloud commands, and run nothing
#
# The run's folder has to be one that every host sees. Start it on a machine that stays up. Ctrl-C and SIGTERM are passed on to
# all hosts, which save and end with 130 and 75. What an earlier start left running is ended first. The exit status is the
# program's own, of the first host that failed; gcloud's 255 is a lost connection, and is restarted like a fault.
set -u

fail() {
  printf 'tpu_pod.sh: %s\n' "$1" >&2
  exit 2
}

whole_number() { # NAME VALUE
  case $2 in '' | *[!0-9]* | ??????????*) fail "$1 takes a whole number, not '$2'." ;; esac
}

tpu='' where=() setup='' python=python3.11 environment=(GPTJAX_DISTRIBUTED=auto) restarts=10 grace=300 dry_run=''
name='^[A-Za-z_][A-Za-z0-9_]*='
while [ $# -gt 0 ]; do
  case $1 in
    --zone=?* | --project=?*) where+=("$1") ;;
    --setup) setup=yes ;;
    --python=?*) python=${1#*=} ;;
    --env=*)
      [[ ${1#--env=} =~ $name ]] || fail "--env takes NAME=VALUE, not '${1#--env=}'."
      environment+=("${1#--env=}")
      ;;
    --restarts=*) restarts=${1#*=} && whole_number --restarts "$restarts" ;;
    --grace=*) grace=${1#*=} && whole_number --grace "$grace" ;;
    --dry-run) dry_run=yes ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --) shift && break ;;
    -*) fail "there is no option '$1'; launch/tpu_pod.sh --help lists them." ;;
    *)
      [ -z "$tpu" ] || fail "'$1' stands where '--' should: launch/tpu_pod.sh TPU -- COMMAND."
      tpu=$1
      ;;
  esac
  shift
done
[ -n "$tpu" ] || fail "the TPU's name is missing: launch/tpu_pod.sh TPU -- COMMAND."
[ -n "$setup" ] || [ $# -gt 0 ] || fail 'there is neither --setup nor a command: launch/tpu_pod.sh TPU -- COMMAND.'
command=("$@")

quoted() { # the words as a shell reads them back, in single quotes where they need any
  local word plain='^[A-Za-z0-9_./:=,@%+-]+$' quote="'\\''" between=''
  for word in "$@"; do
    if [[ $word =~ $plain ]]; then printf '%s%s' "$between" "$word"; else printf "%s'%s'" "$between" "${word//\'/$quote}"; fi
    between=' '
  done
}

run() { # a command that needs no signal passed on
  if [ -n "$dry_run" ]; then quoted "$@" && printf '\n'; else "$@"; fi
}

on_all_hosts=(gcloud compute tpus tpu-vm ssh "$tpu" ${where[@]+"${where[@]}"} --worker=all)
# In /tmp, because a number from before a reboot would be somebody else's now.
# shellcheck disable=SC2016 # expanded on the hosts
process_file='/tmp/gptjax.$USER.pid'
alive="alive() { test -s $process_file && kill -0 \$(cat $process_file) 2>/dev/null; }"
end_left_over="if alive; then kill -TERM \$(cat $process_file); for s in \$(seq $grace); do alive || break; sleep 1; done; fi;"
end_left_over+=" if alive; then kill -KILL \$(cat $process_file); fi"

if [ -n "$setup" ]; then
  repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=${TMPDIR:-/tmp}/gptjax-$$.tar.gz
  trap 'rm -f "$archive"' EXIT
  install="set -e; $(quoted "$python") -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||"
  install+=" { echo \"\$(hostname): \"$(quoted "$python is absent or older than 3.11; name another by --python") >&2; exit 2; };"
  install+=" mkdir -p gptjax; tar -xzf gptjax.tar.gz -C gptjax; cd gptjax; $(quoted "$python") -m venv .venv;"
  install+=" .venv/bin/pip install --quiet -c constraints.txt -e . 'jax[tpu]'"
  run git -C "$repository" archive --format=tar.gz "--output=$archive" HEAD || exit 1
  run gcloud compute tpus tpu-vm scp "$archive" "$tpu:gptjax.tar.gz" ${where[@]+"${where[@]}"} --worker=all || exit 1
  run "${on_all_hosts[@]}" "--command=$install" || exit
fi
[ "${#command[@]}" -gt 0 ] || exit 0

remote="$alive; $end_left_over; cd gptjax && . .venv/bin/activate && echo \$\$ >$process_file &&"
remote+=" exec env $(quoted "${environment[@]}" "${command[@]}")"
if [ -n "$dry_run" ]; then
  quoted "${on_all_hosts[@]}" "--command=$remote"
  printf '\n'
  exit 0
fi

asked='' interrupted=''
# shellcheck disable=SC2329 # the traps call it
pass_on() { # SIGNAL
  asked=yes interrupted=yes
  printf 'tpu_pod.sh: passing SIG%s on to all hosts\n' "$1" >&2
  "${on_all_hosts[@]}" "--command=$alive; if alive; then kill -$1 \$(cat $process_file); fi" </dev/null >/dev/null 2>&1
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

for ((attempt = 0; ; attempt++)); do
  # Job control for this line only: in a process group of its own gcloud does not get the terminal's Ctrl-C, and goes on showing
  # what the hosts say while they save.
  set -m
  "${on_all_hosts[@]}" "--command=$remote" </dev/null &
  gcloud_id=$!
  set +m
  # A signal ends `wait` early, so it is called again; 127 then says that the first call had the answer after all.
  status=0
  while :; do
    interrupted=''
    wait "$gcloud_id"
    code=$?
    [ "$code" -eq 127 ] || status=$code
    [ -n "$interrupted" ] || break
  done
  case $status in 0 | 2 | 130) break ;; esac
  if [ -n "$asked" ] || [ "$attempt" -ge "$restarts" ]; then break; fi
  printf 'tpu_pod.sh: status %s: restart %s of %s goes on from the last checkpoint\n' "$status" "$((attempt + 1))" "$restarts" >&2
  sleep 5
  [ -z "$asked" ] || break
done
exit "$status"
