#!/bin/bash
# kvm.sh [FLAG...] -- PACKAGE...: runs the end-to-end tests of these packages on a KVM host, one host for all: this machine
# where it has /dev/kvm, else an emulated one (see test/kvmhost). FLAGs are those of go test. Everything is compiled before
# the host is there. Where a package has other tests beside, those are in EVERYTHING below.
set -euo pipefail

if [ "${1-}" = --inside ]; then
    # In the host: each package's tests in the package's own directory, as go test has it.
    shift
    flags=()
    while [ "$1" != -- ]; do
        flags+=("$1")
        shift
    done
    shift
    top=$PWD status=0
    for package in "$@"; do
        cd "$top/$package"
        began=$SECONDS
        only=(-test.run '^TestKVM')
        [ -e "$top/build/test/bin/$(basename "$package").all" ] && only=()
        if "$top/build/test/bin/$(basename "$package").test" -test.timeout 80m "${only[@]}" "${flags[@]}"; then
            printf 'ok  \tftclock/%s\t%ds\n' "$package" $((SECONDS - began))
        else
            printf 'FAIL\tftclock/%s\t%ds\n' "$package" $((SECONDS - began))
            status=1
        fi
    done
    exit $status
fi

flags=()
while [ "${1-}" != -- ]; do
    if [ $# = 0 ]; then
        echo "usage: kvm.sh [FLAG...] -- PACKAGE..." >&2
        exit 2
    fi
    flags+=("${1/#-/-test.}")
    shift
done
shift
cd "$(dirname "$0")/.."
packages=("${@#./}")
rm -rf build/test/bin
mkdir -p build/test/bin
# The race detector makes ten times slower what an emulated host makes ten times slower already.
race=()
where=$(build/host/run --where)
[ "$where" = emulated ] || race=(-race)
echo "kvm: compiling the end-to-end tests; they run on $where KVM"
CGO_ENABLED=1 ${GO:-go} test -c "${race[@]}" -o build/test/bin/ "${packages[@]/#/./}"
for package in "${packages[@]}"; do
    # All tests of a package whose TestMain brings up a private libvirt are run here, and nowhere else.
    if grep -Eqs '(privatelibvirt\.|os\.Exit\()Main\(' "$package"/*_test.go; then
        touch "build/test/bin/$(basename "$package").all"
    fi
done

# An emulated host that hangs or crashes, which is the emulator's fault, is booted again for the packages and the tests that
# haven't passed yet. CI (RETRY_FAILED=1) does so once for tests that failed, too: an emulator that corrupts memory makes any
# test fail. Each of them is named.
log=build/test/kvm.log
: >$log
names() { sed -n -E "s/^--- $1: ([A-Za-z0-9_]+) .*/\1/p" $log | sort -u; }
retry=${RETRY_FAILED-0}
[ "$where" = emulated ] || retry=0
for try in 1 2 3 4 5 6 7 8; do
    passed=$(names PASS | paste -s -d '|')
    left=()
    for package in "${packages[@]}"; do
        grep -q "^ok  	ftclock/$package	" $log || left+=("$package")
    done
    set +e
    build/host/run ${HOSTFLAGS-} -- "$0" --inside ${passed:+-test.skip "^($passed)\$"} "${flags[@]}" -- "${left[@]}" | tee -a $log
    status=${PIPESTATUS[0]}
    set -e
    if [ $try = 8 ]; then break; fi
    if [ "$status" = 75 ]; then
        echo "kvm: THE EMULATED HOST FAILED (try $try of 8): the tests that didn't pass yet run once more"
    elif [ "$status" = 1 ] && [ "$retry" = 1 ]; then
        retry=0
        echo "kvm: FAILED, once more on a fresh emulated host: $(comm -23 <(names FAIL) <(names PASS) | paste -s -d ' ')"
    else
        break
    fi
done
if [ "$status" = 0 ]; then
    comm -12 <(names FAIL) <(names PASS) | sed 's/^/kvm: PASSED AT THE SECOND TRY ONLY: /'
fi
exit "$status"
