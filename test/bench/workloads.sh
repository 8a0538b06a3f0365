#!/bin/sh
# The thesis' workloads in a domain of yours, a distribution on KVM that ssh reaches: a kernel build and mysqlslap, at 0, 10
# and 40 checkpoints a second. Run it once with the domain's metadata and once without, and compare the lines it prints.
# The guest needs: a configured kernel tree in ~/linux, make and gcc, and mysqlslap with a server that the user may log in to.
#
#   test/bench/workloads.sh DOMAIN USER@GUEST
set -eu

domain=$1
guest=$2

# shellcheck disable=SC2015,SC2016,SC2029 # the words are for the guest's shell
for rate in 0 10 40; do
    for work in 'cd linux && make -s clean && make -s -j"$(nproc)"' \
        'mysqlslap --auto-generate-sql --concurrency=50 --iterations=20 --number-of-queries=1000'; do
        case $work in
        *make*) name="kernel build" ;;
        *) name=mysqlslap ;;
        esac
        checkpoints=
        if [ "$rate" != 0 ]; then
            # More than the work takes; ended below.
            ftclock exercise "$domain" --rate "$rate" --pause 5 --count 1000000 >/dev/null 2>&1 &
            checkpoints=$!
        fi
        # The host's clock: the guest's is what is in question.
        begin=$(date +%s.%N)
        ssh "$guest" "$work" >/dev/null
        end=$(date +%s.%N)
        [ -z "$checkpoints" ] || { kill "$checkpoints" && wait "$checkpoints" || :; }
        echo "$rate checkpoints a second, $name: $(echo "$end - $begin" | bc) s"
    done
done
