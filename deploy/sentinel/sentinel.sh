#!/bin/sh
# Start a Sentinel that watches over FIRST, and over what has taken its place since: its file in DATA remembers that.
# SELF: this host's name, as others reach it.
set -eu
file=${DATA:-/data}/sentinel.conf
[ -e "$file" ] || cat >"$file" <<CONF
port ${PORT:-26379}
dir ${DATA:-/data}
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $SELF
sentinel monitor voice $FIRST ${PRIMARY_PORT:-6379} 2
sentinel down-after-milliseconds voice 2000
sentinel failover-timeout voice 10000
CONF
exec valkey-server "$file" --sentinel "$@"
