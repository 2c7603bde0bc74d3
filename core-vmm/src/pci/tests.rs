//! The bus as a guest sees it: configuration mechanisms, windows, BARs that move.

use std::sync::{Arc, Mutex};

use proptest::collection::vec;
use proptest::prelude::*;

use super::config_space::{CONVENTIONAL_LEN_BYTES, ConfigSpace, Effect, Identity};
use super::*;
use crate::bus::BusDevice;

const WINDOWS: PciWindows = PciWindows {
    low: AddressRange { start: 0xc000_0000, len_bytes: 0x1000_0000 },
    high: AddressRange { start: 0x80_0000_0000, len_bytes: 0x10_0000_0000 },
};

/// A function with one BAR that remembers what happened to it.
pub(crate) struct Probe {
    config: Mutex<ConfigSpace>,
    mapped: Mutex<Vec<Option<u64>>>,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Probe {
    pub(crate) fn new(len_bytes: u64, width: BarWidth) -> Arc<Self> {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: [2, 0, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let mut config = ConfigSpace::new(&identity, CONVENTIONAL_LEN_BYTES);
        config.add_bar(BarSpec { index: BarIndex::ZERO, len_bytes, width, prefetchable: false });
        let config = Mutex::new(config);
        Arc::new(Self { config, mapped: Mutex::default(), written: Mutex::default() })
    }

    pub(crate) fn small() -> Arc<Self> {
        Self::new(0x1000, BarWidth::Bits64)
    }
}

impl PciFunction for Probe {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        assert!(data.len() <= 4 && usize::from(offset) % data.len() == 0);
        self.config.lock().unwrap().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        assert!(data.len() <= 4 && usize::from(offset) % data.len() == 0);
        match self.config.lock().unwrap().write(offset, data) {
            Effect::BarMoved => ConfigEffect::BarsMoved,
            Effect::None | Effect::MsixChanged(_) => ConfigEffect::None,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        self.config.lock().unwrap().bars()
    }

    fn place_bar(&self, index: BarIndex, address: u64) {
        self.config.lock().unwrap().place_bar(index, address);
    }

    fn reset_config(&self) {
        self.config.lock().unwrap().reset();
    }

    fn decoded(&self, index: BarIndex) -> Option<AddressRange> {
        self.config.lock().unwrap().decoded(index)
    }

    fn bar_mapped(&self, _index: BarIndex, range: Option<AddressRange>) {
        self.mapped.lock().unwrap().push(range.map(|range| range.start));
    }

    fn read_bar(&self, _index: BarIndex, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= self.bars()[0].len_bytes);
        data.fill(0x5a);
    }

    fn write_bar(&self, _index: BarIndex, offset: u64, data: &[u8]) {
        self.written.lock().unwrap().push((offset, data.to_vec()));
    }
}

struct Machine {
    bus: Arc<PciBus>,
    ecam: Ecam,
    ports: ConfigPorts,
    low: MmioWindow,
}

impl Machine {
    fn new() -> Self {
        let bus = Arc::new(PciBus::new(WINDOWS));
        Self {
            ecam: Ecam::new(Arc::clone(&bus)),
            ports: ConfigPorts::new(Arc::clone(&bus)),
            low: MmioWindow::low(Arc::clone(&bus)),
            bus,
        }
    }

    fn config(&self, slot: u8, register: u64) -> u32 {
        let mut data = [0xff; 4];
        self.ecam.read(u64::from(slot) << 15 | register, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, slot: u8, register: u64, value: u32) {
        self.ecam.write(u64::from(slot) << 15 | register, &value.to_le_bytes());
    }

    fn memory(&self, address: u64) -> u8 {
        let mut data = [0xff];
        self.low.read(address - WINDOWS.low.start, &mut data);
        data[0]
    }
}

#[test]
fn both_mechanisms_show_the_same_functions() {
    let machine = Machine::new();
    let slot = machine.bus.attach(Probe::small()).unwrap();
    assert_eq!(slot.number(), 1);
    for (slot, expected) in [(0_u8, 0x0008_1b36), (1, 0x1041_1af4), (2, u32::MAX), (31, u32::MAX)] {
        assert_eq!(machine.config(slot, 0), expected);
        let address: u32 = 1 << 31 | u32::from(slot) << 11;
        machine.ports.write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        machine.ports.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), expected);
    }
}

#[test]
fn ports_answer_only_for_an_enabled_address_on_bus_0_and_function_0() {
    let machine = Machine::new();
    for address in [0_u32, 1 << 31 | 1 << 16, 1 << 31 | 1 << 8] {
        machine.ports.write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        machine.ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
        machine.ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), address, "the address reads back");
    }
    machine.ports.write(0, &(1_u32 << 31).to_le_bytes());
    machine.ports.write(1, &[6]);
    let mut data = [0xff; 2];
    machine.ports.read(6, &mut data);
    assert_eq!(u16::from_le_bytes(data), 8, "a byte to 0xcf9 is not for the address");
}

#[test]
fn a_second_function_of_a_slot_does_not_exist() {
    let machine = Machine::new();
    assert_eq!(machine.config(0, 1 << 12), u32::MAX);
}

#[test]
fn an_access_across_two_functions_is_cut() {
    let machine = Machine::new();
    machine.bus.attach(Probe::small()).unwrap();
    let mut data = [0xaa; 8];
    machine.ecam.read((1 << 15) - 4, &mut data);
    assert_eq!(data, [0xff, 0xff, 0xff, 0xff, 0xf4, 0x1a, 0x41, 0x10]);
    let mut data = [0xaa; 5];
    machine.ecam.read((1 << 15) + 1, &mut data);
    assert_eq!(data, [0x1a, 0x41, 0x10, 0, 0]);
}

#[test]
fn a_bar_is_reached_where_it_is_decoded_and_nowhere_else() {
    let machine = Machine::new();
    let probe = Probe::small();
    let slot = machine.bus.attach(probe.clone()).unwrap().number();
    assert_eq!(machine.config(slot, 0x10), 0xc000_0004, "placed before the guest runs");
    assert_eq!(machine.memory(0xc000_0000), 0xff, "decoding is off");
    machine.set_config(slot, 4, 2);
    assert_eq!(machine.memory(0xc000_0fff), 0x5a);
    assert_eq!(machine.memory(0xc000_1000), 0xff);
    machine.set_config(slot, 0x10, 0xc010_0000);
    assert_eq!(machine.memory(0xc000_0000), 0xff);
    assert_eq!(machine.memory(0xc010_0000), 0x5a);
    machine.low.write(0x10_0ffe, &[1, 2, 3, 4]);
    assert_eq!(*probe.written.lock().unwrap(), [(0xffe, vec![1, 2])], "cut at the BAR's end");
    machine.set_config(slot, 4, 0);
    assert_eq!(machine.memory(0xc010_0000), 0xff);
    let expected = [Some(0xc000_0000), Some(0xc010_0000), None];
    assert_eq!(*probe.mapped.lock().unwrap(), expected);
}

#[test]
fn a_bar_outside_the_windows_is_not_mapped() {
    let machine = Machine::new();
    let probe = Probe::small();
    let slot = machine.bus.attach(probe.clone()).unwrap().number();
    machine.set_config(slot, 4, 2);
    for address in [0_u32, 0xfee0_0000, 0xd000_0000, 0xffff_f000] {
        machine.set_config(slot, 0x10, address);
    }
    assert_eq!(*probe.mapped.lock().unwrap(), [Some(0xc000_0000), None]);
    machine.set_config(slot, 0x14, 0x80);
    machine.set_config(slot, 0x10, 0);
    assert_eq!(probe.mapped.lock().unwrap().last(), Some(&Some(0x80_0000_0000)));
}

#[test]
fn one_bar_over_another_harms_only_the_guest() {
    let machine = Machine::new();
    let slots = [0, 1].map(|_| machine.bus.attach(Probe::small()).unwrap().number());
    for slot in slots {
        machine.set_config(slot, 0x10, 0xc800_0000);
        machine.set_config(slot, 4, 2);
    }
    assert_eq!(machine.memory(0xc800_0000), 0x5a);
    machine.set_config(slots[0], 4, 0);
    assert_eq!(machine.memory(0xc800_0000), 0x5a, "the other one is still there");
}

#[test]
fn small_bars_go_low_and_large_ones_high() {
    let machine = Machine::new();
    let place = |len, width| {
        let slot = machine.bus.attach(Probe::new(len, width)).unwrap().number();
        let high = if width == BarWidth::Bits64 { machine.config(slot, 0x14) } else { 0 };
        u64::from(machine.config(slot, 0x10) & !0xf) | u64::from(high) << 32
    };
    assert_eq!(place(0x1000, BarWidth::Bits64), 0xc000_0000);
    assert_eq!(place(1 << 33, BarWidth::Bits64), 0x80_0000_0000);
    assert_eq!(place(1 << 24, BarWidth::Bits32), 0xc100_0000);
    let full = machine.bus.attach(Probe::new(1 << 29, BarWidth::Bits32));
    assert_eq!(full, Err(PciError::NoRoom { len_bytes: 1 << 29 }));
    assert_eq!(place(0x1000, BarWidth::Bits64), 0xc000_1000, "the failed one left no trace");
}

#[test]
fn a_detached_function_is_gone_and_its_slot_and_window_free() {
    let machine = Machine::new();
    let probe = Probe::small();
    let slot = machine.bus.attach(probe.clone()).unwrap();
    machine.set_config(slot.number(), 4, 2);
    assert!(machine.bus.detach(slot).is_ok());
    assert_eq!(probe.mapped.lock().unwrap().last(), Some(&None));
    assert_eq!(machine.config(slot.number(), 0), u32::MAX);
    assert_eq!(machine.memory(0xc000_0000), 0xff);
    assert_eq!(machine.bus.detach(slot).err(), Some(PciError::SlotEmpty(1)));
    assert_eq!(machine.bus.detach(Slot::HOST_BRIDGE).err(), Some(PciError::SlotEmpty(0)));
    assert_eq!(machine.bus.attach(Probe::small()), Ok(slot));
    assert_eq!(machine.config(slot.number(), 0x10), 0xc000_0004);
}

#[test]
fn slots_run_out_and_a_taken_one_is_refused() {
    let machine = Machine::new();
    let seven = Slot::new(7).unwrap();
    assert_eq!(machine.bus.attach_at(seven, Probe::small()), Ok(seven));
    assert_eq!(machine.bus.attach_at(seven, Probe::small()), Err(PciError::SlotTaken(7)));
    for _ in 0..30 {
        machine.bus.attach(Probe::small()).unwrap();
    }
    assert_eq!(machine.bus.attach(Probe::small()), Err(PciError::NoSlot));
}

#[test]
fn a_reset_of_the_bus_puts_bars_back_and_decodes_nothing() {
    let machine = Machine::new();
    let probe = Probe::small();
    let slot = machine.bus.attach(probe.clone()).unwrap().number();
    machine.set_config(slot, 4, 2);
    machine.set_config(slot, 0x10, 0xc010_0000);
    machine.bus.reset();
    assert_eq!(machine.config(slot, 0x10), 0xc000_0004);
    assert_eq!(machine.config(slot, 4) & 0xffff, 0);
    assert_eq!(machine.memory(0xc010_0000), 0xff);
    assert_eq!(probe.mapped.lock().unwrap().last(), Some(&None));
}

proptest! {
    #[test]
    fn no_access_of_any_size_or_place_breaks_the_bus(
        accesses in vec((0..ECAM_LEN_BYTES, vec(any::<u8>(), 1..9), 0..6_u8), 1..200),
    ) {
        let machine = Machine::new();
        machine.bus.attach(Probe::small()).unwrap();
        machine.bus.attach(Probe::small()).unwrap();
        for (offset, mut data, way) in accesses {
            // Most accesses go where something is.
            let near = offset % (3 << 15);
            match way {
                0 => machine.ecam.write(near & !0x7f00, &data),
                1 => machine.ecam.read(near, &mut data),
                2 => machine.ports.write(offset % 8, &data),
                3 => machine.ports.read(offset % 8, &mut data),
                4 => machine.low.write(offset, &data),
                _ => machine.low.read(offset, &mut data),
            }
        }
        prop_assert_eq!(machine.config(1, 0), 0x1041_1af4);
    }
}
