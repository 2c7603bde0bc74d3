//! The end of everything in the guest: processes, file systems; the machine follows.

use std::{fs, io, sync::Arc, time::Duration};

use rustix::{
    fs::sync,
    mount::{UnmountFlags, unmount},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout_at},
};

use crate::{
    cgroup::Cgroup,
    container::Containers,
    mounts::{STATE, mounted_below},
    process::Process,
    text::chain,
};

/// How long processes have between SIGTERM and SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(2);
/// How long killed processes may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Ends all processes of all containers, writes everything to the disks and unmounts them.
pub(crate) async fn end_everything(containers: &Containers) {
    let left = containers.close();
    for (signal, limit) in [(libc::SIGTERM, TERM_LIMIT), (libc::SIGKILL, KILL_LIMIT)] {
        let running: Vec<_> = left.iter().filter(|(_, init)| init.exit().is_none()).collect();
        if running.is_empty() {
            break;
        }
        end(&running, signal, limit).await;
    }
    if let Err(error) = spawn_blocking(settle_file_systems).await {
        log::error!("the file systems were not settled: {error}");
    }
}

async fn end(running: &[&(Arc<Cgroup>, Arc<Process>)], signal: i32, limit: Duration) {
    for (cgroup, _init) in running {
        if let Err(error) = cgroup.signal_all(signal) {
            log::warn!("{}", chain(&error));
        }
    }
    let deadline = Instant::now() + limit;
    for (_cgroup, init) in running {
        if timeout_at(deadline, init.ended()).await.is_err() {
            log::info!("{} outlives signal {signal}", init.id);
        }
    }
}

/// How much the kernel has in memory that is not written yet, on its way or not.
pub(crate) fn unwritten_bytes() -> io::Result<u64> {
    Ok(unwritten(&fs::read_to_string("/proc/meminfo")?))
}

/// Dirty pages, pages being written, and those of FUSE being written (proc(5), meminfo).
fn unwritten(meminfo: &str) -> u64 {
    let fields = ["Dirty:", "Writeback:", "WritebackTmp:"];
    let of = |line: &str| {
        let (name, amount) = line.split_once(' ')?;
        let kib = amount.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
        fields.contains(&name).then(|| kib.saturating_mul(1024))
    };
    meminfo.lines().filter_map(of).fold(0, u64::saturating_add)
}

fn settle_file_systems() {
    sync();
    let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else {
        log::error!("can't read the table of mounts");
        return;
    };
    for target in mounted_below(&table, STATE).rev() {
        if let Err(error) = unmount(target, UnmountFlags::NOFOLLOW) {
            log::warn!("can't unmount {target}: {error}");
        }
    }
    sync();
}

#[cfg(test)]
mod tests {
    use super::unwritten;

    #[test]
    fn what_is_not_written_yet_is_added_up() {
        let text = "MemTotal: 9 kB\nDirty:       12 kB\nWriteback:    3 kB\nWritebackTmp:   1 kB\n";
        assert_eq!(unwritten(text), 16 << 10);
        assert_eq!(unwritten("Dirty: many\n"), 0);
    }
}
