//! The order of things, with KVM and followers that write down what they are told.

use std::os::{linux::fs::MetadataExt, unix::fs::FileExt};

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

use super::*;
use crate::{bus::BusDevice, event, memory::slots::Slots, vcpu::gate::Gate};

const MIB: u64 = 1 << 20;
const UNIT: u64 = 128 * MIB;
const BOOT: u64 = 256 * MIB;
const START: u64 = 1 << 32;

/// Who is told what, in order.
#[derive(Default)]
struct Told {
    what: Vec<String>,
    most_regions: Option<usize>,
    dma_fails_at: Option<u64>,
    keeps_dma: bool,
}

impl Followers for Told {
    fn fewest_regions(&self) -> Option<(String, usize)> {
        Some(("disk".to_owned(), self.most_regions?))
    }

    fn follow(&mut self, memory: &GuestMemoryMmap) {
        self.what.push(format!("{} regions", memory.num_regions()));
    }

    fn map_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), String> {
        if self.dma_fails_at == Some(region.start_addr().0) {
            return Err("no room".to_owned());
        }
        self.what.push(format!("map {}", (region.start_addr().0 - START) / UNIT));
        Ok(())
    }

    fn unmap_for_dma(&mut self, region: &GuestRegionMmap) -> Result<(), String> {
        self.what.push(format!("unmap {}", (region.start_addr().0 - START) / UNIT));
        if self.keeps_dma { Err("held".to_owned()) } else { Ok(()) }
    }
}

struct Machine {
    memory: Memory,
    ram: GuestRam,
    told: Told,
    events: EventDevice,
    slots: Slots,
}

impl Machine {
    /// None where KVM is not there.
    fn new() -> Option<Self> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: no KVM");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let mut ram = GuestRam::new(BOOT).unwrap();
        let slots = Slots::with_limit(6);
        ram.register(&vm, &slots).unwrap();
        let plan = Plan::new(&ram.ram, BOOT + 8 * UNIT, 40).unwrap();
        let (notifier, _mailbox) = event::channel(Arc::new(Gate::new())).unwrap();
        let controller = Arc::new(MemoryHotplug::new(plan.units(), notifier));
        let site = Site::new(plan, vm, slots.clone()).unwrap();
        let memory = Memory::new(site, controller);
        let events = EventDevice::new().unwrap();
        Some(Self { memory, ram, told: Told::default(), events, slots })
    }

    fn set(&mut self, units: usize) -> Result<(), SetMemoryError> {
        let bytes = self.memory.plan().bytes_with(units);
        self.memory.set(bytes, &mut self.ram, &mut self.told, &self.events)
    }

    fn process(&mut self) -> Vec<Event> {
        self.memory.process(&mut self.ram, &mut self.told)
    }

    fn told(&mut self) -> String {
        std::mem::take(&mut self.told.what).join(", ")
    }

    /// What the guest writes: selects a unit, and then this to that register.
    fn guest(&self, unit: u32, register: u64, value: u32) {
        let controller = self.memory.controller();
        controller.write(0, &unit.to_le_bytes());
        controller.write(register, &value.to_le_bytes());
    }

    fn ejects(&self, unit: u32) {
        self.guest(unit, 8, 1 << 3);
    }

    fn refuses(&self, unit: u32) {
        self.guest(unit, 0xc, 3);
        self.guest(unit, 0x10, 0x82);
    }

    fn poke(&self, unit: u64, value: u64) {
        self.ram.memory.write_obj(value, GuestAddress(START + unit * UNIT)).unwrap();
    }

    fn peek(&self, unit: u64) -> u64 {
        self.ram.memory.read_obj(GuestAddress(START + unit * UNIT)).unwrap()
    }
}

#[test]
fn ram_comes_to_backends_before_devices_and_goes_the_other_way_round() {
    let Some(mut vm) = Machine::new() else { return };
    vm.set(2).unwrap();
    assert_eq!(vm.told(), "3 regions, map 0, map 1");
    assert_eq!((vm.memory.bytes(), vm.slots.free()), (BOOT + 2 * UNIT, 3));
    assert_eq!(vm.events.interrupt().read().unwrap(), 1);
    vm.poke(1, 7);
    vm.set(1).unwrap();
    assert_eq!(vm.told(), "", "the guest has it still");
    assert!(vm.memory.is_leaving());
    assert_eq!((vm.memory.bytes(), vm.peek(1)), (BOOT + 2 * UNIT, 7));
    vm.ejects(1);
    assert_eq!(vm.process(), [Event::MemoryChanged { bytes: BOOT + UNIT }]);
    assert_eq!(vm.told(), "unmap 1, 2 regions");
    assert_eq!((vm.memory.is_leaving(), vm.slots.free()), (false, 4));
    assert!(vm.ram.memory.read_obj::<u64>(GuestAddress(START + UNIT)).is_err());
    vm.set(2).unwrap();
    assert_eq!(vm.peek(1), 0, "what comes is zero");
}

#[test]
fn the_pages_of_what_goes_are_the_hosts_again_even_if_somebody_keeps_the_file() {
    let Some(mut vm) = Machine::new() else { return };
    vm.set(1).unwrap();
    vm.poke(0, 7);
    let region = vm.ram.memory.find_region(GuestAddress(START)).unwrap();
    let kept = region.file_offset().unwrap().file().try_clone().unwrap();
    assert!(kept.metadata().unwrap().st_blocks() > 0);
    vm.set(0).unwrap();
    vm.ejects(0);
    assert_eq!(vm.process().len(), 1);
    assert_eq!(kept.metadata().unwrap().st_blocks(), 0);
    let start = GuestAddress(START);
    vm.set(1).unwrap();
    // Whoever kept the file writes to nobody's memory.
    kept.write_all_at(&[1; 8], 0).unwrap();
    assert_eq!(vm.ram.memory.read_obj::<u64>(start).unwrap(), 0);
}

#[test]
fn a_guest_that_gives_up_some_of_it_is_told_of_in_both_ways() {
    let Some(mut vm) = Machine::new() else { return };
    vm.set(3).unwrap();
    vm.set(1).unwrap();
    vm.refuses(2);
    assert_eq!(vm.process(), []);
    vm.ejects(1);
    let [changed, declined] = vm.process().try_into().unwrap();
    assert_eq!(changed, Event::MemoryChanged { bytes: BOOT + 2 * UNIT });
    let Event::Declined { what: Resource::Memory, reason } = declined else {
        panic!("{declined:?}")
    };
    assert_eq!(reason, "the guest keeps the memory device at 0x110000000 (_OST 0x82, busy)");
    assert!(!vm.memory.is_leaving());
    // Unit 1 has become free, and is the newest then.
    vm.told.what.clear();
    vm.set(3).unwrap();
    assert_eq!(vm.told(), "4 regions, map 1");
    vm.set(2).unwrap();
    vm.ejects(2);
    assert_eq!(vm.process(), [], "it was not asked for");
    vm.ejects(1);
    assert_eq!(vm.process(), [Event::MemoryChanged { bytes: BOOT + 2 * UNIT }]);
}

#[test]
fn what_the_host_refuses_is_undone() {
    let Some(mut vm) = Machine::new() else { return };
    vm.set(1).unwrap();
    vm.told.what.clear();
    // KVM has no slot for the last one.
    assert!(matches!(vm.set(6), Err(SetMemoryError::Memory(MemoryError::NoSlot(_)))));
    assert_eq!(vm.told(), "");
    vm.told.dma_fails_at = Some(START + 3 * UNIT);
    assert!(matches!(vm.set(5), Err(SetMemoryError::Dma(_))));
    assert_eq!(vm.told(), "6 regions, map 1, map 2, unmap 1, unmap 2, 2 regions");
    vm.told.most_regions = Some(3);
    let error = vm.set(3).unwrap_err().to_string();
    assert!(error.contains("4 regions") && error.contains("3 that the backend of disk"), "{error}");
    assert_eq!((vm.memory.bytes(), vm.slots.free()), (BOOT + UNIT, 4));
    vm.set(2).unwrap();
}

#[test]
fn memory_that_a_device_holds_stays_where_it_is_and_is_not_used_again() {
    let Some(mut vm) = Machine::new() else { return };
    vm.set(1).unwrap();
    vm.told.keeps_dma = true;
    vm.set(0).unwrap();
    vm.ejects(0);
    assert_eq!(vm.process(), [Event::MemoryChanged { bytes: BOOT }]);
    assert_eq!(vm.slots.free(), 4);
    vm.told.what.clear();
    vm.set(1).unwrap();
    assert_eq!(vm.told(), "2 regions, map 1");
    assert!(matches!(vm.set(8), Err(SetMemoryError::Held(1))));
}

#[test]
fn a_reset_takes_what_was_to_go_and_wipes_the_rest() {
    let Some(mut vm) = Machine::new() else { return };
    vm.set(2).unwrap();
    vm.poke(0, 7);
    vm.set(1).unwrap();
    let events = vm.memory.reset(&mut vm.ram, &mut vm.told);
    assert_eq!(events, [Event::MemoryChanged { bytes: BOOT + UNIT }]);
    assert_eq!(vm.peek(0), 7);
    vm.memory.wipe().unwrap();
    assert_eq!(vm.peek(0), 0);
    assert_eq!(vm.memory.reset(&mut vm.ram, &mut vm.told), []);
}
