#!/bin/sh
# Argument: controller or node. All containers share /etc/munge (one key) and /shared (runs).
set -eu
mkdir -p /run/munge /var/spool/slurmctld /var/spool/slurmd
if [ "$1" = controller ] && [ ! -s /etc/munge/munge.key ]; then
  (umask 077; head -c 1024 /dev/urandom >/etc/munge/munge.key)
fi
until [ -s /etc/munge/munge.key ]; do sleep 0.2; done
chown -R munge: /etc/munge /run/munge && chmod 755 /run/munge && chmod 400 /etc/munge/munge.key
su -s /bin/sh munge -c "munged --force"
case $1 in
  controller) exec slurmctld -D ;;
  node) exec slurmd -D -N "$(hostname)" ;;
esac
