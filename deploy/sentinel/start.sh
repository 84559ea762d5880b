#!/bin/sh
# Start Valkey as the Sentinels have it: as the primary, or as its replica. Without a Sentinel that answers, FIRST is
# the primary. SELF: this host's name, as others reach it. SENTINELS: their names. PASSWORD_FILE: holds the password of
# all of them; no command line and no environment of a server shows it.
set -eu
port=${PORT:-6379}
password=$(cat "$PASSWORD_FILE")
primary=
for sentinel in $SENTINELS; do
  primary=$(REDISCLI_AUTH=$password timeout 2 valkey-cli -e -h "${sentinel%:*}" -p "${sentinel#*:}" --raw \
    sentinel get-master-addr-by-name voice 2>/dev/null | head -n 1) || true
  [ -z "$primary" ] || break
done
primary=${primary:-$FIRST}
set -- valkey-server - --port "$port" --save "" --appendonly yes --maxmemory 256mb --maxmemory-policy noeviction \
  --replica-announce-ip "$SELF" "$@"
[ "$primary" = "$SELF" ] || set -- "$@" --replicaof "$primary" "$port"
exec "$@" <<CONF
requirepass $password
masterauth $password
CONF
