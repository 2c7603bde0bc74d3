//! Sandboxes that outlive the command that started them.

use anyhow::{Result, ensure};
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::User;

#[test]
fn two_sandboxes_run_at_once_and_each_can_be_entered() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    for name in ["one", "two"] {
        let options = ["--name", name, "--detach", "--hostname", name];
        user.run(
            &options,
            &["sh", "-c", "echo started; trap 'exit 5' TERM; while :; do sleep 1; done"],
        )?
        .code(0)?;
    }
    let listed = user.nacre(&["ps"])?.code(0)?;
    ensure!(listed.out.contains("one") && listed.out.contains("two"), "{listed:?}");
    for name in ["one", "two"] {
        user.nacre(&["exec", name, "hostname"])?.prints(&format!("{name}\n"))?;
        user.nacre(&["logs", name])?.prints("started\n")?;
    }
    user.nacre(&["exec", "one", "sh", "-c", "exit 9"])?.code(9)?;
    user.nacre(&["exec", "one", "sh", "-c", "kill -KILL $$"])?.code(128 + 9)?;
    user.nacre(&["stop", "one"])?.code(0)?;
    let listed = user.nacre(&["ps"])?.code(0)?;
    ensure!(listed.out.contains("two"), "{listed:?}");
    user.nacre(&["rm", "one"])?.code(0)?;
    user.nacre(&["rm", "-f", "two"])?.code(0)?;
    before.and_nothing_more(user.state())
}

#[test]
fn a_name_in_use_is_refused_and_an_unknown_one_told() -> Result<()> {
    let user = User::new()?;
    user.run(&["--name", "same", "--detach"], &["sleep", "1000"])?.code(0)?;
    user.run(&["--name", "same", "--detach"], &["sleep", "1000"])?.code(125)?.tells("same")?;
    user.nacre(&["exec", "other", "true"])?.code(125)?.tells("other")?;
    user.nacre(&["rm", "-f", "same"])?.code(0)?;
    Ok(())
}
