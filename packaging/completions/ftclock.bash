# Completion of ftclock for bash. ftclock itself knows what can come next.
complete -C ftclock ftclock
