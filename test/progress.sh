#!/bin/sh
# progress.sh NAME COMMAND…: runs a command that may be silent for long, and says every 8 s that it still runs.
name=$1
shift
seconds=0
while sleep 8; do
    seconds=$((seconds + 8))
    echo "$name: still at it after $seconds s" >&2
done &
ticker=$!
"$@"
status=$?
{ kill "$ticker" && wait "$ticker"; } 2>/dev/null
exit "$status"
