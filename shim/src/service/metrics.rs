//! Figures of containers, together.

use containerd_shim_protos::cgroups_v2::metrics::Metrics;

/// The figures as containerd names their type.
pub(super) const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// What several containers use together. Limits and pressures are of one container and left out.
pub(super) fn sum(all: &[Metrics]) -> Metrics {
    let mut sum = Metrics::new();
    for one in all {
        let (pids, more) = (sum.pids.mut_or_insert_default(), &one.pids);
        pids.current = pids.current.saturating_add(more.current);
        let (cpu, more) = (sum.cpu.mut_or_insert_default(), &one.cpu);
        cpu.usage_usec = cpu.usage_usec.saturating_add(more.usage_usec);
        cpu.user_usec = cpu.user_usec.saturating_add(more.user_usec);
        cpu.system_usec = cpu.system_usec.saturating_add(more.system_usec);
        cpu.nr_periods = cpu.nr_periods.saturating_add(more.nr_periods);
        cpu.nr_throttled = cpu.nr_throttled.saturating_add(more.nr_throttled);
        cpu.throttled_usec = cpu.throttled_usec.saturating_add(more.throttled_usec);
        let (memory, more) = (sum.memory.mut_or_insert_default(), &one.memory);
        memory.usage = memory.usage.saturating_add(more.usage);
        memory.anon = memory.anon.saturating_add(more.anon);
        memory.file = memory.file.saturating_add(more.file);
        memory.inactive_file = memory.inactive_file.saturating_add(more.inactive_file);
        memory.active_file = memory.active_file.saturating_add(more.active_file);
        memory.inactive_anon = memory.inactive_anon.saturating_add(more.inactive_anon);
        memory.active_anon = memory.active_anon.saturating_add(more.active_anon);
        memory.pgfault = memory.pgfault.saturating_add(more.pgfault);
        memory.pgmajfault = memory.pgmajfault.saturating_add(more.pgmajfault);
        memory.swap_usage = memory.swap_usage.saturating_add(more.swap_usage);
        let (events, more) = (sum.memory_events.mut_or_insert_default(), &one.memory_events);
        events.oom = events.oom.saturating_add(more.oom);
        events.oom_kill = events.oom_kill.saturating_add(more.oom_kill);
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
