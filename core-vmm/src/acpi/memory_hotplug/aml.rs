//! The namespace's side of memory hotplug: a memory device for each unit that there can be, and the
//! methods that all of them share.

use acpi_tables::{
    Aml,
    aml::{
        Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Else, Equal,
        Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
        MethodCall, Mutex, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Path, Release,
        ResourceTemplate, Return, Scope, Store, While,
    },
};

use super::{DEVICE_CHECK, EJECT, EJECT_REQUEST, HAS_COME, IS_TO_GO, NONE, PRESENT};
use crate::{
    acpi::dsdt::{FOR_EVER, Raw},
    memory::{hotplug::Plan, layout},
};

/// `_STA` of a device that is there (ACPI 6.5, 6.3.7): present, enabled, shown, working.
const THERE: u8 = 0xf;

fn path(name: &str) -> Path {
    Path::new(name)
}

fn lock() -> Acquire {
    Acquire::new(path("MLCK"), FOR_EVER)
}

fn unlock() -> Release {
    Release::new(path("MLCK"))
}

/// Adds the controller, its methods and the devices.
pub(in crate::acpi) fn append(aml: &mut Vec<u8>, plan: &Plan) {
    let mut inside = Vec::new();
    registers(&mut inside);
    methods(&mut inside);
    notify(&mut inside, plan);
    scan(&mut inside);
    for unit in 0..plan.units() {
        device(&mut inside, plan, unit);
    }
    // A container, as QEMU's is: Linux looks for devices in it.
    let (id, uid) = (EISAName::new("PNP0A06"), "Memory hotplug");
    let (id, uid) = (Name::new(path("_HID"), &id), Name::new(path("_UID"), &uid));
    let inside = Raw(inside);
    let controller = Device::new(path("MEMH"), vec![&id, &uid, &inside]);
    Scope::new(path("_SB_"), vec![&controller]).to_aml_bytes(aml);
}

fn registers(aml: &mut Vec<u8>) {
    let range = layout::MEMORY_HOTPLUG;
    let (space, len) = (OpRegionSpace::SystemMemory, range.end - range.start);
    OpRegion::new(path("MREG"), space, &range.start, &len).to_aml_bytes(aml);
    let register = |name: [u8; 4]| FieldEntry::Named(name, 32);
    Field::new(
        path("MREG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [*b"MSEL", *b"MNXT", *b"MSTS", *b"MEVT", *b"MRPT"].map(register).into(),
    )
    .to_aml_bytes(aml);
    // Several of the methods may run at once, and all of them select.
    Mutex::new(path("MLCK"), 0).to_aml_bytes(aml);
}

/// The methods of a unit, which is their first argument.
fn methods(aml: &mut Vec<u8>) {
    let (select, status) = (path("MSEL"), path("MSTS"));
    let select = Store::new(&select, &Arg(0));
    Method::new(
        path("MSTA"),
        1,
        true,
        vec![
            &lock(),
            &select,
            &And::new(&Local(0), &status, &PRESENT),
            &unlock(),
            &If::new(&Local(0), vec![&Return::new(&THERE)]),
            &Return::new(&0_u8),
        ],
    )
    .to_aml_bytes(aml);
    let eject = Store::new(&status, &EJECT);
    Method::new(path("MEJT"), 1, true, vec![&lock(), &select, &eject, &unlock()]).to_aml_bytes(aml);
    let (event, report) = (path("MEVT"), path("MRPT"));
    let (event, report) = (Store::new(&event, &Arg(1)), Store::new(&report, &Arg(2)));
    Method::new(path("MOST"), 3, true, vec![&lock(), &select, &event, &report, &unlock()])
        .to_aml_bytes(aml);
}

/// Notifies the device of the unit that is the first argument of the value that is the second.
fn notify(aml: &mut Vec<u8>, plan: &Plan) {
    let mut choices = Vec::new();
    for unit in 0..plan.units() {
        let device = path(&name(unit));
        let notify = Notify::new(&device, &Arg(1));
        If::new(&Equal::new(&Arg(0), &unit), vec![&notify]).to_aml_bytes(&mut choices);
    }
    Method::new(path("MTFY"), 2, true, vec![&Raw(choices)]).to_aml_bytes(aml);
}

/// Tells all news: of a unit that has come and is to go already, one after the other.
fn scan(aml: &mut Vec<u8>) {
    let (select, status, next) = (path("MSEL"), path("MSTS"), path("MNXT"));
    let tell = |event| MethodCall::new(path("MTFY"), vec![&Local(0), event]);
    let came = [&Store::new(&status, &HAS_COME) as &dyn Aml, &tell(&DEVICE_CHECK)];
    let goes = [&Store::new(&status, &IS_TO_GO) as &dyn Aml, &tell(&EJECT_REQUEST)];
    Method::new(
        path("MSCN"),
        0,
        true,
        vec![
            &lock(),
            &Store::new(&Local(0), &next),
            &While::new(
                &NotEqual::new(&Local(0), &NONE),
                vec![
                    &Store::new(&select, &Local(0)),
                    &And::new(&Local(1), &status, &HAS_COME),
                    &If::new(&Local(1), came.to_vec()),
                    &Else::new(goes.to_vec()),
                    &Store::new(&Local(0), &next),
                ],
            ),
            &unlock(),
        ],
    )
    .to_aml_bytes(aml);
}

fn name(unit: u32) -> String {
    format!("M{unit:03X}")
}

/// One memory device (ACPI 6.5, 9.11). Its place never changes.
fn device(aml: &mut Vec<u8>, plan: &Plan, unit: u32) {
    let range = plan.range(unit);
    let cached = AddressSpaceCacheable::Cacheable;
    let memory = AddressSpace::new_memory(cached, true, range.start, range.end - 1, None);
    let resources = ResourceTemplate::new(vec![&memory]);
    let status = MethodCall::new(path("MSTA"), vec![&unit]);
    let eject = MethodCall::new(path("MEJT"), vec![&unit]);
    let report = MethodCall::new(path("MOST"), vec![&unit, &Arg(0), &Arg(1)]);
    Device::new(
        path(&name(unit)),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0C80")),
            &Name::new(path("_UID"), &unit),
            &Name::new(path("_CRS"), &resources),
            &Method::new(path("_STA"), 0, false, vec![&Return::new(&status)]),
            &Method::new(path("_EJ0"), 1, false, vec![&eject]),
            &Method::new(path("_OST"), 3, false, vec![&report]),
        ],
    )
    .to_aml_bytes(aml);
}
