# Completion of ftclock for fish. ftclock itself knows what can come next.
function __ftclock_complete
    set -lx COMP_LINE (commandline -cp)
    command ftclock 2>/dev/null
end
complete -c ftclock -f -a '(__ftclock_complete)'
