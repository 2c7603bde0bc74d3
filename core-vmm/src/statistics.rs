//! What KVM itself counts about the VM and its vCPUs, where the host gives it (Linux 5.14 and
//! later, `KVM_GET_STATS_FD`).
//!
//! Linux `Documentation/virt/kvm/api.rst`, section 4.133: a descriptor whose header says where
//! its list of descriptions and its block of values lie. The descriptors and the places of the
//! figures that are wanted are found once, before the jail closes; later each figure costs one
//! read. Nothing of the layout is believed: a list that does not fit its limits gives no figures.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt};

use kvm_ioctls::VmFd;

use crate::{sys, vcpu::thread::Vcpu};

/// The figures that are told, by KVM's names: exits and their kinds, what was injected, faults
/// on guest memory, and which pages it is made of.
const WANTED: [&str; 14] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_exits",
    "irq_window_exits",
    "signal_exits",
    "irq_injections",
    "hypercalls",
    "insn_emulation",
    "pf_taken",
    "tlb_flush",
    "pages_4k",
    "pages_2m",
];

/// `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc` without its name: flags, exponent, size, offset, bucket_size.
const DESCRIPTION_BYTES: usize = 16;
/// Limits of what is taken for a list: KVM has about fifty figures with names of up to 48 bytes.
const MAX_DESCRIPTIONS: u32 = 1024;
const MAX_NAME_BYTES: u32 = 256;
const VALUE_BYTES: u64 = 8;
/// Exponent (two bytes) and number of values (two bytes) of a plain count.
const COUNT: [u8; 4] = 0x0001_0000_u32.to_le_bytes();

/// A figure's place in a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    name: &'static str,
    offset: u64,
}

/// One descriptor, the VM's or a vCPU's, and what is read from it.
#[derive(Debug)]
struct Source {
    file: File,
    places: Vec<Place>,
}

/// All of a VM's figures. Empty where the host has none.
#[derive(Debug, Default)]
pub struct Statistics {
    sources: Vec<Source>,
}

impl Statistics {
    /// Opens them for the VM and each vCPU.
    #[must_use]
    pub fn open(vm: &VmFd, vcpus: &[Vcpu]) -> Self {
        let opened = vcpus.iter().map(Vcpu::statistics).chain([sys::kvm_statistics(vm)]);
        let source = |file: io::Result<File>| -> io::Result<Source> {
            let file = file?;
            let places = places(&file)?;
            Ok(Source { file, places })
        };
        match opened.map(source).collect() {
            Ok(sources) => Self { sources },
            Err(error) => {
                log::debug!("KVM gives no statistics: {error}");
                Self::default()
            }
        }
    }

    /// The figures as they are now, all vCPUs' added; none where the host has none.
    #[must_use]
    pub fn read(&self) -> Option<BTreeMap<String, u64>> {
        let mut sums = BTreeMap::new();
        for Source { file, places } in &self.sources {
            for Place { name, offset } in places {
                let mut value = [0; 8];
                if let Err(error) = file.read_exact_at(&mut value, *offset) {
                    log::debug!("KVM's figure {name} can't be read: {error}");
                    return None;
                }
                let sum: &mut u64 = sums.entry((*name).to_owned()).or_default();
                *sum = sum.saturating_add(u64::from_le_bytes(value));
            }
        }
        (!sums.is_empty()).then_some(sums)
    }
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Finds the wanted figures by the descriptor's own list.
fn places(file: &impl FileExt) -> io::Result<Vec<Place>> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let [_flags, name_bytes, count, _id, descriptions, data] =
        [0, 4, 8, 12, 16, 20].map(|at| word(&header, at).unwrap_or_default());
    if count > MAX_DESCRIPTIONS || name_bytes > MAX_NAME_BYTES {
        return Err(malformed("a list of statistics beyond all limits"));
    }
    let name_bytes = usize::try_from(name_bytes).map_err(io::Error::other)?;
    let count = usize::try_from(count).map_err(io::Error::other)?;
    let mut list = vec![0; count * (DESCRIPTION_BYTES + name_bytes)];
    file.read_exact_at(&mut list, descriptions.into())?;
    let found = list.chunks_exact(DESCRIPTION_BYTES + name_bytes).filter_map(|description| {
        let (fixed, name) = description.split_at(DESCRIPTION_BYTES);
        let name = name.split(|byte| *byte == 0).next()?;
        let name = WANTED.into_iter().find(|wanted| wanted.as_bytes() == name)?;
        // The exponent of the scale and how many values: a plain count has 0 and 1.
        let shape: [u8; 4] = *fixed.get(4..)?.first_chunk()?;
        (shape == COUNT).then_some(())?;
        let offset = u64::from(data) + u64::from(word(fixed, 8)?);
        offset.is_multiple_of(VALUE_BYTES).then_some(Place { name, offset })
    });
    Ok(found.collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A descriptor's content as KVM lays it out: header, id, descriptions, values.
    fn content(figures: &[(&str, u16, u64)]) -> Vec<u8> {
        const NAME_BYTES: u32 = 48;
        let count = u32::try_from(figures.len()).unwrap();
        let data = 72 + count * (16 + NAME_BYTES);
        let mut bytes: Vec<u8> =
            [0, NAME_BYTES, count, 24, 72, data].into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.resize(72, b'x');
        for (index, (name, values, _)) in (0_u32..).zip(figures) {
            bytes.extend(0_u32.to_le_bytes());
            bytes.extend([0, *values].map(u16::to_le_bytes).as_flattened());
            bytes.extend((index * 8).to_le_bytes());
            bytes.extend(0_u32.to_le_bytes());
            let end = bytes.len() + 48;
            bytes.extend(name.as_bytes());
            bytes.resize(end, 0);
        }
        bytes.extend(figures.iter().flat_map(|(_, _, value)| value.to_le_bytes()));
        bytes
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn source(bytes: &[u8]) -> io::Result<Source> {
        let file = file(bytes);
        let places = places(&file)?;
        Ok(Source { file, places })
    }

    #[test]
    fn figures_that_are_wanted_are_found_by_name_and_added() {
        let vcpu = |exits| source(&content(&[("l1d_flush", 1, 9), ("exits", 1, exits)])).unwrap();
        let vm = source(&content(&[("pages_4k", 1, 5), ("exits", 32, 7)])).unwrap();
        let all = Statistics { sources: vec![vcpu(100), vcpu(23), vm] }.read().unwrap();
        let expected = [("exits", 123), ("pages_4k", 5)].map(|(n, v)| (n.to_owned(), v));
        assert_eq!(all, BTreeMap::from(expected));
    }

    #[test]
    fn a_list_that_does_not_fit_is_refused_and_cut_values_give_none() {
        let whole = content(&[("exits", 1, 1)]);
        for end in [0, 23, 72, 100] {
            assert!(source(&whole[..end]).is_err(), "{end}");
        }
        for (at, huge) in [(4, u32::MAX), (8, u32::MAX), (8, 1025), (16, u32::MAX)] {
            let mut bytes = whole.clone();
            bytes[at..at + 4].copy_from_slice(&huge.to_le_bytes());
            assert!(source(&bytes).is_err(), "{at}");
        }
        let cut = source(&whole[..whole.len() - 1]).unwrap();
        assert_eq!(Statistics { sources: vec![cut] }.read(), None);
        assert_eq!(Statistics::default().read(), None);
    }
}
