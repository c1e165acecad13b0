# Sourced by the entry points. If FIREZONE_TOKEN is the path of a file, such as a Docker secret, read the token from it.
# shellcheck shell=sh
if [ -n "${FIREZONE_TOKEN:-}" ] && [ -f "$FIREZONE_TOKEN" ]; then
    FIREZONE_TOKEN=$(cat "$FIREZONE_TOKEN")
    export FIREZONE_TOKEN
fi
