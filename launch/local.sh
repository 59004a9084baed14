#!/usr/bin/env bash
# Runs one command in N processes on this machine, joined into one run by jax.distributed.
#
#   launch/local.sh [OPTIONS] N -- gptjax train --config=configs/stdlib_tiny.py --workdir=runs/a
#
#   --devices-per-process=M   give every process M virtual CPU devices, and no accelerator
#   --restarts=K              start all again, up to K times, when the run ends with a status other than 0, 2 and 130 (default 0)
#   --grace=SECONDS           after one process failed, how long the others have before they are killed (default 30)
#   --port=PORT               the coordinator's port (default: a free one)
#   --dry-run                 print what would run, and run nothing
#
# Every line of output carries the number of its process. When one process fails, all are ended; SIGTERM and Ctrl-C are passed
# on to all, and nothing is restarted after them. The exit status is that of the process that failed first.
set -u

fail() {
  printf 'local.sh: %s\n' "$1" >&2
  exit 2
}

whole_number() { # NAME VALUE LEAST
  case $2 in '' | *[!0-9]* | ??????????*) fail "$1 takes a whole number, not '$2'." ;; esac
  [ "$((10#$2))" -ge "$3" ] || fail "$1=$2, but it has to be at least $3."
}

processes='' devices='' restarts=0 grace=30 port='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --devices-per-process=*) devices=${1#*=} && whole_number --devices-per-process "$devices" 1 ;;
    --restarts=*) restarts=${1#*=} && whole_number --restarts "$restarts" 0 ;;
    --grace=*) grace=${1#*=} && whole_number --grace "$grace" 0 ;;
    --port=*) port=${1#*=} && whole_number --port "$port" 1 ;;
    --dry-run) dry_run=yes ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --) shift && break ;;
    -*) fail "there is no option '$1'; the options are --devices-per-process, --restarts, --grace, --port and --dry-run." ;;
    *)
      [ -z "$processes" ] || fail "'$1' stands where '--' should: launch/local.sh N -- COMMAND."
      processes=$1 && whole_number 'the number of processes' "$processes" 1
      ;;
  esac
  shift
done
[ -n "$processes" ] || fail 'the number of processes is missing: launch/local.sh N -- COMMAND.'
[ $# -gt 0 ] || fail 'the command is missing: launch/local.sh N -- COMMAND.'
command=("$@")

free_port() {
  "${PYTHON:-python3}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# An environment meant for another launcher would otherwise leak into a run of one process, which needs none.
unset GPTJAX_COORDINATOR GPTJAX_NUM_PROCESSES GPTJAX_PROCESS_ID GPTJAX_DISTRIBUTED

environment_of() { # RANK; sets the array `environment`
  environment=()
  if [ "$processes" -gt 1 ]; then
    environment+=("GPTJAX_COORDINATOR=127.0.0.1:$chosen_port" "GPTJAX_NUM_PROCESSES=$processes" "GPTJAX_PROCESS_ID=$1")
  fi
  [ -z "$devices" ] || environment+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
}

choose_port() { # a new one for every start: the last start's may linger
  chosen_port=$port
  if [ -z "$chosen_port" ] && [ "$processes" -gt 1 ]; then
    chosen_port=$(free_port) || fail "no free port was found, because ${PYTHON:-python3} did not run; give one by --port=PORT."
  fi
}

quoted() { # the words as a shell reads them back, in single quotes where they need any
  local word plain='^[A-Za-z0-9_./:=,@%+-]+$' quote="'\\''"
  for word in "$@"; do
    if [[ $word =~ $plain ]]; then printf ' %s' "$word"; else printf " '%s'" "${word//\'/$quote}"; fi
  done
}

if [ -n "$dry_run" ]; then
  choose_port
  for ((rank = 0; rank < processes; rank++)); do
    environment_of "$rank"
    printf '[%d]' "$rank"
    quoted env ${environment[@]+"${environment[@]}"} "${command[@]}"
    printf '\n'
  done
  exit 0
fi

say() { printf '[launch] %s\n' "$1" >&2; }

numbered() { # RANK: a `read` loop, because sed and awk hold lines back in some systems
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

start() {
  choose_port
  for ((rank = 0; rank < processes; rank++)); do
    environment_of "$rank"
    # Job control for this line only: a process group of its own keeps the terminal's Ctrl-C away from the process, which else
    # would get it twice, and leaves SIGINT deliverable, which a background job without job control ignores.
    set -m
    (exec env ${environment[@]+"${environment[@]}"} "${command[@]}") </dev/null > >(numbered "$rank") 2> >(numbered "$rank" >&2) &
    pids[rank]=$!
    set +m
  done
}

send() { # SIGNAL, to every process still running
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do [ -z "$pid" ] || kill -s "$1" "$pid" 2>/dev/null; done
}

asked=''
# shellcheck disable=SC2329 # the traps call it
pass_on() {
  asked=$1
  send "$1"
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

collect() { # notes who has ended; sets `running`, and `status` to that of the first failure
  local rank code
  running=0
  for ((rank = 0; rank < processes; rank++)); do
    [ -n "${pids[rank]}" ] || continue
    if kill -0 "${pids[rank]}" 2>/dev/null; then
      running=$((running + 1))
      continue
    fi
    wait "${pids[rank]}" 2>/dev/null
    code=$?
    pids[rank]=''
    [ "$code" -eq 0 ] || say "process $rank ended with status $code"
    # Of those that ended together, a person's mistake is the cause and the others' failures follow from it.
    if [ "$status" -eq 0 ] || { [ "$code" -eq 2 ] && [ "$ended" -eq 0 ]; }; then status=$code; fi
  done
}

run_once() { # sets `status`
  pids=() status=0 ended=0
  local failed_at='' pid
  start
  while collect && [ "$running" -gt 0 ]; do
    if [ "$status" -ne 0 ]; then
      [ -n "$failed_at" ] || failed_at=$SECONDS
      # After 75 the others are saving too, as they are after a signal that was passed on: they are left to it for a while.
      if [ "$ended" -eq 0 ] && [ -z "$asked" ] && { [ "$status" -ne 75 ] || [ $((SECONDS - failed_at)) -ge "$grace" ]; }; then
        ended=1 failed_at=$SECONDS
        say "ending the other $running"
        send TERM
      elif [ $((SECONDS - failed_at)) -ge "$grace" ]; then
        say "killing $running that did not end within $grace s"
        for pid in "${pids[@]}"; do [ -z "$pid" ] || kill -KILL -- "-$pid" 2>/dev/null; done
        failed_at=$SECONDS
      fi
    fi
    sleep 0.1
  done
}

for ((attempt = 0; ; attempt++)); do
  run_once
  case $status in 0 | 2 | 130) break ;; esac
  [ -z "$asked" ] || break
  [ "$attempt" -lt "$restarts" ] || break
  say "status $status: restart $((attempt + 1)) of $restarts goes on from the last checkpoint"
  sleep 1
  [ -z "$asked" ] || break
done
exit "$status"
