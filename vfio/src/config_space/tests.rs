//! A device as an NVMe controller describes itself, seen by its guest; and any other.

use proptest::{collection::vec, prelude::*};

use super::*;

const SIZES: [u64; 6] = [0x4000, 0, 0, 0, 0, 0];

/// An NVMe controller with every kind of capability, and others that no guest is to see.
fn said() -> Vec<u8> {
    let mut said = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| said[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x36, 0x1b, 0x10, 0x00, 0x06, 0x05, 0x10, 0x00, 2, 2, 8, 1]);
    put(0x0e, &[0x80]);
    put(0x10, &[0x04, 0, 0, 0xfe, 0, 0, 0, 0]);
    put(0x2c, &[0xf4, 0x1a, 0x00, 0x11]);
    put(0x30, &[1, 0, 0, 0xfd]);
    put(0x34, &[0x40]);
    put(0x3c, &[11, 1]);
    put(0x40, &[0x11, 0x80, 64, 0x80, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
    put(0x60, &[0x01, 0x50, 0x03, 0xc8, 0x0b, 0x01]);
    put(0x50, &[0x05, 0xf0, 0x8a, 0x01]);
    put(0x80, &[0x10, 0x60, 0x02, 0, 0, 0x80, 0, 0x10, 0x10, 0x28, 0, 0, 0x11, 0x04]);
    put(0xf0, &[0x03, 0, 1, 2, 3, 4]);
    put(0x100, &[0x10, 0, 1, 0x20]);
    put(0x200, &[0x03, 0, 1, 0x30, 1, 2, 3, 4, 5, 6, 7, 8]);
    put(0x300, &[0x0f, 0, 1, 0x40]);
    put(0x400, &[0x0b, 0, 1, 0, 0, 0, 0, 1]);
    said
}

fn space() -> ConfigSpace {
    ConfigSpace::new(&said(), SIZES, true)
}

/// Reads as a guest would, from a device that reads as it said.
fn read(space: &ConfigSpace, offset: u16, len: usize) -> u32 {
    let mut data = [0; 4];
    let at = usize::from(offset);
    space.read(offset, &mut data[..len], |data| {
        data.copy_from_slice(&said()[at..at + data.len()]);
    });
    u32::from_le_bytes(data)
}

fn ids(space: &ConfigSpace) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut at = read(space, 0x34, 1);
    while at != 0 {
        let at16 = u16::try_from(at).unwrap();
        ids.push(read(space, at16, 1));
        at = read(space, at16 + 1, 1);
    }
    ids
}

#[test]
fn a_guest_sees_who_the_device_is_and_that_it_stands_alone() {
    let space = space();
    assert_eq!(read(&space, 0, 4), 0x0010_1b36);
    assert_eq!(read(&space, 8, 4), 0x0108_0202);
    assert_eq!(read(&space, 0x0e, 1), 0, "one function");
    assert_eq!(read(&space, 0x2c, 4), 0x1100_1af4);
    assert_eq!(read(&space, 0x30, 4), 0, "no ROM");
    assert_eq!(read(&space, 0x3c, 2), 0x0100, "the first pin, and no line yet");
    let without = ConfigSpace::new(&said(), SIZES, false);
    assert_eq!(read(&without, 0x3d, 1), 0);
}

#[test]
fn a_guest_sees_the_capabilities_that_it_may_use_and_no_others() {
    let space = space();
    assert_eq!(ids(&space), [0x11, 0x05, 0x01, 0x10]);
    assert_eq!(read(&space, 0xf0, 4), 0, "vital product data");
    assert_eq!(read(&space, 0x82, 1) & 0xf0, 0x90, "an endpoint of the root complex");
    assert_eq!(read(&space, 0x8c, 4), 0, "no link");
    assert_eq!(read(&space, 0x84, 4), 0x1000_8000, "which can be reset");
    assert_eq!(read(&space, 0x62, 2), 0x0003, "no power management events");
    assert_eq!(read(&space, 0x52, 2), 0x008a, "nothing enabled, no masks");
    // SR-IOV is hidden, but the list begins there; ATS is skipped.
    assert_eq!(read(&space, 0x100, 4), 0x2000_0000);
    assert_eq!(read(&space, 0x200, 4), 0x4001_0003);
    assert_eq!(read(&space, 0x204, 4), 0x0403_0201);
    assert_eq!(read(&space, 0x300, 4), 0);
    assert_eq!(read(&space, 0x400, 4), 0x0001_000b);
}

#[test]
fn a_device_without_extended_capabilities_that_a_guest_may_see_has_none() {
    let mut said = said();
    said[0x103] = 0;
    let space = ConfigSpace::new(&said, SIZES, true);
    assert_eq!(read(&space, 0x100, 4), 0);
    assert_eq!(ConfigSpace::new(&said[..256], SIZES, true).bytes.len(), 256);
}

#[test]
fn bars_are_ours_and_the_device_goes_on_decoding_its_memory() {
    let mut space = space();
    space.place_bar(0, 0x40_0000_0000);
    assert_eq!(read(&space, 0x10, 4), 4);
    assert_eq!(read(&space, 0x14, 4), 0x40);
    assert_eq!(space.decoded(0), None);
    let (to_device, effect) = space.write(4, &[0x06, 0x04]);
    assert_eq!(effect, Effect::BarsMoved);
    assert_eq!(to_device.unwrap().bytes(), [0x06, 0x04]);
    assert_eq!(space.decoded(0), Some(0x40_0000_0000));
    let (to_device, effect) = space.write(0x10, &[0xff; 4]);
    assert_eq!((to_device, effect), (None, Effect::BarsMoved));
    assert_eq!(read(&space, 0x10, 4), 0xffff_c004);
    let (to_device, effect) = space.write(4, &[0x04, 0]);
    assert_eq!(effect, Effect::BarsMoved);
    assert_eq!(to_device.unwrap().bytes(), [0x06, 0], "memory decoding stays on");
    assert_eq!(space.write(0x18, &[0xff; 4]), (None, Effect::None), "no such BAR");
}

#[test]
fn message_interrupts_are_ours() {
    let mut space = space();
    assert_eq!(space.write(0x42, &[0, 0x80]), (None, Effect::MsixChanged(0x8040)));
    assert_eq!(space.write(0x42, &[0, 0x80]), (None, Effect::None));
    assert_eq!(space.msix().unwrap().vectors, 65);
    assert_eq!(space.msi_vectors(), 32);
    let unheeded = [(0x54, &[0, 0, 0xe0, 0xfe][..]), (0x58, &[1, 0, 0, 0]), (0x5c, &[0x41, 0])];
    for (at, data) in unheeded {
        assert!(matches!(space.write(at, data), (None, Effect::MsiChanged(_))));
    }
    let enabled = space.write(0x52, &[0x21, 0]);
    let state = MsiState { vectors: 4, address: 0x1_fee0_0000, data: 0x41 };
    assert_eq!(enabled, (None, Effect::MsiChanged(state)));
    space.reset();
    assert_eq!(read(&space, 0x52, 2), 0x008a);
    assert_eq!(read(&space, 0x42, 2), 0x0040);
}

#[test]
fn a_function_level_reset_and_errors_reach_the_device_and_power_states_do_not() {
    let mut space = space();
    let (to_device, effect) = space.write(0x88, &[0x10, 0xa8]);
    assert_eq!((to_device.unwrap().bytes(), effect), (&[0x10, 0xa8][..], Effect::None));
    assert_eq!(read(&space, 0x88, 2), 0x2810, "what the device has");
    let (to_device, _effect) = space.write(6, &[0, 0xf9]);
    assert_eq!(to_device.unwrap().bytes(), [0, 0xf9]);
    assert_eq!(space.write(0x64, &[0x03, 0x80]), (None, Effect::None));
    assert_eq!(read(&space, 0x64, 2), 0x000b, "asleep as far as the guest can tell");
    assert_eq!(read(&space, 0x06, 2) & 0x10, 0x10);
}

proptest! {
    #[test]
    fn no_device_and_no_write_breaks_what_a_guest_may_not_change(
        noise in vec((0_usize..4096, any::<u8>()), 0..200),
        writes in vec((any::<u16>(), vec(any::<u8>(), 0..9)), 1..80),
        sizes: [u32; 6],
    ) {
        let mut bytes = said();
        for (at, value) in noise {
            bytes[at] = value;
        }
        let mut space = ConfigSpace::new(&bytes, sizes.map(u64::from), true);
        let before = space.bytes.clone();
        for (offset, data) in writes {
            let offset = if offset & 1 == 0 { offset } else { offset % 256 };
            let (to_device, _effect) = space.write(offset, &data);
            if let Some(to_device) = to_device {
                let memory = (offset == 4).then(|| to_device.bytes()[0] & 2);
                prop_assert!(memory.is_none_or(|bit| bit == 2));
            }
            for bar in space.bars().to_vec() {
                let start = space.decoded(bar.index);
                prop_assert!(start.is_none_or(|start| start % bar.len_bytes == 0));
            }
            let mut seen = vec![0; data.len()];
            space.read(offset, &mut seen, |data| data.fill(0xff));
        }
        for (at, first) in before.iter().enumerate() {
            prop_assert_eq!((space.bytes[at] ^ first) & !space.writable[at], 0, "at {:#x}", at);
            prop_assert_eq!(space.bytes[at] & space.device[at], 0, "at {:#x}", at);
            prop_assert_eq!(space.writable[at] & space.device[at], 0, "at {:#x}", at);
        }
        space.reset();
        prop_assert_eq!(space.bytes, before);
    }
}
