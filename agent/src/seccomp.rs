//! An OCI seccomp profile as a classic BPF program; pure.
//!
//! The profile's rules are compiled in their order, the first that matches decides, and what no
//! rule matches gets the default action. Only x86_64 system calls are in the tables: code of
//! another architecture (32-bit, x32) is killed, as libseccomp does for architectures that a
//! profile doesn't list.

use std::{mem::offset_of, str::FromStr};

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    seccomp_data, sock_filter,
};
use libcontainer::oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use syscalls::Sysno;

/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const ARCH_X86_64: u32 = 0xc000_003e;
/// `__X32_SYSCALL_BIT` of asm/unistd.h.
const X32_BIT: u32 = 0x4000_0000;
/// The kernel's limit, `BPF_MAXINSNS` of linux/bpf_common.h.
const INSTRUCTIONS_MAX: usize = 4096;

/// Why a profile can't be enforced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SeccompError {
    /// An action that needs a partner in user space.
    #[error("the guest can't honour the action {0:?}")]
    Action(LinuxSeccompAction),
    /// A flag that the guest can't honour.
    #[error("the guest can't honour the flag {0:?}")]
    Flag(LinuxSeccompFilterFlag),
    /// An argument that no system call has.
    #[error("no system call has an argument {0}")]
    Argument(usize),
    /// Too many rules.
    #[error("a program of {0} instructions: at most {INSTRUCTIONS_MAX} are allowed")]
    TooLong(usize),
}

/// A profile that the kernel can enforce.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    /// For seccomp(2).
    pub(crate) program: Vec<sock_filter>,
    /// For seccomp(2).
    pub(crate) flags: u32,
}

/// Compiles a profile.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Compiled, SeccompError> {
    let default = verdict(profile.default_action(), profile.default_errno_ret())?;
    let mut program = vec![
        load(offset_of!(seccomp_data, arch)),
        jump(BPF_JEQ, ARCH_X86_64, 1, 0),
        ret(libc::SECCOMP_RET_KILL_PROCESS),
        load(offset_of!(seccomp_data, nr)),
        jump(BPF_JGE, X32_BIT, 0, 1),
        ret(libc::SECCOMP_RET_KILL_PROCESS),
    ];
    for rule in profile.syscalls().iter().flatten() {
        append(&mut program, rule)?;
    }
    program.push(ret(default));
    if program.len() > INSTRUCTIONS_MAX {
        return Err(SeccompError::TooLong(program.len()));
    }
    Ok(Compiled { program, flags: flags(profile)? })
}

fn flags(profile: &LinuxSeccomp) -> Result<u32, SeccompError> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            // Threads are none yet when the filter is installed.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 1 << 1,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 1 << 2,
            other => return Err(SeccompError::Flag(*other)),
        };
    }
    Ok(flags)
}

fn verdict(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, SeccompError> {
    let errno = errno.unwrap_or(libc::EPERM.cast_unsigned()) & libc::SECCOMP_RET_DATA;
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            Ok(libc::SECCOMP_RET_KILL_THREAD)
        }
        LinuxSeccompAction::ScmpActKillProcess => Ok(libc::SECCOMP_RET_KILL_PROCESS),
        LinuxSeccompAction::ScmpActTrap => Ok(libc::SECCOMP_RET_TRAP),
        LinuxSeccompAction::ScmpActErrno => Ok(libc::SECCOMP_RET_ERRNO | errno),
        LinuxSeccompAction::ScmpActTrace => Ok(libc::SECCOMP_RET_TRACE | errno),
        LinuxSeccompAction::ScmpActLog => Ok(libc::SECCOMP_RET_LOG),
        LinuxSeccompAction::ScmpActAllow => Ok(libc::SECCOMP_RET_ALLOW),
        LinuxSeccompAction::ScmpActNotify => Err(SeccompError::Action(action)),
    }
}

/// One rule: for each of its system calls, its conditions and its verdict.
fn append(program: &mut Vec<sock_filter>, rule: &LinuxSyscall) -> Result<(), SeccompError> {
    let verdict = verdict(rule.action(), rule.errno_ret())?;
    for name in rule.names() {
        // Profiles name the system calls of all architectures.
        let Ok(number) = Sysno::from_str(name) else { continue };
        let mut body = Vec::new();
        for arg in rule.args().iter().flatten() {
            body.push(condition(arg)?);
        }
        append_call(program, number, &body, verdict);
    }
    Ok(())
}

/// A condition: what to do with each half of the argument, as blocks that fall through when met.
type Condition = Vec<Step>;

/// One instruction of a condition, with jumps by meaning instead of distance.
enum Step {
    Load(usize),
    And(u32),
    /// Goes on if the test holds, else leaves the rule.
    Need {
        test: u32,
        operand: u32,
        holds: bool,
    },
    /// If the test's result is `result`, the condition is met: go to its end.
    Met {
        test: u32,
        operand: u32,
        result: bool,
    },
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition, SeccompError> {
    let index = arg.index();
    if index >= 6 {
        return Err(SeccompError::Argument(index));
    }
    let at = offset_of!(seccomp_data, args) + index * 8;
    let (low, high) = (Step::Load(at), Step::Load(at + 4));
    let value = match arg.op() {
        // `value` is the mask and `value_two` what is left after it (OCI runtime, seccomp).
        LinuxSeccompOperator::ScmpCmpMaskedEq => arg.value_two().unwrap_or_default(),
        _ => arg.value(),
    };
    let (v_low, v_high) = halves(value);
    let need = |test, operand, holds| Step::Need { test, operand, holds };
    let met = |test, operand, result| Step::Met { test, operand, result };
    Ok(match arg.op() {
        LinuxSeccompOperator::ScmpCmpEq => {
            vec![high, need(BPF_JEQ, v_high, true), low, need(BPF_JEQ, v_low, true)]
        }
        LinuxSeccompOperator::ScmpCmpNe => {
            vec![high, met(BPF_JEQ, v_high, false), low, need(BPF_JEQ, v_low, false)]
        }
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let (m_low, m_high) = halves(arg.value());
            vec![
                high,
                Step::And(m_high),
                need(BPF_JEQ, v_high, true),
                low,
                Step::And(m_low),
                need(BPF_JEQ, v_low, true),
            ]
        }
        op => {
            // High halves decide unless equal; then the low ones do.
            let (greater, test, holds) = match op {
                LinuxSeccompOperator::ScmpCmpGt => (true, BPF_JGT, true),
                LinuxSeccompOperator::ScmpCmpGe => (true, BPF_JGE, true),
                LinuxSeccompOperator::ScmpCmpLe => (false, BPF_JGT, false),
                _ => (false, BPF_JGE, false),
            };
            let decided =
                if greater { met(BPF_JGT, v_high, true) } else { met(BPF_JGE, v_high, false) };
            vec![high, decided, need(BPF_JEQ, v_high, true), low, need(test, v_low, holds)]
        }
    })
}

/// Both 32-bit halves, the low one first, as they lie in memory.
fn halves(value: u64) -> (u32, u32) {
    let bytes = value.to_le_bytes();
    let half =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    (half(0), half(4))
}

/// Appends `if nr == number && all conditions { return verdict }`, leaving nr loaded.
fn append_call(
    program: &mut Vec<sock_filter>,
    number: Sysno,
    conditions: &[Condition],
    verdict: u32,
) {
    let number = u32::try_from(number.id()).unwrap_or(u32::MAX);
    let steps: u8 =
        conditions.iter().map(|condition| u8::try_from(condition.len()).unwrap_or(0)).sum();
    if steps == 0 {
        program.push(jump(BPF_JEQ, number, 0, 1));
        program.push(ret(verdict));
        return;
    }
    // Six arguments of six steps each at most, so all distances fit: nr test, steps, verdict, and
    // nr loaded again for the next rule.
    program.push(jump(BPF_JEQ, number, 0, steps + 2));
    let mut left = steps;
    for condition in conditions {
        let mut rest = u8::try_from(condition.len()).unwrap_or(0);
        for step in condition {
            left -= 1;
            rest -= 1;
            // From after this instruction: over what is left and the verdict, to the reload.
            let out = left + 1;
            program.push(match step {
                Step::Load(at) => load(*at),
                Step::And(mask) => statement(BPF_ALU | BPF_AND | BPF_K, *mask),
                Step::Need { test, operand, holds: true } => jump(*test, *operand, 0, out),
                Step::Need { test, operand, holds: false } => jump(*test, *operand, out, 0),
                Step::Met { test, operand, result: true } => jump(*test, *operand, rest, 0),
                Step::Met { test, operand, result: false } => jump(*test, *operand, 0, rest),
            });
        }
    }
    program.push(ret(verdict));
    program.push(load(offset_of!(seccomp_data, nr)));
}

fn statement(code: u32, operand: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap_or(0), jt: 0, jf: 0, k: operand }
}

fn load(at: usize) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, u32::try_from(at).unwrap_or(u32::MAX))
}

fn ret(verdict: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, verdict)
}

fn jump(test: u32, operand: u32, if_true: u8, if_false: u8) -> sock_filter {
    sock_filter { jt: if_true, jf: if_false, ..statement(BPF_JMP | test | BPF_K, operand) }
}

#[cfg(test)]
mod tests;
