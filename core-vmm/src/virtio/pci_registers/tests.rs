//! The registers under drivers that behave, and under guests that do not.

use proptest::{collection::vec, prelude::*};

use super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use super::*;

fn unheeded(_effect: Effect) {}

const OFFERED: u64 = features::VERSION_1 | 1 << 29 | 5;

fn registers() -> PciRegisters {
    PciRegisters::new(OFFERED, &[256, 128], vec![1, 2, 3, 4, 5, 6], true)
}

fn read(registers: &PciRegisters, offset: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    registers.read_common(offset, &mut data[..len]);
    u64::from_le_bytes(data)
}

fn write(registers: &mut PciRegisters, offset: u64, len: usize, value: u64) -> Effect {
    registers.write_common(offset, &value.to_le_bytes()[..len])
}

fn acknowledge(registers: &mut PciRegisters, features: u64) {
    for select in 0..2 {
        assert_eq!(write(registers, 0x08, 4, select), Effect::None);
        assert_eq!(write(registers, 0x0c, 4, features >> (32 * select)), Effect::None);
    }
}

fn ready() -> PciRegisters {
    let mut registers = registers();
    for status in [ACKNOWLEDGE, DRIVER] {
        let status = registers.status() | status;
        assert_eq!(write(&mut registers, 0x14, 1, status.into()), Effect::None);
    }
    acknowledge(&mut registers, features::VERSION_1 | 4);
    assert_eq!(write(&mut registers, 0x14, 1, 11), Effect::None);
    assert_eq!(registers.status(), 11);
    assert_eq!(write(&mut registers, 0x16, 2, 1), Effect::None);
    assert_eq!(write(&mut registers, 0x18, 2, 64), Effect::None);
    assert_eq!(write(&mut registers, 0x20, 8, 0x1_0000_1000), Effect::None);
    assert_eq!(write(&mut registers, 0x28, 4, 0x2000), Effect::None);
    assert_eq!(write(&mut registers, 0x2c, 4, 1), Effect::None);
    assert_eq!(write(&mut registers, 0x34, 4, 2), Effect::None);
    assert_eq!(write(&mut registers, 0x30, 4, 0x3000), Effect::None);
    assert_eq!(write(&mut registers, 0x1c, 2, 1), Effect::None);
    assert_eq!(write(&mut registers, 0x14, 1, 15), Effect::DriverOk);
    registers
}

#[test]
fn a_driver_that_does_all_in_order_becomes_ready() {
    let registers = ready();
    assert!(registers.is_driver_ok());
    let layout = QueueLayout {
        size: 64,
        descriptors: 0x1_0000_1000,
        available: 0x1_0000_2000,
        used: 0x2_0000_3000,
    };
    let features = features::VERSION_1 | 4;
    assert_eq!(registers.activation(), Activation { features, queues: vec![None, Some(layout)] });
}

#[test]
fn the_structure_reads_as_the_specification_lays_it_out() {
    let mut registers = registers();
    assert_eq!(read(&registers, 0x04, 4), OFFERED & 0xffff_ffff);
    unheeded(write(&mut registers, 0x00, 4, 1));
    assert_eq!(read(&registers, 0x04, 4), 1);
    unheeded(write(&mut registers, 0x00, 4, 2));
    assert_eq!(read(&registers, 0x04, 4), 0);
    assert_eq!(read(&registers, 0x10, 2), 0xffff);
    assert_eq!(read(&registers, 0x12, 2), 2);
    unheeded(write(&mut registers, 0x16, 2, 1));
    assert_eq!(read(&registers, 0x18, 2), 128);
    assert_eq!(read(&registers, 0x1a, 2), 0xffff);
    assert_eq!(read(&registers, 0x1e, 2), 1, "the notification offset is the queue's number");
    unheeded(write(&mut registers, 0x16, 2, 2));
    assert_eq!(read(&registers, 0x18, 2), 0, "there is no third queue");
    assert_eq!(read(&registers, 0x3c, 8), 0, "an access that leaves the structure");
}

#[test]
fn features_that_were_not_offered_are_not_agreed_upon() {
    for features in [features::VERSION_1 | 2, 4, 1 << 40 | features::VERSION_1] {
        let mut registers = registers();
        unheeded(write(&mut registers, 0x14, 1, 3));
        acknowledge(&mut registers, features);
        assert!(matches!(write(&mut registers, 0x14, 1, 11), Effect::Refused(_)));
        assert_eq!(registers.status(), 3);
        assert!(matches!(write(&mut registers, 0x14, 1, 7), Effect::Refused(_)));
        assert!(!registers.is_driver_ok());
    }
}

#[test]
fn features_are_fixed_once_agreed_upon() {
    let mut registers = ready();
    assert!(matches!(write(&mut registers, 0x0c, 4, 0), Effect::Refused(_)));
}

#[test]
fn all_status_bits_at_once_work_and_none_is_cleared() {
    let mut registers = registers();
    acknowledge(&mut registers, features::VERSION_1);
    assert_eq!(write(&mut registers, 0x14, 1, 15), Effect::DriverOk);
    assert_eq!(write(&mut registers, 0x14, 1, 15), Effect::None, "nothing new");
    assert!(matches!(write(&mut registers, 0x14, 1, 3), Effect::Refused(_)));
    assert_eq!(write(&mut registers, 0x14, 1, u64::from(FAILED) | 15), Effect::None);
    assert_eq!(registers.status(), FAILED | 15);
}

#[test]
fn a_reset_reads_as_unfinished_until_it_is_finished() {
    let mut registers = ready();
    assert_eq!(write(&mut registers, 0x14, 1, 0), Effect::Reset);
    assert_eq!(read(&registers, 0x14, 1), 15);
    assert!(registers.is_resetting() && !registers.is_driver_ok());
    assert!(matches!(write(&mut registers, 0x14, 1, 0), Effect::Refused(_)));
    assert!(matches!(write(&mut registers, 0x14, 1, 1), Effect::Refused(_)));
    registers.finish_reset();
    assert_eq!(read(&registers, 0x14, 1), 0);
    assert_eq!(registers.activation().queues, [None, None]);
    assert_eq!(registers.activation().features, 0);
    unheeded(write(&mut registers, 0x16, 2, 1));
    assert_eq!(read(&registers, 0x18, 2), 128, "the size is the largest again");
}

#[test]
fn a_reset_of_a_device_without_status_still_clears_what_was_written() {
    let mut registers = registers();
    acknowledge(&mut registers, 4);
    assert_eq!(write(&mut registers, 0x14, 1, 0), Effect::None);
    assert_eq!(registers.activation().features, 0);
}

#[test]
fn needs_reset_is_told_once_and_only_to_a_ready_driver() {
    let mut fresh = registers();
    assert!(!fresh.set_needs_reset());
    assert_eq!(fresh.status(), 0);
    let mut registers = ready();
    assert!(registers.set_needs_reset());
    assert!(!registers.set_needs_reset());
    assert_eq!(registers.status(), 15 | NEEDS_RESET);
    assert_eq!(write(&mut registers, 0x14, 1, 15), Effect::None);
    assert_eq!(registers.status(), 15 | NEEDS_RESET, "a driver can't clear it");
    assert_eq!(write(&mut registers, 0x14, 1, 0), Effect::Reset);
}

#[test]
fn a_driver_cannot_set_needs_reset() {
    let mut registers = registers();
    unheeded(write(&mut registers, 0x14, 1, u64::from(NEEDS_RESET | ACKNOWLEDGE)));
    assert_eq!(registers.status(), ACKNOWLEDGE);
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_largest() {
    let mut registers = registers();
    for size in [0, 3, 257, 512, 0xffff] {
        assert!(matches!(write(&mut registers, 0x18, 2, size), Effect::Refused(_)));
        assert_eq!(read(&registers, 0x18, 2), 256);
    }
    assert_eq!(write(&mut registers, 0x18, 2, 1), Effect::None);
    assert!(matches!(write(&mut registers, 0x1c, 2, 0), Effect::Refused(_)));
    assert!(matches!(write(&mut registers, 0x3a, 2, 1), Effect::Refused(_)), "no queue reset");
}

#[test]
fn a_running_queue_is_not_moved_but_may_fire_another_vector() {
    let mut registers = ready();
    for (offset, len) in [(0x18, 2), (0x1c, 2), (0x20, 8), (0x24, 4), (0x30, 4)] {
        assert!(matches!(write(&mut registers, offset, len, 1), Effect::Refused(_)));
    }
    assert_eq!(write(&mut registers, 0x1a, 2, 2), Effect::Vector(SourceIndex(1), 2));
    assert_eq!(read(&registers, 0x1a, 2), 2);
    assert_eq!(write(&mut registers, 0x1a, 2, 3), Effect::Vector(SourceIndex(1), NO_VECTOR));
    assert_eq!(read(&registers, 0x1a, 2), 0xffff, "three vectors: queues and configuration");
    assert_eq!(write(&mut registers, 0x10, 2, 0), Effect::Vector(SourceIndex(2), 0));
    unheeded(write(&mut registers, 0x16, 2, 9));
    assert!(matches!(write(&mut registers, 0x1a, 2, 0), Effect::Refused(_)));
}

#[test]
fn the_configuration_is_served_from_the_cache_and_its_generation_counts_changes() {
    let mut registers = registers();
    let mut data = [0xff; 8];
    registers.read_config(4, &mut data);
    assert_eq!(data, [5, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(&registers, 0x15, 1), 0);
    assert!(!registers.set_config(&[1, 2, 3, 4, 5, 6]));
    assert!(registers.set_config(&[9, 2, 3, 4, 5, 6]));
    assert_eq!(read(&registers, 0x15, 1), 1);
    let effect = registers.write_config(2, &[7, 7]);
    assert_eq!(effect, Effect::ConfigWritten(ConfigWrite { offset: 2, bytes: vec![7, 7] }));
    registers.read_config(2, &mut data[..2]);
    assert_eq!(data[..2], [7, 7]);
    assert!(matches!(registers.write_config(5, &[0, 0]), Effect::Refused(_)));
    assert!(matches!(registers.write_config(u64::MAX, &[0]), Effect::Refused(_)));
    let mut fixed = PciRegisters::new(OFFERED, &[16], vec![0; 4], false);
    assert!(matches!(fixed.write_config(0, &[1]), Effect::Refused(_)));
}

#[test]
fn the_interrupt_status_is_cleared_by_reading_it() {
    let mut registers = registers();
    let mut data = [0xff; 2];
    registers.raise_config_isr();
    registers.read_isr(1, &mut data);
    assert_eq!(data, [0, 0], "the register is the first byte");
    registers.read_isr(0, &mut data);
    assert_eq!(data, [2, 0]);
    registers.read_isr(0, &mut data);
    assert_eq!(data, [0, 0]);
}

proptest! {
    #[test]
    fn no_sequence_of_writes_breaks_an_invariant(
        writes in vec((0_u64..0x48, vec(any::<u8>(), 0..9), any::<bool>()), 0..200),
    ) {
        let mut registers = registers();
        for (offset, data, natural) in writes {
            // Half of the writes fit a field, or hardly any would get anywhere.
            let len = match offset { 0x14 => 1, 0x10 | 0x16..0x1e => 2, _ => 4 };
            let data = if natural { data.iter().copied().cycle().take(len).collect() } else { data };
            let before = registers.status();
            match registers.write_common(offset, &data) {
                Effect::Reset => {
                    prop_assert_eq!(registers.status(), before);
                    registers.finish_reset();
                    prop_assert_eq!(registers.status(), 0);
                }
                Effect::DriverOk => {
                    prop_assert!(registers.status() & FEATURES_OK != 0);
                    prop_assert!(before & DRIVER_OK == 0);
                }
                Effect::Vector(source, vector) => {
                    prop_assert!(source.0 <= 2 && (vector <= 2 || vector == NO_VECTOR));
                }
                Effect::Refused(_) | Effect::None => {}
                Effect::ConfigWritten(_) => prop_assert!(false, "not a common register"),
            }
            let activation = registers.activation();
            if registers.is_driver_ok() {
                prop_assert!(features::is_acceptable(activation.features, OFFERED));
            }
            for (queue, max) in activation.queues.iter().zip([256, 128]) {
                let valid = queue.is_none_or(|q| q.size.is_power_of_two() && q.size <= max);
                prop_assert!(valid);
            }
            let mut data = data;
            registers.read_common(offset, &mut data);
        }
    }
}
