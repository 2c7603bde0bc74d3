#!/bin/busybox sh
# The emulated host's first program: modules, the root, the share; then xtask itself takes over.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
echo "nacre-host: init"
load() {
    for module in /modules/"$1"/*; do
        $B insmod "$module" || echo "nacre-host: cannot load $module"
    done
}
load root
load later &
$B mount -t erofs -o ro /dev/vda /lower || echo "nacre-host: cannot mount the root"
$B mount -t tmpfs -o mode=755 tmpfs /upper
$B mkdir /upper/files /upper/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /root
R=/root
$B mount -t devtmpfs dev $R/dev
$B mkdir -p $R/dev/pts $R/dev/shm $R/dev/net
$B mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts $R/dev/pts
$B mount -t tmpfs tmpfs $R/dev/shm
# Opening one of these loads its module.
$B mknod $R/dev/net/tun c 10 200
$B mknod $R/dev/vhost-net c 10 238
$B mknod $R/dev/vhost-vsock c 10 241
$B ln -s /proc/self/fd $R/dev/fd
$B mount -t proc proc $R/proc
$B mount -t sysfs sys $R/sys
$B mount -t cgroup2 cgroup $R/sys/fs/cgroup
$B mount -t tmpfs -o mode=755 tmpfs $R/run
$B mount -t tmpfs -o mode=1777 tmpfs $R/tmp
$B mount -t virtiofs host $R/host || echo "nacre-host: cannot mount the share"
# A guest's kernel is read through the share: by 4 MiB it comes six times faster than by 128 KiB.
echo 4096 > $R/sys/class/bdi/$($B mountpoint -d $R/host)/read_ahead_kb
$B ip link set lo up
wait
$B ip link set eth0 up
$B ip addr add 10.0.2.15/24 dev eth0
$B ip route add default via 10.0.2.2
echo "nacre-host" > /proc/sys/kernel/hostname
echo "nacre-host: up"
exec $B switch_root $R "$nacre_executor" in-host
