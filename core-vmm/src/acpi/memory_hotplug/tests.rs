//! The registers, driven as a guest does and as none does.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{event, vcpu::gate::Gate};

fn controller(units: u32) -> MemoryHotplug {
    let (notifier, _mailbox) = event::channel(Arc::new(Gate::new())).unwrap();
    MemoryHotplug::new(units, notifier)
}

fn read(of: &MemoryHotplug, register: u64) -> u32 {
    let mut data = [0xff; 4];
    of.read(register, &mut data);
    u32::from_le_bytes(data)
}

fn write(to: &MemoryHotplug, register: u64, value: u32) {
    to.write(register, &value.to_le_bytes());
}

fn report(to: &MemoryHotplug, event: u32, code: u32) {
    write(to, EVENT, event);
    write(to, REPORT, code);
}

#[test]
fn a_guest_finds_what_has_come_and_gives_it_up_when_asked() {
    let memory = controller(3);
    assert_eq!(read(&memory, NEXT), NONE);
    memory.plug(2);
    assert_eq!(read(&memory, NEXT), 2);
    write(&memory, SELECT, 2);
    assert_eq!(read(&memory, STATUS), PRESENT | HAS_COME);
    write(&memory, STATUS, HAS_COME);
    assert_eq!((read(&memory, NEXT), read(&memory, STATUS)), (NONE, PRESENT));
    report(&memory, DEVICE_CHECK, SUCCESS);
    memory.ask(2);
    assert_eq!((read(&memory, NEXT), read(&memory, STATUS)), (2, PRESENT | IS_TO_GO));
    write(&memory, STATUS, IS_TO_GO);
    assert_eq!((read(&memory, NEXT), read(&memory, STATUS)), (NONE, PRESENT));
    report(&memory, EJECT_REQUEST, EJECTION_PENDING);
    assert_eq!(memory.take_reports(), []);
    write(&memory, STATUS, EJECT);
    assert_eq!(read(&memory, STATUS), 0, "_STA after _EJ0");
    report(&memory, EJECT_REQUEST, SUCCESS);
    assert_eq!(memory.take_reports(), [Report::Ejected { unit: 2 }]);
    memory.forget(2);
    memory.plug(2);
    assert_eq!(read(&memory, STATUS), PRESENT | HAS_COME);
}

#[test]
fn only_what_is_leaving_can_be_ejected() {
    let memory = controller(2);
    memory.plug(0);
    for unit in [0, 1, 2, NONE] {
        write(&memory, SELECT, unit);
        write(&memory, STATUS, EJECT);
    }
    assert_eq!(memory.take_reports(), []);
    write(&memory, SELECT, 0);
    assert_eq!(read(&memory, STATUS) & PRESENT, PRESENT);
    memory.ask(0);
    write(&memory, STATUS, EJECT);
    write(&memory, STATUS, EJECT);
    assert_eq!(memory.take_reports(), [Report::Ejected { unit: 0 }]);
}

#[test]
fn a_unit_that_is_not_given_up_stays_and_can_be_asked_for_again() {
    let memory = controller(1);
    memory.plug(0);
    for code in [0x82, SUCCESS, u32::MAX] {
        memory.ask(0);
        report(&memory, EJECT_REQUEST, EJECTION_PENDING);
        report(&memory, EJECT_REQUEST, code);
        report(&memory, EJECT_REQUEST, code);
        assert_eq!(memory.take_reports(), [Report::Kept { unit: 0, code }]);
        assert_eq!(read(&memory, STATUS), PRESENT | HAS_COME);
    }
}

#[test]
fn a_unit_that_the_guest_cannot_use_is_reported_once() {
    let memory = controller(1);
    report(&memory, DEVICE_CHECK, 1);
    memory.plug(0);
    report(&memory, DEVICE_CHECK, INSERTION_PENDING);
    report(&memory, DEVICE_CHECK, 1);
    report(&memory, DEVICE_CHECK, 1);
    assert_eq!(memory.take_reports(), [Report::Unusable { unit: 0, code: 1 }]);
}

#[test]
fn a_reset_ends_what_is_pending_and_keeps_the_rest() {
    let memory = controller(3);
    memory.plug(0);
    memory.plug(1);
    memory.ask(1);
    write(&memory, SELECT, 1);
    memory.reset();
    assert_eq!(memory.take_reports(), [Report::Ejected { unit: 1 }]);
    assert_eq!((read(&memory, SELECT), read(&memory, NEXT)), (0, NONE));
    assert_eq!(read(&memory, STATUS), PRESENT);
    report(&memory, DEVICE_CHECK, 1);
    assert_eq!(memory.take_reports(), [], "it is about the run before");
}

#[test]
fn the_control_thread_is_woken_by_what_it_has_to_know_alone() {
    let (notifier, mailbox) = event::channel(Arc::new(Gate::new())).unwrap();
    let memory = MemoryHotplug::new(1, notifier);
    memory.plug(0);
    report(&memory, DEVICE_CHECK, SUCCESS);
    write(&memory, STATUS, EJECT);
    assert!(mailbox.take().is_none());
    memory.ask(0);
    write(&memory, STATUS, EJECT);
    assert!(matches!(mailbox.take(), Some(GuestEvent::Memory)));
    assert!(mailbox.take().is_none());
}

#[derive(Clone, Debug)]
enum Step {
    Plug(u32),
    Ask(u32),
    Forget(u32),
    Reset,
    Write(u64, Vec<u8>),
    Read(u64, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop_oneof![0_u32..16, Just(0x82), Just(0x103), any::<u32>()];
    let whole = (0_u64..6, value)
        .prop_map(|(register, value)| Step::Write(register * 4, value.to_le_bytes().to_vec()));
    prop_oneof![
        (0_u32..4).prop_map(Step::Plug),
        (0_u32..5).prop_map(Step::Ask),
        (0_u32..4).prop_map(Step::Forget),
        Just(Step::Reset),
        whole.clone(),
        whole,
        (any::<u64>(), vec(any::<u8>(), 1..9)).prop_map(|(at, data)| Step::Write(at, data)),
        (0_u64..0x44, 1_usize..9).prop_map(|(at, len)| Step::Read(at, len)),
    ]
}

proptest! {
    #[test]
    fn whatever_a_guest_does_it_ejects_only_what_it_was_asked_to(steps in vec(step(), 0..200)) {
        let memory = controller(4);
        // By unit: whether it is the host's to take, there, and asked for.
        let (mut there, mut asked) = ([false; 5], [false; 5]);
        for step in steps {
            let at = |unit: u32| usize::try_from(unit).unwrap();
            match step {
                Step::Plug(unit) if !there[at(unit)] => {
                    memory.plug(unit);
                    there[at(unit)] = true;
                }
                Step::Ask(unit) => {
                    memory.ask(unit);
                    asked[at(unit)] |= there[at(unit)];
                }
                Step::Forget(unit) if !there[at(unit)] => memory.forget(unit),
                Step::Plug(_) | Step::Forget(_) => {}
                Step::Reset => memory.reset(),
                Step::Write(offset, data) => memory.write(offset, &data),
                Step::Read(offset, len) => memory.read(offset, &mut vec![0; len]),
            }
            for report in memory.take_reports() {
                match report {
                    Report::Ejected { unit } => {
                        prop_assert!(there[at(unit)] && asked[at(unit)]);
                        (there[at(unit)], asked[at(unit)]) = (false, false);
                        memory.forget(unit);
                    }
                    Report::Kept { unit, .. } => {
                        prop_assert!(there[at(unit)] && asked[at(unit)]);
                        asked[at(unit)] = false;
                    }
                    Report::Unusable { unit, .. } => prop_assert!(there[at(unit)]),
                }
            }
        }
    }
}
