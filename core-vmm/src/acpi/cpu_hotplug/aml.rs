//! The controller in AML: one processor device for each possible vCPU, and the method that the
//! event device calls.
//!
//! Devices call shared methods with their index, so that one takes about a hundred bytes.

use acpi_tables::{
    Aml,
    aml::{
        Acquire, And, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry,
        FieldLockRule, FieldUpdateRule, If, Index, LessThan, Local, Method, MethodCall, Mutex,
        Name, NotEqual, Notify, OpRegion, OpRegionSpace, Path, Release, Return, Scope, ShiftRight,
        Store, While, ZERO,
    },
};

use super::registers::{CAME, EJECT, IS_THERE, IS_TO_GO, NONE};
use crate::{
    acpi::{
        dsdt::{FOR_EVER, Raw},
        ost::{DEVICE_CHECK, EJECT_REQUEST},
        tables,
    },
    memory::layout,
};

/// `_STA`: present, enabled, shown, working.
const ALL_WELL: u8 = 0xf;

fn path(name: &str) -> Path {
    Path::new(name)
}

/// What the event device calls: tells the guest's drivers of every vCPU with something unseen.
pub(in crate::acpi) fn scan_method() -> Path {
    path("\\_SB_.CPUH.CSCN")
}

/// Adds the controller and its processors. A machine whose vCPUs stay has neither: to look at each
/// would cost every boot.
pub(in crate::acpi) fn append(aml: &mut Vec<u8>, cpus: u32, max_cpus: u32) {
    let possible = if max_cpus > cpus { max_cpus } else { 0 };
    let mut processors = Raw(Vec::new());
    for index in 0..possible {
        processor(&mut processors.0, index);
    }
    let mut methods = Raw(Vec::new());
    if possible > 0 {
        registers(&mut methods.0);
        state(&mut methods.0);
        description(&mut methods.0);
        notification(&mut methods.0, possible);
    }
    scan(&mut methods.0, possible);
    let container = Name::new(path("_HID"), &"ACPI0010");
    let id = Name::new(path("_UID"), &0_u8);
    let controller = Device::new(path("CPUH"), vec![&container, &id, &methods, &processors]);
    Scope::new(path("_SB_"), vec![&controller]).to_aml_bytes(aml);
}

fn name(index: u32) -> Path {
    Path::new(&format!("C{index:03X}"))
}

/// The order of `super::registers`: the field's names stand for its offsets.
fn registers(aml: &mut Vec<u8>) {
    let range = layout::CPU_HOTPLUG;
    let len = range.end - range.start;
    OpRegion::new(path("CPHR"), OpRegionSpace::SystemMemory, &range.start, &len).to_aml_bytes(aml);
    let fields = [*b"CSEL", *b"CSTS", *b"CNXT", *b"COEV", *b"COUT"];
    Field::new(
        path("CPHR"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.into_iter().map(|name| FieldEntry::Named(name, 32)).collect(),
    )
    .to_aml_bytes(aml);
    Mutex::new(path("CPLK"), 0).to_aml_bytes(aml);
}

/// A method of `args` whose body has the registers to itself; the first argument is the vCPU.
fn with_selected(aml: &mut Vec<u8>, name: &str, args: u8, body: &[&dyn Aml], end: &[&dyn Aml]) {
    let (acquire, release) = (Acquire::new(path("CPLK"), FOR_EVER), Release::new(path("CPLK")));
    let (select, first) = (path("CSEL"), Arg(0));
    let select = Store::new(&select, &first);
    let start: [&dyn Aml; 2] = [&acquire, &select];
    let children = [&start, body, &[&release], end].concat();
    Method::new(path(name), args, true, children).to_aml_bytes(aml);
}

/// `CSTA`, `CEJC` and `COSC`: behind every processor's `_STA`, `_EJ0` and `_OST`.
fn state(aml: &mut Vec<u8>) {
    let (status, event, outcome) = (path("CSTS"), path("COEV"), path("COUT"));
    let absent = Store::new(&Local(0), &ZERO);
    let is_there = And::new(&ZERO, &status, &IS_THERE);
    let well = Store::new(&Local(0), &ALL_WELL);
    let present = If::new(&is_there, vec![&well]);
    with_selected(aml, "CSTA", 1, &[&absent, &present], &[&Return::new(&Local(0))]);
    with_selected(aml, "CEJC", 1, &[&Store::new(&status, &EJECT)], &[]);
    let about = Store::new(&event, &Arg(1));
    with_selected(aml, "COSC", 3, &[&about, &Store::new(&outcome, &Arg(2))], &[]);
}

/// `CMAT`, behind every `_MAT`: the vCPU's entry in the MADT as it is once it is there.
fn description(aml: &mut Vec<u8>) {
    let set = |at: u8, shift: u8| {
        let value = ShiftRight::new(&ZERO, &Arg(0), &shift);
        let mut store = Raw(Vec::new());
        Store::new(&Index::new(&ZERO, &Local(0), &at), &value).to_aml_bytes(&mut store.0);
        store
    };
    let entry =
        |index| Store::new(&Local(0), &BufferData::new(tables::processor(index, true))).bytes();
    let small = entry(0);
    let large = entry(tables::FIRST_X2APIC_ID);
    let result = Return::new(&Local(0));
    let (uid, apic_id) = (set(2, 0), set(3, 0));
    let is_small = LessThan::new(&Arg(0), &tables::FIRST_X2APIC_ID);
    let small = If::new(&is_small, vec![&small, &uid, &apic_id, &result]);
    let (id_0, id_1, uid_0, uid_1) = (set(4, 0), set(5, 8), set(12, 0), set(13, 8));
    let children: Vec<&dyn Aml> = vec![&small, &large, &id_0, &id_1, &uid_0, &uid_1, &result];
    Method::new(path("CMAT"), 1, true, children).to_aml_bytes(aml);
}

trait Bytes: Aml {
    /// Itself in bytes, which borrow nothing.
    fn bytes(&self) -> Raw {
        let mut raw = Raw(Vec::new());
        self.to_aml_bytes(&mut raw.0);
        raw
    }
}

impl<T: Aml> Bytes for T {}

/// `CTFY`: a notification of the device with an index.
fn notification(aml: &mut Vec<u8>, possible: u32) {
    let mut chain = Raw(Vec::new());
    for index in 0..possible {
        let device = name(index);
        let notify = Notify::new(&device, &Arg(1));
        If::new(&Equal::new(&Arg(0), &index), vec![&notify]).to_aml_bytes(&mut chain.0);
    }
    Method::new(path("CTFY"), 2, true, vec![&chain]).to_aml_bytes(aml);
}

/// `CSCN`. Each round takes something unseen away, so it ends.
fn scan(aml: &mut Vec<u8>, possible: u32) {
    let (select, status, next) = (path("CSEL"), path("CSTS"), path("CNXT"));
    let take = |bit: u32, value: u32| {
        let seen = Store::new(&status, &bit);
        let tell = MethodCall::new(path("CTFY"), vec![&Local(0), &value]);
        If::new(&And::new(&ZERO, &Local(1), &bit), vec![&seen, &tell]).bytes()
    };
    let (came, is_to_go) = (take(CAME, DEVICE_CHECK), take(IS_TO_GO, EJECT_REQUEST));
    let first = Store::new(&Local(0), &next);
    let chosen = Store::new(&select, &Local(0));
    let state = Store::new(&Local(1), &status);
    let is_one = NotEqual::new(&Local(0), &NONE);
    let rounds = While::new(&is_one, vec![&chosen, &state, &came, &is_to_go, &first]);
    let (acquire, release) = (Acquire::new(path("CPLK"), FOR_EVER), Release::new(path("CPLK")));
    let children: Vec<&dyn Aml> =
        if possible > 0 { vec![&acquire, &first, &rounds, &release] } else { vec![] };
    Method::new(path("CSCN"), 0, true, children).to_aml_bytes(aml);
}

fn processor(aml: &mut Vec<u8>, index: u32) {
    let call = |name, args: &[&dyn Aml]| {
        let all = [&[&index as &dyn Aml], args].concat();
        MethodCall::new(path(name), all).bytes()
    };
    let (state, entry) = (call("CSTA", &[]), call("CMAT", &[]));
    let (eject, outcome) = (call("CEJC", &[]), call("COSC", &[&Arg(0), &Arg(1)]));
    let (state, entry) = (Return::new(&state), Return::new(&entry));
    Device::new(
        name(index),
        vec![
            &Name::new(path("_HID"), &"ACPI0007"),
            &Name::new(path("_UID"), &index),
            &Method::new(path("_STA"), 0, false, vec![&state]),
            &Method::new(path("_MAT"), 0, false, vec![&entry]),
            &Method::new(path("_EJ0"), 1, false, vec![&eject]),
            &Method::new(path("_OST"), 3, false, vec![&outcome]),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aml(cpus: u32, max_cpus: u32) -> Vec<u8> {
        let mut aml = Vec::new();
        append(&mut aml, cpus, max_cpus);
        aml
    }

    fn count(aml: &[u8], text: &[u8]) -> usize {
        aml.windows(text.len()).filter(|window| *window == text).count()
    }

    #[test]
    fn each_possible_vcpu_has_a_device_in_about_a_hundred_bytes() {
        let (few, many) = (aml(1, 100), aml(1, 300));
        assert_eq!((count(&few, b"ACPI0007"), count(&many, b"ACPI0007")), (100, 300));
        // Its device, and where it is notified.
        assert_eq!((count(&many, b"C12B"), count(&many, b"C12C")), (2, 0));
        let each = (many.len() - few.len()) / 200;
        assert!(each <= 112, "{each} bytes");
    }

    #[test]
    fn a_machine_whose_vcpus_stay_has_a_scan_method_that_does_nothing() {
        let aml = aml(4, 4);
        assert_eq!((count(&aml, b"ACPI0007"), count(&aml, b"CSCN")), (0, 1));
        assert!(aml.len() < 64, "{} bytes", aml.len());
    }
}
