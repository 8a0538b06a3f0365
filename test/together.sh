#!/bin/bash
# together.sh COMMAND COMMAND: runs the second command while the first one runs, and shows its output when both have ended. An
# emulated host leaves some of a second processor idle. The second command gets no more than that: the host's processors wait
# for each other all the time, and where one of them waits for a program of this machine, too, a test takes forty times as
# long. Where the end-to-end tests run on native KVM, or the memory isn't enough for two emulated hosts, of which some tests
# boot one, they run one after the other.
set -uo pipefail
cd "$(dirname "$0")/.."
available=$(sed -n -E 's/^MemAvailable: +([0-9]+) kB/\1/p' /proc/meminfo)
if [ "$(build/host/run --where)" = native ] || [ "$available" -lt $((12 << 20)) ]; then
    bash -c "$1" && bash -c "$2"
    exit
fi
log=build/test/beside.log
echo "together: beside the next run \`$2\`; its output comes at the end, and is in $log meanwhile"
chrt --idle 0 bash -c "$2" >$log 2>&1 &
beside=$!
trap 'kill $beside 2>/dev/null' EXIT
bash -c "$1"
status=$?
wait $beside
second=$?
echo "together: \`$2\` printed:"
cat $log
[ $status != 0 ] || status=$second
exit $status
