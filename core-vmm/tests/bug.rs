//! What a supervisor sees of a panic on a thread that nobody waits for.

use std::process::Command;
use std::thread;

use nacre_proto::exit::VmmExit;

/// Set in the child, which is this program again.
const MARK: &str = "NACRE_TEST_PANICS";

#[test]
fn a_panic_on_any_thread_ends_the_process_with_a_line_and_a_code() {
    if std::env::var_os(MARK).is_some() {
        core_vmm::bug::ends_the_process();
        let thread = thread::Builder::new().name("vcpu7".to_owned());
        thread.spawn(|| panic!("the gate has {} hinges", 3)).unwrap().join().unwrap_err();
        unreachable!("the process has ended");
    }
    let test = "a_panic_on_any_thread_ends_the_process_with_a_line_and_a_code";
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr).into_owned();
    assert_eq!(child.status.code(), Some(u8::from(VmmExit::Failed).into()), "{said}");
    assert!(said.contains("nacre-vmm: a bug on thread vcpu7 at "), "{said}");
    assert!(said.contains("the gate has 3 hinges"), "{said}");
}
