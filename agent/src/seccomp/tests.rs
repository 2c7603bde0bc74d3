//! Compiled profiles, run by a small interpreter of classic BPF.

use libcontainer::oci_spec::runtime::LinuxSeccomp;
use proptest::prelude::{any, prop_assert_eq, prop_oneof, proptest};
use serde_json::{Value, json};

use super::*;

/// A system call as a filter sees it.
#[derive(Clone, Copy)]
struct Call {
    arch: u32,
    number: u32,
    args: [u64; 6],
}

impl Call {
    fn of(name: Sysno, args: [u64; 6]) -> Self {
        Self { arch: ARCH_X86_64, number: u32::try_from(name.id()).unwrap(), args }
    }

    fn word(&self, at: u32) -> u32 {
        match at {
            0 => self.number,
            4 => self.arch,
            at => {
                let at = usize::try_from(at).unwrap() - offset_of!(seccomp_data, args);
                let (low, high) = halves(self.args[at / 8]);
                if at % 8 == 0 { low } else { high }
            }
        }
    }
}

/// What the kernel would do with the call.
fn verdict_of(program: &[sock_filter], call: &Call) -> u32 {
    let (mut accumulator, mut at) = (0_u32, 0_usize);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { jt } else { jf });
        match u32::from(code) {
            code if code == BPF_LD | BPF_W | BPF_ABS => accumulator = call.word(k),
            code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
            code if code == BPF_JMP | BPF_JEQ | BPF_K => at += jump(accumulator == k),
            code if code == BPF_JMP | BPF_JGT | BPF_K => at += jump(accumulator > k),
            code if code == BPF_JMP | BPF_JGE | BPF_K => at += jump(accumulator >= k),
            code if code == BPF_RET | BPF_K => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn compiled(profile: &Value) -> Vec<sock_filter> {
    let profile: LinuxSeccomp = serde_json::from_value(profile.clone()).unwrap();
    compile(&profile).unwrap().program
}

fn refused(number: u32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number
}

const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;

#[test]
fn what_is_listed_is_allowed_and_all_else_gets_the_default() {
    let program = compiled(&json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "syscalls": [{ "names": ["read", "chown32", "write"], "action": "SCMP_ACT_ALLOW" }]
    }));
    let on = |name| verdict_of(&program, &Call::of(name, [0; 6]));
    assert_eq!(on(Sysno::read), ALLOWED);
    assert_eq!(on(Sysno::write), ALLOWED);
    assert_eq!(on(Sysno::open), refused(38));
}

#[test]
fn code_of_another_architecture_is_killed() {
    let program = compiled(&json!({ "defaultAction": "SCMP_ACT_ALLOW" }));
    let call = Call::of(Sysno::read, [0; 6]);
    assert_eq!(verdict_of(&program, &call), ALLOWED);
    for call in [Call { arch: 0x4000_0003, ..call }, Call { number: X32_BIT, ..call }] {
        assert_eq!(verdict_of(&program, &call), libc::SECCOMP_RET_KILL_PROCESS);
    }
}

#[test]
fn conditions_are_all_needed_and_the_next_rule_is_tried() {
    // As in the usual default profile: clone without new namespaces, then without anything.
    let program = compiled(&json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            { "names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
                { "index": 0, "value": 0x7e02_0000_u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" },
                { "index": 1, "value": 5, "op": "SCMP_CMP_NE" }
            ] },
            { "names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7, "args": [
                { "index": 2, "value": 9, "op": "SCMP_CMP_EQ" }
            ] },
            { "names": ["read"], "action": "SCMP_ACT_ALLOW" }
        ]
    }));
    let clone = |args| verdict_of(&program, &Call::of(Sysno::clone, args));
    assert_eq!(clone([0x11, 0, 0, 0, 0, 0]), ALLOWED);
    assert_eq!(clone([0x11, 5, 0, 0, 0, 0]), refused(1));
    assert_eq!(clone([0x0200_0000, 0, 0, 0, 0, 0]), refused(1));
    assert_eq!(clone([0x0200_0000, 0, 9, 0, 0, 0]), refused(7));
    assert_eq!(verdict_of(&program, &Call::of(Sysno::read, [0; 6])), ALLOWED);
}

#[test]
fn what_the_guest_cannot_honour_is_refused() {
    for profile in [
        json!({ "defaultAction": "SCMP_ACT_NOTIFY" }),
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            { "names": ["read"], "action": "SCMP_ACT_ERRNO",
              "args": [{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }] }] }),
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            { "names": vec!["read"; 4000], "action": "SCMP_ACT_ERRNO" }] }),
    ] {
        let profile: LinuxSeccomp = serde_json::from_value(profile).unwrap();
        assert!(compile(&profile).is_err());
    }
}

type Model = fn(u64, u64) -> bool;

const OPERATORS: [(&str, Model); 6] = [
    ("SCMP_CMP_EQ", |arg, value| arg == value),
    ("SCMP_CMP_NE", |arg, value| arg != value),
    ("SCMP_CMP_LT", |arg, value| arg < value),
    ("SCMP_CMP_LE", |arg, value| arg <= value),
    ("SCMP_CMP_GT", |arg, value| arg > value),
    ("SCMP_CMP_GE", |arg, value| arg >= value),
];

proptest! {
    #[test]
    fn comparisons_are_of_64_bits(
        arg in any::<u64>(),
        value in any::<u64>(),
        // Mostly values that share a half with the argument: there the branches are.
        share in prop_oneof![0..1_u8, 1..2_u8, 2..3_u8, 3..4_u8],
        index in 0..6_usize,
    ) {
        let high = 0xffff_ffff_0000_0000;
        let value = match share {
            0 => value,
            1 => (arg & high) | (value & !high),
            2 => (value & high) | (arg & !high),
            _ => arg,
        };
        for (op, model) in OPERATORS {
            let program = compiled(&json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "args": [{ "index": index, "value": value, "op": op }] }]
            }));
            let mut args = [0; 6];
            args[index] = arg;
            let allowed = verdict_of(&program, &Call::of(Sysno::read, args)) == ALLOWED;
            prop_assert_eq!(allowed, model(arg, value), "{} {} {}", arg, op, value);
        }
    }
}
