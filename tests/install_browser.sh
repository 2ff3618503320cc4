#!/usr/bin/env bash
# Put Debian's Chromium on this machine for the test that opens a report; says why where it cannot.
set -euo pipefail
skipped="so the test that opens a report in a browser will be skipped"
if command -v chromium > /dev/null; then
    exit 0
fi
if ! command -v apt-get > /dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "Chromium is not installed (needs apt-get and root), $skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --quiet=2 --no-install-recommends chromium > /dev/null; }
# The lists of packages may be old or missing; refreshing them is only worth its time then.
install 2> /dev/null || { apt-get update --quiet=2 && install; } ||
    echo "Chromium could not be installed, $skipped"
