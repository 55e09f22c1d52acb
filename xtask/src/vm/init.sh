#!/bin/busybox sh
# The first process of a test machine: mounts what tests need, loads modules, runs the command, says how it ended.
B=/bin/busybox
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TERM=dumb
$B mkdir -p /proc /sys /dev /tmp /run /mnt
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev 2>/dev/null
$B mkdir -p /dev/shm
$B mount -t tmpfs tmpfs /dev/shm
# Nothing over /tmp and /run: the root is in memory, and the tests may lie there.
$B mount -t bpf bpf /sys/fs/bpf
$B mount -t cgroup2 cgroup2 /sys/fs/cgroup
$B stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS1 2>&1
while read -r module; do
    $B insmod "/modules/$module.ko" || echo "module $module does not load"
done </modules/order
$B ip link set lo up
ulimit -n 65536
$B sh /command
echo "VM-EXIT: $?"
$B sync
$B stty -F /dev/ttyS1 raw -echo
$B poweroff -f
