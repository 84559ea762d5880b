#!/bin/sh
# Start a Sentinel that watches over FIRST, and over what has taken its place since: its file in DATA remembers that.
# SELF: this host's name, as others reach it. PASSWORD_FILE: holds the password of the Valkeys and of the Sentinels.
set -eu
umask 077
file=${DATA:-/data}/sentinel.conf
password=$(cat "$PASSWORD_FILE")
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
# The password may be a new one, so what the file says of the old one goes.
{
  grep -v -e '^requirepass ' -e '^user default ' -e '^sentinel auth-pass ' "$file"
  printf '%s\n' "requirepass $password" "sentinel auth-pass voice $password"
} >"$file.new"
mv "$file.new" "$file"
exec valkey-server "$file" --sentinel "$@"
