//! How large a pod's guest is to be: what it has by itself and what its containers are allowed. Pure.

use nacre_proto::vmm::MEMORY_STEP_BYTES;
use oci_spec::runtime::LinuxResources;

/// The period of a quota that has none of its own, in microseconds (the kernel's default).
const PERIOD_US: u64 = 100_000;
/// Left to the guest's kernel and agent beside what containers use, in bytes.
const BESIDE_BYTES: u64 = 128 << 20;

/// What one container is allowed, as far as that is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Processors' time, in thousandths of a processor.
    cpu_thousandths: Option<u64>,
    memory_bytes: Option<u64>,
}

impl Limits {
    /// By a specification. Without a limit, and with a negative one, it is not limited.
    pub(super) fn of(resources: Option<&LinuxResources>) -> Self {
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(oci_spec::runtime::LinuxCpu::quota);
        let quota = quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0);
        let period = cpu.and_then(oci_spec::runtime::LinuxCpu::period).unwrap_or(PERIOD_US).max(1);
        let memory = resources.and_then(|resources| resources.memory().as_ref());
        let limit = memory.and_then(oci_spec::runtime::LinuxMemory::limit);
        let limit = limit.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
        let thousandths = |quota: u64| quota.saturating_mul(1000) / period;
        Self { cpu_thousandths: quota.map(thousandths), memory_bytes: limit }
    }

    /// With what a change of them says; what it leaves out stays.
    pub(super) fn changed_by(self, resources: &LinuxResources) -> Self {
        let new = Self::of(Some(resources));
        let names_cpu = resources.cpu().as_ref().is_some_and(|cpu| cpu.quota().is_some());
        let names_memory = resources.memory().as_ref().is_some_and(|all| all.limit().is_some());
        Self {
            cpu_thousandths: if names_cpu { new.cpu_thousandths } else { self.cpu_thousandths },
            memory_bytes: if names_memory { new.memory_bytes } else { self.memory_bytes },
        }
    }
}

/// An amount of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) cpus: u32,
    pub(super) memory_bytes: u64,
}

impl Size {
    /// What a guest is to have that has `self` without a container, no more than `most`, and no
    /// less memory than leaves room for what its containers use.
    pub(super) fn with(
        self,
        containers: impl Iterator<Item = Limits>,
        most: Self,
        used_bytes: u64,
    ) -> Self {
        let (mut thousandths, mut memory) = (0_u64, 0_u64);
        for limits in containers {
            thousandths = thousandths.saturating_add(limits.cpu_thousandths.unwrap_or(0));
            memory = memory.saturating_add(limits.memory_bytes.unwrap_or(0));
        }
        let more = u32::try_from(thousandths.div_ceil(1000)).unwrap_or(u32::MAX);
        let cpus = self.cpus.saturating_add(more).min(most.cpus).max(1);
        let least = used_bytes.saturating_add(BESIDE_BYTES).saturating_sub(self.memory_bytes);
        let steps = memory.max(least).div_ceil(MEMORY_STEP_BYTES);
        let room = most.memory_bytes.saturating_sub(self.memory_bytes) / MEMORY_STEP_BYTES;
        Self { cpus, memory_bytes: self.memory_bytes + steps.min(room) * MEMORY_STEP_BYTES }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIB: u64 = 1 << 20;
    const BASE: Size = Size { cpus: 1, memory_bytes: 256 * MIB };
    const MOST: Size = Size { cpus: 4, memory_bytes: 2048 * MIB };

    fn resources(cpu: &serde_json::Value, memory: &serde_json::Value) -> LinuxResources {
        serde_json::from_value(json!({"cpu": cpu, "memory": memory})).unwrap()
    }

    fn limits(quota: i64, limit: i64) -> Limits {
        Limits::of(Some(&resources(&json!({"quota": quota}), &json!({"limit": limit}))))
    }

    fn size(containers: &[Limits]) -> (u32, u64) {
        let size = BASE.with(containers.iter().copied(), MOST, 0);
        (size.cpus, size.memory_bytes / MIB)
    }

    #[test]
    fn a_guest_has_its_own_and_what_its_containers_are_allowed_in_whole_steps() {
        let mib = |mib: i64| mib << 20;
        assert_eq!(size(&[]), (1, 256));
        assert_eq!(size(&[Limits::default(); 3]), (1, 256));
        assert_eq!(size(&[limits(50_000, mib(100))]), (2, 384));
        assert_eq!(size(&[limits(50_000, mib(100)), limits(150_000, mib(156))]), (3, 512));
        assert_eq!(size(&[limits(-1, -1)]), (1, 256), "as good as none");
    }

    #[test]
    fn no_guest_is_larger_than_it_can_be() {
        assert_eq!(size(&[limits(i64::MAX, i64::MAX), limits(i64::MAX, i64::MAX)]), (4, 2048));
        let most = Size { cpus: 1, memory_bytes: 300 * MIB };
        assert_eq!(BASE.with([limits(100_000, 1 << 30)].into_iter(), most, 0), BASE);
    }

    #[test]
    fn what_is_in_use_is_not_taken() {
        let used = BASE.with(std::iter::empty(), MOST, 700 * MIB);
        assert_eq!(used.memory_bytes, (256 + 5 * 128) * MIB);
        assert_eq!(BASE.with(std::iter::empty(), MOST, 100 * MIB), BASE);
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let before = limits(50_000, 1 << 20);
        let none = json!({});
        assert_eq!(before.changed_by(&resources(&none, &none)), before);
        let twice = before.changed_by(&resources(&none, &json!({"limit": 2 << 20})));
        assert_eq!(twice, limits(50_000, 2 << 20));
        let free = before.changed_by(&resources(&json!({"quota": -1}), &none));
        assert_eq!(free, Limits { cpu_thousandths: None, ..before });
    }
}
