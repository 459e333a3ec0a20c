#!/usr/bin/env bash
# Install Chromium for the tests that look at the report in a browser, where it is missing and apt-get may be used.
# Usage: scripts/chromium.sh     Never fails: without a browser those tests skip and say so.
set -uo pipefail

for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "chromium: not installed, and this user cannot use apt-get; tests in a browser will skip"
  exit 0
fi

export DEBIAN_FRONTEND=noninteractive
apt() { timeout --kill-after=10 240 apt-get -qq -o Dpkg::Use-Pty=0 "$@" </dev/null >/dev/null 2>&1; }
start=$SECONDS
apt install --no-install-recommends -y chromium || { apt update && apt install --no-install-recommends -y chromium; }
if command -v chromium >/dev/null 2>&1; then
  echo "chromium: installed in $((SECONDS - start)) s"
else
  echo "chromium: apt-get could not install it; tests in a browser will skip"
fi
exit 0
