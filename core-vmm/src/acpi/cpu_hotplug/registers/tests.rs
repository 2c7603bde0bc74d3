//! A guest that plays its part, one that does not, and random accesses.

use proptest::{collection::vec, prelude::*};

use super::*;

fn write(registers: &mut Registers, offset: u64, value: u32) {
    registers.write(offset, &value.to_le_bytes());
}

fn status_of(registers: &mut Registers, index: u32) -> u32 {
    write(registers, SELECT, index);
    registers.read(STATUS, 4)
}

/// What the scan method does: sees all that is unseen, and gives each vCPU's index and bits.
fn scan(registers: &mut Registers) -> Vec<(u32, u32)> {
    let mut seen = Vec::new();
    while registers.read(NEXT, 4) != NONE {
        let index = registers.read(NEXT, 4);
        let bits = status_of(registers, index) & (CAME | IS_TO_GO);
        write(registers, STATUS, bits);
        seen.push((index, bits));
    }
    seen
}

fn ost(registers: &mut Registers, index: u32, event: u32, outcome: u32) {
    write(registers, SELECT, index);
    write(registers, OST_EVENT, event);
    write(registers, OST_OUTCOME, outcome);
}

fn eject(registers: &mut Registers, index: u32) {
    write(registers, SELECT, index);
    write(registers, STATUS, EJECT);
}

#[test]
fn vcpus_come_are_seen_once_and_are_ejected_highest_first() {
    let mut registers = Registers::new(1, 4);
    assert_eq!((registers.read(POSSIBLE, 4), registers.read(NEXT, 4)), (4, NONE));
    let change = registers.change(3).unwrap();
    assert_eq!(change, Change { arrived: vec![1, 2], is_news_to_guest: true });
    assert_eq!(status_of(&mut registers, 1), IS_THERE | CAME);
    assert_eq!(status_of(&mut registers, 3), 0);
    assert_eq!(scan(&mut registers), [(1, CAME), (2, CAME)]);
    ost(&mut registers, 1, ost::DEVICE_CHECK, ost::SUCCESS);
    assert_eq!(status_of(&mut registers, 1), IS_THERE);
    assert!(registers.change(2).unwrap().arrived.is_empty());
    assert_eq!(scan(&mut registers), [(2, IS_TO_GO)]);
    assert_eq!(registers.present(), 3, "until it is ejected");
    eject(&mut registers, 2);
    assert_eq!((registers.present(), status_of(&mut registers, 2)), (2, 0));
    ost(&mut registers, 2, ost::EJECT_REQUEST, ost::SUCCESS);
    assert_eq!(registers.take_news(), [News::Ejected(2)]);
    let taken_again = registers.change(3).unwrap().arrived;
    assert_eq!(taken_again, [3], "not one whose thread may still run");
    registers.change(4).unwrap_or_default();
    registers.parked(2);
    assert_eq!(registers.change(4).unwrap().arrived, [2]);
}

#[test]
fn a_guest_that_keeps_a_vcpu_or_cannot_use_it_is_told_of() {
    let mut registers = Registers::new(2, 4);
    registers.change(1).unwrap();
    scan(&mut registers);
    ost(&mut registers, 1, ost::EJECT_REQUEST, ost::EJECTION_PENDING);
    assert_eq!(registers.take_news(), []);
    assert_eq!(registers.change(2), Err(LeavingError(1)));
    ost(&mut registers, 1, ost::EJECT_REQUEST, 0x82);
    ost(&mut registers, 1, ost::EJECT_REQUEST, 0x82);
    let kept = News::Declined { index: 1, was_to_go: true, status: 0x82 };
    assert_eq!(registers.take_news(), [kept]);
    eject(&mut registers, 1);
    assert_eq!(registers.present(), 2, "it stays, whatever comes later");
    assert_eq!(registers.change(3).unwrap().arrived, [2]);
    ost(&mut registers, 2, ost::DEVICE_CHECK, 1);
    let unused = News::Declined { index: 2, was_to_go: false, status: 1 };
    assert_eq!(registers.take_news(), [unused]);
    assert_eq!(registers.present(), 3);
}

#[test]
fn a_guest_that_does_not_listen_is_told_again_and_may_have_to_give_more() {
    let mut registers = Registers::new(4, 5);
    assert!(registers.change(3).unwrap().is_news_to_guest);
    assert_eq!(scan(&mut registers), [(3, IS_TO_GO)]);
    assert!(registers.change(3).unwrap().is_news_to_guest);
    assert_eq!(scan(&mut registers), [(3, IS_TO_GO)]);
    registers.change(1).unwrap();
    assert_eq!(scan(&mut registers), [(1, IS_TO_GO), (2, IS_TO_GO), (3, IS_TO_GO)]);
    assert_eq!(registers.change(2), Err(LeavingError(3)));
    assert!(registers.change(1).unwrap().arrived.is_empty());
}

#[test]
fn a_reset_ends_all_that_is_pending_and_the_first_vcpus_stay() {
    let mut registers = Registers::new(3, 6);
    registers.change(1).unwrap();
    eject(&mut registers, 1);
    ost(&mut registers, 2, ost::EJECT_REQUEST, 1);
    assert_eq!(registers.present(), 2, "vCPUs 0 and 2");
    registers.parked(1);
    registers.change(4).unwrap();
    registers.change(3).unwrap();
    assert_eq!(registers.reset(), 3);
    assert_eq!((registers.read(NEXT, 4), registers.read(SELECT, 4)), (NONE, 0));
    let there: Vec<_> = (0..6).map(|index| status_of(&mut registers, index)).collect();
    assert_eq!(there, [1, 1, 1, 0, 0, 0]);
    assert_eq!(registers.take_news(), []);
}

#[test]
fn the_first_vcpu_and_those_that_are_not_to_go_cannot_be_ejected() {
    let mut registers = Registers::new(3, 4);
    assert_eq!(registers.change(1).unwrap(), Change { arrived: vec![], is_news_to_guest: true });
    for index in [0, 3, 4, NONE] {
        eject(&mut registers, index);
    }
    assert_eq!((registers.present(), registers.take_news()), (3, vec![]));
    assert_eq!(status_of(&mut registers, 0), IS_THERE);
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Word(u64, u32),
    Change(u32),
    Process,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let offset = 0_u64..0x40;
    let aligned = (0_u64..8).prop_map(|word| word * 4);
    let word = prop_oneof![0_u32..8, Just(0x103), Just(0x82), any::<u32>()];
    prop_oneof![
        2 => (offset.clone(), 1_usize..9).prop_map(|(at, len)| Step::Read(at, len)),
        2 => (offset, vec(any::<u8>(), 1..9)).prop_map(|(at, data)| Step::Write(at, data)),
        12 => (aligned, word).prop_map(|(at, value)| Step::Word(at, value)),
        2 => (1_u32..7).prop_map(Step::Change),
        1 => Just(Step::Process),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #[test]
    fn whatever_a_guest_does_it_has_its_first_vcpu_and_no_more_than_it_was_given(
        steps in vec(step(), 0..200),
    ) {
        let mut registers = Registers::new(2, 6);
        let (mut most, mut changes) = (2, 0);
        for step in steps {
            match step {
                Step::Read(at, len) => drop(registers.read(at, len)),
                Step::Write(at, data) => drop(registers.write(at, &data)),
                Step::Word(at, value) => write(&mut registers, at, value),
                Step::Change(cpus) => {
                    changes += 6;
                    most = most.max(cpus);
                    registers.change(cpus).ok();
                }
                Step::Process => {
                    for news in registers.take_news() {
                        if let News::Ejected(index) = news {
                            assert_ne!(index, 0);
                            registers.parked(index);
                        }
                    }
                }
                Step::Reset => assert_eq!(registers.reset(), registers.present()),
            }
            assert!((1..=most).contains(&registers.present()));
            assert!(registers.cpus[0].is_there());
            assert!(registers.news.len() <= changes, "bounded by what was asked of the guest");
            let unseen = registers.cpus.iter().filter(|cpu| cpu.came || cpu.is_to_go);
            assert!(unseen.clone().all(|cpu| cpu.is_there()));
            assert_eq!(unseen.count() == 0, registers.next() == NONE);
        }
    }
}
