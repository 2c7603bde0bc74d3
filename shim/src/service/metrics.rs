//! Figures of containers, together.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, MemoryStat, Metrics, PSIData, PSIStats,
};
use protobuf::MessageField;

use crate::agent::{Counts, Pressure, PressureLine, Stats};

/// The figures as containerd names their type.
pub(super) const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// A container's, as containerd has them.
pub(super) fn of(stats: &Stats) -> Metrics {
    let mut metrics = Metrics::new();
    let pids = metrics.pids.mut_or_insert_default();
    pids.current = stats.pids.get("current").unwrap_or_default();
    pids.limit = limit(&stats.pids, "max");
    cpu(stats, metrics.cpu.mut_or_insert_default());
    memory(stats, metrics.memory.mut_or_insert_default());
    let (events, told) = (metrics.memory_events.mut_or_insert_default(), &stats.memory_events);
    let count = |name| told.get(name).unwrap_or_default();
    events.low = count("low");
    events.high = count("high");
    events.max = count("max");
    events.oom = count("oom");
    events.oom_kill = count("oom_kill");
    events.oom_group_kill = count("oom_group_kill");
    let io = metrics.io.mut_or_insert_default();
    io.psi = pressure(stats.io_pressure);
    for block in &stats.io {
        let count = |name| block.counts.get(name).unwrap_or_default();
        let mut entry = IOEntry::new();
        entry.major = block.major.into();
        entry.minor = block.minor.into();
        entry.rbytes = count("rbytes");
        entry.wbytes = count("wbytes");
        entry.rios = count("rios");
        entry.wios = count("wios");
        io.usage.push(entry);
    }
    metrics
}

/// A limit; the largest number says that there is none, as the kernel's "max" does.
fn limit(counts: &Counts, name: &str) -> u64 {
    counts.get(name).unwrap_or(u64::MAX)
}

fn cpu(stats: &Stats, to: &mut CPUStat) {
    let count = |name| stats.cpu.get(name).unwrap_or_default();
    to.usage_usec = count("usage_usec");
    to.user_usec = count("user_usec");
    to.system_usec = count("system_usec");
    to.nr_periods = count("nr_periods");
    to.nr_throttled = count("nr_throttled");
    to.throttled_usec = count("throttled_usec");
    to.nr_bursts = count("nr_bursts");
    to.burst_usec = count("burst_usec");
    to.psi = pressure(stats.cpu_pressure);
}

fn memory(stats: &Stats, to: &mut MemoryStat) {
    let count = |name| stats.memory.get(name).unwrap_or_default();
    to.anon = count("anon");
    to.file = count("file");
    to.kernel_stack = count("kernel_stack");
    to.slab = count("slab");
    to.sock = count("sock");
    to.shmem = count("shmem");
    to.file_mapped = count("file_mapped");
    to.file_dirty = count("file_dirty");
    to.file_writeback = count("file_writeback");
    to.anon_thp = count("anon_thp");
    to.inactive_anon = count("inactive_anon");
    to.active_anon = count("active_anon");
    to.inactive_file = count("inactive_file");
    to.active_file = count("active_file");
    to.unevictable = count("unevictable");
    to.slab_reclaimable = count("slab_reclaimable");
    to.slab_unreclaimable = count("slab_unreclaimable");
    to.pgfault = count("pgfault");
    to.pgmajfault = count("pgmajfault");
    // The kernel counts these two apart since Linux 5.9.
    to.workingset_refault =
        count("workingset_refault_anon").saturating_add(count("workingset_refault_file"));
    to.workingset_activate =
        count("workingset_activate_anon").saturating_add(count("workingset_activate_file"));
    to.workingset_nodereclaim = count("workingset_nodereclaim");
    to.pgrefill = count("pgrefill");
    to.pgscan = count("pgscan");
    to.pgsteal = count("pgsteal");
    to.pgactivate = count("pgactivate");
    to.pgdeactivate = count("pgdeactivate");
    to.pglazyfree = count("pglazyfree");
    to.pglazyfreed = count("pglazyfreed");
    to.thp_fault_alloc = count("thp_fault_alloc");
    to.thp_collapse_alloc = count("thp_collapse_alloc");
    let used = |name| stats.memory_use.get(name).unwrap_or_default();
    to.usage = used("current");
    to.usage_limit = limit(&stats.memory_use, "max");
    to.swap_usage = used("swap.current");
    to.swap_limit = limit(&stats.memory_use, "swap.max");
    to.max_usage = used("peak");
    to.psi = pressure(stats.memory_pressure);
}

fn pressure(told: Option<Pressure>) -> MessageField<PSIStats> {
    let line = |line: PressureLine| {
        let percent = |hundredths: u32| f64::from(hundredths) / 100.0;
        let mut data = PSIData::new();
        data.avg10 = percent(line.avg10);
        data.avg60 = percent(line.avg60);
        data.avg300 = percent(line.avg300);
        data.total = line.total_us;
        MessageField::some(data)
    };
    let stats = told.map(|told| {
        let mut stats = PSIStats::new();
        stats.some = line(told.some);
        stats.full = line(told.full);
        stats
    });
    MessageField::from_option(stats)
}

/// Adds fields of one message to those of another.
macro_rules! add {
    ($one:expr => $sum:expr; $($field:ident),+) => {{
        let (sum, more) = ($sum.mut_or_insert_default(), &$one);
        $(sum.$field = sum.$field.saturating_add(more.$field);)+
    }};
}

/// What several containers use together. Limits and pressures are of one container and left out.
pub(super) fn sum(all: &[Metrics]) -> Metrics {
    let mut sum = Metrics::new();
    for one in all {
        add!(one.pids => sum.pids; current);
        add!(one.cpu => sum.cpu; usage_usec, user_usec, system_usec);
        add!(one.cpu => sum.cpu; nr_periods, nr_throttled, throttled_usec);
        add!(one.memory => sum.memory; usage, swap_usage, anon, file, pgfault, pgmajfault);
        add!(one.memory => sum.memory; inactive_file, active_file, inactive_anon, active_anon);
        add!(one.memory_events => sum.memory_events; oom, oom_kill);
        sum.io.mut_or_insert_default().usage.extend(one.io.usage.iter().cloned());
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_uses_what_its_containers_use() {
        let mut one = Metrics::new();
        one.cpu.mut_or_insert_default().usage_usec = 5;
        one.memory.mut_or_insert_default().usage = 7;
        let all = sum(&[one.clone(), one]);
        assert_eq!((all.cpu.usage_usec, all.memory.usage), (10, 14));
    }
}
