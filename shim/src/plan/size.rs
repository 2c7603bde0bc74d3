//! How many processors and how much memory a guest has, and can be given. Pure.

use nacre_proto::vmm::MEMORY_STEP_BYTES;

use crate::{
    plan::{PlanError, SandboxConfig, inputs::HostFacts},
    size::ByteSize,
};

/// What a guest begins with makes sense on this host.
pub(super) fn check(config: &SandboxConfig, facts: &HostFacts) -> Result<(), PlanError> {
    if config.cpus == 0 {
        return Err(PlanError::NoCpus);
    }
    let asked = config.memory;
    match asked.0 {
        0 => Err(PlanError::NoMemory),
        _ if is_beyond_width(asked, facts) => Err(beyond_width(asked, facts)),
        _ if asked > facts.memory_and_swap => {
            Err(PlanError::TooMuchMemory { asked, available: facts.memory_and_swap })
        }
        _ => Ok(()),
    }
}

/// A bound that needs no KVM; the VMM knows the guest's own width and how it is used.
fn is_beyond_width(asked: ByteSize, facts: &HostFacts) -> bool {
    facts.address_bits.is_some_and(|bits| asked.0.checked_shr(bits) != Some(0))
}

fn beyond_width(asked: ByteSize, facts: &HostFacts) -> PlanError {
    PlanError::BeyondWidth { asked, address_bits: facts.address_bits.unwrap_or_default() }
}

/// As many processors as the host has, and no fewer than there are from the beginning.
pub(super) fn max_cpus(config: &SandboxConfig, facts: &HostFacts) -> Result<u32, PlanError> {
    match config.max_cpus {
        None => Ok(facts.cpus.max(config.cpus)),
        Some(max) if max < config.cpus => Err(PlanError::MaxCpus { max, cpus: config.cpus }),
        Some(max) => Ok(max),
    }
}

/// As much memory as the host has, in whole steps from what there is in the beginning.
pub(super) fn max_memory(config: &SandboxConfig, facts: &HostFacts) -> Result<ByteSize, PlanError> {
    let memory = config.memory;
    match config.max_memory {
        None => {
            let more = facts.memory.0.saturating_sub(memory.0);
            Ok(ByteSize(memory.0 + more / MEMORY_STEP_BYTES * MEMORY_STEP_BYTES))
        }
        Some(max) if max < memory => Err(PlanError::MaxMemory { max, memory }),
        Some(max) if is_beyond_width(max, facts) => Err(beyond_width(max, facts)),
        Some(max) if max > facts.memory_and_swap => {
            Err(PlanError::TooMuchMemory { asked: max, available: facts.memory_and_swap })
        }
        Some(max) => Ok(max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{config, facts};

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_guest_can_be_given_what_the_host_has_unless_told_otherwise() {
        let (mut config, mut facts) = (config(), facts());
        (config.cpus, config.memory) = (1, ByteSize(200 << 20));
        (facts.cpus, facts.memory) = (4, ByteSize(GIB));
        assert_eq!(max_cpus(&config, &facts), Ok(4));
        assert_eq!(max_memory(&config, &facts), Ok(ByteSize(968 << 20)));
        (config.cpus, config.memory) = (6, ByteSize(2 * GIB));
        assert_eq!(max_cpus(&config, &facts), Ok(6));
        assert_eq!(max_memory(&config, &facts), Ok(config.memory));
        (config.max_cpus, config.max_memory) = (Some(300), Some(ByteSize(8 * GIB)));
        facts.memory_and_swap = ByteSize(8 * GIB);
        assert_eq!(max_cpus(&config, &facts), Ok(300));
        assert_eq!(max_memory(&config, &facts), Ok(ByteSize(8 * GIB)));
    }

    #[test]
    fn a_bound_below_the_beginning_or_beyond_all_addresses_is_refused() {
        let (mut config, facts) = (config(), facts());
        (config.cpus, config.max_cpus) = (2, Some(1));
        let error = max_cpus(&config, &facts).unwrap_err();
        assert_eq!(error.to_string(), "--max-cpus 1 is less than the 2 CPUs of the beginning");
        config.max_memory = Some(ByteSize(1 << 20));
        let error = max_memory(&config, &facts).unwrap_err();
        assert_eq!(error.to_string(), "--max-memory 1M is less than the 512M of the beginning");
        config.max_memory = Some(ByteSize(1 << 41));
        let error = max_memory(&config, &facts).unwrap_err();
        assert!(matches!(error, PlanError::BeyondWidth { .. }));
        config.max_memory = Some(ByteSize(2 * GIB));
        let error = max_memory(&config, &facts).unwrap_err();
        assert!(matches!(error, PlanError::TooMuchMemory { .. }));
    }
}
