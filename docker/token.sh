# Sourced by the entry points: FIREZONE_TOKEN may name a file (a Docker secret), whose content then takes its place.
# shellcheck shell=sh
if [ -n "${FIREZONE_TOKEN:-}" ] && [ -f "$FIREZONE_TOKEN" ]; then
    FIREZONE_TOKEN=$(cat "$FIREZONE_TOKEN")
    export FIREZONE_TOKEN
fi
