//! What a guest runs to use the registers: a device for each slot below its host bridge, and the
//! scan that the event device calls.
//!
//! Linux's acpiphp takes a slot for one where functions come and go if it has an `_ADR` and an
//! `_EJ0`. `_SUN` is the slot's name there, so it is unique over all segments.

use acpi_tables::{
    Aml,
    aml::{
        Acquire, And, Arg, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
        FieldUpdateRule, If, Local, Method, MethodCall, Mutex, Name, Notify, OpRegion,
        OpRegionSpace, Path, Release, Scope, Store, ZERO,
    },
};

use super::registers::{DOWN, EJECT, SELECT, STATUS, UP};
use crate::{
    acpi::{
        dsdt::{FOR_EVER, Raw},
        ost::{DEVICE_CHECK, EJECT_REQUEST},
    },
    memory::layout,
    pci::slot::SLOT_COUNT,
};

/// The scan, for the event device.
pub(crate) const SCAN: &str = "\\_SB_.PCIH.PSCN";

/// The host bridge of `segment`.
pub(crate) fn bridge(segment: u16) -> String {
    format!("PCI{segment:X}")
}

/// Adds the registers' device; the host bridges come with their [`slots`].
pub(crate) fn append(aml: &mut Vec<u8>, segments: u16) {
    const REGION: &str = "PREG";
    let start = layout::PCI_HOTPLUG.start;
    let len_bytes = u32::try_from(STATUS + 4 - SELECT).unwrap_or(0);
    let fields = [*b"PSEG", *b"PHUP", *b"PHDN", *b"PHEJ", *b"PHSL", *b"PHEV", *b"PHST"];
    const { assert!(UP == 4 && DOWN == 8 && EJECT == 12 && STATUS == 24, "the fields' order") };
    let fields = fields.map(|name| FieldEntry::Named(name, 32)).to_vec();
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("PCIH"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A06")),
                &Name::new(Path::new("_UID"), &"PCI hotplug"),
                &Mutex::new(Path::new("PMTX"), 0),
                &OpRegion::new(Path::new(REGION), OpRegionSpace::SystemMemory, &start, &len_bytes),
                &Field::new(
                    Path::new(REGION),
                    FieldAccessType::DWord,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    fields,
                ),
                &scan(segments),
                &Method::new(
                    Path::new("EJCT"),
                    2,
                    true,
                    vec![
                        &Acquire::new(Path::new("PMTX"), FOR_EVER),
                        &Store::new(&Path::new("PSEG"), &Arg(0)),
                        &Store::new(&Path::new("PHEJ"), &Arg(1)),
                        &Release::new(Path::new("PMTX")),
                    ],
                ),
                &Method::new(
                    Path::new("STAT"),
                    4,
                    true,
                    vec![
                        &Acquire::new(Path::new("PMTX"), FOR_EVER),
                        &Store::new(&Path::new("PSEG"), &Arg(0)),
                        &Store::new(&Path::new("PHSL"), &Arg(1)),
                        &Store::new(&Path::new("PHEV"), &Arg(2)),
                        &Store::new(&Path::new("PHST"), &Arg(3)),
                        &Release::new(Path::new("PMTX")),
                    ],
                ),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// What was added is notified before what is to go: it may be the same slot's.
fn scan(segments: u16) -> Raw {
    let mut body = Vec::new();
    Acquire::new(Path::new("PMTX"), FOR_EVER).to_aml_bytes(&mut body);
    for segment in 0..segments {
        let notify = || Path::new(&format!("\\_SB_.{}.PNTF", bridge(segment)));
        Store::new(&Path::new("PSEG"), &segment).to_aml_bytes(&mut body);
        for (register, what) in [("PHUP", DEVICE_CHECK), ("PHDN", EJECT_REQUEST)] {
            Store::new(&Local(0), &Path::new(register)).to_aml_bytes(&mut body);
            If::new(&Local(0), vec![&MethodCall::new(notify(), vec![&Local(0), &what])])
                .to_aml_bytes(&mut body);
        }
    }
    Release::new(Path::new("PMTX")).to_aml_bytes(&mut body);
    let mut aml = Vec::new();
    Method::new(Path::new("PSCN"), 0, true, vec![&Raw(body)]).to_aml_bytes(&mut aml);
    Raw(aml)
}

/// The slots of `segment`, to stand below its host bridge, and the method that notifies those of a
/// mask. Names without a path are looked for upwards: that keeps hundreds of slots short.
pub(crate) fn slots(segment: u16) -> Raw {
    let mut aml = Vec::new();
    let mut notify = Vec::new();
    let far = |method, args| MethodCall::new(Path::new(method), args);
    Method::new(
        Path::new("PEJT"),
        1,
        true,
        vec![&far("\\_SB_.PCIH.EJCT", vec![&segment, &Arg(0)])],
    )
    .to_aml_bytes(&mut aml);
    let status = far("\\_SB_.PCIH.STAT", vec![&segment, &Arg(0), &Arg(1), &Arg(2)]);
    Method::new(Path::new("PSTA"), 3, true, vec![&status]).to_aml_bytes(&mut aml);
    for slot in 1..SLOT_COUNT {
        let name = || Path::new(&format!("S{slot:03}"));
        let address = u32::from(slot) << 16;
        let number = segment * u16::from(SLOT_COUNT) + u16::from(slot);
        let near = |method, args| MethodCall::new(Path::new(method), args);
        Device::new(
            name(),
            vec![
                &Name::new(Path::new("_ADR"), &address),
                &Name::new(Path::new("_SUN"), &number),
                &Method::new(Path::new("_EJ0"), 1, true, vec![&near("PEJT", vec![&slot])]),
                &Method::new(
                    Path::new("_OST"),
                    3,
                    true,
                    vec![&near("PSTA", vec![&slot, &Arg(0), &Arg(1)])],
                ),
            ],
        )
        .to_aml_bytes(&mut aml);
        If::new(&And::new(&ZERO, &Arg(0), &(1_u32 << slot)), vec![&Notify::new(&name(), &Arg(1))])
            .to_aml_bytes(&mut notify);
    }
    Method::new(Path::new("PNTF"), 2, true, vec![&Raw(notify)]).to_aml_bytes(&mut aml);
    Raw(aml)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_takes_no_more_than_its_share_of_the_tables() {
        assert!(slots(11).0.len() <= 31 * 74 + 64, "{}", slots(11).0.len());
    }
}
