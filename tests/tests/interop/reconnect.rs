//! Our disk under QEMU, killed while a Linux guest uses it. QEMU connects anew by itself, and keeps a
//! region in which is marked what is in flight.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nacre_tests::backend::Backend;
use nacre_tests::process::Signal;

use crate::guest::Guest;

/// How often the backend is killed.
const KILLS: u32 = 10;
const DISK_BYTES: u64 = 16 << 20;

/// Writes, reads and compares without a pause; says how many rounds were made.
const SCRIPT: &str = "#!/bin/sh
mkdir -p /tmp
i=0
while [ ! -e /job/enough ]; do
    i=$((i + 1))
    dd if=/dev/urandom of=/tmp/new bs=64k count=16 2>/dev/null
    at=$((i % 8 * 16))
    dd if=/tmp/new of=/dev/vda bs=64k seek=$at conv=fsync 2>/dev/null ||
        echo \"round $i: cannot write\" >> /job/errors
    echo 3 > /proc/sys/vm/drop_caches
    dd if=/dev/vda of=/tmp/old bs=64k skip=$at count=16 2>/dev/null ||
        echo \"round $i: cannot read\" >> /job/errors
    cmp /tmp/new /tmp/old || echo \"round $i: differs\" >> /job/errors
    echo $i > /job/count
    mv /job/count /job/rounds
done
dmesg | grep -i 'i/o error\\|timed out\\|hung\\|call trace\\|nobody cared' >> /job/errors
echo done > /job/result
";

#[test]
fn a_guest_of_qemu_notices_nothing_of_a_disk_that_is_killed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    fs::File::create(&image)?.set_len(DISK_BYTES)?;
    let disk = ["--disk", &image.display().to_string(), "--lock-wait", "60"];
    let mut disk = Backend::start("nacre-blk", dir.path(), &disk)?;
    let chardev = format!("socket,id=disk,path={},reconnect-ms=10", disk.socket().display());
    let devices = ["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=disk"];
    let mut guest = Guest::start(dir.path(), SCRIPT, &devices.map(str::to_owned))?;
    guest.another_round()?;
    for kill in 0..KILLS {
        // Each at another moment of a round.
        thread::sleep(Duration::from_millis(u64::from(kill) * 37));
        disk = disk.replace(Signal::KILL)?;
        guest.another_round()?;
    }
    guest.finish()
}
