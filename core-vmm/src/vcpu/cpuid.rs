//! What CPUID tells the guest: what KVM supports, with each vCPU's place in the topology.
//!
//! One socket of as many single-threaded cores as there can be vCPUs: one that comes later finds
//! its place among the others. APIC ids are the vCPU indexes.
//! Performance counters are not shown. A wrong topology costs boot time: Linux then sorts vCPUs
//! into packages one by one.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

/// As many vCPUs have ids of eight bits that mean no more than one.
pub const MAX_SMALL_IDS: u32 = 255;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES_INTEL: u32 = 0x4;
const LEAF_PERFORMANCE_INTEL: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
/// KVM's features, Linux `Documentation/virt/kvm/x86/cpuid.rst`.
const LEAF_KVM: u32 = 0x4000_0001;
const LEAF_WIDTHS: u32 = 0x8000_0008;
const LEAF_CACHES_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;
const LEAF_PERFORMANCE_AMD: u32 = 0x8000_0022;
const LEAF_TOPOLOGY_V2_AMD: u32 = 0x8000_0026;

const FEATURE_ECX_X2APIC: u32 = 1 << 21;
const FEATURE_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURE_EDX_HYPER_THREADING: u32 = 1 << 28;

/// Messages have 15 bits for their destination: `interrupt::kvm` takes them apart.
const KVM_EXTENDED_DESTINATION: u32 = 1 << 15;

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Bits of a field of CPUID.
const fn field(width: u32, shift: u32) -> u32 {
    ((1 << width) - 1) << shift
}

fn with_field(register: u32, width: u32, shift: u32, value: u32) -> u32 {
    register & !field(width, shift) | (value << shift) & field(width, shift)
}

/// What KVM on this host can show to a guest.
#[derive(Clone, Debug)]
pub struct Supported {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl Supported {
    /// Asks KVM.
    ///
    /// # Errors
    ///
    /// Fails if KVM does not tell.
    pub fn of(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        let entries = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?.as_slice().to_vec();
        Ok(Self { entries, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) })
    }

    /// The guest's physical address width in bits: the host's, which the guest is shown too.
    #[must_use]
    pub fn address_bits(&self) -> u32 {
        let widths = self.entries.iter().find(|entry| entry.function == LEAF_WIDTHS);
        // Intel and AMD alike: a processor without the leaf has 36 bits.
        widths.map_or(36, |entry| entry.eax & 0xff).clamp(32, 52)
    }

    /// The entries for vCPU `index` of the `count` that there can be, both in what x2APIC can number.
    #[must_use]
    pub fn for_vcpu(&self, index: u32, count: u32) -> Vec<kvm_cpuid_entry2> {
        let topology = Topology { index, count };
        let mut entries: Vec<_> = self
            .entries
            .iter()
            .filter(|entry| {
                !matches!(
                    entry.function,
                    LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_TOPOLOGY_V2_AMD | LEAF_PERFORMANCE_AMD
                )
            })
            .copied()
            .collect();
        for entry in &mut entries {
            topology.fill(entry);
            if entry.function == LEAF_FEATURES {
                entry.ecx |= FEATURE_ECX_HYPERVISOR | FEATURE_ECX_X2APIC;
                if self.tsc_deadline {
                    entry.ecx |= FEATURE_ECX_TSC_DEADLINE;
                }
            }
        }
        let highest = self.entries.iter().find(|entry| entry.function == 0);
        if highest.is_some_and(|entry| entry.eax >= LEAF_TOPOLOGY) {
            entries.extend(topology.levels(LEAF_TOPOLOGY));
        }
        if highest.is_some_and(|entry| entry.eax >= LEAF_TOPOLOGY_V2) {
            entries.extend(topology.levels(LEAF_TOPOLOGY_V2));
        }
        entries
    }
}

/// The entries as KVM takes them.
///
/// # Errors
///
/// Fails if there are more than KVM takes.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, kvm_ioctls::Error> {
    CpuId::from_entries(entries).map_err(|_error| kvm_ioctls::Error::new(libc::E2BIG))
}

/// A vCPU's place.
#[derive(Clone, Copy, Debug)]
struct Topology {
    index: u32,
    count: u32,
}

impl Topology {
    /// How many bits number the cores.
    fn core_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    /// Sets what a leaf that KVM gave says about the topology.
    fn fill(self, entry: &mut kvm_cpuid_entry2) {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = with_field(entry.ebx, 8, 24, self.index);
                entry.ebx = with_field(entry.ebx, 8, 16, (1 << self.core_bits()).min(255));
                if self.count > 1 {
                    entry.edx |= FEATURE_EDX_HYPER_THREADING;
                } else {
                    entry.edx &= !FEATURE_EDX_HYPER_THREADING;
                }
            }
            // A type of 0 ends the list of caches. The last level is shared by all, others are
            // each core's own.
            LEAF_CACHES_INTEL if entry.eax & field(5, 0) != 0 => {
                let sharers = self.cache_sharers(entry.eax);
                entry.eax = with_field(entry.eax, 12, 14, sharers - 1);
                entry.eax = with_field(entry.eax, 6, 26, (1 << self.core_bits()) - 1);
            }
            LEAF_CACHES_AMD if entry.eax & field(5, 0) != 0 => {
                let sharers = self.cache_sharers(entry.eax);
                entry.eax = with_field(entry.eax, 12, 14, sharers - 1);
            }
            LEAF_KVM if self.count > MAX_SMALL_IDS => entry.eax |= KVM_EXTENDED_DESTINATION,
            LEAF_PERFORMANCE_INTEL => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            LEAF_WIDTHS => {
                entry.ecx = with_field(entry.ecx, 8, 0, (self.count - 1).min(255));
                entry.ecx = with_field(entry.ecx, 4, 12, self.core_bits());
            }
            LEAF_TOPOLOGY_AMD => {
                entry.eax = self.index;
                // Core id and threads per core less one; then one node per socket, node 0.
                entry.ebx = self.index & field(8, 0);
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    fn cache_sharers(self, eax: u32) -> u32 {
        let level = (eax & field(3, 5)) >> 5;
        if level >= 3 { 1 << self.core_bits() } else { 1 }
    }

    /// The levels of an extended topology leaf: threads, cores, and the end of the list.
    fn levels(self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | kind << 8,
            edx: self.index,
            ..Default::default()
        };
        [
            level(0, 0, 1, LEVEL_THREAD),
            level(1, self.core_bits(), self.count & field(16, 0), LEVEL_CORE),
            level(2, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    fn supported() -> Supported {
        Supported {
            entries: vec![
                entry(0, 0x1f),
                entry(LEAF_FEATURES, 0),
                entry(LEAF_CACHES_INTEL, 0x121),
                entry(LEAF_CACHES_INTEL, 0x163),
                entry(LEAF_PERFORMANCE_INTEL, 0x0730_0402),
                entry(LEAF_TOPOLOGY, 9),
                entry(LEAF_KVM, 1),
                entry(LEAF_WIDTHS, 0x3028),
                entry(LEAF_TOPOLOGY_AMD, 7),
                entry(LEAF_TOPOLOGY_V2_AMD, 7),
            ],
            tsc_deadline: true,
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32) -> Vec<kvm_cpuid_entry2> {
        entries.iter().filter(|entry| entry.function == function).copied().collect()
    }

    #[test]
    fn each_vcpu_finds_its_id_and_the_number_of_cores_in_every_leaf() {
        let entries = supported().for_vcpu(2, 3);
        let features = find(&entries, LEAF_FEATURES)[0];
        assert_eq!(features.ebx >> 24, 2);
        assert_eq!(features.ebx >> 16 & 0xff, 4);
        assert_ne!(features.edx & FEATURE_EDX_HYPER_THREADING, 0);
        for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
            let levels = find(&entries, function);
            assert_eq!(levels.len(), 3);
            assert!(levels.iter().all(|level| level.edx == 2));
            assert_eq!((levels[0].eax, levels[0].ebx, levels[0].ecx), (0, 1, 0x100));
            assert_eq!((levels[1].eax, levels[1].ebx, levels[1].ecx), (2, 3, 0x201));
        }
        assert_eq!(find(&entries, LEAF_WIDTHS)[0].ecx, 2 << 12 | 2);
        assert_eq!(find(&entries, LEAF_TOPOLOGY_AMD)[0].eax, 2);
        assert!(find(&entries, LEAF_TOPOLOGY_V2_AMD).is_empty());
    }

    #[test]
    fn a_guest_knows_its_hypervisor_and_has_x2apic_and_no_counters() {
        let entries = supported().for_vcpu(0, 1);
        let features = find(&entries, LEAF_FEATURES)[0];
        let wanted = FEATURE_ECX_HYPERVISOR | FEATURE_ECX_X2APIC | FEATURE_ECX_TSC_DEADLINE;
        assert_eq!(features.ecx & wanted, wanted);
        assert_eq!(features.edx & FEATURE_EDX_HYPER_THREADING, 0);
        assert_eq!(find(&entries, LEAF_PERFORMANCE_INTEL)[0].eax, 0);
    }

    #[test]
    fn inner_caches_are_private_and_the_last_level_is_shared() {
        let entries = supported().for_vcpu(0, 4);
        let caches = find(&entries, LEAF_CACHES_INTEL);
        assert_eq!(caches[0].eax >> 14 & 0xfff, 0);
        assert_eq!(caches[1].eax >> 14 & 0xfff, 3);
        assert!(caches.iter().all(|cache| cache.eax >> 26 == 3));
    }

    #[test]
    fn ids_beyond_eight_bits_are_whole_where_there_is_room_and_never_wrong() {
        let entries = supported().for_vcpu(299, 300);
        let features = find(&entries, LEAF_FEATURES)[0];
        assert_eq!((features.ebx >> 24, features.ebx >> 16 & 0xff), (299 & 0xff, 255));
        let levels = find(&entries, LEAF_TOPOLOGY);
        assert!(levels.iter().all(|level| level.edx == 299));
        assert_eq!((levels[1].eax, levels[1].ebx), (9, 300));
        assert_eq!(find(&entries, LEAF_WIDTHS)[0].ecx, 9 << 12 | 255);
        assert_eq!(find(&entries, LEAF_TOPOLOGY_AMD)[0].eax, 299);
        let caches = find(&entries, LEAF_CACHES_INTEL);
        assert_eq!(caches[1].eax >> 14 & 0xfff, 511);
        assert_eq!(caches[1].eax >> 26, 63, "six bits");
    }

    #[test]
    fn messages_have_longer_destinations_only_where_an_id_needs_them() {
        let features = |count| find(&supported().for_vcpu(0, count), LEAF_KVM)[0].eax;
        assert_eq!(features(255), 1);
        assert_eq!(features(256), 1 | KVM_EXTENDED_DESTINATION);
    }

    #[test]
    fn the_address_width_is_the_hosts() {
        assert_eq!(supported().address_bits(), 40);
    }
}
