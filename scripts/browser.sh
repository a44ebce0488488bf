#!/usr/bin/env bash
# Installs a headless Chromium for the test that opens a report in it, with apt, where there is none.
#
#   bash scripts/browser.sh
#
# Needs root and Debian or Ubuntu; elsewhere it says so, and the test is skipped. VLM_REASON_CHROMIUM names another one.
set -euo pipefail

say() { printf 'browser: %s\n' "$1"; }

if [ -n "${VLM_REASON_CHROMIUM:-}" ]; then exit 0; fi
for name in chromium-headless-shell chromium chromium-browser google-chrome chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    say "no Chromium, and no root with apt-get to install it: the test of the report in a browser will be skipped"
    exit 0
fi

# The shell alone, without a desktop's libraries, where the distribution has it (Debian); Ubuntu's is a snap.
export DEBIAN_FRONTEND=noninteractive
start=$SECONDS
log=$(mktemp)
trap 'rm -f "$log"' EXIT
say "installing Chromium ..."
if { apt-get update && apt-get install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core; } \
    </dev/null >"$log" 2>&1; then
    say "Chromium: done in $((SECONDS - start)) s"
else
    tail -n 3 "$log" >&2
    say "Chromium could not be installed (above): the test of the report in a browser will not run"
fi
