//! Device rules of a container as a program that the kernel asks at each use of a device; pure.
//!
//! The last rule that fits decides, and without one the answer is no. A program of the kind
//! `BPF_PROG_TYPE_CGROUP_DEVICE` gets `struct bpf_cgroup_dev_ctx` (linux/bpf.h): access and type in one
//! word, major, minor.

use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::cgroup::limits::LimitError;

const RULES_MAX: usize = 500;
/// `BPF_DEVCG_DEV_BLOCK` and `BPF_DEVCG_DEV_CHAR`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
/// `BPF_DEVCG_ACC_MKNOD`, `_READ`, `_WRITE`.
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MAKE | READ | WRITE;

/// Who may use which device how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    allow: bool,
    /// Absent: of both kinds.
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may use (OCI runtime specification 1.2, "Default Devices", and the nodes of
/// any device, which are of no use by themselves).
const STANDARD: [Rule; 11] = [
    allowed(CHARACTER, None, None, MAKE),
    allowed(BLOCK, None, None, MAKE),
    allowed(CHARACTER, Some(1), Some(3), ALL),
    allowed(CHARACTER, Some(1), Some(5), ALL),
    allowed(CHARACTER, Some(1), Some(7), ALL),
    allowed(CHARACTER, Some(1), Some(8), ALL),
    allowed(CHARACTER, Some(1), Some(9), ALL),
    allowed(CHARACTER, Some(5), Some(0), ALL),
    allowed(CHARACTER, Some(5), Some(1), ALL),
    allowed(CHARACTER, Some(5), Some(2), ALL),
    allowed(CHARACTER, Some(136), None, ALL),
];

const fn allowed(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// The rules of a specification that has any, and the standard ones after them.
///
/// # Errors
///
/// Fails if a rule makes no sense.
pub(crate) fn rules(given: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, LimitError> {
    if given.len() > RULES_MAX {
        let value = given.len().to_string();
        return Err(LimitError::Invalid { what: "so many device rules", value });
    }
    if given.is_empty() {
        return Ok(Vec::new());
    }
    let own = given.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    Ok(own.into_iter().chain(STANDARD).collect())
}

/// A disk that a container may use.
pub(crate) fn of_disk(major: u32, minor: u32) -> Option<Rule> {
    let (major, minor) = (i32::try_from(major).ok()?, i32::try_from(minor).ok()?);
    Some(allowed(BLOCK, Some(major), Some(minor), ALL))
}

fn rule(given: &LinuxDeviceCgroup) -> Result<Rule, LimitError> {
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => i32::try_from(number)
            .ok()
            .filter(|number| *number >= 0)
            .map(Some)
            .ok_or(LimitError::Invalid { what: "a device's number", value: number.to_string() }),
    };
    let kind = match given.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(LinuxDeviceType::P) => return Err(LimitError::Unsupported("device rules of pipes")),
    };
    let text = given.access().clone().unwrap_or_else(|| "rwm".to_owned());
    let mut access = 0;
    for letter in text.chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MAKE,
            _ => return Err(LimitError::Invalid { what: "a use of devices", value: text }),
        };
    }
    let (major, minor) = (number(given.major())?, number(given.minor())?);
    Ok(Rule { allow: given.allow(), kind, major, minor, access })
}

/// One instruction (linux/bpf.h, `struct bpf_insn`), on a little-endian machine.
fn instruction(code: u8, registers: u8, offset: u8, value: i32) -> u64 {
    u64::from(code)
        | u64::from(registers) << 8
        | u64::from(offset) << 16
        | u64::from(value.cast_unsigned()) << 32
}

/// The program: registers 2 to 5 are type, access, major, minor.
pub(crate) fn program(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        instruction(0x61, 0x12, 0, 0),
        instruction(0x54, 0x02, 0, 0xffff),
        instruction(0x61, 0x13, 0, 0),
        instruction(0x74, 0x03, 0, 16),
        instruction(0x61, 0x14, 4, 0),
        instruction(0x61, 0x15, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(block(rule));
    }
    program.extend([instruction(0xb7, 0x00, 0, 0), instruction(0x95, 0, 0, 0)]);
    program
}

/// Answers if the rule fits, and else goes on with the next.
fn block(rule: &Rule) -> Vec<u64> {
    // What is compared: code, registers and value of a jump that is taken if the rule does not fit.
    let equal = |register: u8, value: Option<i32>| value.map(|value| (0x55, register, value));
    let mut tests = vec![];
    tests.extend(equal(2, rule.kind));
    tests.extend(equal(4, rule.major));
    tests.extend(equal(5, rule.minor));
    let answer = [instruction(0xb7, 0x00, 0, rule.allow.into()), instruction(0x95, 0, 0, 0)];
    // A permission fits if it covers all that is asked for, a refusal if any of it: then no bit is in
    // question that it does not, or does, name.
    let uses = if rule.allow {
        vec![
            instruction(0xbf, 0x31, 0, 0),
            instruction(0x54, 0x01, 0, ALL & !rule.access),
            instruction(0x55, 0x01, 2, 0),
        ]
    } else {
        vec![
            instruction(0xbf, 0x31, 0, 0),
            instruction(0x54, 0x01, 0, rule.access),
            instruction(0x15, 0x01, 2, 0),
        ]
    };
    let rest = uses.len() + answer.len();
    let count = tests.len();
    let jumps = tests.into_iter().enumerate().map(|(index, (code, register, value))| {
        let beyond = u8::try_from(count - 1 - index + rest).unwrap_or(u8::MAX);
        instruction(code, register, beyond, value)
    });
    jumps.chain(uses).chain(answer).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parsed(given: &Value) -> Result<Vec<Rule>, LimitError> {
        rules(&serde_json::from_value::<Vec<LinuxDeviceCgroup>>(given.clone()).unwrap())
    }

    #[test]
    fn the_standard_rules_follow_the_given_ones_if_there_are_any() {
        assert!(parsed(&json!([])).unwrap().is_empty());
        let rules = parsed(&json!([{ "allow": false, "access": "rwm" }])).unwrap();
        assert_eq!(rules.len(), 1 + STANDARD.len());
        assert!(!rules[0].allow && rules[0].kind.is_none() && rules[0].access == ALL);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            json!([{ "allow": true, "access": "x" }]),
            json!([{ "allow": true, "major": -5 }]),
            json!([{ "allow": true, "type": "c", "minor": 1_i64 << 40 }]),
        ] {
            assert!(parsed(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_rule_that_does_not_fit_is_jumped_over() {
        let rule = allowed(CHARACTER, Some(1), Some(3), READ);
        let block = block(&rule);
        let offsets: Vec<_> = block.iter().map(|word| word >> 16 & 0xff).collect();
        assert_eq!(offsets, [7, 6, 5, 0, 0, 2, 0, 0]);
        assert_eq!(program(&[]).len(), 8);
    }
}
